"""Bring a quantization within the drop that is allowed, at the least cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor, fx

from slimgraph.auto.control import Candidate, by_noise_per_cost, search
from slimgraph.auto.outcome import Progress
from slimgraph.deploy.targets import target_named
from slimgraph.program.count import count
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.quantization.agreement import output_noise
from slimgraph.quantization.merge import merge_quantizers
from slimgraph.quantization.operators import data_inputs, kind_of
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.quantize import Quantization, quantize_again
from slimgraph.quantization.sensitivity import Sensitivity, measure_sensitivity
from slimgraph.report.facts import AccuracyControl, SparedLayer

REASON = "accuracy: with it in integers the metric drops by more than allowed"

_RANGES = ("min_max", "hist", "KL", "mse", "emd")
"""The algorithms that are tried; those that are left out give nearly the ranges of one of these."""

_WIDE = 16
"""Bits of layers that are spared where a target computes with them."""

_ROUNDS = 3
"""How often the limit is tightened where ONNX Runtime and the program differ by a few samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What control works with."""

    replan: Callable[[Mapping[str, str]], QuantizationPlan]
    """A plan without ranges in which the named layers stay float."""
    drop_of: Callable[[Program], float]
    """What the metric loses in a program."""
    confirm: Callable[[Quantization], float]
    """What it loses in the file that is made of a quantization."""
    lost_us: Callable[[], Mapping[str, float]]
    """By how much each layer is slower in float than in integers; without those of which it is not known."""
    calibration: Callable[[], Iterable[Any]]
    held_out: Sequence[Mapping[str, Tensor]]
    """Inputs on which ranges are compared."""
    say: Progress


def control_accuracy(
    quantized: Quantization, means: Means, *, limit: float, drop: float
) -> tuple[Quantization, AccuracyControl]:
    """A quantization whose drop is within the limit, and what was done; the one that was given, where none is.

    First other ranges are tried, which cost nothing but the trial: those with the least noise of the outputs. Then the
    layers are ranked by the noise that they bring for each microsecond that they save, and the fewest of them are
    spared (`search`): they go back to float or, for a target that computes with 16 bits, get these. The metric decides
    in every step, that of the written file at the end.

    Args:
        quantized: what loses too much, with histograms among its statistics.
        drop: what it loses.
    """
    base, base_drop = _with_best_ranges(quantized, means, drop)
    trials = _Trials(base, means, drop=base_drop)
    names = spareable(base.prepared, base.plan)
    noise = layer_noise(
        base.prepared, base.plan, measure_sensitivity(base.prepared, base.plan, base.repair_batches), names
    )
    means.say("Measuring layers", 0, None)
    lost_us = means.lost_us()
    costs = lost_us or _macs(base.prepared, names)
    order = by_noise_per_cost([Candidate(name=name, noise=noise[name], cost=costs.get(name, 0.0)) for name in names])
    total = sum(noise.values()) or 1.0

    def account(spared: Sequence[str], drop_after: float, *, met: bool) -> AccuracyControl:
        layers = [
            SparedLayer(
                name=name,
                bits=_WIDE if trials.widens else None,
                noise_share=noise[name] / total,
                lost_us=None if trials.widens else lost_us.get(name),
            )
            for name in sorted(spared, key=lambda name: -noise[name])
        ]
        return AccuracyControl(
            limit=limit,
            drop_before=drop,
            drop=drop_after,
            met=met,
            algorithm_before=quantized.algorithm,
            algorithm=base.algorithm if met else quantized.algorithm,
            spared=tuple(layers),
            layers=len(names),
            trials=len(trials.drops) + (base is not quantized),
        )

    allowed = limit
    for _ in range(_ROUNDS):
        found = search(order, trials.drop_of, limit=allowed, costs={name: costs.get(name, 0.0) for name in names})
        final = trials.quantization(frozenset(found.spared)) if found.met else None
        if final is None:  # not even all of them help, or nothing would be left to quantize
            break
        actual = means.confirm(final)
        if actual <= limit + 1e-9:
            return final, account(found.spared, actual, met=True)
        allowed -= max(actual - found.drop, 1e-9)
    return quantized, account((), trials.drop_of(frozenset(names)), met=False)


# Ranges


def _with_best_ranges(quantized: Quantization, means: Means, drop: float) -> tuple[Quantization, float]:
    """The quantization with the ranges that bring the least noise, if the metric agrees, and what it loses."""
    means.say("Trying other ranges", 0, None)
    tried = {quantized.algorithm: quantized}
    plan = replace(quantized.plan, ranges={})
    for algorithm in _RANGES:
        if algorithm not in tried:
            tried[algorithm] = quantize_again(quantized, plan, means.calibration(), algorithm=algorithm)
    noises = {name: output_noise(quantized.prepared, each.program, means.held_out) for name, each in tried.items()}
    best = min(noises, key=lambda name: noises[name])
    if best == quantized.algorithm:
        return quantized, drop
    found = means.drop_of(merge_quantizers(tried[best].program))
    return (tried[best], found) if found < drop else (quantized, drop)


# Layers


def spareable(program: Program, plan: QuantizationPlan) -> list[str]:
    """Values of the operators that run in integers for their own sake, not for that of their neighbours."""
    anchors = target_named(plan.target).anchors
    layers = {weight.value for weight in plan.weights}
    quantized = {activation.value for activation in plan.activations}
    return [
        name
        for name, node in program.values.items()
        if name in layers
        or (
            kind_of(node) in anchors
            and name not in plan.kept_float
            and any(value_of(source) in quantized for source in data_inputs(program, node))
        )
    ]


def layer_noise(
    program: Program, plan: QuantizationPlan, sensitivity: Sensitivity, names: Sequence[str]
) -> dict[str, float]:
    """The noise that sparing each layer takes away, nearly.

    That of a value is shared by the layers that write and read it, also through operators between them.
    """
    noise = dict.fromkeys(names, 0.0)
    values = program.values
    found = sensitivity.noise
    for name in names:
        noise[name] += found.get(("weight", name), 0.0)
    for activation in plan.activations:
        if not (brought := found.get(("activation", activation.value), 0.0)):
            continue
        node = values[activation.value]
        writers = {activation.value} if activation.value in noise else _nearest(node, _sources, noise)
        near = writers | _nearest(node, _readers, noise)
        for name in near:
            noise[name] += brought / len(near)
    return noise


def _sources(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _readers(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _nearest(start: fx.Node, neighbours: Callable[[fx.Node], list[fx.Node]], layers: Mapping[str, float]) -> set[str]:
    """The first layers that are met in one direction."""
    waiting, seen, met = [start], {start}, set()
    while waiting:
        for node in neighbours(waiting.pop()):
            if node in seen:
                continue
            seen.add(node)
            if value_of(node) in layers:
                met.add(value_of(node))
            else:
                waiting.append(node)
    return met


def _macs(program: Program, names: Sequence[str]) -> dict[str, float]:
    macs = {row.value: float(row.macs) for row in count(program).rows}
    return {name: macs.get(name, 0.0) for name in names}


class _Trials:
    """What the metric loses with some layers spared; each set is measured once."""

    def __init__(self, base: Quantization, means: Means, *, drop: float) -> None:
        self._base = base
        self._means = means
        self.drops: dict[frozenset[str], float] = {frozenset(): drop}
        self.widens = base.plan.target == "simulate"

    def drop_of(self, spared: frozenset[str]) -> float:
        if spared not in self.drops:
            self._means.say("Trying which layers to spare", len(self.drops), None)
            found = self.quantization(spared)
            program = self._base.prepared if found is None else merge_quantizers(found.program)
            self.drops[spared] = self._means.drop_of(program)
        return self.drops[spared]

    def quantization(self, spared: frozenset[str]) -> Quantization | None:
        """None where nothing is left to quantize."""
        if not spared:
            return self._base
        if self.widens:
            plan = _widened(self._base, spared)
        else:
            plan = self._means.replan(dict.fromkeys(sorted(spared), REASON))
        if not plan.activations:
            return None
        return quantize_again(self._base, plan, self._means.calibration())


def _widened(base: Quantization, spared: frozenset[str]) -> QuantizationPlan:
    """The plan with 16 bits for the layers and what they read, whose ranges are the extremes: nothing need be cut."""
    values = base.prepared.values
    plan = base.plan
    quantized = {activation.value: activation for activation in plan.activations}
    read = {
        value_of(source) for name in spared for source in data_inputs(base.prepared, values[name])
    } & quantized.keys()
    layers = {weight.value for weight in plan.weights}
    ranges = dict(plan.ranges)
    for name in read:
        owner = quantized[name].range_of
        if owner in base.statistics:
            seen = base.statistics[owner]
            ranges[owner] = (min(seen.minimum, 0.0), max(seen.maximum, 0.0))
    wide = plan.with_bits(dict.fromkeys(spared & layers, _WIDE), dict.fromkeys(read, _WIDE))
    return replace(wide, ranges=ranges)


def held_out(batches: Iterable[Mapping[str, Tensor]], *, skipped: int, most: int) -> list[Mapping[str, Tensor]]:
    """Batches behind the first `skipped`; where there are too few of them, the last ones."""
    found = list(islice(batches, skipped + most))
    return found[skipped:] or found[-most:]
