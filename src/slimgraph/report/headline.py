"""The first line of a report: what compression gave, in words, with bad news in front."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from slimgraph.deploy.latency import LatencyComparison
from slimgraph.report.facts import MetricResult, ModelFacts
from slimgraph.report.words import MINUS, MISSING, number, percent, points, times

SAME_LATENCY = 0.02
"""Medians of two alternated runs of one model differ by about this much, so less is not a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """What a reader must know if nothing else is read."""

    tone: Literal["good", "caution", "bad"]
    """`caution`: something was not measured or not gained. `bad`: slower, larger, or worse than allowed."""
    alarms: tuple[str, ...]
    """What is not as it should be, worst first."""
    summary: str

    @property
    def text(self) -> str:
        """The whole first line; alarms come first and loud."""
        return f"{'; '.join(self.alarms).upper()} — {self.summary}" if self.alarms else self.summary


_RELATIVE = {"agreement": "Same answer as the original", "closeness": "Closeness to the original's output"}


def title_text(metric: MetricResult) -> str:
    """What the metric is called above its value."""
    return _RELATIVE.get(metric.kind, metric.name)


def value_text(metric: MetricResult, value: float) -> str:
    """A value of the metric in its unit."""
    return percent(value) if metric.unit == "fraction" else number(value, 4)


def difference_text(metric: MetricResult, value: float) -> str:
    """The size of a difference of two values of the metric in its unit."""
    return points(value) if metric.unit == "fraction" else number(value, 4)


def change_text(metric: MetricResult) -> str:
    """How the metric changed, with its sign: "−0.1 points", "unchanged"."""
    size = difference_text(metric, abs(metric.drop))
    if not isfinite(metric.drop):
        return MISSING
    if size == difference_text(metric, 0.0):
        return "unchanged"
    return f"{MINUS if metric.drop > 0 else '+'}{size}"


def size_text(original: ModelFacts, compressed: ModelFacts) -> str:
    """Comparison of the two file sizes."""
    ratio = compressed.size_bytes / original.size_bytes
    if ratio == 1:
        return "same size"
    return f"{times(1 / ratio)} smaller" if ratio < 1 else f"{times(ratio)} larger"


def is_slower(latency: LatencyComparison) -> bool:
    """Whether the compressed model takes longer, by more than its measurement spreads."""
    return latency.latency_ratio > 1 and not _is_same(latency)


def _is_same(latency: LatencyComparison) -> bool:
    within = latency.latency_ratio_low <= 1 <= latency.latency_ratio_high
    return within or abs(latency.latency_ratio - 1) <= SAME_LATENCY


def speed_text(latency: LatencyComparison) -> str:
    """Comparison of the two latencies."""
    if _is_same(latency):
        return "equally fast"
    if latency.latency_ratio < 1:
        return f"{times(latency.speedup)} faster"
    return f"{times(latency.latency_ratio)} slower"


def conditions_text(latency: LatencyComparison) -> str:
    """What the latency was measured with; a batch of one goes without saying."""
    call = latency.compressed
    threads = "one thread" if call.threads == 1 else f"{call.threads} threads"
    return threads if call.batch == 1 else f"{threads}, batch {call.batch}"


def _metric_clause(metric: MetricResult) -> str:
    if metric.kind == "agreement":
        return f"same answer as the original on {percent(metric.after)} of {metric.samples:,} samples"
    if metric.kind == "closeness":
        return f"output {percent(metric.after)} close to the original's on {metric.samples:,} samples"
    if not isfinite(metric.drop):
        return f"{metric.name} {value_text(metric, metric.after)} (was {value_text(metric, metric.before)})"
    change = change_text(metric)
    origin = "from" if change != "unchanged" else "at"
    return f"{metric.name} {value_text(metric, metric.after)} ({change} {origin} {value_text(metric, metric.before)})"


def _limit_clause(metric: MetricResult) -> str:
    if metric.max_drop is None or metric.exceeds_max_drop:  # what exceeds its limit is an alarm already
        return ""
    return f"; within the allowed drop of {difference_text(metric, metric.max_drop)}"


def _bad_news(
    original: ModelFacts,
    compressed: ModelFacts,
    metric: MetricResult | None,
    latency: LatencyComparison | None,
    made_for: str | None,
) -> list[str]:
    news = []
    if metric is not None and not isfinite(metric.after):
        news.append(f"{metric.name} is {number(metric.after)}")
    elif metric is not None and metric.exceeds_max_drop and metric.max_drop is not None and metric.kind == "closeness":
        least = percent(1 - metric.max_drop)
        news.append(f"the output is only {percent(metric.after)} close to the original's, and {least} is the least")
    elif metric is not None and metric.exceeds_max_drop and metric.max_drop is not None:
        what = "agreement" if metric.kind == "agreement" else metric.name
        news.append(f"{what} drops by more than the allowed {difference_text(metric, metric.max_drop)}")
    if latency is not None and is_slower(latency) and made_for is None:
        news.append("slower than the original")
    if compressed.size_bytes > original.size_bytes:
        news.append("larger than the original")
    return news


def _gaps(metric: MetricResult | None, latency: LatencyComparison | None, made_for: str | None) -> list[str]:
    gaps = []
    if latency is not None and made_for is not None:
        gaps.append(f"latency not measured in {made_for}")
    elif latency is not None and _is_same(latency):
        gaps.append("no faster than the original")
    if metric is None:
        gaps.append("accuracy not measured")
    elif metric.kind == "agreement":
        gaps.append("accuracy not measured, only agreement with the original")
    elif metric.kind == "closeness":
        gaps.append("accuracy not measured, only closeness to the original")
    if latency is None:
        gaps.append("latency not measured")
    return gaps


def headline(
    original: ModelFacts,
    compressed: ModelFacts,
    metric: MetricResult | None,
    latency: LatencyComparison | None,
    *,
    made_for: str | None = None,
) -> Headline:
    """First line for these measurements; None is what was not measured.

    Args:
        made_for: the target, where latency was measured in another runtime than its own.
    """
    bad, gaps = _bad_news(original, compressed, metric, latency, made_for), _gaps(metric, latency, made_for)
    clauses = [size_text(original, compressed)]
    if metric is not None:
        clauses.insert(0, _metric_clause(metric))
    if latency is not None:
        where = "" if made_for is None else " in ONNX Runtime"
        clauses.append(f"{speed_text(latency)}{where} on {conditions_text(latency)}")
    summary = f"{compressed.label} model: {', '.join(clauses)}{_limit_clause(metric) if metric else ''}"
    return Headline(tone="bad" if bad else "caution" if gaps else "good", alarms=(*bad, *gaps), summary=summary)
