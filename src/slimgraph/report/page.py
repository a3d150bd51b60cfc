"""The report as files: one HTML page that needs nothing but itself, and the same content as JSON."""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from slimgraph.files import output_directory, write_text
from slimgraph.program.program import Json
from slimgraph.report import words
from slimgraph.report.content import Report, ValueHistogram, to_json, worst_first
from slimgraph.report.facts import IntegerKernels, MetricResult, ModelFacts
from slimgraph.report.headline import change_text, conditions_text, size_text, speed_text, title_text, value_text
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


def _bar(snr_db: float | None) -> float:
    """Length of the bar behind a signal-to-noise ratio, in percent: 60 dB and more is all of it."""
    return 0.0 if snr_db is None or math.isnan(snr_db) else max(0.0, min(1.0, snr_db / 60)) * 100


def _inline(value: Json) -> str:
    """A JSON value of the history on one line: text as it is, a list by its elements."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return words.number(value, 4)
    if isinstance(value, list):
        return ", ".join(map(_inline, value)) or "none"
    return json.dumps(value, ensure_ascii=False)


def _breakable(name: str) -> Markup:
    """A dotted name that a narrow column may break after its separators, and else only where it must."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[._/:])", name) if part)


def _package_text(name: str) -> str:
    return files("slimgraph.report").joinpath(name).read_text(encoding="utf-8")


def render_page(report: Report) -> str:
    """HTML text of the report. It asks for nothing from outside, and its own policy forbids it to."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for write in (words.number, words.percent, words.scaled, words.file_size, words.grouped, words.milliseconds):
        environment.filters[write.__name__] = write
    environment.filters.update(bar=_bar, breakable=_breakable, inline=_inline)
    environment.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    script = _package_text("page.js")
    page = environment.from_string(_package_text("page.html.j2")).render(
        report=report,
        headline=report.headline,
        summary=summary(report),
        conditions=None if report.latency is None else conditions_text(report.latency),
        change=None if report.metric is None else change_text(report.metric),
        size_change=size_text(report.original, report.compressed),
        speed_change=None if report.latency is None else speed_text(report.latency),
        title=title_text,
        value=value_text,
        plane=_plane(report),
        histograms=[(histogram, _range(index, histogram)) for index, histogram in enumerate(report.histograms)],
        layers=worst_first(report.layers),
        style=Markup(_package_text("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    # A name may hold half of a surrogate pair (a file name that is not UTF-8 does), which no file can.
    return page.encode("utf-8", errors="replace").decode("utf-8")


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
