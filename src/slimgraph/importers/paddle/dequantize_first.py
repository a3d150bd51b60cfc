"""Give old quantized models their real values in front of products, which they have behind them.

They multiply codes, kept in floats, and turn the product into real values: scale · (codes · codes). Here it becomes
(scale · codes) · (scale · codes): the Q/DQ form, from which runtimes take the same integers. Nothing else changes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimgraph.importers.paddle.graph import Value
from slimgraph.importers.paddle.operators_quantized import (
    DEQUANTIZE_STORED,
    ROUND_KNOWN,
    are_codes,
    codes_of_weight,
    step_top,
    stored_codes,
)
from slimgraph.importers.steps import Step
from slimgraph.program.names import unused

_ROUNDING = ("fake_quantize_moving_average_abs_max", "fake_quantize_range_abs_max")
_ROUNDING_WEIGHTS = {"fake_quantize_abs_max": False, "fake_channel_wise_quantize_abs_max": True}
_BEHIND = ("fake_dequantize_max_abs", "fake_channel_wise_dequantize_max_abs")

_CONVOLUTIONS = ("conv2d", "depthwise_conv2d", "conv3d")
_TRANSPOSED = ("conv2d_transpose", "depthwise_conv2d_transpose", "conv3d_transpose")
_MATRICES = ("mul", "matmul_with_flatten", "matmul", "matmul_v2", "legacy_matmul")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product of codes that a later step turns into real values."""

    rounding: Step
    """Makes the codes of the first factor."""
    product: Step
    behind: Step
    steps: Tensor
    """Real value of one code of the weight, one or one for each channel."""
    axis: int | None
    """Of the weight: its channels, where they have their own."""


def rounded_weights(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], outputs: Sequence[str]
) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps without those that round a stored weight to codes by its own reach, and with these codes stored."""
    readers = Counter(name for step in steps for name in step.inputs)
    stored, renamed = dict(tensors), dict[str, str]()
    kept: list[Step] = []
    for step in steps:
        name = step.inputs[0] if step.inputs else ""
        by_channel = _ROUNDING_WEIGHTS.get(step.kind)
        is_own = name in tensors and readers[name] == 1 and not set(step.outputs) & set(outputs)
        if by_channel is None or not is_own or not tensors[name].is_floating_point():
            kept.append(replace(step, inputs=tuple(renamed.get(each, each) for each in step.inputs)))
            continue
        stored[name], reach = codes_of_weight(step, tensors[name], by_channel=by_channel)
        renamed[step.outputs[0]] = name
        if any(step.outputs[1:2]):
            stored[step.outputs[1]] = reach
    return kept, stored


def dequantize_first(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], outputs: Sequence[str], values: Mapping[str, Value]
) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps with codes turned into real values in front of each product instead of behind it.

    A product stays as it is, which is right too, where the range of its first factor is only known when the model runs,
    where its weight is no stored codes, or where something else reads its codes.

    Args:
        outputs: values that have to stay.
        values: what the file declares of its values.
    """
    steps, tensors = rounded_weights(steps, tensors, outputs)
    found = _products(steps, tensors, values, Counter(outputs))
    added: dict[str, Tensor] = {}
    taken = {name for step in steps for name in (*step.inputs, *step.outputs)} | tensors.keys()
    reals, weights = dict[str, str](), dict[str, str]()  # codes, and the name of their real values
    written: list[Step] = []
    behind = {each.behind.outputs[0] for each in found.values()}
    for step in steps:
        if step.outputs[0] in behind:
            continue
        each = found.get(step.outputs[0])
        if each is None:
            written.append(step)
            continue
        codes, weight, *rest = step.inputs
        if codes not in reals:
            reals[codes] = _new(f"{codes}.dequantized", taken)
            written.append(replace(each.rounding, operator=ROUND_KNOWN, outputs=(reals[codes],)))
        if weight not in weights:
            weights[weight] = _new(f"{weight}.dequantized", taken)
            bits, axis = _bits(tensors[weight]), each.axis or 0
            kept = stored_codes(weight, tensors[weight], each.steps * step_top(bits), bits)
            added |= kept
            written.append(
                Step(
                    name=step.name,
                    kind="dequantize_linear",
                    operator=DEQUANTIZE_STORED,
                    inputs=tuple(kept),
                    outputs=(weights[weight],),
                    attributes={"bit_length": bits, "quant_axis": axis},
                )
            )
        written.append(replace(step, inputs=(reals[codes], weights[weight], *rest), outputs=each.behind.outputs))
    written = _needed(written, outputs)
    return written, {**tensors, **added, **_numbers(written, tensors)}


