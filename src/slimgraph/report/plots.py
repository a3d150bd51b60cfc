"""The pictures of a report: for each, a function that returns its numbers, one that draws them as SVG.

A drawing holds no text that came from a model: matplotlib would read `$` as mathematics, and has no glyphs for every
script. Names stand in the page, which escapes them. Colours are the page's, so that a drawing follows its scheme.
"""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from slimgraph.report.content import Report, ValueHistogram
from slimgraph.report.headline import value_text
from slimgraph.report.words import milliseconds, number, percent

# matplotlib knows no CSS variables: it draws in these marks, each of which is replaced by its variable afterwards. What
# follows the comma is used where the drawing stands outside a page.
INK, MUTED, ACCENT, WARNING, WASH = "#010101", "#020202", "#030303", "#040404", "#050505"
_CSS_COLOURS = {
    INK: "var(--ink, #1c1f23)",
    MUTED: "var(--muted, #5d6570)",
    ACCENT: "var(--accent, #1d63c4)",
    WARNING: "var(--bad, #b3261e)",
    WASH: "var(--wash, #e4ebf5)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.unicode_minus": True,
}
MAX_BARS = 128
"""More bars than this are thinner than a pixel; neighbours are added up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model in the accuracy–latency plane."""

    latency_ms: float
    latency_p90_ms: float
    metric: float
    interval: tuple[float, float] | None = None
    """Of the metric, 95 %, where it was estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyLatency:
    """Numbers of the accuracy–latency picture."""

    before: Point
    after: Point
    lowest_allowed: float | None
    """The metric below which more is lost than allowed."""
    in_percent: bool
    kind: str
    description: str
    """What the picture shows, in words, for those who cannot see it."""

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the vertical axis."""
        heights = [self.before.metric, self.after.metric, *(self.after.interval or ())]
        if self.lowest_allowed is not None:
            heights.append(self.lowest_allowed)
        spread = (max(heights) - min(heights)) or abs(heights[0]) * 0.01 or 0.01
        return (min(heights) - 0.35 * spread, max(heights) + 0.35 * spread)

    @property
    def shows_interval(self) -> bool:
        """Whether the interval is long enough to be seen behind the dot."""
        if self.after.interval is None:
            return False
        low, high = self.limits
        reach = max(abs(end - self.after.metric) for end in self.after.interval)
        return reach > 0.04 * (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeHistogram:
    """Numbers of the picture of a range: shares of the elements, and which of them are kept."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]
    """Of all elements, in each bin; they add up to 1, or are all 0."""
    low: float
    high: float
    codes: tuple[int, int] | None
    """Those of `low` and `high`; None where they are not told."""
    clipped_ratio: float
    description: str
    """What the picture shows, in words, for those who cannot see it."""


def accuracy_latency(report: Report) -> AccuracyLatency | None:
    """Where both models stand; None where accuracy or latency is not known."""
    metric, latency = report.metric, report.latency
    if metric is None or latency is None or not math.isfinite(metric.drop):
        return None
    interval = None
    if metric.change_interval is not None:
        interval = (metric.before + metric.change_interval[0], metric.before + metric.change_interval[1])
    before, after = (
        Point(latency_ms=call.median_ms, latency_p90_ms=call.p90_ms, metric=value, interval=ends)
        for call, value, ends in (
            (latency.original, metric.before, None),
            (latency.compressed, metric.after, interval),
        )
    )
    described = [
        f"{name} {milliseconds(point.latency_ms)} and {value_text(metric, point.metric)}"
        for name, point in (("original", before), ("compressed", after))
    ]
    return AccuracyLatency(
        before=before,
        after=after,
        lowest_allowed=None if metric.max_drop is None else metric.before - metric.max_drop,
        in_percent=metric.unit == "fraction",
        kind=metric.kind,
        description=f"Latency and {metric.kind}: {'; '.join(described)}.",
    )


def _merged(histogram: ValueHistogram) -> tuple[list[float], list[float]]:
    """Edges and counts of at most `MAX_BARS` bins."""
    step = math.ceil(len(histogram.counts) / MAX_BARS)
    starts = range(0, len(histogram.counts), step)
    edges = [histogram.edges[start] for start in starts] + [histogram.edges[-1]]
    return edges, [math.fsum(histogram.counts[start : start + step]) for start in starts]


def range_histogram(histogram: ValueHistogram) -> RangeHistogram:
    """What to draw for a histogram and its range."""
    edges, counts = _merged(histogram)
    total = math.fsum(counts) or 1.0
    return RangeHistogram(
        edges=tuple(edges),
        shares=tuple(count / total for count in counts),
        low=histogram.low,
        high=histogram.high,
        codes=histogram.codes,
        clipped_ratio=histogram.clipped_ratio,
        description=(
            f"Values from {number(edges[0])} to {number(edges[-1])}; range {number(histogram.low)} to "
            f"{number(histogram.high)}, {percent(histogram.clipped_ratio)} of the elements outside."
        ),
    )


@contextmanager
def style(name: str) -> Iterator[None]:
    """matplotlib as we want it, whatever the user's own settings are; ids depend on `name` and nothing else."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = name
        yield


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing of that size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(length=3)
    return figure, axes


def svg_of(figure: Figure, name: str) -> str:
    """The drawing as an SVG element that can stand in a page beside others: `name` makes its ids unique."""
    written = io.StringIO()
    without_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", metadata=without_metadata, transparent=True)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{name}-", text)
    text = re.sub(r"font-family:[^;\"]*;? ?", "", text)  # the page's
    for mark, colour in _CSS_COLOURS.items():
        text = text.replace(mark, colour)
    return text.strip()


