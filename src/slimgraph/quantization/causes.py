"""Why a quantizer errs: a table of faults, each with the numbers that show it and what to do about it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from slimgraph.quantization.density import Floats
from slimgraph.quantization.evidence import ActivationEvidence, WeightEvidence

OUTLIER_CHANNEL = 8.0
"""Times the median channel that the largest one reaches: it takes three bits from the others."""
OUTLIER_CHANNEL_RMS = 4.0
"""Times the median that its root mean square is; one stray element does not make a channel large."""
FEWEST_CHANNELS = 4
"""With fewer of them there is no median to speak of."""

LONG_TAIL = 4.0
"""Times the magnitude of nearly all elements that the grid reaches: two bits for a handful of elements."""
TAIL = 1e-4
"""The part of the elements that may lie in the tail."""
TAIL_LEAST = 4
"""The number of elements that may, at least."""
FEWEST_ELEMENTS = 256
"""With fewer of them there is no tail to speak of."""

SATURATION = 3.0
"""Times the rounding error that the saturation error is, where clipping does more harm than it spares."""
WRONG_SIGN = 0.01
"""Part of the elements that lie on a side of zero where there is no code."""
WASTED_SIDE = 0.4
"""Part of the codes on a side of zero where no element lies."""

FEW_CODES = 32
"""Codes below which rounding can be seen: 5 bits."""
UNEQUAL_PARTS = 8.0
"""Times the smallest of the parts of a concatenation or a sum that the largest one reaches."""
UNEQUAL_WEIGHTS = 8.0
"""Times the median that the weights of the largest channel reach."""
OUTLIER_WEIGHT = 10.0
"""Times the root mean square of the weights on a scale that the largest of them is; 3 to 5 is normal."""
OUTLIER_WEIGHT_ERROR = 0.5
"""Part of the rounding error of the weight that is due to such scales."""

_Evidence = TypeVar("_Evidence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A fault, in numbers."""

    text: str
    channel: int | None = None
    """The one that stands out."""
    remedy: str = ""
    """What would help in this very case, for the advice."""


@dataclass(frozen=True, slots=True)
class Rule(Generic[_Evidence]):
    """A fault: how it is called, how it shows, and what helps.

    In the advice `{skip}` stands for the options that leave layers in float, `{remedy}` for what the test has found.
    """

    name: str
    test: Callable[[_Evidence], Shown | None]
    advice: str


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _bits(ratio: float) -> str:
    return f"{math.log2(ratio):.1f} bits"


# Activations


def _signed_on_unsigned(seen: ActivationEvidence) -> Shown | None:
    first, last = seen.scheme.code_range
    (below, above), (lowest, highest) = seen.clipped, seen.extent
    if seen.zero_point == first and below >= WRONG_SIGN:
        return Shown(text=f"{100 * below:.1f} % of the elements are negative, down to {_number(lowest)}, and become 0")
    if seen.zero_point == last and above >= WRONG_SIGN:
        return Shown(text=f"{100 * above:.1f} % of the elements are positive, up to {_number(highest)}, and become 0")
    return None


def _clipped(seen: ActivationEvidence) -> Shown | None:
    saturation, rounding = seen.saturation_error, seen.rounding_error
    if not saturation > SATURATION * rounding:
        return None
    (low, high), (lowest, highest) = seen.grid, seen.extent
    return Shown(
        text=f"{100 * sum(seen.clipped):.2g} % of the elements lie outside of {_number(low)} … {_number(high)} (they "
        f"go from {_number(lowest)} to {_number(highest)}); saturation errs {_times(saturation, rounding)} as much as "
        "rounding"
    )


def _times(larger: float, smaller: float) -> str:
    return f"{larger / smaller:,.0f} times" if smaller > 0 else "infinitely"


def _unequal_parts(seen: ActivationEvidence) -> tuple[str, float, str, float, int] | None:
    """The largest part with its reach, the smallest, and how many codes that one has; None where they are alike."""
    reaches = {name: max(-low, high) for name, (low, high) in seen.parts.items()}
    reaches = {name: reach for name, reach in reaches.items() if reach > 0}
    if len(reaches) < 2:
        return None
    largest, smallest = max(reaches, key=lambda n: reaches[n]), min(reaches, key=lambda n: reaches[n])
    codes = seen.codes_between(*seen.parts[smallest])
    if reaches[largest] < UNEQUAL_PARTS * reaches[smallest] or codes > FEW_CODES:
        return None
    return largest, reaches[largest], smallest, reaches[smallest], codes


