"""Bring a quantization within the drop that is allowed, at the least cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor

from slimgraph.auto.control import search
from slimgraph.auto.outcome import Progress
from slimgraph.auto.widening import Ladder, Wider, ladder, widened
from slimgraph.program.program import Program
from slimgraph.quantization.agreement import output_noise
from slimgraph.quantization.merge import merge_quantizers
from slimgraph.quantization.mixed_bits import FLOAT
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization, quantize_again
from slimgraph.report.facts import AccuracyControl, Attempt, SparedLayer

_RANGES = ("min_max", "hist", "KL", "mse", "emd")
"""The algorithms that are tried; those that are left out give nearly the ranges of one of these."""

_ROUNDS = 3
"""How often the limit is tightened where ONNX Runtime and the program differ by a few samples."""

_EQUAL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What control works with."""

    replan: Callable[[Mapping[str, str]], QuantizationPlan]
    """A plan without ranges in which the named layers stay float."""
    repair: Callable[[str], Quantization] | None
    """The quantization by ranges of an algorithm and repairs that lower the noise; None: they were chosen before."""
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
    """A quantization whose drop is within the limit, and what was done; the best without wider layers, where none is.

    What costs the result nothing comes first: other ranges, of the statistics that are there, and then the cheap
    repairs, which take another calibration. Of each, that with the least noise of the outputs is taken if the metric
    agrees. If that is not enough, the fewest layers get more bits (`Ladder`, `search`), those first that bring the most
    noise for what they save. The metric decides in every step, that of the written file whenever the limit is met.

    Args:
        quantized: what loses too much, with histograms among its statistics.
        drop: what it loses.
    """
    control = _Control(quantized, means, limit=limit, drop=drop)
    for cheap in (control.choose_ranges, control.choose_repairs):
        cheap()
        if control.is_confirmed(control.best, control.drop):
            return control.best, control.account({}, control.confirmed, met=True)
    return control.widen()


class _Control:
    """What was tried so far, and the best of it without wider layers."""

    def __init__(self, quantized: Quantization, means: Means, *, limit: float, drop: float) -> None:
        self.first, self.first_drop = quantized, drop
        self.best, self.drop = quantized, drop
        self.confirmed = drop
        self._means, self._limit, self._allowed = means, limit, limit
        self._attempts: list[Attempt] = []
        self._ladder: Ladder | None = None

    def is_confirmed(self, candidate: Quantization, drop: float) -> bool:
        """Whether the limit is met, in the file as well; if only in the program, the limit of this one is tightened."""
        if candidate is self.first or not drop <= self._allowed + _EQUAL:
            return False
        self.confirmed = self._means.confirm(candidate)
        if self.confirmed <= self._limit + _EQUAL:
            return True
        self._allowed -= max(self.confirmed - drop, _EQUAL)
        return False

    # What costs the result nothing

    def choose_ranges(self) -> None:
        """Take the ranges that bring the least noise, if the metric agrees."""
        self._means.say("Trying other ranges", 0, None)
        tried = {self.first.algorithm: self.first}
        plan = replace(self.first.plan, ranges={})
        for algorithm in _RANGES:
            if algorithm not in tried:
                tried[algorithm] = quantize_again(self.first, plan, self._means.calibration(), algorithm=algorithm)
        noises = {name: self._noise(each) for name, each in tried.items()}
        best = min(noises, key=lambda name: noises[name])
        drop = self.first_drop
        if best != self.first.algorithm:
            drop = self._means.drop_of(merge_quantizers(tried[best].program))
        is_better = drop < self.first_drop
        kept = best if is_better else self.first.algorithm
        for name, noise in noises.items():
            found = {self.first.algorithm: self.first_drop, best: drop}.get(name)
            self._attempts.append(Attempt(kind="ranges", what=name, noise=noise, drop=found, kept=name == kept))
        if is_better:
            self.best, self.drop = tried[best], drop

    def choose_repairs(self) -> None:
        """Make the repairs that lower the noise, if the metric agrees."""
        if self._means.repair is None:
            self._note_repairs(self.first, kept=True)
            return
        self._means.say("Trying repairs", 0, None)
        repaired = self._means.repair(self.best.algorithm)
        drop = self.drop
        if repaired.repairs != self.best.repairs:
            drop = self._means.drop_of(merge_quantizers(repaired.program))
        is_better = drop < self.drop
        self._note_repairs(repaired, kept=is_better)
        if repaired.repairs != self.best.repairs:
            found = self._noise(repaired)
            what = str(repaired.repairs)
            self._attempts.append(Attempt(kind="repairs", what=what, noise=found, drop=drop, kept=is_better))
        if is_better:
            self.best, self.drop = repaired, drop

    def _note_repairs(self, chosen: Quantization, *, kept: bool) -> None:
        """Tell what "auto" has tried one by one, now or before."""
        for name, noise in chosen.repair_noise.items():
            made = kept and name in (chosen.repairs.names or ("nothing",))
            self._attempts.append(Attempt(kind="repairs", what=name, noise=noise, drop=None, kept=made))

    def _noise(self, candidate: Quantization) -> float:
        return output_noise(self.first.prepared, candidate.program, self._means.held_out)

    # What costs bytes or time

    def widen(self) -> tuple[Quantization, AccuracyControl]:
        """The best with the fewest layers that are wider, and what was done."""
        self._means.say("Measuring layers", 0, None)
        self._ladder = steps = ladder(self.best, self._means.lost_us())
        trials = _Trials(self.best, self._means, self._attempts, drop=self.drop)
        for _ in range(_ROUNDS):
            found = search(steps.order, trials.drop_of, limit=self._allowed, dearest=steps.dearest)
            widths = widths_of(found.taken)
            final = trials.quantization(widths) if found.met else None
            if final is None:  # not even all of them help, or nothing would be left to quantize
                break
            if self.is_confirmed(final, found.drop):
                trials.keep(widths)
                return final, self.account(widths, self.confirmed, met=True)
        return self.best, self.account({}, trials.drop_of(frozenset(steps.order)), met=False)

    # The account

    def account(self, widths: Mapping[str, int], drop: float, *, met: bool) -> AccuracyControl:
        """What was done, if layers have these widths now."""
        spared = []
        if self._ladder is not None:
            for name, bits in widths.items():
                share = self._ladder.noise_share(name, bits)
                lost = self._ladder.lost_us.get(name) if bits == FLOAT else None
                spared.append(
                    SparedLayer(name=name, bits=None if bits == FLOAT else bits, noise_share=share, lost_us=lost)
                )
        return AccuracyControl(
            limit=self._limit,
            drop_before=self.first_drop,
            drop=drop,
            met=met,
            algorithm_before=self.first.algorithm,
            algorithm=self.best.algorithm,
            repairs_before=self.first.repairs.names,
            repairs=self.best.repairs.names,
            spared=tuple(sorted(spared, key=lambda layer: -layer.noise_share)),
            layers=0 if self._ladder is None else len(self._ladder.layers),
            attempts=tuple(self._attempts),
        )


