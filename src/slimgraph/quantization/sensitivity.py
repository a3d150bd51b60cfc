"""How much each quantizer of a plan, by itself, moves what a program answers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError, ConfigError
from slimgraph.program.parts import in_parts
from slimgraph.program.program import Program
from slimgraph.program.replay import Instead, replay
from slimgraph.program.scheme import IntScheme
from slimgraph.quantization.apply import rounded_weight
from slimgraph.quantization.operators import weight_position
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.table import text_table

_Key = tuple[Literal["weight", "activation"], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSensitivity:
    """What one quantizer does when all others are left out."""

    kind: Literal["weight", "activation"]
    name: str
    """The layer whose weight is rounded, or the value that is."""
    bits: int
    noise: float
    """Energy of the change of the outputs as a part of their energy, Σ(y′−y)² / Σy², mean over the outputs."""
    divergence: float | None
    """Mean KL divergence, in nats, of the class probabilities of what it answers from those of the float program; None
    where the program does not return one (N, classes) tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The quantizers of a plan, the worst first. Noises of independent quantizers add up, nearly."""

    rows: tuple[QuantizerSensitivity, ...]
    samples: int

    def table(self, *, limit: int | None = None) -> str:
        """The rows as text, with the part that each has in the sum of all."""
        total = sum(row.noise for row in self.rows) or 1.0
        cells = [
            (row.name, row.kind, row.bits, f"{row.noise:.3g}", f"{100 * row.noise / total:.1f} %")
            for row in self.rows[:limit]
        ]
        return text_table(("name", "quantizer", "bits", "noise", "share"), cells)

    @property
    def noise(self) -> dict[tuple[str, str], float]:
        """Noise by kind and name."""
        return {(row.kind, row.name): row.noise for row in self.rows}


def measure_sensitivity(
    program: Program, plan: QuantizationPlan, batches: Iterable[Any], *, samples: int = 64
) -> Sensitivity:
    """How far the outputs move when one quantizer of the plan acts alone, for each of them.

    What stands before a quantizer is computed once for all of them, so that a chain of n layers costs n/2 runs.

    Args:
        program: the float program that the plan was made for, as `prepare` gives it.
        plan: with ranges.
        batches: what `Signature.bind` takes; the first `samples` samples are used.
    Raises:
        ConfigError: the plan has no ranges.
        CalibrationError: there is no batch.
    """
    if plan.range_owners and not plan.ranges:
        raise ConfigError("The plan has no ranges. Calibrate it first: choose_ranges(plan, collect_statistics(…)).")
    alternatives, owners = _alternatives(program, plan)
    changes: dict[_Key, _Change] = defaultdict(_Change)
    was_training = program.training
    program.eval()
    seen = 0
    try:
        with torch.inference_mode():
            for index, batch in enumerate(batches):
                bound = program.signature.bind(batch, where=f"Calibration batch {index}")
                bound = _first(program, bound, samples - seen)
                seen += len(next(iter(bound.values())))
                for part in in_parts(program, bound):
                    _add_part(program, part, alternatives, owners, changes)
                if seen >= samples:
                    break
    finally:
        program.train(was_training)
    if not seen:
        raise CalibrationError("There is no batch. Give at least one; an iterator that was read before is empty.")
    bits: dict[_Key, int] = {("weight", w.value): w.scheme.bits for w in plan.weights}
    bits |= {("activation", a.value): a.scheme.bits for a in plan.activations}
    rows = [
        QuantizerSensitivity(
            kind=kind,
            name=name,
            bits=bits[kind, name],
            noise=change.noise,
            divergence=change.divergence / seen if change.has_classes else None,
        )
        for (kind, name), change in changes.items()
    ]
    return Sensitivity(rows=tuple(sorted(rows, key=lambda row: -row.noise)), samples=seen)


def _first(program: Program, bound: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    batched = program.signature.batched
    return {name: x[:count] if name in batched else x for name, x in bound.items()}


# What each quantizer does


def _alternatives(program: Program, plan: QuantizationPlan) -> tuple[dict[str, list[Instead]], dict[str, list[_Key]]]:
    """By value, what may be computed instead, and beside it the quantizer that each stands for."""
    alternatives: dict[str, list[Instead]] = defaultdict(list)
    owners: dict[str, list[_Key]] = defaultdict(list)

    def offer(value: str, quantizer: _Key, instead: Instead) -> None:
        alternatives[value].append(instead)
        owners[value].append(quantizer)

    for weight in plan.weights:
        offer(
            weight.value, ("weight", weight.value), _RoundedWeight(weight.scheme, plan.weight_reach.get(weight.value))
        )
    values = program.values
    for activation in plan.activations:
        if activation.range_of != activation.value and activation.everywhere:
            continue  # it only hands on what was rounded before it
        rounding = _Rounding(activation.scheme, None if activation.dynamic else plan.ranges[activation.range_of])
        if activation.everywhere:
            offer(activation.value, ("activation", activation.value), _RoundedResult(rounding))
            continue
        for reader in plan.consumers[activation.value]:
            argument = _RoundedArgument(values[activation.value], rounding)
            offer(reader, ("activation", activation.value), argument)
    return alternatives, owners


@dataclass(frozen=True, slots=True)
class _Rounding:
    scheme: IntScheme
    interval: tuple[float, float] | None
    """None takes that of each tensor."""

    def __call__(self, x: Tensor) -> Tensor:
        low, high = x.aminmax() if self.interval is None else map(torch.tensor, self.interval)
        scale, zero_point = self.scheme.parameters(low, high)
        return torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), *self.scheme.code_range)


@dataclass(frozen=True, slots=True)
class _RoundedWeight:
    scheme: IntScheme
    reach: tuple[float, ...] | None

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = weight_position(node)
        rounded = rounded_weight(args[position], self.scheme, self.reach)
        return node.target(*args[:position], rounded, *args[position + 1 :], **kwargs)  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class _RoundedResult:
    rounding: _Rounding

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.rounding(args[0] if node.op == "placeholder" else node.target(*args, **kwargs))  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class _RoundedArgument:
    source: fx.Node
    rounding: _Rounding

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = [self.rounding(x) if given is self.source else x for given, x in zip(node.args, args, strict=True)]
        return node.target(*changed, **kwargs)  # type: ignore[operator]


# Sums over the batches


class _Change:
    """How far the outputs are from those of the float program."""

    def __init__(self) -> None:
        self.energies: list[tuple[float, float]] = []
        self.divergence = 0.0
        self.has_classes = False

    def add(self, outputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        pairs = [(y.double(), x.double()) for y, x in zip(outputs, wanted, strict=True) if x.is_floating_point()]
        found = [(float((y - x).square().sum()), float(x.square().sum())) for y, x in pairs]
        old = self.energies or [(0.0, 0.0)] * len(found)
        self.energies = [(a + c, b + d) for (a, b), (c, d) in zip(old, found, strict=True)]
        if len(pairs) == 1 and pairs[0][1].dim() == 2:
            given, expected = (scores.log_softmax(dim=1) for scores in pairs[0])
            self.divergence += float((expected.exp() * (expected - given)).sum())
            self.has_classes = True

    @property
    def noise(self) -> float:
        parts = [change / energy if energy else 0.0 for change, energy in self.energies]
        return sum(parts) / len(parts) if parts else 0.0


def _add_part(
    program: Program,
    part: Mapping[str, Tensor],
    alternatives: Mapping[str, list[Instead]],
    owners: Mapping[str, list[_Key]],
    changes: dict[_Key, _Change],
) -> None:
    outcomes = list(replay(program, part, alternatives))
    wanted = outcomes.pop().outputs
    for outcome in outcomes:
        changes[owners[outcome.value][outcome.choice]].add(outcome.outputs, wanted)