def _concatenation(seen: ActivationEvidence) -> Shown | None:
    found = _unequal_parts(seen) if seen.operator == "concat" else None
    if found is None:
        return None
    largest, most, smallest, least, codes = found
    return Shown(
        text=f"{largest} reaches {_number(most)} and {smallest} {_number(least)}, which on their one scale has "
        f"{codes} of {seen.codes} codes"
    )


def _sum(seen: ActivationEvidence) -> Shown | None:
    found = _unequal_parts(seen) if seen.operator == "add" else None
    if found is None:
        return None
    largest, most, smallest, least, codes = found
    return Shown(
        text=f"{largest} reaches {_number(most)} and {smallest} {_number(least)}, of which the grid of the sum keeps "
        f"{codes} of {seen.codes} codes"
    )


def outlier_channel(seen: ActivationEvidence) -> Shown | None:
    """One channel that reaches far beyond the others, for which all of them have a wide step."""
    if seen.spread is None or len(seen.spread.low) < FEWEST_CHANNELS:
        return None
    reach = np.minimum(seen.spread.reach, max(map(abs, seen.grid)))  # what is cut off takes no codes
    channel = int(reach.argmax())
    median, rms = _median(reach), _median(seen.spread.rms)
    if not (
        reach[channel] >= OUTLIER_CHANNEL * median > 0 and seen.spread.rms[channel] >= OUTLIER_CHANNEL_RMS * rms > 0
    ):
        return None
    near = int((reach >= reach[channel] / 2).sum())
    ratio = float(reach[channel] / median)
    text = (
        f"channel {channel} reaches {_number(float(reach[channel]))}, {ratio:,.0f} times the median of "
        f"{len(reach)} channels ({_number(median)}), which have {_bits(ratio)} less"
    )
    others = f"; {near} channels reach half as far or more" if near > 1 else ""
    remedy = _SCALING if seen.can_be_scaled else "its channels cannot be scaled, so "
    return Shown(text=text + others, channel=channel, remedy=remedy)


_SCALING = "smooth or equalize the channels (--repairs bias,smooth,equalize); else "


def _median(x: Floats) -> float:
    """Of what is not zero: dead channels are no measure of the others."""
    alive = x[x > 0]
    return float(np.median(alive)) if len(alive) else 0.0


def _outlier_values(seen: ActivationEvidence) -> Shown | None:
    if seen.density is None or seen.count_not_zero < FEWEST_ELEMENTS:
        return None
    tail = max(TAIL, TAIL_LEAST / seen.count_not_zero)
    usual = seen.quantile(tail)
    reach = min(max(map(abs, seen.grid)), max(map(abs, seen.extent)))
    if reach < LONG_TAIL * usual:
        return None
    return Shown(
        text=f"{100 * (1 - tail):.4g} % of the elements lie within ±{_number(usual)}, and the range reaches "
        f"{_number(reach)}, {reach / usual:,.0f} times as far, which costs them {_bits(reach / usual)}",
        remedy=_clipping(seen, reach),
    )


def _clipping(seen: ActivationEvidence, reach: float) -> str:
    """The algorithms whose ranges leave the tail out, the narrowest first."""
    reaches = {name: max(-low, high) for name, (low, high) in seen.ranges().items()}
    narrow = sorted((name for name in reaches if reaches[name] <= reach / 2), key=lambda name: reaches[name])
    if not narrow:
        return "no --algorithm cuts so much, so look at the samples that hold them"
    return f"--algorithm {' or '.join(f'{name} (to {_number(reaches[name])})' for name in narrow)}"


def _one_sided(seen: ActivationEvidence) -> Shown | None:
    first, last = seen.scheme.code_range
    lowest, highest = seen.extent
    used = seen.codes_between(lowest, highest)
    below = seen.codes_between(seen.grid[0], lowest) - 1
    above = seen.codes_between(highest, seen.grid[1]) - 1
    if max(below, above) < WASTED_SIDE * seen.codes or min(below, above) > (1 - WASTED_SIDE) / 2 * seen.codes:
        return None
    if not first < seen.zero_point < last or used <= FEW_CODES:
        return None
    side = "negative" if below > above else "positive"
    return Shown(
        text=f"the elements go from {_number(lowest)} to {_number(highest)}, so {max(below, above)} of {seen.codes} "
        f"codes, the {side} ones, are never used"
    )


