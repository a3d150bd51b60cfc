"""Quantized operators of Paddle as Q/DQ pairs, whose integers are those that Paddle computes.

What the files call a scale is the largest magnitude: x ≈ code · scale / (2^(bits - 1) - 1).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.paddle.row import Argument, Row, many, one
from slimgraph.importers.steps import Call, Operator, Step
from slimgraph.program.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE

QUANTIZE_CHANNELS = torch.ops.quantized_decomposed.quantize_per_channel.default

_DEQUANTIZERS = ("fake_dequantize_max_abs", "fake_channel_wise_dequantize_max_abs")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Codes:
    """The integers that stand for real values."""

    top: int
    lowest: int
    dtype: torch.dtype

    @property
    def limits(self) -> tuple[int, int, torch.dtype]:
        return self.lowest, self.top, self.dtype

    @property
    def whole(self) -> tuple[int, int, torch.dtype]:
        """All that the type holds: for what is stored."""
        return torch.iinfo(self.dtype).min, torch.iinfo(self.dtype).max, self.dtype


def _codes(attributes: Mapping[str, Any]) -> _Codes:
    bits = int(attributes.get("bit_length", 8))
    if not 2 <= bits <= 16:
        raise ValueError(f"it has codes of {bits} bits; known are 2 to 16")
    top = 2 ** (bits - 1) - 1
    if attributes.get("qmax", top) != top:  # float8 has other ones
        raise ValueError(f"its codes of {bits} bits end at {attributes['qmax']}; known is {top}")
    # Ties go to even, and the lowest code is used; or they go away from zero, and it is not. Ours go to even.
    lowest = -top - 1 if attributes.get("round_type", 1) == 0 else -top
    return _Codes(top=top, lowest=lowest, dtype=torch.int8 if bits <= 8 else torch.int16)


def _step(reach: float, codes: _Codes) -> float:
    """The real value of one code. A reach of zero stands for a tensor of zeros."""
    return (reach if reach > 1e-30 else reach + 1e-6) / codes.top


def _axis(attributes: Mapping[str, Any]) -> int:
    found = attributes.get("quant_axis", 0)
    return found if isinstance(found, int) else 0


# Weights: the file stores them as real values, or as codes in floats or in integers.


def _reach(weight: Tensor, axis: int | None) -> Tensor:
    magnitude = weight.abs()
    if axis is None:
        return magnitude.amax().reshape(1)
    return magnitude.amax([i for i in range(weight.dim()) if i != axis % weight.dim()])


def _spread(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    if axis is None or values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis % like.dim() else 1 for i in range(like.dim())])


def _kept(name: str, codes: Tensor, reach: Tensor, kind: _Codes) -> dict[str, Tensor]:
    """Codes in the place of a weight, with the real value of one code, as the library's own quantizer keeps them."""
    steps = torch.where(reach > 1e-30, reach, reach + 1e-6).float() / kind.top
    return {name: codes, f"{name}_scale": steps, f"{name}_zero_point": torch.zeros_like(steps, dtype=kind.dtype)}


def _of_real(attributes: Mapping[str, Any], weight: Tensor, reach: Tensor, axis: int | None) -> Tensor:
    kind = _codes(attributes)
    steps = _spread(torch.where(reach > 1e-30, reach, reach + 1e-6).float() / kind.top, weight, axis)
    return (weight.float() / steps).round().clamp(kind.lowest, kind.top).to(kind.dtype)


