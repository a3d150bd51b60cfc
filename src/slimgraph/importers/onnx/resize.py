"""Resize and Upsample of ONNX: interpolation, as PyTorch's own operator wherever that is the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.importers.host import Host
from slimgraph.importers.steps import Call, Operator

_EXAMPLES = ((7, 14), (16, 32), (8, 24), (32, 16), (7, 11), (20, 20), (13, 5), (64, 63), (1, 4), (6, 1))
"""Sizes before and after, on which a formula for axes of any size is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What the attributes say."""

    mode: str
    """nearest, linear or cubic."""
    coordinates: str
    nearest: str
    cubic: float
    exclude_outside: bool
    antialias: bool
    fill: float
    """Outside of the region that is cropped."""

    @property
    def reach(self) -> int:
        """Neighbours on each side."""
        return 2 if self.mode == "cubic" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """What happens to one axis; sizes may be symbols."""

    axis: int
    size: Any
    resized: Any
    scale: Any = None
    """None: resized / size, exactly."""
    region: tuple[float, float] = (0.0, 1.0)

    @property
    def known(self) -> bool:
        return (
            isinstance(self.size, int) and isinstance(self.resized, int) and isinstance(self.scale, (float, type(None)))
        )

    @property
    def factor(self) -> Any:
        return self.resized / self.size if self.scale is None else self.scale


# Where the elements of the result lie in what is resized. `xp` is NumPy where sizes are known, else PyTorch.


def _coordinates(xp: Any, axis: _Axis, rule: _Rule) -> Any:
    size, resized, scale = axis.size, axis.resized, axis.scale
    # With a scale, runtimes compute in 24 bits, and what is nearest depends on it; sizes alone allow to be exact.
    at = xp.arange(resized, dtype=xp.float64 if scale is None else xp.float32)

    def back(place: Any) -> Any:
        return place * size / resized if scale is None else place / scale

    # Before it is rounded down, as in the published examples; ONNX Runtime aligns corners by what it is rounded to.
    width = resized if scale is None else size * scale
    begin, end = axis.region
    match rule.coordinates:
        case "half_pixel":
            return back(at + 0.5) - 0.5
        case "half_pixel_symmetric":
            return size / 2 * (1 - resized / width) + back(at + 0.5) - 0.5
        case "pytorch_half_pixel":
            return back(at + 0.5) - 0.5 if resized > 1 else at * 0
        case "align_corners":
            return at * (size - 1) / (width - 1) if width != 1 else at * 0
        case "asymmetric":
            return back(at)
        case "tf_half_pixel_for_nn":
            return back(at + 0.5)
        case _:  # tf_crop_and_resize
            whole = (end - begin) * (size - 1)
            return begin * (size - 1) + (at * whole / (resized - 1) if resized > 1 else at * 0 + 0.5 * whole)


def _nearest(xp: Any, axis: _Axis, rule: _Rule) -> Any:
    at = _coordinates(xp, axis, rule)
    match rule.nearest:
        case "round_prefer_floor":
            places = xp.ceil(at - 0.5)
        case "round_prefer_ceil":
            places = xp.floor(at + 0.5)
        case "ceil":
            places = xp.ceil(at)
        case "simple":  # before version 11, in ONNX Runtime
            places = xp.ceil(at) if axis.factor < 1 else xp.floor(at)
        case _:
            places = xp.floor(at)
    return xp.clip(places, 0, axis.size - 1)


def _weights(xp: Any, axis: _Axis, rule: _Rule) -> tuple[Any, Any]:
    """Indices of what each element is made of, and their weights, both (resized, neighbours)."""
    at = _coordinates(xp, axis, rule)
    low = xp.floor(at)
    stretch = min(float(axis.factor), 1.0) if rule.antialias else 1.0
    first = int(np.floor(-rule.reach / stretch)) + 1
    places = low[:, None] + xp.arange(first, 2 - first)
    apart = xp.abs(places - at[:, None]) * stretch
    if rule.mode == "linear":
        weights = xp.clip(1 - apart, 0, None)
    else:  # Keys, "Cubic convolution interpolation for digital image processing", 1981
        a = rule.cubic
        near = ((a + 2) * apart - (a + 3)) * apart * apart + 1
        far = a * (((apart - 5) * apart + 8) * apart - 4)
        weights = xp.where(apart <= 1, near, xp.where(apart < 2, far, 0 * apart))
    if rule.exclude_outside:
        weights = xp.where((places >= 0) & (places < axis.size), weights, 0 * weights)
    if rule.exclude_outside or rule.antialias:
        weights = weights / weights.sum(1)[:, None]
    return xp.clip(places, 0, axis.size - 1), weights


# The same, computed for any rule: along one axis after the other.


def _along(call: Call, x: Tensor, axis: _Axis, rule: _Rule) -> Tensor:
    if rule.antialias and not axis.known:
        raise call.error(f"it smooths axis {axis.axis}, whose size is free; give the input a fixed size")
    xp: Any = np if axis.known else torch

    def tensor(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values.tolist(), dtype=dtype, device=x.device) if axis.known else values.to(x.device, dtype)

    if rule.mode == "nearest":
        y = torch.index_select(x, axis.axis, tensor(_nearest(xp, axis, rule), torch.int64))
    else:
        places, weights = _weights(xp, axis, rule)
        y = _weighted(x, axis, tensor(places, torch.int64), tensor(weights, x.dtype))
    if rule.coordinates != "tf_crop_and_resize":
        return y
    at = _coordinates(xp, axis, rule)
    outside = tensor((at < 0) | (at > axis.size - 1), torch.bool)
    return torch.where(_on_axis(outside, axis.axis, x.dim()), torch.full_like(y, rule.fill), y)


def _weighted(x: Tensor, axis: _Axis, places: Tensor, weights: Tensor) -> Tensor:
    if places.shape[1] > 4:  # many neighbours: a matrix that is mostly full
        matrix = torch.zeros(places.shape[0], axis.size, dtype=x.dtype, device=x.device)
        matrix = matrix.scatter_add(1, places, weights)
        return torch.matmul(x.movedim(axis.axis, -1), matrix.t()).movedim(-1, axis.axis)
    parts = [
        torch.index_select(x, axis.axis, place) * _on_axis(weight, axis.axis, x.dim())
        for place, weight in zip(places.unbind(1), weights.unbind(1), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _on_axis(values: Tensor, axis: int, rank: int) -> Tensor:
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


# PyTorch's own interpolation, where it puts every element of the result where ONNX puts it.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """A mode of `interpolate`."""

    mode: str
    align_corners: bool | None

    def coordinates(self, size: int, resized: int, scale: float | None) -> NDArray[Any]:
        """What PyTorch computes, in its precision."""
        at = np.arange(resized, dtype=np.float32)
        step = np.float32(size) / np.float32(resized) if scale is None else np.float32(1 / scale)
        if self.align_corners:
            return at * np.float32((size - 1) / max(resized - 1, 1))
        if self.mode == "nearest":
            return np.floor(at * step)
        if self.mode == "nearest-exact":
            return np.floor((at + np.float32(0.5)) * step)
        return (at + np.float32(0.5)) * step - np.float32(0.5)


def _forms(rule: _Rule, spatial: int) -> list[_Form]:
    if rule.mode == "nearest":
        return [_Form(mode=mode, align_corners=None) for mode in ("nearest", "nearest-exact")]
    if rule.mode == "linear":
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[spatial]
    elif spatial != 2 or rule.exclude_outside or rule.cubic != -0.75:
        return []
    else:
        mode = "bicubic"
    return [_Form(mode=mode, align_corners=aligned) for aligned in (False, True)]


def _agree(form: _Form, axis: _Axis, rule: _Rule, *, by_scale: bool) -> bool:
    if axis.known:
        pairs = [(axis.size, axis.resized)]
    elif axis.scale is None:
        pairs = list(_EXAMPLES)
    else:
        pairs = [(size, int(size * axis.scale)) for size, _ in _EXAMPLES if int(size * axis.scale)]
    for size, resized in pairs:
        example = _Axis(axis=axis.axis, size=size, resized=resized, scale=axis.scale)
        found = form.coordinates(size, resized, axis.scale if by_scale else None)
        if rule.mode == "nearest":
            if not np.array_equal(_nearest(np, example, rule), np.clip(found, 0, size - 1)):
                return False
            continue
        wanted = _coordinates(np, example, rule)
        if rule.mode == "linear":  # what is outside has the value of the edge
            wanted, found = np.clip(wanted, 0, size - 1), np.clip(found, 0, size - 1)
        if not np.allclose(wanted, found, rtol=1e-6, atol=1e-6 * size):
            return False
    return True


def _interpolated(x: Tensor, axes: Sequence[_Axis], rule: _Rule) -> Tensor | None:
    """The result of PyTorch's operator, or None where none is the same."""
    spatial = x.dim() - 2
    if rule.coordinates == "tf_crop_and_resize" or not x.is_floating_point() or not 1 <= spatial <= 3:
        return None
    if any(axis.axis < 2 for axis in axes):
        return None
    if rule.antialias:
        return _smoothed(x, axes, rule)
    changed = {axis.axis: axis for axis in axes}
    scales = [changed[i].scale if i in changed else 1.0 for i in range(2, x.dim())]
    by_scale = all(isinstance(scale, float) for scale in scales) and all(
        not axis.known or int(axis.size * axis.scale) == axis.resized for axis in axes
    )
    for form in _forms(rule, spatial):
        if all(_agree(form, axis, rule, by_scale=by_scale) for axis in axes):
            if by_scale:
                return F.interpolate(x, scale_factor=scales, mode=form.mode, align_corners=form.align_corners)
            return F.interpolate(x, _sizes(x, changed), mode=form.mode, align_corners=form.align_corners)
    return None


