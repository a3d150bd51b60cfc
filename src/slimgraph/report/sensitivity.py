"""The page of a sensitivity table: a curve for each group, and the numbers."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from slimgraph.files import write_text
from slimgraph.report.environment import Environment
from slimgraph.report.html import render
from slimgraph.report.plots import ACCENT, MUTED, WARNING, figure_of, style, svg_of
from slimgraph.report.words import percent

_SENSITIVE = 3
"""Curves at most that stand out, with their numbers in the table; more could not be told apart."""


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
    def outstanding(self) -> tuple[Curve, ...]:
        """The most sensitive of many, or all of a few."""
        return self.ranked[:_SENSITIVE]

    @property
    def headline(self) -> str:
        """The finding in a sentence."""
        if not self.curves:
            return "Nothing was measured"
        worst = self.ranked[0]
        ratio = min(worst.losses, key=lambda ratio: abs(ratio - 0.5))
        part, lost = f"{100 * ratio:.0f} %", percent(worst.losses[ratio])
        if len(self.curves) == 1:
            return f"Without {part} of {worst.name}, {lost} of {self.metric} is lost"
        free = sum(curve.losses.get(ratio, 1.0) <= 0.01 for curve in self.curves)
        return (
            f"Without {part} of one group, {free} of {len(self.curves)} groups {'loses' if free == 1 else 'lose'} at "
            f"most 1 % of {self.metric}; {worst.name} loses the most, {lost}"
        )


def draw_curves(report: SensitivityReport, *, name: str) -> str:
    """SVG of all curves; those that stand out have their numbers in the table at their ends."""
    with style(name):
        figure, axes = figure_of(9.6, 3.2)
        for curve in reversed(report.ranked):  # the most sensitive lie on top
            stands_out = curve in report.outstanding
            axes.plot(
                [0.0, *curve.losses],
                [0.0, *curve.losses.values()],
                color=WARNING if stands_out else MUTED,
                linewidth=1.6 if stands_out else 0.7,
                marker="o",
                markersize=3 if stands_out else 1.5,
            )
        axes.axhline(0, color=ACCENT, linewidth=0.8)
        axes.set_xlim(0, max(report.ratios, default=1.0) * 1.03)
        _number_ends(axes, report.outstanding)
        axes.set_xlabel("part of one group that is gone")
        axes.set_ylabel("part of the metric that is lost")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return svg_of(figure, name)


def _number_ends(axes: Axes, curves: tuple[Curve, ...]) -> None:
    """Write 1, 2, … behind the last points, one below the other where these are close."""
    low, high = axes.get_ylim()
    ends = [(*list(curve.losses.items())[-1], str(number)) for number, curve in enumerate(curves, 1)]
    height = math.inf
    for ratio, loss, number in sorted(ends, key=lambda end: end[1], reverse=True):
        height = min(loss, height - 0.07 * (high - low))
        axes.annotate(number, (ratio, height), (6, 0), textcoords="offset points", color=WARNING, va="center")


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
        render("sensitivity.html.j2", report=report, data_file=data_file, drawing=drawing),
    )