def widths_of(taken: Iterable[Wider]) -> dict[str, int]:
    """The bits of each layer after these steps."""
    widths: dict[str, int] = {}
    for step in taken:
        widths[step.layer] = max(step.bits, widths.get(step.layer, 0))
    return widths


class _Trials:
    """What the metric loses with some layers wider; each set is measured once."""

    def __init__(self, base: Quantization, means: Means, attempts: list[Attempt], *, drop: float) -> None:
        self._base, self._means, self._attempts = base, means, attempts
        self._drops: dict[frozenset[tuple[str, int]], float] = {frozenset(): drop}
        self._places: dict[frozenset[tuple[str, int]], int] = {}

    def drop_of(self, taken: frozenset[Wider]) -> float:
        widths = widths_of(taken)
        key = frozenset(widths.items())
        if key not in self._drops:
            self._means.say("Trying which layers to widen", len(self._drops), None)
            found = self.quantization(widths)
            program = self._base.prepared if found is None else merge_quantizers(found.program)
            self._drops[key] = drop = self._means.drop_of(program)
            self._places[key] = len(self._attempts)
            self._attempts.append(Attempt(kind="layers", what=described(widths), noise=None, drop=drop, kept=False))
        return self._drops[key]

    def keep(self, widths: Mapping[str, int]) -> None:
        """Note which of the trials is the result."""
        place = self._places.get(frozenset(widths.items()))
        if place is not None:
            self._attempts[place] = replace(self._attempts[place], kept=True)

    def quantization(self, widths: Mapping[str, int]) -> Quantization | None:
        """None where nothing is left to quantize."""
        if not widths:
            return self._base
        plan = widened(self._base, widths, self._means.replan)
        return quantize_again(self._base, plan, self._means.calibration()) if plan.activations else None


def described(widths: Mapping[str, int]) -> str:
    """How many layers have which bits.

    >>> described({"conv1": 8, "conv2": 8, "head": 32})
    '2 layers in 8 bits, 1 in float'
    """
    parts: list[str] = []
    for bits in sorted({*widths.values()}):
        number = sum(width == bits for width in widths.values())
        layers = "" if parts else " layer" if number == 1 else " layers"
        parts.append(f"{number}{layers} in {'float' if bits == FLOAT else f'{bits} bits'}")
    return ", ".join(parts)


def held_out(batches: Iterable[Mapping[str, Tensor]], *, skipped: int, most: int) -> list[Mapping[str, Tensor]]:
    """Batches behind the first `skipped`; where there are too few of them, the last ones."""
    found = list(islice(batches, skipped + most))
    return found[skipped:] or found[-most:]