def _smoothed(x: Tensor, axes: Sequence[_Axis], rule: _Rule) -> Tensor | None:
    # PyTorch leaves out what is outside, and has the constant of PIL.
    same = (
        x.dim() == 4
        and rule.exclude_outside
        and rule.coordinates == "half_pixel"
        and (rule.mode == "linear" or rule.cubic == -0.5)
        and all(axis.known and (axis.scale is None or axis.size * axis.scale == axis.resized) for axis in axes)
    )
    mode = "bilinear" if rule.mode == "linear" else "bicubic"
    return F.interpolate(x, _sizes(x, {axis.axis: axis for axis in axes}), mode=mode, antialias=True) if same else None


def _sizes(x: Tensor, changed: dict[int, _Axis]) -> list[Any]:
    return [changed[i].resized if i in changed else x.shape[i] for i in range(2, x.dim())]


def _apply(call: Call, x: Tensor, axes: Sequence[_Axis], rule: _Rule) -> Tensor:
    changed = [axis for axis in axes if not _is_same(axis, rule)]
    if not changed:
        return x
    whole = _interpolated(x, changed, rule)
    if whole is not None:
        return whole
    narrow = rule.mode != "nearest" and x.dtype not in (torch.float32, torch.float64)
    y = x.float() if narrow else x
    for axis in changed:
        y = _along(call, y, axis, rule)
    return y.to(x.dtype)


