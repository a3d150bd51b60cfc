"""Write a plan into a program: quantize–dequantize pairs around values, integer weights."""

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.qdq import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNELS,
    DEQUANTIZE_GROUPS,
    DEQUANTIZE_MEASURED,
    MEASURE,
    QUANTIZE,
    QUANTIZE_MEASURED,
)
from slimgraph.program.scheme import SMALLEST_SCALE, IntScheme, dequantize, quantize, rows_of
from slimgraph.program.value_range import OUT_THRESHOLD
from slimgraph.quantization.operators import weight_position
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer
from slimgraph.quantization.preparation import require_float

aten = torch.ops.aten

_INT32_TOP = 2**31 - 1

ROOM_FOR_BIAS = _INT32_TOP // 2
"""Integer biases stay below this in magnitude: the sums to which they are added need room as well."""


_Codes: TypeAlias = tuple[int, IntScheme, bytes, bytes]
"""What codes are made of: a tensor, by its `id`, a scheme, scales and zero points."""


@dataclass(frozen=True, slots=True)
class _Grid:
    scale: float
    zero_point: int
    scheme: IntScheme


def weight_scale(weight: Tensor, scheme: IntScheme, reach: Sequence[float] | None = None) -> Tensor:
    """Scale by the largest magnitude, or by the `reach` that a plan gives: one element, or one an index of the axis.

    With groups its shape is (channels, groups).
    """
    return weight_grid(weight, scheme, reach)[0]


