"""Learn to round weights so that the parts of a program answer as they did in float."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.program.fold import set_bias
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.signature import samples_in
from slimgraph.quantization.apply import ROOM_FOR_BIAS, room_for_bias, rounded_weight, weight_scale
from slimgraph.quantization.learn_region import LearnedRegion, Recipe, RegionLayer, learn_region
from slimgraph.quantization.learned_rounding import Annealing, LearnedRounding, nearest
from slimgraph.quantization.lockstep import Lockstep, Schedule, batches_of
from slimgraph.quantization.operators import WEIGHT_AXIS, kind_of
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer
from slimgraph.quantization.reach import with_best_reach
from slimgraph.quantization.regions import Region, block_regions, layer_regions, resolve
from slimgraph.quantization.simulation import LayerTensors, Simulation

Regions: TypeAlias = Literal["layer", "block"] | Sequence[Region | tuple[str | Sequence[str], str]]

MEMORY_BYTES = 2**30

_PER_BATCH = 32


@torch.inference_mode(mode=False)
def reconstruct(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    regions: Regions = "block",
    steps: int = 300,
    epochs: int | None = None,
    samples: int = 1024,
    batch_size: int = _PER_BATCH,
    lr: float = 0.1,
    drop: float = 0.0,
    activations: bool = True,
    biases: bool = True,
    annealing: Annealing = Annealing(),  # noqa: B008 - it is frozen
    seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Program, QuantizationPlan]:
    """The float program with weights on their integer grids, rounded up or down as was learned, and the plan for it.

    Region by region, from the inputs to the outputs, the rounding of its weights is learned so that its output, given
    what the quantized program before it gives, is near to the float program's in squared error. What was learned is
    kept where it is better than rounding to the nearest on data that was held out; the history says so for each region.
    `apply_quantization` of the result gives just these codes, since the plan names the reach of each grid. Weights that
    several layers read, that are looked up or have a zero point, or that lie in no region, are left to rounding to the
    nearest.

    Args:
        program: the float program that the plan was made for, as `prepare` gives it; it stays as it is.
        plan: with ranges. Where it gives a weight of few bits no reach, the one of least rounding error is taken.
        batches: calibration data, as `Signature.bind` takes it; read once.
        regions: "layer" for each layer with the activation function behind it; "block" for residual blocks and the
            like, as `block_regions` finds them; or regions: names of inputs and output.
        steps: of Adam, for each region.
        epochs: passes over the samples for each region, in place of `steps`.
        samples: the first of these are used, or fewer where their values would take more than `memory_bytes`.
        batch_size: samples in a step.
        lr: of Adam, on the logits of the rounding; fewer steps want more of it.
        drop: part of the elements of each activation that is not rounded in a step: 0.5 is QDrop.
        activations: round activations while learning. Without, the weights are learned for real activations.
        biases: learn the stored biases of the layers, too.
        memory_bytes: of what is remembered between regions; a step needs memory of its own for one batch.
        progress: told the region, the steps done and those to do in all.
    Raises:
        ConfigError: the plan has no ranges, an option or a region cannot be used.
        UnknownNameError: a region names a value that the program does not have.
        CalibrationError: there is no batch, or a region gives NaN or infinity; the message names it.
    Sources: for layers Nagel et al., AdaRound, 2020, arXiv 2004.10568; for blocks Li et al., BRECQ, 2021, arXiv
        2102.05426; for `drop` Wei et al., QDrop, 2022, arXiv 2203.05740. There somebody lists the blocks of a network;
        here they are found in the graph. The error is divided by that of rounding to the nearest, so that neither the
        learning rate nor the annealing depends on the scale of the values.
    """
    _require(
        steps=steps,
        epochs=1 if epochs is None else epochs,
        samples=samples,
        batch_size=batch_size,
        memory_bytes=memory_bytes,
    )
    if not lr > 0 or not 0 <= drop <= 1:
        raise ConfigError(f"lr is {lr} and drop {drop}; lr is above 0, and drop from 0 to 1.")
    plan.require_ranges()
    plan.require_values(program.values)
    result = program.copy().eval()
    reached = with_best_reach(result, plan)
    readers = edit.count_readers(result.graph_module)
    learnable = replace(reached, weights=tuple(w for w in reached.weights if _is_learnable(result, w, readers)))
    spans = resolve(result, learnable, _regions(result, learnable, regions))
    grids = _grids(result, learnable)
    current = {result.value(w.value): LayerTensors(_rounded(result, w, reached), None) for w in reached.weights}
    current |= {node: LayerTensors(_nearest(result, grid), None) for node, grid in grids.items()}
    layers = {node: _region_layer(result, grids[node], node, biases) for span in spans for node in span.layers}

    schedule = Schedule(result, spans)
    data = batches_of(result, batches, samples=_affordable(result, schedule, samples, memory_bytes), size=batch_size)
    steps = steps if epochs is None else epochs * len(data)
    real, quantized = Simulation(result), Simulation(result, reached if activations else None)
    lockstep = Lockstep(schedule, real, quantized, current, data)
    recipe = Recipe(steps=steps, lr=lr, drop=drop, biases=biases, annealing=annealing, seed=seed)
    told: list[Json] = []
    for index, span in enumerate(spans):
        learned = learn_region(
            span,
            lockstep.enter(span),
            {node: layers[node] for node in span.layers},
            current,
            quantized=quantized,
            real=real,
            recipe=recipe,
            progress=_telling(progress, str(span.region), index * steps, len(spans) * steps),
        )
        current.update(learned.layers)
        lockstep.leave(span)
        told.append(_told(span.region, learned))

    for node in layers:
        edit.set_tensor(result.graph_module, grids[node].planned.weight, current[node].weight)
        if (bias := current[node].bias) is not None:
            set_bias(result, node, bias, readers)
    edit.finish(result).train(program.training)
    parameters: dict[str, Json] = {
        "regions": regions if isinstance(regions, str) else [str(span.region) for span in spans],
        "steps": steps,
        "samples": sum(map(samples_in, data)),
        "samples_wanted": samples,
        "batch_size": batch_size,
        "lr": lr,
        "drop": drop,
        "activations": activations,
        "biases": biases,
        "seed": seed,
    }
    entry = HistoryEntry(step="reconstruct", parameters=parameters, result={"regions": told})
    reach = {grids[node].planned.value: grids[node].reach for node in layers}
    return result.with_history(entry), replace(reached, weight_reach={**reached.weight_reach, **reach})


def _require(**options: int) -> None:
    for name, given in options.items():
        if given < 1:
            raise ConfigError(f"{name} is {given}; give at least 1.")


def _tensor(program: Program, weight: WeightQuantizer) -> Tensor:
    return edit.tensor_named(program.graph_module, weight.weight).detach()


def _is_learnable(program: Program, weight: WeightQuantizer, readers: Mapping[int, int]) -> bool:
    """Whether a layer multiplies by the weight, no other reads it, and zero is the middle of its grid."""
    stored = edit.tensor_named(program.graph_module, weight.weight)
    return (
        readers[id(stored)] == 1 and kind_of(program.value(weight.value)) in WEIGHT_AXIS and weight.scheme.middle == 0
    )


def _regions(program: Program, plan: QuantizationPlan, given: Regions) -> Sequence[Region]:
    if isinstance(given, str):
        if given not in ("layer", "block"):
            raise ConfigError(f"regions is {given!r}. {closest(given, ['layer', 'block'])}")
        return layer_regions(program, plan) if given == "layer" else block_regions(program, plan)
    if not given:
        raise ConfigError("regions has none, so that nothing would be learned. Give some, or 'layer' or 'block'.")
    return [item if isinstance(item, Region) else _named(item) for item in given]


def _named(pair: tuple[str | Sequence[str], str]) -> Region:
    inputs, output = pair
    return Region(inputs=(inputs,) if isinstance(inputs, str) else tuple(inputs), output=output)


@dataclass(frozen=True, slots=True)
class _WeightGrid:
    """The grid that `apply_quantization` will give a weight."""

    planned: WeightQuantizer
    scale: Tensor
    largest_bias: Tensor | None
    """Beyond it a bias would make the scale wider; None where biases stay real."""

    @property
    def reach(self) -> tuple[float, ...]:
        return tuple((self.scale.double() * self.planned.scheme.code_range[1]).flatten().tolist())


def _grids(program: Program, plan: QuantizationPlan) -> dict[fx.Node, _WeightGrid]:
    activations = {activation.value: activation for activation in plan.activations}
    found = {}
    for planned in plan.weights:
        node = program.value(planned.value)
        scale = weight_scale(_tensor(program, planned), planned.scheme, plan.weight_reach.get(planned.value))
        bias = edit.constant_of(program.graph_module, edit.arguments(node)["bias"])
        source = activations.get(planned.input or "")
        largest = None
        if planned.integer_bias and bias is not None and source is not None and not source.dynamic:
            low, high = map(torch.tensor, plan.ranges[source.range_of])
            input_scale = float(source.scheme.parameters(low, high)[0])
            scale = room_for_bias(scale, bias, input_scale)
            largest = (scale.double() * input_scale * ROOM_FOR_BIAS).to(bias.dtype) * (1 - 1e-6)
        found[node] = _WeightGrid(planned, scale, largest)
    return found


def _rounded(program: Program, planned: WeightQuantizer, plan: QuantizationPlan) -> Tensor:
    return rounded_weight(_tensor(program, planned), planned.scheme, plan.weight_reach.get(planned.value))


def _nearest(program: Program, grid: _WeightGrid) -> Tensor:
    return nearest(_tensor(program, grid.planned), grid.scale, grid.planned.scheme)


def _region_layer(program: Program, grid: _WeightGrid, node: fx.Node, learn_bias: bool) -> RegionLayer:
    weight = _tensor(program, grid.planned)
    bias = edit.constant_of(program.graph_module, edit.arguments(node)["bias"]) if learn_bias else None
    return RegionLayer(
        weight=weight,
        bias=None if bias is None else bias.detach(),
        largest_bias=grid.largest_bias,
        rounding=LearnedRounding(weight, grid.scale, grid.planned.scheme),
        nearest=_nearest(program, grid),
    )


def _affordable(program: Program, schedule: Schedule, samples: int, memory_bytes: int) -> int:
    """How many samples fit: both programs remember each of them."""
    example = program.signature.example_sizes.get(program.signature.batch_axis or "", 1)
    return max(2, min(samples, memory_bytes * example // (2 * max(1, schedule.bytes_at_most()))))


def _telling(
    progress: Callable[[str, int, int], None] | None, region: str, before: int, total: int
) -> Callable[[int], None]:
    def tell(steps: int) -> None:
        if progress is not None:
            progress(region, before + steps, total)

    return tell


def _told(region: Region, learned: LearnedRegion) -> Json:
    return {
        "inputs": list(region.inputs),
        "output": region.output,
        "nearest_error": learned.nearest_error,
        "learned_error": learned.learned_error,
        "kept": "learned" if learned.is_learned else "nearest",
    }