def _is_same(axis: _Axis, rule: _Rule) -> bool:
    return (
        statically_known_true(axis.size == axis.resized)
        and (axis.scale is None or axis.scale == 1.0)
        and (rule.coordinates != "tf_crop_and_resize" or axis.region == (0.0, 1.0))
        and rule.coordinates != "tf_half_pixel_for_nn"
    )


# What the file says.


def _scaled(size: Any, scale: Any) -> Any:
    """Size times scale, rounded down, where the scale has 24 bits: ten times 0.9 is nine."""
    if isinstance(size, int) and isinstance(scale, float):
        return int(np.float32(size) * np.float32(scale))
    if isinstance(scale, float):
        simple = Fraction(scale).limit_denominator(1000)
        if abs(simple - Fraction(scale)) <= abs(scale) * 1e-7:
            return size * simple.numerator // simple.denominator
    return torch.sym_int(size * scale)


def _kept_ratio(call: Call, sizes: Sequence[Any], own: Sequence[Any], policy: str) -> Any:
    """The one scale that a policy chooses for all axes."""
    if policy not in ("not_larger", "not_smaller"):
        raise call.error(f"its keep_aspect_ratio_policy is {policy!r}; known are stretch, not_larger and not_smaller")
    choose: Callable[[Any, Any], Any] = torch.sym_min if policy == "not_larger" else torch.sym_max
    scale = sizes[0] / own[0]
    for size, old in zip(sizes[1:], own[1:], strict=True):
        scale = choose(scale, size / old)
    return scale