def _few_codes(seen: ActivationEvidence) -> Shown | None:
    used = seen.codes_between(*seen.extent)
    if used >= FEW_CODES:
        return None
    (low, high), (lowest, highest) = seen.grid, seen.extent
    return Shown(
        text=f"{used} of {seen.codes} codes ({math.log2(used):.1f} bits) are used: the elements go from "
        f"{_number(lowest)} to {_number(highest)}, the grid from {_number(low)} to {_number(high)}"
    )


# Weights


def _unequal_weights(seen: WeightEvidence) -> Shown | None:
    if seen.scheme.axis is not None or len(seen.channel_reach) < FEWEST_CHANNELS:
        return None
    channel = int(seen.channel_reach.argmax())
    most, median = float(seen.channel_reach[channel]), _median(seen.channel_reach)
    if not most >= UNEQUAL_WEIGHTS * median > 0:
        return None
    return Shown(
        text=f"all channels have one scale; the weights of channel {channel} reach {_number(most)}, "
        f"{most / median:,.0f} times the median ({_number(median)}), which costs the others {_bits(most / median)}",
        channel=channel,
    )


def _few_weight_codes(seen: WeightEvidence) -> Shown | None:
    return Shown(text=f"its weights have {seen.codes} codes") if seen.codes < FEW_CODES else None


def _outlier_weights(seen: WeightEvidence) -> Shown | None:
    error = seen.row_scale**2
    large = seen.row_reach >= OUTLIER_WEIGHT * np.where(seen.row_rms > 0, seen.row_rms, np.inf)
    part = float(error[large].sum() / error.sum())
    if part < OUTLIER_WEIGHT_ERROR:
        return None
    ratio = np.divide(seen.row_reach, seen.row_rms, out=np.zeros_like(seen.row_rms), where=seen.row_rms > 0)
    return Shown(
        text=f"in {int(large.sum())} of {len(large)} channels the largest weight is up to {ratio.max():.0f} times the "
        f"root mean square; they make {100 * part:.0f} % of the rounding error",
        channel=int(ratio.argmax()),
    )


# The tables. The first rule that holds names the cause: what explains more stands before what follows from it.

ACTIVATION_RULES: tuple[Rule[ActivationEvidence], ...] = (
    Rule(
        "unsigned/signed mismatch",
        _signed_on_unsigned,
        "calibrate the range on data that has both signs, with --algorithm min_max",
    ),
    Rule(
        "clipped range",
        _clipped,
        "--algorithm min_max, which clips nothing of the calibration data; if it is that one, give more of them",
    ),
    Rule(
        "scale shared by a concatenation",
        _concatenation,
        "equalize what writes its parts (--repairs bias,equalize); else {skip}, so that they stay float",
    ),
    Rule(
        "outlier channel",
        outlier_channel,
        "{remedy}{skip}",
    ),
    Rule(
        "outlier values",
        _outlier_values,
        "{remedy}; if they matter for the answer, {skip}",
    ),
    Rule(
        "unsigned/signed mismatch",
        _one_sided,
        "a target whose grids move their zero point (--target onnxruntime, openvino); else {skip}",
    ),
    Rule("sum of unequal scales", _sum, "{skip}, so that the sum stays float; smoothing brings its sides together"),
    Rule("few codes used", _few_codes, "more bits, or a range of its own; else {skip}"),
)

WEIGHT_RULES: tuple[Rule[WeightEvidence], ...] = (
    Rule(
        "weights of unequal channels",
        _unequal_weights,
        "a scale for each channel (weight_per_channel=True); where the target has none, --repairs bias,equalize",
    ),
    Rule(
        "few codes used",
        _few_weight_codes,
        "learned rounding (--repairs bias,reach,rounding=block), more bits, or {skip}",
    ),
    Rule("outlier weights", _outlier_weights, "the best reach of the grid (--repairs bias,reach); else {skip}"),
)