def weight_grid(weight: Tensor, scheme: IntScheme, reach: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight's grid; as `weight_scale`.

    The grid of an asymmetric scheme without `reach` covers what each channel, or group, holds.

    Raises:
        ConfigError: `reach` has other than one number for each scale, or groups do not divide the weight.
    """
    rows = rows_of(weight.detach(), scheme)
    if reach is not None:
        if len(reach) != len(rows):
            raise ConfigError(
                f"The reach has {len(reach)} numbers, but a weight of shape {list(weight.shape)} has {len(rows)} "
                f"scales as {scheme.described}. Give one for each."
            )
        high = torch.tensor(reach, dtype=torch.float64)
        low = -high
    else:
        low, high = rows.aminmax(dim=1)
    if scheme.group is not None:
        channels = weight.shape[scheme.axis or 0]
        low, high = low.reshape(channels, -1), high.reshape(channels, -1)
    scale, zero_point = scheme.parameters(low, high)
    return scale.to(weight.device), zero_point.to(weight.device)


def rounded_weight(weight: Tensor, scheme: IntScheme, reach: Sequence[float] | None = None) -> Tensor:
    """The real numbers that the codes of a weight stand for."""
    grid = weight_grid(weight, scheme, reach)
    return dequantize(quantize(weight, *grid, scheme), *grid, scheme)


def apply_quantization(program: Program, plan: QuantizationPlan) -> Program:
    """The program in deployment form: integer weights, and a quantize–dequantize pair at every planned value.

    It evaluates what the target's integer kernels compute, and is not trained further: it is in evaluation mode, also
    where `program` is not.

    Raises:
        ConfigError: the plan has no ranges yet, or speaks of another program.
        ProgramError: something in the program is quantized already, or has fake quantizers.
    """
    require_float(program)
    plan.require_ranges()
    plan.require_values(program.values)
    quantized = program.copy().eval()
    grids = _grids(plan)
    values = quantized.values
    readers = edit.count_readers(quantized.graph_module)
    shared: dict[_Codes, fx.Node] = {}
    for weight in plan.weights:
        source = grids.get(weight.input or "")
        reach = plan.weight_reach.get(weight.value)
        _quantize_layer(quantized, values[weight.value], weight, reach, source, readers, shared)
    taken = set(quantized.values)
    for activation in plan.activations:
        node, consumers = values[activation.value], plan.consumers.get(activation.value)
        if activation.dynamic:
            _quantize_at_inference(node, activation.scheme, consumers, taken)
        else:
            _quantize_value(node, grids[activation.value], consumers, taken)
    for name, top in plan.rectifiers.items():
        # The range ends at or below the cut, so saturation does what the function did.
        if (
            name in grids
            and grids[name].zero_point == grids[name].scheme.code_range[0]
            and (top is None or _reach(grids[name]) <= top * (1 + 1e-6))
        ):
            _bypass(values[name])
    edit.finish(quantized)
    parameters: dict[str, Json] = {
        "target": plan.target,
        "activations": len(plan.activations),
        "weights": len(plan.weights),
        "kept_float": len(plan.kept_float),
    }
    if plan.output_scales:
        parameters[OUT_THRESHOLD] = dict(plan.output_scales)
    return quantized.with_history(HistoryEntry(step="quantize", parameters=parameters))


def _grids(plan: QuantizationPlan) -> dict[str, _Grid]:
    grids = {}
    for activation in plan.activations:
        if activation.dynamic:
            continue
        low, high = plan.ranges[activation.range_of]
        scale, zero_point = activation.scheme.parameters(torch.tensor(low), torch.tensor(high))
        grids[activation.value] = _Grid(scale.item(), int(zero_point.item()), activation.scheme)
    return grids


def _reach(grid: _Grid) -> float:
    return (grid.scheme.code_range[1] - grid.zero_point) * grid.scale


def _bypass(node: fx.Node) -> None:
    """Take an activation function out; the value keeps its name, now made by the operator before it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    name, layer = value_of(node), layer_of(node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
    set_names(source, layer=layer_of(source) or layer, value=value_of(source) or name)


def _quantize_value(node: fx.Node, grid: _Grid, consumers: tuple[str, ...] | None, taken: set[str]) -> None:
    codes = (grid.scale, grid.zero_point, *grid.scheme.code_range, grid.scheme.dtype)
    readers = [user for user in node.users if consumers is None or value_of(user) in consumers]
    code = edit.insert_after(node, QUANTIZE, (node, *codes), value=f"{value_of(node)}/quantized", taken=taken)
    back = edit.insert_after(code, DEQUANTIZE, (code, *codes), value=f"{value_of(node)}/dequantized", taken=taken)
    for reader in readers:
        reader.replace_input_with(node, back)


def _quantize_at_inference(
    node: fx.Node, scheme: IntScheme, consumers: tuple[str, ...] | None, taken: set[str]
) -> None:
    """A quantize–dequantize pair on the grid that covers what the value holds when the program runs."""
    readers = [user for user in node.users if consumers is None or value_of(user) in consumers]
    name = value_of(node)

    def behind(before: fx.Node, target: Any, args: tuple[Any, ...], part: str) -> fx.Node:
        return edit.insert_after(before, target, args, value=f"{name}/{part}", taken=taken)

    if scheme.middle is not None:
        # PyTorch's own operator for symmetric grids ends at half a step above the largest magnitude, and not on it.
        steps = float(scheme.code_range[1] - scheme.middle)
        magnitude = behind(node, aten.abs.default, (node,), "magnitude")
        largest = behind(magnitude, aten.max.default, (magnitude,), "largest")
        exact = behind(largest, aten.div.Tensor, (largest, steps), "exact_scale")
        scale = behind(exact, aten.clamp_min.default, (exact, SMALLEST_SCALE), "scale")
        end = zero_point = behind(scale, aten.full_like.default, (scale, scheme.middle), "zero_point")
        zero_point.kwargs = {"dtype": torch.int64}
    else:
        grid = (*scheme.code_range, SMALLEST_SCALE, scheme.dtype)
        measured = behind(node, MEASURE, (node, *grid), "grid")
        scale = behind(measured, operator.getitem, (measured, 0), "scale")
        end = zero_point = behind(scale, operator.getitem, (measured, 1), "zero_point")
    codes = (scale, zero_point, *scheme.code_range, scheme.dtype)
    code = behind(end, QUANTIZE_MEASURED, (node, *codes), "quantized")
    back = behind(code, DEQUANTIZE_MEASURED, (code, *codes), "dequantized")
    for reader in readers:
        reader.replace_input_with(node, back)


def _quantize_layer(
    program: Program,
    node: fx.Node,
    plan: WeightQuantizer,
    reach: Sequence[float] | None,
    source: _Grid | None,
    readers: Counter[int],
    shared: dict[_Codes, fx.Node],
) -> None:
    weight = edit.tensor_named(program.graph_module, plan.weight)
    position = weight_position(node)
    scale, zero_point = weight_grid(weight, plan.scheme, reach)
    bias_node = edit.arguments(node).get("bias")
    bias = edit.constant_of(program.graph_module, bias_node)
    if source is not None and bias is not None and plan.integer_bias:
        scale = room_for_bias(scale, bias, source.scale)
    # Another layer that reads the same tensor, such as a head that is called on several maps or an output that is tied
    # to a table, has the same codes, unless its bias asks for wider steps.
    key = (id(weight), plan.scheme, scale.cpu().numpy().tobytes(), zero_point.cpu().numpy().tobytes())
    if key not in shared:
        codes = quantize(weight.detach(), scale, zero_point, plan.scheme)
        source_node = node.args[position]
        shared[key] = _dequantized(program, node, source_node, codes, (scale, zero_point), plan.scheme, readers)
    node.update_arg(position, shared[key])
    if source is not None and bias is not None and plan.integer_bias:
        bias_scale = (scale.double() * source.scale).float()
        bias_codes = (
            (bias.detach().double() / bias_scale.double()).round().clamp(-_INT32_TOP, _INT32_TOP).to(torch.int32)
        )
        grid = IntScheme(bits=16, axis=None if plan.scheme.axis is None else 0)  # int32: the scheme only gives the axis
        new = _dequantized(program, node, bias_node, bias_codes, (bias_scale, zero_point), grid, readers)
        node.args = (*node.args[:2], new, *node.args[3:])


def room_for_bias(scale: Tensor, bias: Tensor, input_scale: float) -> Tensor:
    """Weight scales so wide that bias / (input scale × weight scale) fits into 31 bits.

    A channel with next to no weight has a scale near zero, and its bias would overflow; its weights lose nothing that
    the bias does not outweigh by far.
    """
    least = bias.detach().double().abs() / (input_scale * ROOM_FOR_BIAS)
    if scale.numel() == 1:
        least = least.max().reshape(1)
    return torch.maximum(scale.double(), least).float()


def _dequantized(
    program: Program,
    user: fx.Node,
    tensor_node: object,
    codes: Tensor,
    grid: tuple[Tensor, Tensor],
    scheme: IntScheme,
    readers: Counter[int],
) -> fx.Node:
    """A node that gives back the real values of integer codes; the codes take the place of the float tensor."""
    assert isinstance(tensor_node, fx.Node)
    scale, zero_point = grid
    name = str(tensor_node.target)
    if readers[id(edit.tensor_named(program.graph_module, name))] > 1:  # somebody else still reads the float tensor
        name = unused(f"{name}_codes", edit.tensor_names(program.graph_module))
    # Groups lie along rows for the operator that reads them, and for nobody else.
    is_turned = scheme.group is not None and scheme.axis == 1
    source = edit.read_tensor(program, name, codes.T.contiguous() if is_turned else codes, before=user)
    dtype = codes.dtype
    first, last = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    arguments: tuple[Any, ...]
    if scheme.axis is None:
        target, arguments = DEQUANTIZE, (source, scale.item(), int(zero_point.item()), first, last, dtype)
    else:
        scales = edit.read_tensor(program, f"{name}_scale", scale, before=user)
        # The difference of two codes may have more bits than they have.
        zeros_as = dtype if scheme.symmetric else torch.int32
        zeros = edit.read_tensor(program, f"{name}_zero_point", zero_point.to(zeros_as), before=user)
        if scheme.group is None:
            target, arguments = DEQUANTIZE_CHANNELS, (source, scales, zeros, scheme.axis, first, last, dtype)
        else:
            target = DEQUANTIZE_GROUPS
            arguments = (source, scales, zeros, *scheme.code_range, dtype, scheme.group, torch.float32)
    with user.graph.inserting_before(user):
        back = user.graph.call_function(target, arguments)
        set_names(back, layer=layer_of(user), value=f"{name}/dequantized")
        if is_turned:
            back = user.graph.call_function(aten.transpose.int, (back, 0, 1))
            set_names(back, layer=layer_of(user), value=f"{name}/turned")
    return back
