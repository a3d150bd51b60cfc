"""Take the fake quantizers out of a trained program, and write down as a plan what they had come to."""

import json
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ProgramError
from slimgraph.program.fake_quantize import LEARNED_FAKE_QUANTIZE, PACT, ROUNDING, learned_zero_point
from slimgraph.program.fold import OUTPUT_AXIS, fold_batch_norm, foldable_norms, norm_gain
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Program, require_program
from slimgraph.program.scheme import SMALLEST_SCALE
from slimgraph.program.simplify import remove_dropout
from slimgraph.program.value_range import FOLLOWING
from slimgraph.quantization.fake_quantizers import FAKE, evaluated
from slimgraph.quantization.insertion import STEP
from slimgraph.quantization.output_scales import observed_outputs
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer, plan_from_json

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """What training has come to: `apply_quantization(frozen.program, frozen.plan)` is its deployment form."""

    program: Program
    """Float, in evaluation mode, batch norms folded, the weights that become integers on their grids."""
    plan: QuantizationPlan
    """With ranges, and with the reach of every weight."""


def freeze(program: Program) -> Frozen:
    """The float program and the plan that training has come to; training may go on, since this works on a copy.

    Once applied they evaluate what the fake-quantized program does: the same weight codes, and the same activation
    codes as far as sums in another order and biases in integers let them be.

    Raises:
        ProgramError: the program has no fake quantizers, or its history has not got their plan.
    """
    require_program(program)
    plan = plan_of(program)
    output_scales = observed_outputs(program)
    frozen = program.copy().eval()
    weights, reaches = _freeze_weights(frozen, plan)
    ranges = _freeze_activations(frozen, plan)
    _drop_memories(frozen)
    frozen.history = tuple(map(_without_plan, frozen.history))  # it is a result now, and long
    folded = remove_dropout(fold_batch_norm(frozen)).with_history(HistoryEntry(step="freeze"))
    return Frozen(
        program=folded,
        plan=replace(
            plan,
            weights=weights,
            ranges={**plan.ranges, **ranges},
            weight_reach=reaches,
            output_scales=output_scales,
        ),
    )


def plan_of(program: Program) -> QuantizationPlan:
    """The plan by which fake quantizers were put into a program.

    Raises:
        ProgramError: there are none.
    """
    for entry in reversed(program.history):
        if entry.step == STEP and "plan" in entry.parameters:
            return plan_from_json(json.dumps(entry.parameters["plan"]))
    raise ProgramError("The program has no fake quantizers. Give one that `prepare_qat` made.")


def _without_plan(entry: HistoryEntry) -> HistoryEntry:
    kept = {key: value for key, value in entry.parameters.items() if key != "plan"}
    return replace(entry, parameters=kept) if entry.step == STEP else entry


# Weights


def _freeze_weights(
    program: Program, plan: QuantizationPlan
) -> tuple[tuple[WeightQuantizer, ...], dict[str, tuple[float, ...]]]:
    """Put every rounded weight in the place of the float one; gives the plan's weights, and the reach of each."""
    values = program.values
    reaches: dict[str, Tensor] = {}
    whole = set[str]()  # layers whose reach is that of the folded weight already
    stored: dict[fx.Node, fx.Node] = {}
    for planned in plan.weights:
        layer = values[planned.value]
        rounded = layer.args[1]
        assert isinstance(rounded, fx.Node)
        quantizer = rounded
        if rounded.target is aten.div.Tensor:
            whole.add(planned.value)
            quantizer = rounded.args[0]  # type: ignore[assignment]
        reaches[planned.value] = _reach(program, quantizer)
        if rounded not in stored:
            name = unused(f"{planned.weight}~", edit.tensor_names(program.graph_module))
            grid = evaluated(program, rounded)
            stored[rounded] = edit.read_tensor(program, name, grid, trainable=True, before=layer)
            stored[rounded].meta["val"] = rounded.meta.get("val")
        layer.update_arg(1, stored[rounded])
    _drop_memories(program)
    weights = tuple(_renamed(program, values[w.value], w) for w in plan.weights)
    norms = foldable_norms(program)
    for name in reaches.keys() - whole:
        layer = values[name]
        weight = edit.constant_of(program.graph_module, layer.args[1])
        assert weight is not None
        for norm in norms.get(layer, ()):
            gain = norm_gain(program, norm, weight, OUTPUT_AXIS[layer.target])  # type: ignore[index]
            reaches[name] = reaches[name] * gain.abs().reshape(-1)
    return weights, {name: tuple(reach.double().tolist()) for name, reach in reaches.items()}


