"""The steps by which layers get more bits, or go back to float, with what each is worth and costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

import slimgraph.program.edit as edit
from slimgraph.auto.control import Candidate, by_noise_per_cost
from slimgraph.deploy.targets import target_named
from slimgraph.program.count import count
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.quantization.calibration import choose_ranges
from slimgraph.quantization.mixed_bits import FLOAT
from slimgraph.quantization.neighbours import nearest
from slimgraph.quantization.operators import data_inputs, kind_of
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization
from slimgraph.quantization.sensitivity import measure_sensitivity

REASON = "accuracy: with it in integers the metric drops by more than allowed"

_WIDE = 16
"""Bits beyond those of a target, where it computes with any."""


@dataclass(frozen=True, slots=True)
class Wider:
    """A layer with more bits than it has."""

    layer: str
    bits: int
    """Of the weight, and of what the layer reads where that has fewer; `FLOAT`: it goes back to float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The steps that a quantization leaves, in two rungs."""

    narrow: tuple[Candidate[Wider], ...]
    """Up to the bits of the target, for layers that have fewer: that costs bytes, and no time on any kernel of ours."""
    full: tuple[Candidate[Wider], ...]
    """Beyond: 16 bits where the target computes with any, and else float. That costs time."""
    noise: float
    """What all quantizers bring into the outputs, as if noises added up."""
    lost_us: Mapping[str, float]
    """By how much layers are slower in float, as far as it was measured."""

    @property
    def order(self) -> list[Wider]:
        """What to take first: the lower rung, and on each the most noise for its cost."""
        return [*by_noise_per_cost(self.narrow), *by_noise_per_cost(self.full)]

    @property
    def dearest(self) -> list[Wider]:
        """What to take back first."""
        return [
            candidate.step
            for rung in (self.full, self.narrow)
            for candidate in sorted(rung, key=lambda candidate: -candidate.cost)
        ]

    @property
    def layers(self) -> tuple[str, ...]:
        """Those for which anything can be done."""
        return tuple(dict.fromkeys(candidate.step.layer for candidate in (*self.narrow, *self.full)))

    def noise_share(self, layer: str, bits: int) -> float:
        """The part of the noise that is gone when a layer has so many bits."""
        gone = (
            each.noise for each in (*self.narrow, *self.full) if each.step.layer == layer and each.step.bits <= bits
        )
        return sum(gone) / self.noise if self.noise else 0.0


def ladder(base: Quantization, lost_us: Mapping[str, float]) -> Ladder:
    """The steps that a quantization leaves, with the noise that each takes away.

    Args:
        base: what it brings into the outputs is measured on its `repair_batches`.
        lost_us: by how much layers are slower in float; where nothing is known, products count instead.
    """
    program, plan = base.prepared, base.plan
    target = target_named(plan.target)
    weights = {weight.value: weight for weight in plan.weights}
    bits_of = {
        **{("weight", weight.value): weight.scheme.bits for weight in plan.weights},
        **{("activation", found.value): found.scheme.bits for found in plan.activations},
    }
    most = {"weight": target.weight.bits, "activation": target.activation.bits}
    is_narrow = {quantizer: bits < most[quantizer[0]] for quantizer, bits in bits_of.items()}
    sensitivity = measure_sensitivity(
        program,
        plan,
        base.repair_batches,
        weight_bits=[most["weight"]] if any(is_narrow["weight", name] for name in weights) else [],
        activation_bits=[most["activation"]] if any(is_narrow["activation", a.value] for a in plan.activations) else [],
    )
    at = sensitivity.noise_at
    now = {quantizer: at.get((*quantizer, bits), 0.0) for quantizer, bits in bits_of.items()}
    wide = {
        quantizer: at.get((*quantizer, most[quantizer[0]]), now[quantizer]) if narrow else now[quantizer]
        for quantizer, narrow in is_narrow.items()
    }
    names = spareable(program, plan)
    noise_now, noise_wide = layer_noise(program, plan, now, names), layer_noise(program, plan, wide, names)
    own = {name: _quantizers(program, plan, name) for name in names}
    macs = {row.value: float(row.macs) for row in count(program).rows}
    costs: Mapping[str, float] = lost_us or macs
    narrow, full = [], []
    for name in names:
        bits = most["weight"] if name in weights else most["activation"]
        if any(is_narrow[quantizer] for quantizer in own[name]):
            stored = edit.tensor_named(program.graph_module, weights[name].weight).numel() if name in weights else 0
            bytes_more = stored * (bits - bits_of.get(("weight", name), bits)) / 8
            gain = noise_now[name] - noise_wide[name]
            narrow.append(Candidate(step=Wider(name, bits), noise=gain, cost=bytes_more))
        beyond = _WIDE if target.any_bits else FLOAT
        if any(bits_of[quantizer] < beyond for quantizer in own[name]):
            full.append(Candidate(step=Wider(name, beyond), noise=noise_wide[name], cost=costs.get(name, 0.0)))
    return Ladder(narrow=tuple(narrow), full=tuple(full), noise=sum(noise_now.values()), lost_us=lost_us)


def widened(
    base: Quantization, widths: Mapping[str, int], replan: Callable[[Mapping[str, str]], QuantizationPlan]
) -> QuantizationPlan:
    """The plan in which layers have so many bits, or stay float, and all others what they had.

    With 16 bits the ranges of what a layer reads are the extremes: nothing need be cut.

    Args:
        replan: a plan without ranges in which the named layers stay float, for the reasons given.
    """
    floats = {name: REASON for name, bits in sorted(widths.items()) if bits == FLOAT}
    plan = replan(floats) if floats else replace(base.plan, ranges={})
    target = target_named(plan.target)
    schemes = {weight.value: weight.scheme.bits for weight in plan.weights}
    owners = {found.value: found.range_of for found in plan.activations}
    own_bits = {found.range_of: found.scheme.bits for found in plan.activations}
    weights: dict[str, int] = {}
    activations: dict[str, int] = {}
    for name, bits in widths.items():
        if bits == FLOAT:
            continue
        if name in schemes:
            weights[name] = max(bits, schemes[name])
        for source in data_inputs(base.prepared, base.prepared.values[name]):
            if (owner := owners.get(value_of(source))) is not None:
                at_least = bits if bits == _WIDE else target.activation.bits
                activations[owner] = max(at_least, activations.get(owner, own_bits[owner]))
    wide = plan.with_bits(weights, activations)
    extremes = {
        owner: (min(seen.minimum, 0.0), max(seen.maximum, 0.0))
        for owner, bits in activations.items()
        if bits == _WIDE and (seen := base.statistics.get(owner)) is not None
    }
    if not extremes:
        return wide
    ranged = choose_ranges(wide, base.statistics, algorithm=base.algorithm)
    return replace(ranged, ranges={**ranged.ranges, **extremes})


def _quantizers(program: Program, plan: QuantizationPlan, name: str) -> list[tuple[str, str]]:
    """Of a layer: that of its weight, and those of what it reads."""
    found = [("weight", name)] if any(weight.value == name for weight in plan.weights) else []
    quantized = {activation.value for activation in plan.activations}
    sources = (value_of(source) for source in data_inputs(program, program.values[name]))
    return [*found, *(("activation", source) for source in sources if source in quantized)]


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
    program: Program, plan: QuantizationPlan, noise: Mapping[tuple[str, str], float], names: Sequence[str]
) -> dict[str, float]:
    """The noise that sparing each layer takes away, nearly.

    That of a value is shared by the layers that write and read it, also through operators between them.

    Args:
        noise: of each quantizer, by kind and name.
    """
    found = dict.fromkeys(names, 0.0)
    values = program.values

    def is_layer(node: fx.Node) -> bool:
        return value_of(node) in found

    for name in names:
        found[name] += noise.get(("weight", name), 0.0)
    for activation in plan.activations:
        if not (brought := noise.get(("activation", activation.value), 0.0)):
            continue
        node = values[activation.value]
        writers = {activation.value} if is_layer(node) else nearest(node, is_layer, backwards=True)
        near = writers | nearest(node, is_layer, backwards=False)
        for name in near:
            found[name] += brought / len(near)
    return found
