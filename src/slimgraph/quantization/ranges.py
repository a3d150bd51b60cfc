"""Algorithms that choose the real interval that a value's integers shall cover.

Each takes the statistics of a value and its scheme, and returns (low, high) for `IntScheme.parameters`, where
low <= 0 <= high. For a symmetric scheme that is (-t, t) with the threshold t of PaddleSlim's post-training
quantization, which knows only such schemes. For an asymmetric one each docstring says what becomes of the formula; a
side on which the value has no elements stays at zero. A value that is zero everywhere gets (0, 0). Without data all
raise CalibrationError.
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from types import MappingProxyType

import numpy as np

from slimgraph.errors import CalibrationError, ConfigError, UnknownNameError, closest
from slimgraph.program.scheme import IntScheme
from slimgraph.quantization.density import Floats
from slimgraph.quantization.kl import span_to_keep
from slimgraph.quantization.rounding_error import RoundedMoments, rounded_moments
from slimgraph.quantization.statistics import ValueStatistics

Interval = tuple[float, float]


def abs_max(statistics: ValueStatistics, scheme: IntScheme) -> Interval:
    """The largest |x|; for an asymmetric scheme on each side that has elements."""
    low, high = _extent(statistics, scheme)
    reach = max(-low, high)
    return (-reach if low < 0 else 0.0, reach if high > 0 else 0.0)


def min_max(statistics: ValueStatistics, scheme: IntScheme) -> Interval:
    """The smallest and the largest element; for a symmetric scheme the larger magnitude of the two."""
    return _extent(statistics, scheme)


def avg(statistics: ValueStatistics, scheme: IntScheme) -> Interval:
    """Mean over samples of each sample's max|x|; for an asymmetric scheme the means of its minimum and its maximum.

    PaddleSlim takes the mean over batches of the mean in a batch: there the samples of a small last batch weigh more.
    """
    _extent(statistics, scheme)
    if scheme.symmetric:
        threshold = statistics.sample_abs_max_sum / statistics.samples
        return (-threshold, threshold)
    low, high = statistics.sample_min_sum / statistics.samples, statistics.sample_max_sum / statistics.samples
    return (min(low, 0.0), max(high, 0.0))


def hist(
    statistics: ValueStatistics, scheme: IntScheme, *, hist_percent: float = 0.99999, bins: int = 2048
) -> Interval:
    """The quantile `hist_percent` of |x|: the centre of the first bin up to whose end at least that fraction lies.

    For an asymmetric scheme the quantile of x above and its mirror image below, so that each side clips at most the
    fraction 1 - hist_percent. Bins start from zero; PaddleSlim's start from min|x|, which is then not added.
    """
    if not 0.0 < hist_percent <= 1.0:
        raise ConfigError(f"hist_percent is {hist_percent}; give a fraction above 0 and up to 1, such as 0.9999.")
    low, high = _extent(statistics, scheme)
    if low == high:
        return (0.0, 0.0)
    counts, start, width = _binned(statistics, scheme, bins)
    upper = start + (_quantile(counts, hist_percent) + 0.5) * width
    if scheme.symmetric:
        return (-upper, upper)
    lower = high - (_quantile(counts[::-1], hist_percent) + 0.5) * width
    return (min(lower, 0.0) if low < 0 else 0.0, max(upper, 0.0) if high > 0 else 0.0)


def kl(statistics: ValueStatistics, scheme: IntScheme, *, bins: int = 2048) -> Interval:
    """The threshold at which |x|, clipped and rounded, diverges least from |x| as it is (`kl.divergences`).

    The candidates lie from half of max|x| upwards, the levels are the positive codes (127 at 8 bits). Bins start from
    zero; PaddleSlim's start from min|x|, which is then not added, and a constant's threshold is nearly zero there.

    For an asymmetric scheme the levels are all steps between the codes (255 at 8 bits), over the distribution of x
    itself, and `kl.span_to_keep` chooses both ends.
    """
    low, high = _extent(statistics, scheme)
    if low == high:
        return (0.0, 0.0)
    counts, start, width = _binned(statistics, scheme, bins)
    first, last = scheme.code_range
    levels = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else last - first
    begin, end = span_to_keep(counts, levels=levels, zero=-start / width)
    upper = start + (end + 0.5) * width  # as in PaddleSlim half a bin beyond what was kept
    if scheme.symmetric:
        return (-upper, upper)
    lower = start + (begin - 0.5) * width
    return (min(lower, 0.0) if low < 0 else 0.0, max(upper, 0.0) if high > 0 else 0.0)


def mse(statistics: ValueStatistics, scheme: IntScheme, *, lowest: float = 0.3, step: float = 0.02) -> Interval:
    """The scaled extent whose quantization, saturation included, has the least mean squared error.

    Candidates are the ratios 1, 1 - step, ... down to `lowest`; of equals the widest wins. For an asymmetric scheme and
    elements on both sides, one ratio for both ends is chosen first, then one for each end in turn until both stay.

    The error is that of all data, and negative elements keep their sign. PaddleSlim keeps the candidate of the one
    batch with the least error, which is the one with the least energy; clips negative elements to zero in one of its
    modes; and misses the ratio 1, since it adds up the steps in floating point.
    """
    return _least(_squared_error, statistics, scheme, _ratios(lowest, step))


def emd(statistics: ValueStatistics, scheme: IntScheme, *, lowest: float = 0.3, step: float = 0.02) -> Interval:
    """As `mse`, but with the error |mean x - mean x'| + |std x - std x'|, where x' is the quantized x.

    The name is PaddleSlim's; it is not the earth mover's distance. Corrected as `mse`.
    """
    return _least(_moment_error, statistics, scheme, _ratios(lowest, step))


def ptf(statistics: ValueStatistics, scheme: IntScheme) -> Interval:
    """The extent divided by 1, 2, 4 or 8, whichever has the least mean squared error; of equals the widest.

    These are the power-of-two factors of FQ-ViT. For an asymmetric scheme both ends have the same factor. The error is
    that of all data, and negative elements keep their sign; PaddleSlim clips them to zero, and its last batch decides.
    """
    ratios = np.array([1.0, 0.5, 0.25, 0.125])
    return _least(_squared_error, statistics, scheme, ratios, each_end=False)


RANGE_ALGORITHMS: Mapping[str, Callable[..., Interval]] = MappingProxyType(
    {
        "abs_max": abs_max,
        "min_max": min_max,
        "avg": avg,
        "hist": hist,
        "KL": kl,
        "mse": mse,
        "emd": emd,
        "ptf": ptf,
    }
)
"""By the names of the configuration files."""

DEFAULT_ALGORITHM = "min_max"
"""With repaired biases it is among the best on every network of docs/benchmarks.md. Those that clip gain nothing there,
and avg cuts deep into values of a few elements a sample, whose extremes differ from sample to sample."""

NEED_HISTOGRAM = frozenset({"hist", "KL", "mse", "emd", "ptf"})
"""Algorithms that cannot read statistics made with `histogram=False`."""


def range_algorithm(name: str, options: Iterable[str] = ()) -> Callable[..., Interval]:
    """The algorithm of that name, which takes the options of those names.

    Raises:
        UnknownNameError: there is none, or it has no such option; the message offers the closest ones.
    """
    if name not in RANGE_ALGORITHMS:
        raise UnknownNameError(f"There is no range algorithm {name!r}. {closest(name, RANGE_ALGORITHMS)}")
    parameters = signature(RANGE_ALGORITHMS[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            hint = closest(option, known) if known else "It has none."
            raise UnknownNameError(f"The range algorithm {name!r} has no option {option!r}. {hint}")
    return RANGE_ALGORITHMS[name]


def _extent(statistics: ValueStatistics, scheme: IntScheme) -> Interval:
    """Where the elements and zero lie; widened to be symmetric if the scheme is."""
    if statistics.samples == 0:
        raise CalibrationError(
            "A range is asked for a value of which calibration has seen no element. Calibrate on at least one batch "
            "that reaches it and is not empty."
        )
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    return (min(low, -high), max(high, -low)) if scheme.symmetric else (low, high)


def _binned(statistics: ValueStatistics, scheme: IntScheme, bins: int) -> tuple[Floats, float, float]:
    """Counts in `bins` bins, where they start, and their width: of |x| if the scheme is symmetric, else of x."""
    if bins < 2:
        raise ConfigError(f"bins is {bins}; give at least 2, usually 2048.")
    low, high = _extent(statistics, scheme)
    start = 0.0 if scheme.symmetric else low
    counts = statistics.density(absolute=scheme.symmetric).rebinned(start, high, bins)
    return counts, start, (high - start) / bins


def _quantile(counts: Floats, fraction: float) -> int:
    """Index of the first bin up to whose end at least this fraction lies."""
    below = np.cumsum(counts)
    return int(np.searchsorted(below, fraction * below[-1]))


def _squared_error(statistics: ValueStatistics, rounded: RoundedMoments) -> Floats:
    return statistics.square_sum / statistics.count - 2.0 * rounded.mean_product + rounded.mean_square


def _moment_error(statistics: ValueStatistics, rounded: RoundedMoments) -> Floats:
    std: Floats = np.sqrt(np.maximum(rounded.mean_square - rounded.mean**2, 0.0))
    return abs(rounded.mean - statistics.mean) + abs(std - statistics.std)


def _ratios(lowest: float, step: float) -> Floats:
    if not 0.0 < lowest <= 1.0 or not 0.0 < step <= 1.0:
        raise ConfigError(f"lowest is {lowest} and step {step}; give two numbers above 0 and up to 1.")
    steps = int((1.0 - lowest) / step + 1e-6)  # 0.7 / 0.02 is a little less than 35
    return 1.0 - step * np.arange(steps + 1, dtype=np.float64)


def _least(
    error: Callable[[ValueStatistics, RoundedMoments], Floats],
    statistics: ValueStatistics,
    scheme: IntScheme,
    ratios: Floats,
    *,
    each_end: bool = True,
) -> Interval:
    """The extent, scaled by those of the descending `ratios` that have the least error; of equals the first."""
    low, high = _extent(statistics, scheme)
    if low == high:
        return (0.0, 0.0)
    density = statistics.density()

    def best(low_ratios: Floats, high_ratios: Floats) -> int:
        ends = np.broadcast_arrays(low * low_ratios, high * high_ratios)
        parts = 1 + ends[0].size * 2**scheme.bits // 2**20  # bounds the memory: 16 bits have 65,536 codes
        pieces = zip(*(np.array_split(end, parts) for end in ends), strict=True)
        errors = [error(statistics, rounded_moments(density, scheme, *piece)) for piece in pieces]
        return int(np.argmin(np.concatenate(errors)))

    low_ratio = high_ratio = ratios[best(ratios, ratios)]
    if each_end and not scheme.symmetric and low < 0 < high:
        # This ends, since every step lowers the error, or widens the interval at the same error.
        while True:
            before = (low_ratio, high_ratio)
            high_ratio = ratios[best(low_ratio, ratios)]
            low_ratio = ratios[best(ratios, high_ratio)]
            if before == (low_ratio, high_ratio):
                break
    return (float(low * low_ratio), float(high * high_ratio))