def _dequantize_stored(call: Call, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Any:
    kind, axis = _codes(call.step.attributes), _axis(call.step.attributes)
    known = call.module.host(call.step.inputs[1], call.values)
    if scale.numel() == 1 and known is not None:
        y = DEQUANTIZE(codes, float(known.number), 0, *kind.whole)
    else:
        y = DEQUANTIZE_CHANNELS(codes, scale, zero_point, axis % codes.dim(), *kind.whole)
    others = [scale * kind.top if call.reads(name) else None for name in call.step.outputs[1:2]]
    return (y, *others)


DEQUANTIZE_STORED = Operator(run=_dequantize_stored)
"""Of codes, scales and zero points that are stored; its attributes tell the bits and the axis of the channels."""


def step_top(bits: int) -> int:
    """The highest code."""
    return _codes({"bit_length": bits}).top


def stored_codes(name: str, codes: Tensor, reach: Tensor, bits: int) -> dict[str, Tensor]:
    """What `DEQUANTIZE_STORED` reads: integers in the place of a weight, and what stands for them."""
    kind = _codes({"bit_length": bits})
    return _kept(name, codes.to(kind.dtype), reach, kind)


def codes_of_weight(step: Step, weight: Tensor, *, by_channel: bool) -> tuple[Tensor, Tensor]:
    """The codes that a step makes of a weight by the weight's own reach, in integers, and the reach."""
    axis = _axis(step.attributes) if by_channel else None
    reach = _reach(weight, axis)
    return _of_real(step.attributes, weight, reach, axis), reach


def _rounded_weight(step: Step, stored: Mapping[str, Tensor], *, by_channel: bool) -> Any:
    """A weight that is rounded whenever the model runs, rounded once."""
    name = step.inputs[0]
    if name not in stored or not stored[name].is_floating_point():
        return None
    axis = _axis(step.attributes) if by_channel else None
    reach = _reach(stored[name], axis)
    added = _kept(name, _of_real(step.attributes, stored[name], reach, axis), reach, _codes(step.attributes))
    return replace(step, operator=DEQUANTIZE_STORED, inputs=tuple(added)), added


def _rounded_tensor(step: Step, stored: Mapping[str, Tensor]) -> Any:
    return _rounded_weight(step, stored, by_channel=False)


def _rounded_channels(step: Step, stored: Mapping[str, Tensor]) -> Any:
    return _rounded_weight(step, stored, by_channel=True)


def are_codes(tensor: Tensor, top: int) -> bool:
    """Whether all numbers are integers that a symmetric range has, or the one below it."""
    wide = tensor.float()  # the magnitude of int8's lowest code is none of its own
    return bool((wide == wide.round()).all() and (wide >= -top - 1).all() and (wide <= top).all())


def _stored_codes(step: Step, stored: Mapping[str, Tensor]) -> Any:
    """Codes that a file stores, in the integers that they are."""
    name, scale = (*step.inputs, "", "")[:2]
    if name not in stored or scale not in stored or step.attributes.get("only_observer"):
        return None
    kind, codes = _codes(step.attributes), stored[name]
    if not are_codes(codes, kind.top):
        return None
    added = _kept(name, codes.to(kind.dtype), stored[scale].reshape(-1), kind)
    return replace(step, operator=DEQUANTIZE_STORED, inputs=tuple(added)), added


def _integers(step: Step, stored: Mapping[str, Tensor], scale: str, bits: int, most: float, axis: int) -> Any:
    """As `_stored_codes`, where a scale belongs to the code `most`."""
    name = step.inputs[0]
    codes, top = stored.get(name), step_top(bits)
    if codes is None or scale not in stored or not most or not are_codes(codes, top):
        return None
    added = stored_codes(name, codes, stored[scale].reshape(-1).float() * (top / most), bits)
    attributes = {"bit_length": bits, "quant_axis": axis}
    return replace(step, operator=DEQUANTIZE_STORED, inputs=tuple(added), attributes=attributes), added


def _integers_of_tensor(step: Step, stored: Mapping[str, Tensor]) -> Any:
    return _integers(step, stored, step.inputs[1], 8, step.attributes.get("max_range", 127.0), 0)


def _integers_of_channels(step: Step, stored: Mapping[str, Tensor]) -> Any:
    _, _, *scales = step.inputs  # the second is a counter
    bits = int((*step.attributes.get("quant_bits", ()), 8)[0])
    if len(scales) != 1:
        return None
    return _integers(step, stored, scales[0], bits, step_top(bits), _axis(step.attributes))


def with_stored_codes(steps: Sequence[Step], tensors: Mapping[str, Tensor]) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps without those that quantize a stored weight; it becomes what they would make of it."""
    readers = Counter(name for step in steps for name in step.inputs)
    codes, renamed = dict(tensors), dict[str, str]()
    kept: list[Step] = []
    for step in steps:
        name, scale = (*step.inputs, "", "")[:2]
        is_own = readers[name] == 1 and name in tensors and scale in tensors
        if step.kind != "quantize_linear" or step.attributes.get("only_observer") or not is_own:
            kept.append(replace(step, inputs=tuple(renamed.get(name, name) for name in step.inputs)))
            continue
        axis = _axis(step.attributes) if tensors[scale].numel() > 1 else None
        codes[name] = _of_real(step.attributes, tensors[name], tensors[scale].reshape(-1), axis)
        renamed[step.outputs[0]] = name
    return kept, codes


def _identity(call: Call, x: Tensor, *_: Any) -> Tensor:
    return x


# Values


def _rounded(x: Tensor, reach: Tensor, kind: _Codes) -> Tensor:
    """Codes by a reach that is known only when the model runs, as numbers."""
    return (x / (reach + 1e-30) * kind.top).round().clamp(kind.lowest, kind.top)


def _known_reach(call: Call, scale: Host) -> float:
    if not call.attribute("is_test", True):
        raise call.error(
            "its range follows what it sees, as while training. Save the model for inference: model.eval() before "
            "paddle.jit.save"
        )
    return float(scale.number)


def _round_known(call: Call, x: Tensor, scale: Host, *_: Any) -> Tensor:
    kind = _codes(call.step.attributes)
    step = _step(_known_reach(call, scale), kind)
    result: Tensor = DEQUANTIZE(QUANTIZE(x, step, 0, *kind.limits), step, 0, *kind.limits)
    return result


ROUND_KNOWN = Operator(run=_round_known, static=(1,))
"""To codes and back by a stored reach."""


def _round_dynamic(axis: Callable[[Call], int | None]) -> Callable[[Call, Tensor], Any]:
    def run(call: Call, x: Tensor) -> Any:
        kind, along = _codes(call.step.attributes), axis(call)
        reach = _reach(x, along)
        wide = _spread(reach, x, along)
        return _rounded(x, wide, kind) * (wide / kind.top), reach

    return run


def _whole(call: Call) -> None:
    return None


def _channels(call: Call) -> int:
    return _axis(call.step.attributes)


def _quantize_known(call: Call, x: Tensor, scale: Host, *_: Any) -> Any:
    """Codes by a known reach: integers where they are only dequantized again, else as numbers to compute with."""
    kind = _codes(call.step.attributes)
    codes = QUANTIZE(x, _step(_known_reach(call, scale), kind), 0, *kind.limits)
    readers = [step.kind for step in call.module.steps if call.step.outputs[0] in step.inputs]
    integers = bool(readers) and all(kind in _DEQUANTIZERS for kind in readers)
    return codes if integers else codes.to(x.dtype), scale


def _quantize_dynamic(axis: Callable[[Call], int | None]) -> Callable[[Call, Tensor], Any]:
    def run(call: Call, x: Tensor) -> Any:
        along = axis(call)
        reach = _reach(x, along)
        return _rounded(x, _spread(reach, x, along), _codes(call.step.attributes)), reach

    return run


def _dequantize_known(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    most = call.float("max_range", 127.0)
    known = call.module.host(call.step.inputs[1], call.values)
    if known is not None and x.dtype in (torch.int8, torch.int16):
        limits = (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max, x.dtype)
        result: Tensor = DEQUANTIZE(x, float(known.number) / most, 0, *limits)
        return result
    factor = scale.reshape(()) / most if known is None else float(known.number) / most
    return (x if x.is_floating_point() else x.float()) * factor


def _dequantize_channels(call: Call, x: Tensor, iteration: object = None, *scales: Tensor) -> Tensor:
    bits = call.ints("quant_bits", (8,)) or [8]
    axis = call.int("quant_axis", 0)
    if len(scales) == 2:  # of a product: of the channels of its weight, and of the other factor
        axis = call.int("x_num_col_dims", 1)
    y = x if x.is_floating_point() else x.float()
    y = y * _spread(scales[0] / (2 ** (bits[0] - 1) - 1), y, axis)
    return y * (scales[1].reshape(()) / (2 ** (bits[1] - 1) - 1)) if len(scales) == 2 else y


def _quantize_linear(call: Call, x: Tensor, scale: Tensor, *_: Any) -> Any:
    if call.attribute("only_observer", False):
        return x
    kind = _codes(call.step.attributes)
    known = call.module.host(call.step.inputs[1], call.values)
    if known is not None and known.array.size == 1:
        return QUANTIZE(x, _step(float(known.number), kind), 0, *kind.limits)
    steps = scale.reshape(-1) / kind.top
    return QUANTIZE_CHANNELS(x, steps, torch.zeros_like(steps, dtype=torch.int32), _channels(call), *kind.limits)


def _dequantize_linear(call: Call, x: Tensor, scale: Tensor, *_: Any) -> Any:
    if call.attribute("only_observer", False):
        return x
    kind = _codes(call.step.attributes)
    known = call.module.host(call.step.inputs[1], call.values)
    codes = x.dtype in (torch.int8, torch.int16)
    if known is not None and known.array.size == 1:
        step = _step(float(known.number), kind)
        return DEQUANTIZE(x, step, 0, *kind.limits) if codes else x.to(torch.float32) * step
    steps = scale.reshape(-1) / kind.top
    if codes:
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        return DEQUANTIZE_CHANNELS(x, steps, zeros, _channels(call) % x.dim(), *kind.limits)
    return x.to(torch.float32) * _spread(steps, x, _channels(call))


_REACH = Argument(names=("InScale",), known=True)
_FOLLOWED = (one("X"), _REACH, one("InAccum"), one("InState"))
_RESULTS = ("Out", "OutScale", "OutState", "OutAccum")
_LINEAR = (one("X"), one("Scale"), one("ZeroPoint"), one("InAccum"), one("InState"))
_LINEAR_RESULTS = ("Y", "OutScale", "OutAccum", "OutState")

ROWS: tuple[Row, ...] = (
    Row(
        pir="quantize_linear",
        program="quantize_linear",
        inputs=_LINEAR,
        outputs=_LINEAR_RESULTS,
        run=_quantize_linear,
    ),
    Row(
        pir="dequantize_linear",
        program="dequantize_linear",
        inputs=_LINEAR,
        outputs=_LINEAR_RESULTS,
        run=_dequantize_linear,
        prepare=_stored_codes,
    ),
    Row(
        pir="fake_quantize_dequantize_moving_average_abs_max",
        program="fake_quantize_dequantize_moving_average_abs_max",
        inputs=_FOLLOWED,
        outputs=_RESULTS,
        run=_round_known,
    ),
    Row(
        pir="fake_quantize_dequantize_abs_max",
        program="fake_quantize_dequantize_abs_max",
        outputs=_RESULTS,
        run=_round_dynamic(_whole),
        prepare=_rounded_tensor,
    ),
    Row(
        pir="fake_channel_wise_quantize_dequantize_abs_max",
        program="fake_channel_wise_quantize_dequantize_abs_max",
        outputs=_RESULTS,
        run=_round_dynamic(_channels),
        prepare=_rounded_channels,
    ),
    Row(
        pir="fake_quantize_moving_average_abs_max",
        program="fake_quantize_moving_average_abs_max",
        inputs=_FOLLOWED,
        outputs=_RESULTS,
        run=_quantize_known,
    ),
    Row(
        pir="fake_quantize_range_abs_max",
        program="fake_quantize_range_abs_max",
        inputs=(one("X"), _REACH, one("Iter")),
        outputs=("Out", "OutScale", "OutScales"),
        run=_quantize_known,
    ),
    Row(
        pir="fake_quantize_abs_max",
        program="fake_quantize_abs_max",
        outputs=_RESULTS,
        run=_quantize_dynamic(_whole),
    ),
    Row(
        pir="fake_channel_wise_quantize_abs_max",
        program="fake_channel_wise_quantize_abs_max",
        outputs=_RESULTS,
        run=_quantize_dynamic(_channels),
    ),
    Row(
        pir="fake_dequantize_max_abs",
        program="fake_dequantize_max_abs",
        inputs=(one("X"), one("Scale")),
        run=_dequantize_known,
        prepare=_integers_of_tensor,
    ),
    Row(
        pir="fake_channel_wise_dequantize_max_abs",
        program="fake_channel_wise_dequantize_max_abs",
        inputs=(one("X"), many("Scales"), one("Iter")),
        run=_dequantize_channels,
        prepare=_integers_of_channels,
    ),
    Row(
        pir="moving_average_abs_max_scale",
        program="moving_average_abs_max_scale",
        inputs=(one("X"), one("InAccum"), one("InState")),
        outputs=_RESULTS,
        run=_identity,
    ),
)