def _rule(call: Call) -> _Rule:
    coordinates = call.text("coordinate_transformation_mode", "half_pixel")
    nearest = call.text("nearest_mode", "round_prefer_floor")
    if call.version < 11:
        coordinates, nearest = "asymmetric", "simple"
    rule = _Rule(
        mode=call.text("mode", "nearest"),
        coordinates=coordinates,
        nearest=nearest,
        cubic=call.float("cubic_coeff_a", -0.75),
        exclude_outside=bool(call.int("exclude_outside", 0)),
        antialias=bool(call.int("antialias", 0)),
        fill=call.float("extrapolation_value", 0.0),
    )
    for what, given, known in (
        ("mode", rule.mode, ("nearest", "linear", "cubic")),
        ("coordinate_transformation_mode", rule.coordinates, _COORDINATES),
        ("nearest_mode", rule.nearest, ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple")),
    ):
        if given not in known:
            raise call.error(f"its {what} is {given!r}; known are {', '.join(known)}")
    return rule


_COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)


def _resize(
    call: Call, x: Tensor, roi: Host | None = None, scales: Host | None = None, sizes: Host | None = None
) -> Tensor:
    if call.version < 11:  # Resize 10 and Upsample 9 have the scales as the second input, Upsample 7 as an attribute
        factors = list(call.attribute("scales", ())) if roi is None else roi.numbers
        return _apply(call, x, _by_scales(call, x, factors, range(x.dim()), None), _rule(call))
    rule = _rule(call)
    chosen = [axis % x.dim() for axis in call.ints("axes") or range(x.dim())]
    if scales is not None and scales.array.size:
        regions = roi if rule.coordinates == "tf_crop_and_resize" else None
        return _apply(call, x, _by_scales(call, x, scales.numbers, chosen, regions), rule)
    if sizes is None or not sizes.array.size:
        raise call.error("it has neither scales nor sizes")
    wanted, own = sizes.numbers, [x.shape[axis] for axis in chosen]
    _check_count(call, wanted, chosen, "sizes")
    policy, scale = call.text("keep_aspect_ratio_policy", "stretch"), None
    if policy != "stretch":
        scale = _kept_ratio(call, wanted, own, policy)
        wanted = [torch.sym_int(scale * size + 0.5) for size in own]
    elif call.module.baked and 0 in chosen and wanted[chosen.index(0)] == 1:  # as many samples as there are
        wanted[chosen.index(0)] = x.shape[0]
    axes = [
        _Axis(axis=axis, size=old, resized=new, scale=scale, region=_region(roi, i, len(chosen), rule))
        for i, (axis, old, new) in enumerate(zip(chosen, own, wanted, strict=True))
    ]
    return _apply(call, x, axes, rule)


def _check_count(call: Call, given: Sequence[Any], axes: Sequence[int], what: str) -> None:
    if len(given) != len(axes):
        raise call.error(f"it has {len(given)} {what} for {len(axes)} axes")


def _region(roi: Host | None, index: int, count: int, rule: _Rule) -> tuple[float, float]:
    if rule.coordinates != "tf_crop_and_resize" or roi is None or not roi.array.size:
        return (0.0, 1.0)
    numbers = roi.numbers
    return float(numbers[index]), float(numbers[index + count])


def _by_scales(call: Call, x: Tensor, scales: Sequence[Any], chosen: Sequence[int], roi: Host | None) -> list[_Axis]:
    _check_count(call, scales, chosen, "scales")
    axes = []
    for i, (axis, scale) in enumerate(zip(chosen, scales, strict=True)):
        if isinstance(scale, (int, float)) and not scale > 0:
            raise call.error(f"its scale for axis {axis} is {scale}, and not above 0")
        region = (0.0, 1.0) if roi is None else (float(roi.numbers[i]), float(roi.numbers[i + len(chosen)]))
        size = _scaled(x.shape[axis], scale if roi is None else scale * (region[1] - region[0]))
        axes.append(_Axis(axis=axis, size=x.shape[axis], resized=size, scale=scale, region=region))
    return axes


OPERATORS: dict[str, Operator] = {
    "Resize": Operator(run=_resize, static=(1, 2, 3)),
    "Upsample": Operator(run=_resize, static=(1,)),
}