def _products(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], values: Mapping[str, Value], outputs: Counter[str]
) -> dict[str, _Product]:
    """What can be rewritten, by the product's output."""
    readers = Counter(name for step in steps for name in step.inputs) + outputs
    makers = {name: step for step in steps for name in step.outputs if name}
    found: dict[str, _Product] = {}
    for behind in steps:
        product = makers.get(behind.inputs[0]) if behind.kind in _BEHIND else None
        if product is None or readers[behind.inputs[0]] > 1 or len(product.inputs) < 2:
            continue
        rounding = makers.get(product.inputs[0])
        if rounding is None or rounding.kind not in _ROUNDING or not _is_codes(tensors.get(product.inputs[1])):
            continue
        each = _product(rounding, product, behind, tensors, values)
        if each is not None:
            found[product.outputs[0]] = each
    # A weight of several products has one scale, and none of its codes is read as such.
    by_weight: dict[str, list[_Product]] = {}
    for each in found.values():
        by_weight.setdefault(each.product.inputs[1], []).append(each)
    for name, several in by_weight.items():
        alike = all(each.axis == several[0].axis and torch.equal(each.steps, several[0].steps) for each in several)
        if not alike or readers[name] > len(several):
            for each in several:
                del found[each.product.outputs[0]]
    return found


def _product(
    rounding: Step, product: Step, behind: Step, tensors: Mapping[str, Tensor], values: Mapping[str, Value]
) -> _Product | None:
    top = step_top(int(rounding.attributes.get("bit_length", 8)))
    weight = tensors[product.inputs[1]]
    if behind.kind == "fake_dequantize_max_abs":
        share = _share(behind.inputs[1], rounding, tensors)
        most = behind.attributes.get("max_range", 127.0)
        if share is None or not most or _channels(product, weight) is None:
            return None
        steps = torch.tensor([share * top / most], dtype=torch.float64)
        return _Product(rounding=rounding, product=product, behind=behind, steps=steps.float(), axis=None)
    _, _, *scales = behind.inputs  # the second is a counter
    bits = behind.attributes.get("quant_bits", (8,))
    share = _share(scales[1], rounding, tensors) if len(scales) == 2 == len(bits) else None
    found, reach = _channels(product, weight), tensors.get(scales[0]) if scales else None
    if share is None or found is None or reach is None:
        return None
    axis, behind_axis = found
    declared = values.get(product.outputs[0])
    if behind_axis < 0:  # the last one, which is the only one to have the channels if it is the one that is meant
        behind_axis = len(declared.shape) - 1 if declared is not None else 0
    if reach.numel() != weight.shape[axis] or behind_axis != max(behind.attributes.get("x_num_col_dims", 1), 1):
        return None
    steps = reach.reshape(-1).double() / step_top(bits[0]) * share * top / step_top(bits[1])
    return _Product(rounding=rounding, product=product, behind=behind, steps=steps.float(), axis=axis)


def _share(scale: str, rounding: Step, tensors: Mapping[str, Tensor]) -> float | None:
    """How many times the reach of the first factor a scale is; None where that cannot be told."""
    reach = rounding.inputs[1]
    if scale == reach or scale in rounding.outputs[1:2]:
        return 1.0
    if scale in tensors and reach in tensors and tensors[scale].numel() == 1 == tensors[reach].numel():
        divisor = float(tensors[reach])
        return float(tensors[scale]) / divisor if divisor else None
    return None


def _channels(product: Step, weight: Tensor) -> tuple[int, int] | None:
    """The axes of the weight and of the product that have the channels; None where it is another operator."""
    attributes = product.attributes
    if product.kind in _CONVOLUTIONS + _TRANSPOSED:
        if any(product.inputs[2:3]) or attributes.get("data_format", "NCHW") not in ("NCHW", "NCDHW", "AnyLayout"):
            return None
        if product.kind in _CONVOLUTIONS:
            return 0, 1
        return (1, 1) if attributes.get("groups", 1) == 1 else None
    if product.kind not in _MATRICES or weight.dim() != 2:
        return None
    return (0, -1) if attributes.get("transpose_y") else (1, -1)


def _bits(codes: Tensor) -> int:
    return 8 if are_codes(codes, step_top(8)) else 16


def _is_codes(weight: Tensor | None) -> bool:
    return weight is not None and weight.dim() > 1 and weight.numel() > 0 and are_codes(weight, step_top(16))


def _numbers(steps: Sequence[Step], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codes that products still compute with, as these can."""
    kinds = (*_CONVOLUTIONS, *_TRANSPOSED, *_MATRICES)
    read = {name for step in steps if step.kind in kinds for name in step.inputs[1:2]}
    return {name: tensors[name].float() for name in read & tensors.keys() if not tensors[name].is_floating_point()}


def _new(wanted: str, taken: set[str]) -> str:
    name = unused(wanted, taken)
    taken.add(name)
    return name


def _needed(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    """The steps without those whose codes nothing reads any more."""
    read = {name for step in steps for name in step.inputs} | set(outputs)
    return [step for step in steps if step.kind not in _ROUNDING or read.intersection(step.outputs)]
