"""Learn the rounding of the weights of one region."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError
from slimgraph.program.names import value_of
from slimgraph.quantization.learned_rounding import Annealing, LearnedRounding, undecided
from slimgraph.quantization.lockstep import RegionBatch
from slimgraph.quantization.regions import Span
from slimgraph.quantization.simulation import LayerTensors, Mix, Simulation

_HELD_OUT = 8
"""Every eighth batch judges what was learned from the others."""

_BIAS_UNIT = 0.1
"""Biases move in this part of the spread of their layer's output, so that one learning rate suits them and logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a region is learned; `reconstruct` says what each option means."""

    steps: int
    lr: float
    drop: float
    biases: bool
    annealing: Annealing
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedRegion:
    """What came of a region."""

    nearest_error: float
    """Mean squared error of its output over that output's mean square, on data held out, rounding to the nearest."""
    learned_error: float
    """The same with what was learned, whether that is kept or not."""
    layers: Mapping[fx.Node, LayerTensors]
    """What is kept."""

    @property
    def is_learned(self) -> bool:
        """Whether what was learned is kept: it is better."""
        return self.learned_error < self.nearest_error


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionLayer:
    """A layer before its rounding is learned."""

    weight: Tensor
    """The real one."""
    bias: Tensor | None
    """None where it is not learned."""
    largest_bias: Tensor | None
    """What the integer bias has room for; None: any."""
    rounding: LearnedRounding
    nearest: Tensor


def learn_region(
    span: Span,
    batches: Sequence[RegionBatch],
    layers: Mapping[fx.Node, RegionLayer],
    others: Mapping[fx.Node, LayerTensors],
    *,
    quantized: Simulation,
    real: Simulation,
    recipe: Recipe,
    progress: Callable[[int], None],
) -> LearnedRegion:
    """What rounding of the region's weights gives the least error of its output, or the nearest where none gives less.

    Args:
        layers: those whose weights are learned.
        others: layers of the region that stay as they are.
        quantized, real: how nodes are computed with and without rounding.
        progress: told the steps done.
    Raises:
        CalibrationError: the error becomes NaN or infinite.
    """
    held_out = set(range(len(batches))[_HELD_OUT - 1 :: _HELD_OUT]) or {len(batches) - 1}
    judges = [batches[index] for index in sorted(held_out)]
    teachers = [batch for index, batch in enumerate(batches) if index not in held_out] or judges
    near = {node: LayerTensors(layer.nearest, None) for node, layer in layers.items()}
    nearest_error = _error(span, judges, {**others, **near}, quantized)
    if nearest_error == 0.0:
        return LearnedRegion(nearest_error=0.0, learned_error=0.0, layers=near)
    power = float(torch.stack([batch.target.square().mean() for batch in judges]).mean()) or 1.0
    shifts = _Shifts.of(span, batches[0], layers, real) if recipe.biases else _Shifts({}, {})
    groups = [layer.rounding.logits for layer in layers.values()] + list(shifts.steps.values())
    optimizer = torch.optim.Adam(groups, lr=recipe.lr)
    device = batches[0].target.device
    generator = torch.Generator(device).manual_seed(recipe.seed)
    mix = _mixing(recipe.drop, generator)
    count = sum(layer.weight.numel() for layer in layers.values())
    order: list[int] = []
    for step in range(recipe.steps):
        order = order or torch.randperm(len(teachers), generator=generator, device=device).tolist()
        batch = teachers[order.pop()]
        with torch.enable_grad():
            ups = {node: layer.rounding.up() for node, layer in layers.items()}
            soft = {
                node: LayerTensors(layer.rounding.soft(ups[node]), shifts.bias(node, layer))
                for node, layer in layers.items()
            }
            given = _forward(span, batch, {**others, **soft}, quantized, mix)
            loss = (given - batch.target).square().mean() / nearest_error
            exponent = recipe.annealing.exponent(step, recipe.steps)
            if exponent is not None:
                doubt = torch.stack([undecided(up, exponent) for up in ups.values()]).sum() / count
                loss = loss + recipe.annealing.weight * doubt
            _require_finite(float(loss.detach()), span, step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(step + 1)
    with torch.no_grad():
        learned = {
            node: LayerTensors(layer.rounding.hard(), shifts.bias(node, layer)) for node, layer in layers.items()
        }
    learned_error = _error(span, judges, {**others, **learned}, quantized)
    return LearnedRegion(
        nearest_error=nearest_error / power,
        learned_error=learned_error / power,
        layers=learned if learned_error < nearest_error else near,
    )


@dataclass(frozen=True, slots=True)
class _Shifts:
    """What is added to biases, in units of their own."""

    steps: dict[fx.Node, Tensor]
    units: dict[fx.Node, Tensor]

    @staticmethod
    def of(span: Span, batch: RegionBatch, layers: Mapping[fx.Node, RegionLayer], real: Simulation) -> "_Shifts":
        found = _Shifts({}, {})
        results = {**batch.constants, **batch.real_entries}
        with torch.no_grad():
            for node in span.nodes:
                results[node] = real.raw(node, results, {})
                if node in layers and (bias := layers[node].bias) is not None:
                    found.units[node] = _BIAS_UNIT * results[node].std(correction=0)
                    found.steps[node] = torch.zeros_like(bias).requires_grad_()
        return found

    def bias(self, node: fx.Node, layer: RegionLayer) -> Tensor | None:
        if node not in self.steps:
            return None
        assert layer.bias is not None
        bias = layer.bias + self.units[node] * self.steps[node]
        return bias if layer.largest_bias is None else bias.clamp(-layer.largest_bias, layer.largest_bias)


def _mixing(drop: float, generator: torch.Generator) -> Mix | None:
    if drop == 0.0:
        return None

    def mix(real: Tensor, rounded: Tensor) -> Tensor:
        chance = torch.rand(real.shape, generator=generator, device=real.device)
        return torch.where(chance < drop, real, rounded)

    return mix


def _forward(
    span: Span,
    batch: RegionBatch,
    layers: Mapping[fx.Node, LayerTensors],
    simulation: Simulation,
    mix: Mix | None = None,
) -> Tensor:
    """The region's output before it is rounded itself: how far its own grid is off is no weight's fault."""
    entries = batch.entries
    if mix is not None:
        entries = {node: mix(batch.real_entries[node], x) for node, x in entries.items()}
    results = {**batch.constants, **entries}
    for node in span.nodes[:-1]:
        results[node] = simulation.rounded(node, simulation.raw(node, results, layers, mix), mix)
    output: Tensor = simulation.raw(span.exit, results, layers, mix)
    return output


def _error(
    span: Span, batches: Sequence[RegionBatch], layers: Mapping[fx.Node, LayerTensors], simulation: Simulation
) -> float:
    """Mean squared error of the output."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            difference = _forward(span, batch, layers, simulation) - batch.target
            total += float(difference.square().sum(dtype=torch.float64))
            count += difference.numel()
    _require_finite(total, span, None)
    return total / max(1, count)


def _require_finite(error: float, span: Span, step: int | None) -> None:
    if not math.isfinite(error):
        when = "with rounded weights" if step is None else f"in step {step}"
        names = ", ".join(value_of(node) for node in span.layers)
        raise CalibrationError(
            f"The error of the region {span.region} is {error} {when}, so that the rounding of {names} cannot be "
            "learned. Look at the weights and ranges there, or lower lr."
        )
