"""The report as files: one HTML page that needs nothing but itself, and the same content as JSON."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from slimgraph.files import output_directory, write_text
from slimgraph.report import words
from slimgraph.report.content import Report, ValueHistogram, to_json, worst_first
from slimgraph.report.facts import IntegerKernels, MetricResult, ModelFacts
from slimgraph.report.headline import (
    change_text,
    conditions_text,
    difference_text,
    size_text,
    speed_text,
    title_text,
    value_text,
)
from slimgraph.report.html import render
from slimgraph.report.plots import accuracy_latency, draw_accuracy_latency, draw_range_histogram, range_histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A line of the summary: one quantity before and after."""

    quantity: str
    before: str
    after: str
    change: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawing, and what it says in words."""

    svg: Markup
    description: str
    shows_interval: bool = False


def _interval_text(metric: MetricResult, interval: tuple[float, float]) -> str:
    scale = 100 if metric.unit == "fraction" else 1
    low, high = (f"{'+' if end > 0 else ''}{words.number(scale * end, 2)}" for end in interval)
    return f"95 %: {low} to {high}"


def _metric_lines(report: Report) -> Iterator[Comparison]:
    metric = report.metric
    if metric is None:
        return
    is_relative = metric.kind != "accuracy"  # to the original, of which there is nothing to say then
    change = change_text(metric)
    if metric.change_interval is not None:
        change = f"{change} ({_interval_text(metric, metric.change_interval)})"
    yield Comparison(
        quantity=f"{title_text(metric)}, {metric.samples:,} samples",
        before=words.MISSING if is_relative else value_text(metric, metric.before),
        after=value_text(metric, metric.after),
        change="" if is_relative else change,
    )


def _latency_lines(report: Report) -> Iterator[Comparison]:
    latency = report.latency
    if latency is None:
        return
    original, compressed = latency.original, latency.compressed
    low, high = latency.latency_ratio_low, latency.latency_ratio_high
    yield Comparison(
        quantity=f"Latency, median of {compressed.repeats:,} calls",
        before=words.milliseconds(original.median_ms),
        after=words.milliseconds(compressed.median_ms),
        change=f"{speed_text(latency)} (ratio {latency.latency_ratio:.2f}; half of the pairs {low:.2f} to {high:.2f})",
    )
    yield Comparison(
        quantity="Latency, 90th percentile",
        before=words.milliseconds(original.p90_ms),
        after=words.milliseconds(compressed.p90_ms),
        change=f"ratio {compressed.p90_ms / original.p90_ms:.2f}",
    )


def _kernel_lines(original: ModelFacts, compressed: ModelFacts) -> Iterator[Comparison]:
    def said(kernels: IntegerKernels | None) -> str:
        return words.MISSING if kernels is None else f"{kernels.integer:,} of {kernels.total:,}"

    before = {kernels.kind: kernels for kernels in original.integer_kernels}
    after = {kernels.kind: kernels for kernels in compressed.integer_kernels}
    for kind in dict.fromkeys((*before, *after)):
        yield Comparison(
            quantity=f"Integer kernels, {kind}", before=said(before.get(kind)), after=said(after.get(kind)), change=""
        )


def _count_lines(original: ModelFacts, compressed: ModelFacts) -> Iterator[Comparison]:
    for quantity, before, after in (
        ("Parameters", original.parameters, compressed.parameters),
        ("MACs for one sample", original.macs, compressed.macs),
    ):
        if before is None and after is None:
            continue
        change = "unchanged" if before == after else ""
        if before and after and before != after:
            change = f"{'+' if after > before else ''}{words.percent(after / before - 1)}"
        yield Comparison(quantity=quantity, before=words.scaled(before), after=words.scaled(after), change=change)


def summary(report: Report) -> list[Comparison]:
    """Lines of the table that compares the two models; what was not measured has none."""
    original, compressed = report.original, report.compressed
    return [
        *_metric_lines(report),
        Comparison(
            quantity="File size, bytes",
            before=words.grouped(original.size_bytes),
            after=words.grouped(compressed.size_bytes),
            change=size_text(original, compressed),
        ),
        *_latency_lines(report),
        *_kernel_lines(original, compressed),
        *_count_lines(original, compressed),
    ]


# What `plots` draws holds no text of the model, so it may stand in the page as it is.


def _plane(report: Report) -> Picture | None:
    numbers = accuracy_latency(report)
    if numbers is None:
        return None
    svg = Markup(draw_accuracy_latency(numbers, name="plane"))
    return Picture(svg=svg, description=numbers.description, shows_interval=numbers.shows_interval)


def _range(index: int, histogram: ValueHistogram) -> Picture:
    numbers = range_histogram(histogram)
    svg = draw_range_histogram(numbers, name=f"range{index}")
    return Picture(svg=Markup(svg), description=numbers.description)


def render_page(report: Report) -> str:
    """HTML text of the report."""
    return render(
        "page.html.j2",
        report=report,
        data_file="report.json",
        headline=report.headline,
        summary=summary(report),
        conditions=None if report.latency is None else conditions_text(report.latency),
        change=None if report.metric is None else change_text(report.metric),
        size_change=size_text(report.original, report.compressed),
        speed_change=None if report.latency is None else speed_text(report.latency),
        title=title_text,
        difference=difference_text,
        value=value_text,
        plane=_plane(report),
        histograms=[(histogram, _range(index, histogram)) for index, histogram in enumerate(report.histograms)],
        layers=worst_first(report.layers),
        losses=report.losses,
    )


def write_report(report: Report, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into the folder, which is made if it is missing, and return their paths.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    directory = output_directory(folder)
    page, data = directory / "report.html", directory / "report.json"
    write_text(page, render_page(report))
    write_text(data, to_json(report))
    return page, data
