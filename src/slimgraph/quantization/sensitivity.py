"""How much each quantizer of a plan, by itself, moves what a program answers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from slimgraph.program.edit import tensor_named
from slimgraph.program.parts import in_parts
from slimgraph.program.program import Program
from slimgraph.program.replay import Instead, replay
from slimgraph.program.scheme import IntScheme
from slimgraph.program.signature import samples_in
from slimgraph.quantization.agreement import Change
from slimgraph.quantization.apply import rounded_weight
from slimgraph.quantization.operators import weight_position
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.reach import NARROW_BITS, best_reach
from slimgraph.quantization.samples import first_batches
from slimgraph.quantization.simulation import Rounding
from slimgraph.table import text_table

_Key = tuple[Literal["weight", "activation"], str, int]
"""Kind, name, bits."""


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
        """Noise by kind and name; of several widths that of the widest."""
        return {(row.kind, row.name): row.noise for row in sorted(self.rows, key=lambda row: row.bits)}

    @property
    def noise_at(self) -> dict[tuple[str, str, int], float]:
        """Noise by kind, name and bits."""
        return {(row.kind, row.name, row.bits): row.noise for row in self.rows}


def measure_sensitivity(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    samples: int = 64,
    weight_bits: Sequence[int] = (),
    activation_bits: Sequence[int] = (),
) -> Sensitivity:
    """How far the outputs move when one quantizer of the plan acts alone, for each of them.

    What stands before a quantizer is computed once for all of them, so that a chain of n layers costs n/2 runs.

    Args:
        program: the float program that the plan was made for, as `prepare` gives it.
        plan: with ranges.
        batches: what `Signature.bind` takes; the first `samples` samples are used.
        weight_bits, activation_bits: widths that are measured beside those of the plan, in the same pass. Ranges stay;
            narrow weights get the reach that suits them (`best_reach`).
    Raises:
        ConfigError: the plan has no ranges.
        CalibrationError: there is no batch.
        DataError: a batch does not fit the program, or has NaN or infinity; the message names it.
    """
    plan.require_ranges()
    alternatives, owners = _alternatives(program, plan, weight_bits, activation_bits)
    changes: dict[_Key, Change] = defaultdict(Change)
    was_training = program.training
    program.eval()
    seen = 0
    try:
        with torch.inference_mode():
            for bound in first_batches(program, batches, samples):
                seen += samples_in(bound)
                for part in in_parts(program, bound):
                    _add_part(program, part, alternatives, owners, changes)
    finally:
        program.train(was_training)
    rows = [
        QuantizerSensitivity(
            kind=kind,
            name=name,
            bits=bits,
            noise=change.noise,
            divergence=change.divergence / seen if change.has_classes else None,
        )
        for (kind, name, bits), change in changes.items()
    ]
    return Sensitivity(rows=tuple(sorted(rows, key=lambda row: -row.noise)), samples=seen)


# What each quantizer does


def _alternatives(
    program: Program, plan: QuantizationPlan, weight_bits: Sequence[int], activation_bits: Sequence[int]
) -> tuple[dict[str, list[Instead]], dict[str, list[_Key]]]:
    """By value, what may be computed instead, and beside it the quantizer that each stands for."""
    alternatives: dict[str, list[Instead]] = defaultdict(list)
    owners: dict[str, list[_Key]] = defaultdict(list)

    def offer(value: str, quantizer: _Key, instead: Instead) -> None:
        alternatives[value].append(instead)
        owners[value].append(quantizer)

    for weight in plan.weights:
        for bits in {weight.scheme.bits, *weight_bits}:
            scheme = replace(weight.scheme, bits=bits)
            reach = plan.weight_reach.get(weight.value) if bits == weight.scheme.bits else None
            if reach is None and bits != weight.scheme.bits and bits <= NARROW_BITS:
                reach = best_reach(tensor_named(program.graph_module, weight.weight), scheme)
            offer(weight.value, ("weight", weight.value, bits), _RoundedWeight(scheme, reach))
    values = program.values
    for activation in plan.activations:
        if activation.range_of != activation.value and activation.everywhere:
            continue  # it only hands on what was rounded before it
        interval = None
        if not activation.dynamic:
            interval = torch.tensor(plan.ranges[activation.range_of], device=program.device)
        for bits in {activation.scheme.bits, *activation_bits}:
            rounding = Rounding(replace(activation.scheme, bits=bits), interval)
            quantizer: _Key = ("activation", activation.value, bits)
            if activation.everywhere:
                offer(activation.value, quantizer, _RoundedResult(rounding))
                continue
            for reader in plan.consumers[activation.value]:
                offer(reader, quantizer, _RoundedArgument(values[activation.value], rounding))
    return alternatives, owners


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
    rounding: Rounding

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.rounding(args[0] if node.op == "placeholder" else node.target(*args, **kwargs))  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class _RoundedArgument:
    source: fx.Node
    rounding: Rounding

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = [self.rounding(x) if given is self.source else x for given, x in zip(node.args, args, strict=True)]
        return node.target(*changed, **kwargs)  # type: ignore[operator]


# Sums over the batches


def _add_part(
    program: Program,
    part: Mapping[str, Tensor],
    alternatives: Mapping[str, list[Instead]],
    owners: Mapping[str, list[_Key]],
    changes: dict[_Key, Change],
) -> None:
    outcomes = list(replay(program, part, alternatives))
    wanted = outcomes.pop().outputs
    for outcome in outcomes:
        changes[owners[outcome.value][outcome.choice]].add(outcome.outputs, wanted)
