"""Streaming statistics of a value, its histogram, and the distribution read from it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgraph.errors import CalibrationError
from slimgraph.quantization.density import Density
from slimgraph.quantization.histogram import BINS
from slimgraph.quantization.statistics import SPREAD, ValueStatistics


def statistics_of(*batches, histogram=True):
    statistics = ValueStatistics(histogram=histogram)
    for batch in batches:
        statistics.update(batch, name="x")
    return statistics


def state(statistics):
    """Everything that must be equal, whatever the order: sums are left out, they round."""
    exact = (
        statistics.samples,
        statistics.count,
        statistics.minimum,
        statistics.maximum,
        statistics.histogram.exponent,
    )
    return exact, statistics.histogram.counts.tolist()


def sums(statistics):
    return np.array(
        [
            statistics.sum,
            statistics.square_sum,
            statistics.sample_min_sum,
            statistics.sample_max_sum,
            statistics.sample_abs_max_sum,
        ]
    )


def test_statistics_of_two_small_batches():
    statistics = statistics_of(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), torch.tensor([[0.0, 0.25]]))
    assert (statistics.batches, statistics.samples, statistics.count) == (2, 3, 6)
    assert (statistics.minimum, statistics.maximum, statistics.abs_max) == (-3.0, 2.0, 3.0)
    assert (statistics.sum, statistics.square_sum) == (0.75, 14.3125)
    assert statistics.sample_min_sum == -3.0 + 0.5 + 0.0
    assert statistics.sample_max_sum == 1.0 + 2.0 + 0.25
    assert statistics.sample_abs_max_sum == 3.0 + 2.0 + 0.25
    assert statistics.mean == 0.125
    assert statistics.std == math.sqrt(14.3125 / 6 - 0.125**2)


def test_bins_are_mirrored_at_zero_and_have_a_power_of_two_as_width():
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, 1.25, -1e-30, 1e-30]])
    histogram = statistics_of(x).histogram
    assert histogram.width == 2.0 / BINS  # the range is the first power of two above 1.25
    counts = histogram.counts
    assert counts[BINS] == 3  # both zeros and 1e-30
    assert counts[BINS - 1] == 1  # -1e-30
    assert counts[BINS + BINS // 2] == 1  # 1.0 is the first value of its bin
    assert counts[BINS - 1 - BINS // 2] == 1  # -1.0 likewise
    assert counts[BINS + BINS * 5 // 8] == 1
    assert counts.sum() == 7


def test_a_power_of_two_as_maximum_doubles_the_range():
    assert statistics_of(torch.tensor([1.0])).histogram.width == 2.0 / BINS
    assert statistics_of(torch.tensor([1.0]).nextafter(torch.tensor(0.0))).histogram.width == 1.0 / BINS


def test_zeros_do_not_set_the_range():
    histogram = statistics_of(torch.zeros(2, 3), torch.full((1, 2), 1e-3)).histogram
    assert histogram.width == 2.0**-9 / BINS
    assert histogram.counts[BINS] == 6


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
samples = st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(samples, st.randoms(use_true_random=False), st.integers(0, 12))
def test_counts_do_not_depend_on_order_or_batches(rows, random, cut):
    x = torch.tensor(rows, dtype=torch.float32)
    shuffled = x[random.sample(range(len(x)), len(x))]
    whole, parts = statistics_of(x), statistics_of(shuffled[:cut], shuffled[cut:])
    assert state(whole) == state(parts)
    magnitude = np.array([sums(statistics_of(x.abs()))[:2]])
    np.testing.assert_allclose(
        sums(parts)[:2], sums(whole)[:2], rtol=1e-6, atol=1e-6 * (1 + magnitude.max())
    )  # float32 within a piece


@settings(max_examples=60, deadline=None)
@given(samples)
def test_counts_are_those_of_one_histogram_at_the_final_width(rows):
    x = torch.tensor(rows, dtype=torch.float32)
    histogram = statistics_of(*x.split(1)).histogram
    magnitude_bin = np.floor(x.abs().double().numpy() / histogram.width).astype(int)
    flat = np.where(x.numpy() < 0, BINS - 1 - magnitude_bin, BINS + magnitude_bin)
    assert np.array_equal(histogram.counts, np.bincount(flat.ravel(), minlength=2 * BINS))
    if histogram.exponent > -100:
        assert magnitude_bin.max() >= BINS // 2  # never less than half of the bins are in use


@settings(max_examples=40, deadline=None)
@given(samples, samples)
def test_merged_statistics_are_those_of_all_batches(first, second):
    first, second = torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32)
    merged, other = statistics_of(first), statistics_of(second)
    before = state(other)
    merged.merge(other)
    assert state(merged) == state(statistics_of(first, second))
    assert merged.batches == 2
    assert state(other) == before
    np.testing.assert_array_equal(sums(merged), sums(statistics_of(first)) + sums(other))


def test_statistics_collected_in_inference_mode_can_be_merged_outside_of_it():
    with torch.inference_mode():
        first, second = statistics_of(torch.ones(1, 2)), statistics_of(torch.full((1, 2), 100.0))
    first.merge(second)
    assert first.histogram.counts.sum() == 4


def test_tensors_larger_than_a_block_are_counted_whole():
    x = torch.randn(700_001, 3, generator=torch.Generator().manual_seed(0))  # several pieces, the last not full
    statistics = statistics_of(x.clone().requires_grad_(), x.relu())
    assert statistics.histogram.counts.sum() == statistics.count == 2 * x.numel()
    np.testing.assert_allclose(statistics_of(x).sum, x.double().sum(), atol=1e-6 * float(x.abs().double().sum()))
    np.testing.assert_allclose(statistics_of(x).square_sum, x.double().square().sum(), rtol=1e-6)


def test_of_large_samples_every_kth_element_stands_for_k():
    x = torch.randn(5, 7, SPREAD, generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(x)
    rows = x.numpy().reshape(5, -1)
    every = rows[:, ::9].ravel()  # 7 and 8 share factors with the size
    edges = np.arange(-BINS, BINS + 1) * statistics.histogram.width
    expected = 9 * np.histogram(every, edges)[0]
    assert np.abs(np.cumsum(statistics.histogram.counts) - np.cumsum(expected)).max() <= 9  # mirrored bins at zero
    assert statistics.histogram.counts.sum() == statistics.count == 9 * every.size
    np.testing.assert_allclose(statistics.sum, 9 * every.sum(dtype=np.float64), rtol=1e-4)
    assert (statistics.minimum, statistics.maximum) == (rows.min(), rows.max())


def test_a_density_reaches_to_extremes_that_were_not_counted():
    x = torch.linspace(-1.0, 1.0, 3 * SPREAD).repeat(2, 1)
    x[0, 1], x[1, 2] = -20.0, 30.0
    density = statistics_of(x).density()
    assert (density.edges[0], density.edges[-1]) == (-20.0, 30.0)
    assert density.counts[[0, -1]].tolist() == [1.0, 1.0]
    assert density.counts.sum() == 2 * 5 * -(-3 * SPREAD // 5) + 2


@pytest.mark.parametrize("elements", [2 * SPREAD - 1, 2 * SPREAD, 700_001])
def test_counts_of_large_samples_do_not_depend_on_the_batches(elements):
    x = torch.randn(4, elements, generator=torch.Generator().manual_seed(4))
    assert state(statistics_of(x)) == state(statistics_of(x[2:], x[:1], x[1:2]))
    assert (statistics_of(x).count == x.numel()) == (elements < 2 * SPREAD)


@pytest.mark.parametrize("columns", [16, 48, 112, 768])
def test_elements_of_every_column_of_an_image_are_counted(columns):
    x = torch.zeros(1, 64, 111, columns) + torch.arange(1.0, columns + 1)
    counts = statistics_of(x).histogram.counts
    assert np.count_nonzero(counts) == columns
    assert counts[counts > 0].max() < 2 * counts[counts > 0].min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_types_are_read_as_float32(dtype):
    x = (torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)) * 10).to(dtype)
    assert state(statistics_of(x)) == state(statistics_of(x.float()))


def test_a_tensor_that_is_not_contiguous_counts_the_same():
    x = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(1))
    moved = x.permute(0, 2, 3, 1)
    assert not moved.is_contiguous()
    assert state(statistics_of(moved)) == state(statistics_of(x))
    assert statistics_of(moved).sample_max_sum == statistics_of(x).sample_max_sum


def test_a_scalar_is_one_sample_and_a_vector_has_one_element_in_each():
    assert statistics_of(torch.tensor(3.0)).samples == 1
    assert statistics_of(torch.tensor([3.0, -5.0])).sample_abs_max_sum == 8.0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 0, 4)])
def test_a_tensor_without_elements_is_skipped(shape):
    statistics = statistics_of(torch.empty(shape))
    assert (statistics.batches, statistics.samples, statistics.count) == (1, 0, 0)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (math.nan, "NaN"),
        (math.inf, "infinity"),
        (-math.inf, "infinity"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_values_name_the_value_and_the_batch_and_change_nothing(bad, word, dtype):
    statistics = statistics_of(torch.ones(2, 3), torch.ones(2, 3))
    before = state(statistics)
    batch = torch.ones(2, 3, dtype=dtype)
    batch[1, 2] = bad
    with pytest.raises(CalibrationError, match=rf"'block\.relu' holds .*{word}.* batch 2"):
        statistics.update(batch, name="block.relu")
    assert state(statistics) == before


def test_float64_values_beyond_float32_are_refused():
    with pytest.raises(CalibrationError, match="infinity"):
        statistics_of(torch.tensor([1e300], dtype=torch.float64))


def test_memory_does_not_grow_with_the_data():
    statistics = statistics_of(torch.randn(8, 10))
    size = statistics.histogram.counts.nbytes
    for scale in range(1, 50):
        statistics.update(torch.randn(8, 10) * 2.0**scale, name="x")
    assert statistics.histogram.counts.nbytes == size == 2 * BINS * 8
    others = [value for name, value in vars(statistics).items() if name != "histogram"]
    assert all(isinstance(value, int | float) for value in others)


def test_without_histogram_the_extremes_are_kept():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    statistics = statistics_of(x, histogram=False)
    assert statistics.histogram is None
    np.testing.assert_array_equal(sums(statistics)[2:], sums(statistics_of(x))[2:])
    with pytest.raises(AssertionError, match="without a histogram"):
        _ = statistics.mean
    statistics.merge(statistics_of(x, histogram=False))
    assert statistics.samples == 8


def test_elements_below_a_point_are_interpolated_within_a_bin():
    density = Density(np.array([0.0, 1.0, 3.0]), np.array([2.0, 4.0]))
    mass, total = density.below(np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 9.0]))
    assert mass.tolist() == [0, 0, 1, 2, 4, 6, 6]
    assert total.tolist() == [0, 0, 0.25, 1, 1 + 2 * 1.5, 1 + 4 * 2, 1 + 4 * 2]


def test_a_constant_has_no_spread():
    density = statistics_of(torch.full((2, 3), -0.3)).density()
    mass, total = density.below(np.array([-0.4, -0.2]))
    assert mass.tolist() == [0, 6]
    assert total[1] == pytest.approx(6 * -0.3, rel=1e-6)  # -0.3 as float32


def test_density_ends_at_the_smallest_and_the_largest_element():
    density = statistics_of(torch.tensor([[-0.7, 0.1, 0.3, 2.5]])).density()
    assert (density.edges[0], density.edges[-1]) == (np.float32(-0.7), 2.5)
    absolute = statistics_of(torch.tensor([[-2.5, 0.1]])).density(absolute=True)
    assert (absolute.edges[0], absolute.edges[-1]) == (0.0, 2.5)


@settings(max_examples=40, deadline=None)
@given(samples, st.booleans())
def test_density_ascends_and_rebinning_keeps_every_element(rows, absolute):
    x = torch.tensor(rows, dtype=torch.float32)
    density = statistics_of(x).density(absolute=absolute)
    assert (np.diff(density.edges) >= 0).all()
    assert density.counts.sum() == x.numel()
    counts = density.rebinned(min(density.edges[0], 0.0), max(density.edges[-1], 0.0), 100)
    assert counts.sum() == x.numel()
    assert (counts >= 0).all()
    assert (counts == np.rint(counts)).all()


def test_rebinned_counts_differ_from_exact_ones_by_elements_next_to_the_edges_only():
    x = torch.randn(25, 2_000, generator=torch.Generator().manual_seed(3))
    statistics = statistics_of(x)
    counts = statistics.density(absolute=True).rebinned(0.0, statistics.abs_max, 2048)
    exact, _ = np.histogram(x.abs().numpy(), bins=2048, range=(0.0, statistics.abs_max))
    # An edge splits at most one bin of the histogram, so the cumulative counts differ by less than that bin holds.
    assert np.abs(np.cumsum(counts) - np.cumsum(exact)).max() < statistics.histogram.counts.max() * 2
