"""The pictures of a loss account: which layers make the loss, and how far the channels of one of them reach."""

import math
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator, PercentFormatter

from slimgraph.report.losses import ChannelRanges, LossAccount
from slimgraph.report.plots import ACCENT, INK, MUTED, WARNING, WASH, figure_of, style, svg_of
from slimgraph.report.words import number, percent

MOST_LAYERS = 40
"""Bars that can be told apart; the others are in the curve of the sum."""

MOST_CHANNELS = 192
"""Lines that can be told apart; of more, neighbours become one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShares:
    """Numbers of the picture of the shares, the largest first."""

    by_weight: tuple[float, ...]
    by_activation: tuple[float, ...]
    sums: tuple[float, ...]
    """Of the shares up to each layer."""
    description: str
    """What the picture shows, in words, for those who cannot see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStrip:
    """Numbers of the picture of channels: an interval each."""

    first: tuple[int, ...]
    """Channel at which each line begins: with very many channels it stands for several."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    outlier: int | None
    """Index of the line of the channel that stands out."""
    code_low: float
    code_high: float
    description: str
    """What the picture shows, in words, for those who cannot see it."""


def loss_shares(account: LossAccount) -> LossShares:
    """What to draw for an account."""
    shares = [layer.share for layer in account.layers]
    sums = tuple(math.fsum(shares[: index + 1]) for index in range(min(len(shares), MOST_LAYERS)))
    shown = account.layers[:MOST_LAYERS]
    half = next((index + 1 for index, part in enumerate(sums) if part >= 0.5), len(shown))
    return LossShares(
        by_weight=tuple(layer.share * layer.weight_share for layer in shown),
        by_activation=tuple(layer.share * (1 - layer.weight_share) for layer in shown),
        sums=sums,
        description=(
            f"The costliest of {len(shares)} layers makes {percent(shares[0])} of the loss"
            + (f", and the first {half} make {percent(sums[half - 1])}." if half > 1 else ".")
        ),
    )


def channel_strip(channels: ChannelRanges) -> ChannelStrip:
    """What to draw for the channels of a value."""
    count = len(channels.low)
    step = math.ceil(count / MOST_CHANNELS)
    starts = range(0, count, step)
    low = tuple(min(channels.low[start : start + step]) for start in starts)
    high = tuple(max(channels.high[start : start + step]) for start in starts)
    return ChannelStrip(
        first=tuple(starts),
        low=low,
        high=high,
        outlier=None if channels.outlier is None else channels.outlier // step,
        code_low=channels.code_low,
        code_high=channels.code_high,
        description=(
            f"{count} channels, which reach from {number(min(low))} to {number(max(high))}; the codes reach from "
            f"{number(channels.code_low)} to {number(channels.code_high)}."
        ),
    )


def draw_loss_shares(numbers: LossShares, *, name: str) -> str:
    """SVG of a bar for each layer, in the order of the table, and the sum up to it."""
    places = range(1, len(numbers.sums) + 1)
    with style(name):
        figure, axes = figure_of(9.6, 2.2)
        axes.bar(places, numbers.by_activation, width=0.8, color=ACCENT, linewidth=0)
        axes.bar(places, numbers.by_weight, width=0.8, bottom=numbers.by_activation, color=MUTED, linewidth=0)
        axes.set_xlim(0.4, len(numbers.sums) + 0.6)
        axes.set_xlabel("layer, in the order of the table")
        axes.set_ylabel("share of the loss")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        total = axes.twinx()
        total.plot(places, numbers.sums, color=INK, linewidth=1.2, marker="o", markersize=2.5)
        total.set_ylim(0, 1.04)
        total.set_ylabel("sum")
        total.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        total.spines["right"].set_visible(True)
        total.tick_params(length=3)
        return svg_of(figure, name)


def draw_channel_strip(numbers: ChannelStrip, *, name: str) -> str:
    """SVG of a line for each channel, over the range of the codes; one that stands out in the colour of warnings."""
    with style(name):
        figure, axes = figure_of(3.4, 1.8)
        count = len(numbers.first)
        axes.axhspan(numbers.code_low, numbers.code_high, color=WASH, linewidth=0)
        for bound in (numbers.code_low, numbers.code_high):
            axes.axhline(bound, color=INK, linewidth=1)
        colours = [WARNING if index == numbers.outlier else ACCENT for index in range(count)]
        axes.vlines(numbers.first, numbers.low, numbers.high, colors=colours, linewidth=max(0.7, min(4.0, 150 / count)))
        reach = (min(*numbers.low, numbers.code_low), max(*numbers.high, numbers.code_high))
        margin = 0.05 * (reach[1] - reach[0]) or 1.0
        axes.set_ylim(reach[0] - margin, reach[1] + margin)
        end = numbers.first[-1]
        axes.set_xlim(-0.02 * end - 0.6, 1.02 * end + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("channel")
        return svg_of(figure, name)