def _dot(axes: Axes, point: Point, interval: tuple[float, float] | None, colour: str, scale: float) -> None:
    heights = None
    if interval is not None:
        low, high = interval
        heights = [[max(0.0, point.metric - low) * scale], [max(0.0, high - point.metric) * scale]]
    axes.errorbar(
        [point.latency_ms],
        [point.metric * scale],
        xerr=[[0.0], [max(0.0, point.latency_p90_ms - point.latency_ms)]],
        yerr=heights,
        fmt="o",
        markersize=8,
        color=colour,
        elinewidth=1.2,
        capsize=3,
        zorder=3,
    )


def _beyond(numbers: AccuracyLatency, point: Point, *, above: bool, near: float) -> float:
    """The height beyond which the label of a dot is free: of its own bar, of one that is `near`, and of the limit."""
    after, low, high = numbers.after, *numbers.limits
    ends = [point.metric]
    if after.interval is not None and numbers.shows_interval and abs(after.latency_ms - point.latency_ms) < near:
        ends += after.interval
    end, limit = max(ends) if above else min(ends), numbers.lowest_allowed
    return limit if limit is not None and not above and 0 <= end - limit < 0.12 * (high - low) else end


def draw_accuracy_latency(numbers: AccuracyLatency, *, name: str) -> str:
    """SVG of both models in the plane of latency and accuracy, with the lowest metric that is allowed."""
    scale = 100.0 if numbers.in_percent else 1.0
    before, after = numbers.before, numbers.after
    with style(name):
        figure, axes = figure_of(4.8, 3.2)
        axes.annotate(
            "",
            xytext=(before.latency_ms, before.metric * scale),
            xy=(after.latency_ms, after.metric * scale),
            arrowprops={"arrowstyle": "->", "color": MUTED, "shrinkA": 7, "shrinkB": 7, "linewidth": 1},
        )
        interval = after.interval if numbers.shows_interval else None
        right = 1.15 * max(before.latency_p90_ms, after.latency_p90_ms)
        # One label stands above its dot and one below, where neither the arrow goes nor the other label stands.
        for label, point, bar, colour, above in (
            ("original", before, None, MUTED, before.metric >= after.metric),
            ("compressed", after, interval, ACCENT, before.metric < after.metric),
        ):
            _dot(axes, point, bar, colour, scale)
            end = _beyond(numbers, point, above=above, near=0.15 * right)
            axes.annotate(
                label,
                (point.latency_ms, end * scale),
                xytext=(0, 7 if above else -7),
                textcoords="offset points",
                ha="center" if point.latency_ms > 0.12 * right else "left",  # it would reach beyond the axis
                va="bottom" if above else "top",
                color=colour,
                fontweight="bold",
            )
        if numbers.lowest_allowed is not None:
            # Away from the label below, which may stand as low.
            on_left = min(before, after, key=lambda point: point.metric).latency_ms > right / 2
            axes.axhline(numbers.lowest_allowed * scale, color=WARNING, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                "lowest allowed",
                (0.02 if on_left else 1, numbers.lowest_allowed * scale),
                xycoords=("axes fraction", "data"),
                xytext=(0, -3),
                textcoords="offset points",
                ha="left" if on_left else "right",
                va="top",
                color=WARNING,
            )
        axes.set_ylim(*(scale * end for end in numbers.limits))
        axes.set_xlim(0, right)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.ticklabel_format(useOffset=False)
        axes.set_xlabel("latency, median and 90th percentile, ms")
        axes.set_ylabel(f"{numbers.kind}, %" if numbers.in_percent else numbers.kind)
        return svg_of(figure, name)


def draw_range_histogram(numbers: RangeHistogram, *, name: str) -> str:
    """SVG of a distribution on a logarithmic scale, the elements outside the range in the colour of warnings."""
    left, right = min(numbers.edges[0], numbers.low), max(numbers.edges[-1], numbers.high)
    margin = 0.03 * (right - left) or 1.0
    seen = [share for share in numbers.shares if share > 0]
    floor = min(seen, default=1e-3) / 2
    with style(name):
        figure, axes = figure_of(3.4, 1.8)
        axes.set_yscale("log")
        axes.set_ylim(floor, max(seen, default=1.0) * 2)
        axes.set_xlim(left - margin, right + margin)
        axes.axvspan(numbers.low, numbers.high, color=WASH, linewidth=0)
        heights = [max(share, floor) for share in numbers.shares]  # an empty bin has no logarithm
        for colour, inside in ((WARNING, False), (ACCENT, True)):
            bars = axes.stairs(heights, numbers.edges, fill=True, baseline=floor, color=colour, linewidth=0)
            if inside:
                kept = Rectangle((numbers.low, floor), numbers.high - numbers.low, 1e3, transform=axes.transData)
                bars.set_clip_path(kept)
        for bound in (numbers.low, numbers.high):
            axes.axvline(bound, color=INK, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.13f}".rstrip("0").rstrip(".") + " %")
        if numbers.codes is not None and numbers.low < numbers.high:
            _mark_codes(axes, numbers.low, numbers.high, numbers.codes)
        return svg_of(figure, name)


def _mark_codes(axes: Axes, low: float, high: float, codes: tuple[int, int]) -> None:
    """An axis above the drawing that tells which codes stand for the numbers below."""
    first, last = codes
    step = (high - low) / (last - first)
    left, right = axes.get_xlim()
    above = axes.twiny()
    above.set_xlim(left, right)
    wide = bool((high - low) / (right - left) > 0.3)  # otherwise only two numbers have room, or one
    marked = sorted({first, last, *((first + last + 1) // 2,) * wide})
    above.set_xticks([low + (code - first) * step for code in marked], [str(code) for code in marked])
    above.tick_params(length=3, pad=1, colors=MUTED)
    for spine in above.spines.values():
        spine.set_visible(False)
