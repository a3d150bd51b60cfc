"""Interpolation of Paddle: PyTorch's own where it says the same, else computed along one axis after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.paddle.row import Argument, Row, in_layout, known, one
from slimgraph.importers.steps import Call, Handler

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What the result is as large as: so many elements, or so many times as large."""

    sizes: Sequence[Any]
    factors: Sequence[float] | None


def _simple(factor: float) -> Fraction:
    """The fraction that 24 bits of a number stand for."""
    simple = Fraction(factor).limit_denominator(1000)
    return simple if abs(simple - Fraction(factor)) <= abs(factor) * 1e-7 else Fraction(factor)


def _scaled(size: Any, factor: float) -> Any:
    """Size times factor in 24 bits, as Paddle computes it: ten times 0.7 is seven."""
    if isinstance(size, int):
        return int(np.float32(size) * np.float32(factor))
    simple = _simple(factor)
    return size * simple.numerator // simple.denominator


def _wanted(call: Call, x: Tensor, out_size: Host | None, size_tensor: Host | None, scale: Host | None) -> _Wanted:
    axes = x.dim() - 2
    for given in (size_tensor, out_size):
        if given is not None and given.numbers:
            return _Wanted(sizes=_counted(call, given.numbers, axes), factors=None)
    factors = [] if scale is None else [float(number) for number in scale.numbers]
    if factors and all(factor > 0 for factor in factors):
        factors = _counted(call, factors * axes if len(factors) == 1 else factors, axes)
        sizes = [_scaled(size, factor) for size, factor in zip(x.shape[2:], factors, strict=True)]
        return _Wanted(sizes=sizes, factors=[float(_simple(factor)) for factor in factors])
    sizes = [call.int(name, -1) for name in ("out_d", "out_h", "out_w")[-axes:]]
    if any(size <= 0 for size in sizes):
        raise call.error(f"it says neither how large its result is nor how many times as large: {sizes}, {factors}")
    return _Wanted(sizes=sizes, factors=None)


def _counted(call: Call, numbers: list[Any], axes: int) -> list[Any]:
    if len(numbers) != axes:
        raise call.error(f"it has {len(numbers)} sizes or scales for {axes} axes")
    return numbers


def _interpolation(mode: str) -> Handler:
    def run(
        call: Call,
        x: Tensor,
        out_size: Host | None = None,
        size_tensor: Host | None = None,
        scale: Host | None = None,
    ) -> Tensor:
        wanted = _wanted(call, x, out_size, size_tensor, scale)
        aligned, whole_steps = bool(call.attribute("align_corners", True)), call.int("align_mode", 1) == 1
        if mode == "nearest" and aligned:
            return _along(call, x, wanted, nearest=True)
        if mode == "linear" and not aligned and whole_steps:
            return _along(call, x, wanted, nearest=False)
        word = _LINEAR[x.dim() - 2] if mode == "linear" else mode
        corners = None if mode == "nearest" else aligned
        if wanted.factors is not None and _same_sizes(x, wanted):
            return F.interpolate(x, scale_factor=list(wanted.factors), mode=word, align_corners=corners)
        return F.interpolate(x, list(wanted.sizes), mode=word, align_corners=corners)

    return run


def _same_sizes(x: Tensor, wanted: _Wanted) -> bool:
    """Whether PyTorch multiplies to the same sizes; free ones count by whole numbers alone."""
    assert wanted.factors is not None
    return all(
        int(size * factor) == result if isinstance(size, int) else factor.is_integer()
        for size, factor, result in zip(x.shape[2:], wanted.factors, wanted.sizes, strict=True)
    )


def _along(call: Call, x: Tensor, wanted: _Wanted, *, nearest: bool) -> Tensor:
    """Corners on corners and the nearest, or element k at k steps and linear between."""
    for axis, result in enumerate(wanted.sizes, start=2):
        size = x.shape[axis]
        ratio = 1 / wanted.factors[axis - 2] if wanted.factors is not None else size / result
        if nearest:  # the corners lie on each other
            ratio = 0.0 if isinstance(result, int) and result == 1 else (size - 1) / (result - 1)
        at = torch.arange(result, dtype=torch.float32, device=x.device) * ratio
        if nearest:
            x = torch.index_select(x, axis, (at + 0.5).long())
            continue
        low = torch.clamp(at.long(), max=size - 1)
        part = (at - low).to(x.dtype).reshape([-1 if i == axis else 1 for i in range(x.dim())])
        high = torch.clamp(low + 1, max=size - 1)
        first, second = torch.index_select(x, axis, low), torch.index_select(x, axis, high)
        x = first + (second - first) * part
    return x


_INPUTS = (
    one("X"),
    Argument(names=("OutSize",), known=True),
    Argument(names=("SizeTensor",), known=True),
    known("scale", "Scale"),
)


def _row(kind: str, mode: str) -> Row:
    return Row(
        pir=f"{kind} legacy_{kind}",
        program=f"{kind}_v2 {kind}",
        inputs=_INPUTS,
        attributes={"data_format": "data_layout"},
        run=in_layout(_interpolation(mode)),
    )


ROWS: tuple[Row, ...] = (
    _row("nearest_interp", "nearest"),
    _row("linear_interp", "linear"),
    _row("bilinear_interp", "linear"),
    _row("trilinear_interp", "linear"),
    _row("bicubic_interp", "bicubic"),
)
