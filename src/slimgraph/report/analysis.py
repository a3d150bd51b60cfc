"""The page and the file of an analysis: where a quantization loses, why, and what to do."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from markupsafe import Markup

from slimgraph.files import output_directory, write_text
from slimgraph.report.content import ValueHistogram, to_json
from slimgraph.report.environment import Environment
from slimgraph.report.html import render
from slimgraph.report.loss_plots import channel_strip, draw_channel_strip, draw_loss_shares, loss_shares
from slimgraph.report.losses import LayerLoss, LossAccount
from slimgraph.report.plots import draw_range_histogram, range_histogram

FILES = ("analysis.html", "analysis.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisReport:
    """What was found out about a quantization."""

    title: str
    target: str
    algorithm: str
    """What chose the ranges."""
    losses: LossAccount
    histograms: tuple[ValueHistogram, ...]
    """Of what the worst layers write, by the names of the values."""
    environment: Environment
    command: str
    """What to type to get this result again."""
    created: datetime
    """With its time zone."""

    @property
    def headline(self) -> str:
        """The finding in a sentence."""
        return headline(self.losses.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """A layer with its pictures."""

    layer: LayerLoss
    histogram: ValueHistogram | None
    histogram_svg: Markup
    histogram_text: str
    channels_svg: Markup
    channels_text: str


def headline(layers: Sequence[LayerLoss]) -> str:
    """What the layers, the worst first, come to in a sentence."""
    if not layers or layers[0].noise == 0:
        return "Quantization changes nothing"
    faulty = [layer for layer in layers if layer.causes]
    worst = layers[0]
    said = f"{worst.name} makes {100 * worst.share:.0f} % of the loss"
    if not faulty:
        return f"{said}; no layer has a fault of its own"
    part = sum(layer.share for layer in faulty)
    one = len(faulty) == 1
    return f"{said}; {len(faulty)} of {len(layers)} layers {'has' if one else 'have'} a fault, and " + (
        f"{'it makes' if one else 'they make'} {100 * part:.0f} % of it"
    )


def render_analysis(report: AnalysisReport) -> str:
    """HTML text of the analysis."""
    histograms = {histogram.name: histogram for histogram in report.histograms}
    cards = [
        _card(index, layer, histograms.get(layer.written))
        for index, layer in enumerate(report.losses.layers)
        if layer.channels is not None or layer.written in histograms
    ]
    shares = loss_shares(report.losses) if report.losses.layers else None
    return render(
        "analysis.html.j2",
        report=report,
        data_file=FILES[1],
        losses=report.losses,
        faulty=any(layer.causes for layer in report.losses.layers),
        shares=None if shares is None else (Markup(draw_loss_shares(shares, name="shares")), shares.description),
        cards=cards,
    )


def _card(index: int, layer: LayerLoss, histogram: ValueHistogram | None) -> _Card:
    # What is drawn holds no text of the model, so it may stand in the page as it is.
    histogram_svg, histogram_text, channels_svg, channels_text = "", "", "", ""
    if histogram is not None:
        numbers = range_histogram(histogram)
        histogram_svg, histogram_text = draw_range_histogram(numbers, name=f"range{index}"), numbers.description
    if layer.channels is not None:
        strip = channel_strip(layer.channels)
        channels_svg, channels_text = draw_channel_strip(strip, name=f"channels{index}"), strip.description
    return _Card(
        layer=layer,
        histogram=histogram,
        histogram_svg=Markup(histogram_svg),
        histogram_text=histogram_text,
        channels_svg=Markup(channels_svg),
        channels_text=channels_text,
    )


def write_analysis(report: AnalysisReport, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write `analysis.html` and `analysis.json` into the folder, which is made if it is missing; returns their paths.

    Raises:
        OutputError: the folder or a file cannot be written.
    """
    directory = output_directory(folder)
    page, data = (directory / name for name in FILES)
    write_text(page, render_analysis(report))
    write_text(data, to_json(report))
    return page, data