def _reach(program: Program, quantizer: fx.Node) -> Tensor:
    """Largest magnitudes that the grid of a weight covers, one or one a channel, in float64."""
    given = edit.arguments(quantizer)
    if quantizer.target is LEARNED_FAKE_QUANTIZE:
        return _step(program, given["step"]).double() * float(given["high"])
    return evaluated(program, given["interval"]).double().abs().amax(0).reshape(-1)


def _step(program: Program, node: fx.Node) -> Tensor:
    """A learned step as its operator takes it: one that training has led below zero is the smallest that there is."""
    return evaluated(program, node).clamp(min=SMALLEST_SCALE)


def _renamed(program: Program, layer: fx.Node, planned: WeightQuantizer) -> WeightQuantizer:
    """Let the rounded weight have the name of the float one, unless something else still reads that."""
    node = layer.args[1]
    assert isinstance(node, fx.Node)
    read = {str(other.target) for other in program.graph.find_nodes(op="get_attr")}
    if planned.weight not in read:
        rounded = edit.tensor_named(program.graph_module, str(node.target))
        edit.set_tensor(program.graph_module, planned.weight, rounded, trainable=True)
        node.target = planned.weight
    return replace(planned, weight=str(node.target))


# Activations


def _freeze_activations(program: Program, plan: QuantizationPlan) -> dict[str, tuple[float, float]]:
    """Take the quantizers of activations out; gives the ranges that they had, by the value that owns each."""
    planned = {a.value: a for a in plan.activations}
    ranges: dict[str, tuple[float, float]] = {}
    for quantizer in [node for node in program.graph.nodes if node.target in ROUNDING]:
        value = value_of(quantizer).partition(FAKE)[0]
        activation = planned[value]
        if not activation.dynamic:
            ranges[activation.range_of] = _range(program, quantizer, symmetric=activation.scheme.symmetric)
        source = quantizer.args[0]
        assert isinstance(source, fx.Node)
        if source.target is PACT:
            source = source.args[0]
        if value_of(quantizer) == value:  # it stands for a rectifier as well
            source = _rectified(source, quantizer, plan.rectifiers[value])
        quantizer.replace_all_uses_with(source)
        program.graph.erase_node(quantizer)
    return ranges


def _range(program: Program, quantizer: fx.Node, *, symmetric: bool) -> tuple[float, float]:
    given = edit.arguments(quantizer)
    if quantizer.target is not LEARNED_FAKE_QUANTIZE:
        low, high = evaluated(program, given["interval"]).tolist()
        return low, high
    step, zero = _step(program, given["step"]), int(given["middle"])
    if given["offset"] is not None:
        offset = evaluated(program, given["offset"])
        zero = int(learned_zero_point(offset, step, given["low"], given["high"]))
    reach = (given["high"] - zero) * step.double().item()
    return (-reach if symmetric else (given["low"] - zero) * step.double().item(), reach)


def _rectified(source: fx.Node, quantizer: fx.Node, top: float | None) -> fx.Node:
    with source.graph.inserting_before(quantizer):
        if top is None or math.isinf(top):
            node = source.graph.call_function(aten.relu.default, (source,))
        else:
            node = source.graph.call_function(aten.hardtanh.default, (source, 0.0, top))
    set_names(node, layer=layer_of(quantizer), value=value_of(quantizer))
    node.meta["val"] = quantizer.meta.get("val")
    return node


def _drop_memories(program: Program) -> None:
    """Erase the operators that follow ranges for nobody; since they write, they are no dead code to torch.fx."""
    program.graph.eliminate_dead_code()
    for node in reversed(program.graph.nodes):
        if node.target in FOLLOWING and not node.users:
            program.graph.erase_node(node)
    edit.finish(program)
