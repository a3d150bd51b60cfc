"""Range algorithms against cases by hand, laws, and a slow two-pass implementation of the documented formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimgraph.errors import CalibrationError, ConfigError
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.quantization.kl import bins_to_keep, divergences, span_to_keep
from slimgraph.quantization.ranges import NEED_HISTOGRAM, RANGE_ALGORITHMS
from slimgraph.quantization.statistics import ValueStatistics

SYMMETRIC = IntScheme()
ASYMMETRIC = IntScheme(signed=False, symmetric=False)
ALL = sorted(RANGE_ALGORITHMS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there are thousands of small operations here, which gain nothing from more
    yield
    torch.set_num_threads(threads)


def statistics_of(*batches):
    statistics = ValueStatistics()
    for batch in batches:
        statistics.update(torch.as_tensor(batch, dtype=torch.float32), name="x")
    return statistics


def range_of(algorithm, *batches, scheme=SYMMETRIC, **options):
    return RANGE_ALGORITHMS[algorithm](statistics_of(*batches), scheme, **options)


def quantized(x: Tensor, interval: tuple[float, float], scheme: IntScheme) -> Tensor:
    scale, zero_point = scheme.parameters(*(torch.tensor(end, dtype=torch.float64) for end in interval))
    return dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme)


def squared_error(x: Tensor, interval: tuple[float, float], scheme: IntScheme) -> float:
    return float((x.double() - quantized(x, interval, scheme).double()).square().mean())


def moment_error(x: Tensor, interval: tuple[float, float], scheme: IntScheme) -> float:
    y, x = quantized(x, interval, scheme).double(), x.double()
    return float((x.mean() - y.mean()).abs() + (x.std(correction=0) - y.std(correction=0)).abs())


# Cases by hand.


@pytest.mark.parametrize(
    ("algorithm", "symmetric", "asymmetric"),
    [
        ("abs_max", (-4, 4), (-4, 4)),
        ("min_max", (-4, 4), (-4, 3)),
        ("avg", (-2.5, 2.5), ((1 + 0 - 4 + 0) / 4, (3 + 1 + 0 + 2) / 4)),  # |x| up to 3, 1, 4, 2
    ],
)
def test_ranges_from_extremes(algorithm, symmetric, asymmetric):
    batches = ([[3.0, 1.0], [0.0, 1.0], [-4.0, 0.0]], [[2.0, 0.0]])
    assert range_of(algorithm, *batches) == symmetric
    assert range_of(algorithm, *batches, scheme=ASYMMETRIC) == asymmetric


def test_avg_weighs_samples_not_batches():
    assert range_of("avg", [[1.0], [2.0], [3.0]], [[10.0]]) == (-4.0, 4.0)  # the mean over batches would be 6


def test_hist_is_the_centre_of_the_bin_of_the_quantile():
    x = torch.arange(1, 1001).reshape(10, 100) / 1000  # a hundred in each of ten bins, but one at an edge
    assert range_of("hist", x, hist_percent=0.85, bins=10) == pytest.approx((-0.85, 0.85))
    assert range_of("hist", -x, hist_percent=0.85, bins=10) == pytest.approx((-0.85, 0.85))
    assert range_of("hist", x, hist_percent=1.0, bins=10) == pytest.approx((-0.95, 0.95))
    assert range_of("hist", x, hist_percent=0.85, bins=10, scheme=ASYMMETRIC) == pytest.approx((0.0, 0.85))
    assert range_of("hist", -x, hist_percent=0.85, bins=10, scheme=ASYMMETRIC) == pytest.approx((-0.85, 0.0))
    both = torch.cat([x, -x])
    assert range_of("hist", both, hist_percent=0.925, bins=20, scheme=ASYMMETRIC) == pytest.approx((-0.85, 0.85))


def test_hist_bins_start_from_zero_not_from_the_smallest_magnitude():
    x = torch.linspace(5.0, 6.0, 1000).reshape(10, 100)
    low, high = range_of("hist", x, hist_percent=0.5)
    assert high == pytest.approx(5.5, abs=6 / 2048)
    assert low == -high


def test_kl_divergence_of_five_bins():
    # Keeping four of five: P = [4, 0, 2, 1 + 1 outlier], Q = [4, 0 | 2, 1] = [4, 0 | 1.5, 1.5]; P sums to 8, Q to 7.
    by_hand = 4 / 8 * math.log((4 / 8) / (4 / 7)) + 2 * (2 / 8) * math.log((2 / 8) / (1.5 / 7))
    result = divergences(np.array([4.0, 0.0, 2.0, 1.0, 1.0]), levels=2)
    assert result[4] == pytest.approx(by_hand)
    # Keeping one: P = [8], Q = [4], both certain. Keeping two is no candidate: bin 1 is empty.
    assert result[1] == pytest.approx(0.0, abs=1e-12)
    assert math.isinf(result[2])
    # Keeping three: groups of one bin and the remainder. P = [4, 0, 4], Q = [4 | 0, 2].
    assert result[3] == pytest.approx(0.5 * math.log(0.5 / (4 / 6)) + 0.5 * math.log(0.5 / (2 / 6)))


def test_kl_without_candidate_falls_back_to_the_last_filled_bin_below():
    counts = np.zeros(16)
    counts[[2, 15]] = 5.0
    assert bins_to_keep(counts, levels=3, at_least=7) == 2
    counts[2] = 0.0
    assert bins_to_keep(counts, levels=3, at_least=7) == 15  # all are in the last bin: nothing is clipped
    counts[0] = 5.0
    assert bins_to_keep(counts, levels=3, at_least=7) == 15  # zeros and ones


def test_mse_clips_one_outlier_to_spare_a_thousand_elements():
    # Two bits, codes -2 to 1. From 3 on the thousand ones round to zero (error 1000), at 1 the outlier loses 9² = 81.
    x = torch.cat([torch.ones(1000), torch.tensor([10.0])])
    assert range_of("mse", x, scheme=IntScheme(bits=2), lowest=0.1, step=0.1) == pytest.approx((-1, 1))


def test_mse_keeps_the_range_where_clipping_costs_more():
    x = torch.cat([torch.ones(1000), torch.full((1000,), 10.0)])
    assert range_of("mse", x, scheme=IntScheme(bits=2), lowest=0.1, step=0.1) == (-10, 10)


def test_mse_judges_all_data_not_the_batch_with_the_least_energy():
    loud, quiet = torch.full((1, 1000), 10.0), torch.full((1, 1000), 1e-3)
    for order in ((loud, quiet), (quiet, loud)):
        assert range_of("mse", *order) == (-10, 10)


def test_mse_of_negative_elements_is_that_of_positive_ones():
    x = torch.randn(10, 1000, generator=torch.Generator().manual_seed(0)).abs()
    low, high = range_of("mse", -x)
    error = squared_error(-x, (low, high), SYMMETRIC)
    assert error < 1.1 * squared_error(x, range_of("mse", x), SYMMETRIC)  # the code -128 may make it a little less


def test_emd_prefers_the_grid_that_keeps_mean_and_spread():
    # Two bits, t = 8 gives codes of 8: 0 and 8 stay as they are. Every other threshold moves the mean.
    x = torch.tensor([0.0, 8.0]).repeat(500)
    assert range_of("emd", x, scheme=IntScheme(bits=2)) == (-8, 8)


def test_ptf_divides_the_largest_magnitude_by_a_power_of_two():
    # Two bits: at 8, 4 and 2 the ones round away (0.5 to zero, ties to even), at 1 only the 8 is lost.
    x = torch.cat([torch.full((1000,), 0.99), torch.tensor([8.0])])
    assert range_of("ptf", x, scheme=IntScheme(bits=2)) == (-1, 1)
    assert range_of("ptf", -x, scheme=IntScheme(bits=2, narrow=True)) == (-1, 1)
    assert range_of("ptf", x, torch.full((100_000,), 8.0), scheme=IntScheme(bits=2)) == (-8, 8)


# The documented formulas in two passes over raw data, as loops: an independent judge.


def two_pass_histogram(x: Tensor, bins: int = 2048) -> tuple[np.ndarray, float]:
    magnitude = x.abs().double().numpy()
    counts, edges = np.histogram(magnitude, bins=bins, range=(0.0, magnitude.max()))
    return counts, edges[1] - edges[0]


def two_pass_hist(x: Tensor, percent: float = 0.99999) -> float:
    counts, width = two_pass_histogram(x)
    total, k = 0, -1
    while total / counts.sum() < percent:
        k += 1
        total += counts[k]
    return (k + 0.5) * width


def two_pass_divergence(hist: np.ndarray, i: int, levels: int, outliers_below: float = 0.0) -> float:
    if hist[i - 1] == 0:
        return math.inf
    kept = hist[:i].astype(np.float64)
    p = kept.copy()
    p[i - 1] += hist[i:].sum()
    p[np.flatnonzero(p)[0]] += outliers_below
    used = p != 0
    group = np.minimum(np.arange(i) // (i // levels), levels - 1)
    q = (np.bincount(group, kept) / np.maximum(np.bincount(group, used), 1))[group] * used
    p_sum, q_sum = p.sum(), q.sum()
    return float((p[used] * np.log(q_sum * p[used]) - p[used] * np.log(p_sum * q[used])).sum() / p_sum)


def two_pass_divergences(x: Tensor, levels: int = 127) -> tuple[np.ndarray, float]:
    """For keeping i of 2048 bins, and their width."""
    counts, width = two_pass_histogram(x)
    return np.array([two_pass_divergence(counts, i, levels) if i >= 1023 else math.inf for i in range(2048)]), width


def two_pass_search(error, x: Tensor, candidates: list[float]) -> float:
    reach = float(x.abs().max())
    return min((error(x, (-ratio * reach, ratio * reach), SYMMETRIC), -ratio) for ratio in candidates)[0]


RATIOS = [1.0 - 0.02 * k for k in range(36)]


def draw(kind: str, size: tuple[int, ...] = (20, 1600), seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    normal = torch.randn(size)
    return {
        "normal": normal,
        "rectified": normal.relu(),
        "heavy tail": torch.distributions.StudentT(3.0).sample(size),
        "bimodal": torch.where(torch.rand(size) < 0.5, normal - 4.0, normal * 0.1 + 2.0),
        "exponential": -torch.log(1.0 - torch.rand(size)),
        "one-sided tail": torch.nn.functional.gelu(2.0 * normal),
        "negative": -normal.abs() - 1.0,
        "tiny": normal * 1e-20,
        "large": normal * 1e20,
        "integers": (normal * 3).round(),
    }[kind]


KINDS = [
    *("normal", "rectified", "heavy tail", "bimodal", "exponential", "one-sided tail"),
    *("negative", "tiny", "large", "integers"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_those_of_two_passes_within_a_bin(kind):
    x = draw(kind, size=(50, 2000))
    statistics = statistics_of(*x.split(3))
    divergences, width = two_pass_divergences(x)
    _, hist = RANGE_ALGORITHMS["hist"](statistics, SYMMETRIC)
    _, kl = RANGE_ALGORITHMS["KL"](statistics, SYMMETRIC)
    assert abs(hist - two_pass_hist(x)) <= 1.001 * width
    assert abs(kl - (np.argmin(divergences) + 0.5) * width) <= 1.001 * width
    for algorithm in ("abs_max", "min_max"):
        assert RANGE_ALGORITHMS[algorithm](statistics, SYMMETRIC)[1] == float(x.abs().max())
    mean_reach = float(x.double().abs().amax(dim=1).mean())
    assert RANGE_ALGORITHMS["avg"](statistics, SYMMETRIC)[1] == pytest.approx(mean_reach, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["normal", "rectified", "exponential", "bimodal", "negative"])
def test_on_few_elements_the_kl_threshold_is_as_good_as_that_of_two_passes(kind, seed):
    x = draw(kind, size=(2, 2000), seed=seed)
    # Most bins are empty or hold one element, so that far-apart thresholds are nearly equal; one of them it must be.
    divergences, width = two_pass_divergences(x)
    kept = round(range_of("KL", x)[1] / width - 0.5)
    assert divergences[kept - 1 : kept + 2].min() <= 1.01 * divergences.min()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_on_the_histogram_choose_as_those_on_raw_data(kind):
    x = draw(kind)
    statistics = statistics_of(*x.split(3))
    step = float(x.abs().max()) / 127
    # Candidates are far apart, but their errors may be nearly equal: the chosen one must be as good as the best.
    for algorithm, candidates in (("mse", RATIOS), ("ptf", [1.0, 0.5, 0.25, 0.125])):
        chosen = squared_error(x, RANGE_ALGORITHMS[algorithm](statistics, SYMMETRIC), SYMMETRIC)
        assert chosen <= 1.001 * two_pass_search(squared_error, x, candidates)
    # The best mean and spread are matched to some 1e-4 steps by chance; a bin of the histogram is 1e-2 steps.
    chosen = moment_error(x, RANGE_ALGORITHMS["emd"](statistics, SYMMETRIC), SYMMETRIC)
    assert chosen <= two_pass_search(moment_error, x, RATIOS) + 1e-3 * step


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy tail", "bimodal", "one-sided tail"])
def test_mse_of_two_ends_is_as_good_as_trying_every_pair(kind, bits):
    x = draw(kind, size=(10, 1000))
    scheme = IntScheme(bits=bits, signed=False, symmetric=False)
    low, high = float(x.min()), float(x.max())
    every_pair = min(squared_error(x, (low * a, high * b), scheme) for a in RATIOS[::3] for b in RATIOS[::3])
    assert squared_error(x, range_of("mse", x, scheme=scheme), scheme) <= 1.01 * every_pair


# KL, in parts.

sparse_counts = st.lists(st.sampled_from([0, 0, 1, 2, 7, 100]), min_size=12, max_size=60).filter(any)


@settings(max_examples=80, deadline=None)
@given(sparse_counts, st.integers(1, 6), st.sampled_from([0.0, 3.0]))
def test_divergences_by_cumulative_sums_are_those_of_the_documented_loop(counts, levels, below):
    counts = np.array(counts, dtype=np.float64)
    result = divergences(counts, levels=levels, outliers_below=below)
    for i in range(levels, len(counts)):
        assert result[i] == pytest.approx(two_pass_divergence(counts, i, levels, below), rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(sparse_counts, st.floats(0.0, 1.0), st.integers(1, 6))
def test_a_span_keeps_half_of_each_side_where_it_can(counts, zero, levels):
    counts = np.array(counts, dtype=np.float64)
    zero = zero * len(counts)
    begin, end = span_to_keep(counts, levels=levels, zero=zero)
    assert 0 <= begin < end <= len(counts)
    begin, end = span_to_keep(counts + 1.0, levels=levels, zero=zero)  # no empty bin, so there are candidates
    assert 0 <= begin < end <= len(counts)
    assert begin < zero / 2 + 2  # half a bin is rounded down on each side
    assert end > zero + (len(counts) - zero) / 2 - 2


def test_each_end_of_a_span_is_the_best_given_the_other():
    counts, _ = np.histogram(draw("heavy tail").numpy(), bins=512)
    counts, levels = counts.astype(np.float64), 63
    begin, end = span_to_keep(counts, levels=levels, zero=300.0)
    assert begin > 1
    assert end < 511
    above, clipped_above = counts[begin:], counts[end:].sum()
    below, clipped_below = counts[:end][::-1], counts[:begin].sum()
    assert end - begin == min(
        range(405 - begin, 512 - begin), key=lambda i: two_pass_divergence(above, i, levels, clipped_below)
    )
    assert end - begin == min(
        range(361 - (512 - end), end), key=lambda i: two_pass_divergence(below, i, levels, clipped_above)
    )


def test_more_levels_than_bins_clip_next_to_nothing():
    x = draw("normal")
    assert range_of("KL", x, scheme=IntScheme(bits=16))[1] > 0.8 * float(x.abs().max())


# Laws.

SCHEMES = [SYMMETRIC, ASYMMETRIC, IntScheme(bits=4), IntScheme(signed=False), IntScheme(symmetric=False)]
finite = st.floats(-1e6, 1e6, width=32, allow_nan=False)
rows = st.lists(st.lists(finite, min_size=8, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("algorithm", ALL)
@settings(max_examples=25, deadline=None)
@given(rows, st.sampled_from(SCHEMES))
def test_an_interval_holds_zero_and_stays_within_the_extent(algorithm, values, scheme):
    x = torch.tensor(values, dtype=torch.float32)
    low, high = range_of(algorithm, x, scheme=scheme)
    reach = float(x.abs().max())
    assert -reach <= low <= 0.0 <= high <= reach
    if scheme.symmetric:
        assert low == -high
    else:
        assert low == 0.0 or (x < 0).any()
        assert high == 0.0 or (x > 0).any()


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("kind", ["normal", "one-sided tail"])
def test_scaling_by_a_power_of_two_scales_the_range_exactly(algorithm, scheme, kind):
    x = draw(kind, size=(4, 2000))
    low, high = range_of(algorithm, x, scheme=scheme)
    assert range_of(algorithm, x * 1024, scheme=scheme) == (low * 1024, high * 1024)


@pytest.mark.parametrize("algorithm", ["abs_max", "min_max", "avg", "hist", "KL"])
def test_symmetric_thresholds_are_blind_to_the_sign(algorithm):
    x = draw("one-sided tail", size=(4, 2000))
    assert range_of(algorithm, x) == range_of(algorithm, -x) == range_of(algorithm, x.abs())


@pytest.mark.parametrize("algorithm", ["abs_max", "min_max", "avg", "hist"])
def test_elements_of_one_sign_get_the_symmetric_threshold_and_zero(algorithm):
    x = draw("exponential", size=(4, 2000))
    _, threshold = range_of(algorithm, x)
    assert range_of(algorithm, x, scheme=ASYMMETRIC) == (0.0, threshold)
    assert range_of(algorithm, -x, scheme=ASYMMETRIC) == pytest.approx((-threshold, 0.0))


@pytest.mark.parametrize("algorithm", ALL)
def test_batches_and_their_order_do_not_matter(algorithm):
    x = draw("heavy tail", size=(12, 500))
    assert range_of(algorithm, x) == pytest.approx(range_of(algorithm, *x.flip(0).split(5)), rel=1e-12)


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("constant", [0.7, -3.0, 1e-20, 1e20])
def test_a_constant_keeps_its_range_within_a_bin(algorithm, scheme, constant):
    low, high = range_of(algorithm, torch.full((2, 50), constant), scheme=scheme)
    assert (high if constant > 0 else low) == pytest.approx(constant, rel=1 / 2048)
    assert (low if constant > 0 else high) == (pytest.approx(-constant, rel=1 / 2048) if scheme.symmetric else 0.0)


@pytest.mark.parametrize("algorithm", sorted(set(ALL) - {"avg"}))
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
def test_zeros_and_ones_are_told_apart(algorithm, scheme):
    x = (torch.arange(1000) % 3 == 0).float().reshape(10, 100)
    for values in (x, -x):
        kept = quantized(values, range_of(algorithm, values, scheme=scheme), scheme)
        assert (kept - values).abs().max() <= 0.01  # a step or two at 8 bits


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_get_an_empty_interval_that_the_scheme_can_use(algorithm, scheme):
    low, high = range_of(algorithm, torch.zeros(2, 3), scheme=scheme)
    assert (low, high) == (0.0, 0.0)
    assert float(quantized(torch.zeros(1), (low, high), scheme)) == 0.0


@pytest.mark.parametrize("algorithm", ALL)
def test_a_value_without_elements_has_no_range(algorithm):
    with pytest.raises(CalibrationError, match="no element"):
        range_of(algorithm, torch.empty(0, 3))


def test_only_some_algorithms_need_the_histogram():
    statistics = ValueStatistics(histogram=False)
    statistics.update(torch.tensor([[1.0, 2.0]]), name="x")
    for algorithm in set(ALL) - NEED_HISTOGRAM:
        assert RANGE_ALGORITHMS[algorithm](statistics, SYMMETRIC) == (-2.0, 2.0)
    assert set(ALL) > NEED_HISTOGRAM


@pytest.mark.parametrize(
    ("algorithm", "options", "word"),
    [
        ("hist", {"hist_percent": 0.0}, "hist_percent"),
        ("hist", {"hist_percent": 99.9}, "hist_percent"),
        ("hist", {"bins": 1}, "bins"),
        ("KL", {"bins": 0}, "bins"),
        ("mse", {"step": 0.0}, "step"),
        ("emd", {"lowest": 1.5}, "lowest"),
    ],
)
def test_options_out_of_their_range_are_refused(algorithm, options, word):
    with pytest.raises(ConfigError, match=word):
        range_of(algorithm, [[1.0, 2.0]], **options)
