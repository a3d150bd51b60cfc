"""Tell where a quantization loses what it loses, and why."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

import slimgraph.deploy.targets as kinds
from slimgraph.deploy.compare import compare
from slimgraph.errors import CalibrationError
from slimgraph.program.names import operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.causes import ACTIVATION_RULES, WEIGHT_RULES, Shown, outlier_channel
from slimgraph.quantization.evidence import (
    ActivationEvidence,
    Spread,
    activation_evidence,
    weight_evidence,
)
from slimgraph.quantization.neighbours import nearest
from slimgraph.quantization.operators import data_inputs, kind_of, rectified_range
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.samples import first_samples
from slimgraph.quantization.sensitivity import QuantizerSensitivity, measure_sensitivity
from slimgraph.quantization.statistics import ValueStatistics
from slimgraph.table import text_table

SAMPLES = 32
"""Each quantizer is tried alone on all of them: noises are means over many numbers, which few samples give."""

_NOTABLE = 0.1
"""Share of the loss from which on something is said of a layer without any fault."""


_JOINS = frozenset({kinds.MATMUL, kinds.ADD, kinds.MULTIPLY, kinds.CONCAT, kinds.SOFTMAX, kinds.GLOBAL_AVERAGE_POOL})
_MOVES = frozenset({kinds.RESHAPE, kinds.MAX_POOL, kinds.AVERAGE_POOL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """What makes a quantizer err more than it would have to."""

    name: str
    quantizer: Literal["weight", "activation"]
    text: str
    """The numbers that show it."""
    advice: str
    """What to do."""
    channel: int | None = None
    """The one that stands out, where one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAnalysis:
    """What the quantizers of one layer do to the outputs: that of its weight, and that of what it writes."""

    name: str
    """Of the value that the layer computes; of an input."""
    written: str
    """The value that becomes integers: the layer's own, or that of the activation function fused behind it."""
    operator: str
    noise: float
    """Energy of the change of the outputs as a part of their energy, when only these quantizers act."""
    share: float
    """Part of the noise of all layers."""
    weight_share: float
    """Part of `share` that is due to the weight."""
    divergence: float | None
    """KL divergence of the class probabilities, in nats; None where there are no classes."""
    snr_db: float | None
    """Of what the layer writes, in the quantized program with all its quantizers; None where it was not compared."""
    causes: tuple[Cause, ...]
    """Faults, that of the noisier quantizer first."""
    skip: tuple[str, ...]
    """Layers that have to stay float for these quantizers to go."""
    spread: Spread | None
    """Of the channels of what becomes integers."""
    why: str
    """The causes with their numbers, in a line; also that there is none, where the layer costs much."""
    advice: str
    """What to do, in a line; empty where there is nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """The layers of a quantized program, the one that costs most first."""

    rows: tuple[LayerAnalysis, ...]
    noise: float
    """Sum over the layers, nearly that of all quantizers together."""
    samples: int

    def table(self, *, limit: int | None = None) -> str:
        """The rows as text."""
        cells = [
            (
                row.name,
                row.operator,
                f"{100 * row.share:.1f} %",
                f"{100 * row.weight_share:.0f} %",
                f"{row.noise:.2g}",
                "" if row.snr_db is None else f"{row.snr_db:.1f}",
                row.why,
                row.advice,
            )
            for row in self.rows[:limit]
        ]
        return text_table(("layer", "operator", "share", "by weight", "noise", "SNR dB", "cause", "what to do"), cells)


def analyze(
    program: Program,
    plan: QuantizationPlan,
    statistics: Mapping[str, ValueStatistics],
    batches: Iterable[Any],
    *,
    samples: int = SAMPLES,
    quantized: Program | None = None,
    snr_db: Mapping[str, float] | None = None,
) -> Analysis:
    """What each layer's quantizers alone do to the outputs, and the faults that make them err.

    Args:
        program: the float program that the plan was made for.
        plan: with ranges.
        statistics: of the calibration, with histograms.
        batches: what `Signature.bind` takes; the first `samples` samples are used, and read once.
        samples: a chain of n quantizers costs n/2 runs over them.
        quantized: what the plan made of the program, repairs included; None is the plan alone.
        snr_db: signal-to-noise ratios by value, where they are known already.
    Raises:
        ConfigError: the plan has no ranges.
        CalibrationError: the statistics have no histograms or lack a value, there is no batch, or a value has NaN or
            infinity.
    """
    _require_histograms(plan, statistics)
    used = first_samples(program, batches, samples)
    found = measure_sensitivity(program, plan, used, samples=samples)
    if snr_db is None:
        compared = apply_quantization(program, plan) if quantized is None else quantized
        snr_db = compare(program, compared, used).snr_db
    evidence = activation_evidence(program, plan, statistics, used)
    rows = _Rows(program, plan, found.rows, evidence, snr_db).rows()
    return Analysis(rows=rows, noise=sum(row.noise for row in rows), samples=found.samples)


def _require_histograms(plan: QuantizationPlan, statistics: Mapping[str, ValueStatistics]) -> None:
    for owner in plan.range_owners:
        if owner not in statistics or statistics[owner].histogram is None:
            raise CalibrationError(
                f"The statistics have no histogram of {owner!r}. Collect those of values_to_observe(plan) with "
                "histogram=True."
            )


class _Rows:
    """Gathers what is known of each layer."""

    def __init__(
        self,
        program: Program,
        plan: QuantizationPlan,
        found: Sequence[QuantizerSensitivity],
        evidence: Mapping[str, ActivationEvidence],
        snr_db: Mapping[str, float],
    ) -> None:
        self._program, self._plan, self._evidence, self._snr_db = program, plan, evidence, snr_db
        self._values = program.values
        self._weights = {weight.value: weight for weight in plan.weights}
        self._quantized = {activation.value for activation in plan.activations}
        self._by_layer: dict[str, list[QuantizerSensitivity]] = {}
        for row in found:
            name = row.name if row.kind == "weight" else self._writer(row.name)
            self._by_layer.setdefault(name, []).append(row)
        self._total = sum(row.noise for row in found) or 1.0

    def rows(self) -> tuple[LayerAnalysis, ...]:
        rows = [self._row(name, quantizers) for name, quantizers in self._by_layer.items()]
        position = {name: index for index, name in enumerate(self._values)}
        return tuple(sorted(rows, key=lambda row: (-row.noise, position[row.name])))

    def _writer(self, value: str) -> str:
        """The layer whose kernel writes a quantized value."""
        node = self._values[value]
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and rectified_range(node) is not None and len(source.users) == 1:
            name = value_of(source)
            if name and name not in self._quantized:
                return name
        return value

    def _row(self, name: str, quantizers: Sequence[QuantizerSensitivity]) -> LayerAnalysis:
        node = self._values[name]
        noise = sum(each.noise for each in quantizers)
        of_weight = sum(each.noise for each in quantizers if each.kind == "weight")
        written = next((each.name for each in quantizers if each.kind == "activation"), name)
        divergences = [each.divergence for each in quantizers if each.divergence is not None]
        worst_first = sorted(quantizers, key=lambda each: -each.noise)
        found = tuple(cause for cause in map(self._cause, worst_first) if cause is not None)
        skip = self._skip(worst_first[0])
        why = "; ".join(f"{cause.name} ({cause.quantizer}): {cause.text}" for cause in found)
        advice = found[0].advice if found else ""
        if not found and noise >= _NOTABLE * self._total > 0:
            why, advice = self._without_fault(worst_first[0], _options(skip))
        seen = self._evidence.get(written)
        return LayerAnalysis(
            name=name,
            written=written,
            operator="input" if node.op == "placeholder" else operator_name(node.target),
            noise=noise,
            share=noise / self._total,
            weight_share=of_weight / noise if noise else 0.0,
            divergence=sum(divergences) if divergences else None,
            snr_db=self._snr_db.get(written, self._snr_db.get(name)),
            causes=found,
            skip=skip,
            spread=None if seen is None else seen.spread,
            why=why,
            advice=advice,
        )

    def _without_fault(self, quantizer: QuantizerSensitivity, options: str) -> tuple[str, str]:
        """What is said of a layer that costs much though nothing is wrong with it, and what to do."""
        read = self._weights[quantizer.name].input if quantizer.kind == "weight" else None
        seen = self._evidence.get(read or "")
        stands_out = None if seen is None else outlier_channel(seen)
        if stands_out is not None:
            return f"no fault of its own, but it reads {read}: {stands_out.text}", f"{stands_out.remedy}{options}"
        return "no fault of its own: the outputs depend on it", options

    def _cause(self, quantizer: QuantizerSensitivity) -> Cause | None:
        """The first fault that the quantizer has; one that changes nothing has none."""
        if not quantizer.noise > 0 or math.isnan(quantizer.noise):
            return None
        if quantizer.kind == "weight":
            evidence = weight_evidence(self._program, self._plan, self._weights[quantizer.name])
            found = ((rule.name, rule.advice, rule.test(evidence)) for rule in WEIGHT_RULES)
        else:
            seen = self._evidence[quantizer.name]
            if seen.is_constant:
                return None
            found = ((rule.name, rule.advice, rule.test(seen)) for rule in ACTIVATION_RULES)
        options = _options(self._skip(quantizer))
        return next((_written(name, shown, advice, quantizer, options) for name, advice, shown in found if shown), None)

    def _skip(self, quantizer: QuantizerSensitivity) -> tuple[str, ...]:
        """What has to stay float so that the weight does, or the value: all that would bring it to integers."""
        if quantizer.kind == "weight":
            return (quantizer.name,)
        node = self._values[quantizer.name]
        writer = self._values[self._writer(quantizer.name)]
        own = {value_of(writer)} if self._is_integer(writer) else self._nearest(writer, backwards=True)
        around = own | self._nearest(node, backwards=False)
        return tuple(value for value in self._values if value in around)

    def _nearest(self, start: fx.Node, *, backwards: bool) -> set[str]:
        """The first operators that compute in integers in one direction; others move numbers at most."""
        return nearest(start, self._is_integer, backwards=backwards, passes=_only_moves)

    def _is_integer(self, node: fx.Node) -> bool:
        """Whether an operator computes in integers, and not because its neighbours do."""
        if value_of(node) in self._weights:
            return True
        sources = data_inputs(self._program, node) if kind_of(node) in _JOINS else []
        return bool(sources) and all(value_of(source) in self._quantized for source in sources)


def _only_moves(node: fx.Node) -> bool:
    return kind_of(node) in _MOVES or rectified_range(node) is not None


def _options(layers: Iterable[str]) -> str:
    return " ".join(f"--skip {shlex.quote(name)}" for name in layers)


def _written(name: str, shown: Shown, advice: str, quantizer: QuantizerSensitivity, options: str) -> Cause:
    return Cause(
        name=name,
        quantizer=quantizer.kind,
        text=shown.text,
        advice=advice.format(skip=options or "keep it in float", remedy=shown.remedy),
        channel=shown.channel,
    )
