"""The page of a sensitivity table: a curve for each group, and the numbers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator, PercentFormatter

from slimgraph.files import write_text
from slimgraph.report.environment import Environment
from slimgraph.report.html import render
from slimgraph.report.plots import ACCENT, MUTED, WARNING, figure_of, style, svg_of
from slimgraph.report.words import percent

_SENSITIVE = 3
"""Curves that are drawn in the colour of warnings; their names lead the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What is lost as more and more of a group goes."""

    name: str
    size: int
    losses: Mapping[float, float]
    """By the part that is gone, ascending: parts of the metric of the whole model; at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityReport:
    """The curves of a model, and what they were measured with."""

    title: str
    metric: str
    criterion: str
    baseline: float
    samples: int
    curves: tuple[Curve, ...]
    """In the order of the model."""
    environment: Environment
    command: str
    """What to type to get this result again."""
    created: datetime
    """With its time zone."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Every part that was taken away of any group."""
        return tuple(sorted({ratio for curve in self.curves for ratio in curve.losses}))

    @property
    def ranked(self) -> tuple[Curve, ...]:
        """The most sensitive first; where a curve ends early, its last loss stands for the rest."""

        def lost(curve: Curve) -> float:
            last = [*curve.losses.values()][-1]
            return sum(curve.losses.get(ratio, last) for ratio in self.ratios)

        return tuple(sorted(self.curves, key=lost, reverse=True))

    @property
    def headline(self) -> str:
        """The finding in a sentence."""
        if not self.curves:
            return "Nothing was measured"
        worst = self.ranked[0]
        ratio = min(worst.losses, key=lambda ratio: abs(ratio - 0.5))
        free = sum(curve.losses.get(ratio, 1.0) <= 0.01 for curve in self.curves)
        return (
            f"Without {ratio:.0%} of one group, {free} of {len(self.curves)} groups lose at most 1 % of {self.metric}; "
            f"{worst.name} loses the most, {percent(worst.losses[ratio])}"
        )


def draw_curves(report: SensitivityReport, *, name: str) -> str:
    """SVG of all curves, those of the most sensitive groups in the colour of warnings."""
    with style(name):
        figure, axes = figure_of(9.6, 3.2)
        ranked = report.ranked
        for curve in reversed(ranked):  # the most sensitive lie on top
            warned = curve in ranked[:_SENSITIVE]
            axes.plot(
                [0.0, *curve.losses],
                [0.0, *curve.losses.values()],
                color=WARNING if warned else MUTED,
                linewidth=1.6 if warned else 0.7,
                marker="o",
                markersize=3 if warned else 1.5,
            )
        axes.axhline(0, color=ACCENT, linewidth=0.8)
        axes.set_xlim(0, max(report.ratios, default=1.0) * 1.02)
        axes.set_xlabel("part of one group that is gone")
        axes.set_ylabel("part of the metric that is lost")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return svg_of(figure, name)


def write_sensitivity(report: SensitivityReport, path: str | os.PathLike[str], *, data_file: str) -> None:
    """Write the page.

    Args:
        data_file: name of the file beside it that has the numbers.
    Raises:
        OutputError: it cannot be written.
    """
    drawing = Markup(draw_curves(report, name="curves"))  # no text of the model is in it
    write_text(
        path,
        render("sensitivity.html.j2", report=report, data_file=data_file, drawing=drawing, warned=_SENSITIVE),
    )
