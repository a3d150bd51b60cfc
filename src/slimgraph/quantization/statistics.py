"""What calibration keeps of a value: one pass over the data, constant memory."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimgraph.errors import CalibrationError
from slimgraph.quantization.density import Density
from slimgraph.quantization.histogram import BINS, StreamingHistogram, pieces

SPREAD = 2**11
"""About so many elements of a sample are counted into the histogram, evenly spread over it.

Counting an element takes as long as twenty multiplications of a convolution, and early layers have a million elements a
sample. With 2,048 of each, the least tail that an algorithm cuts off by default, 1 in 100,000, is still five elements
after 256 samples.
"""


class ValueStatistics:
    """Statistics of one value of a program, from which every range algorithm reads.

    Extremes are exact. Histogram and sums take in every element of samples below 2 * `SPREAD` elements, and of larger
    ones every k-th, which stands for k. Sums are float32 within a piece and float64 over pieces.
    Neither the order nor the size of the batches matters, except for the rounding of the sums. With `histogram=False`
    only the extremes are kept, all that abs_max, min_max and avg need, at a fraction of the time.
    """

    def __init__(self, *, histogram: bool = True) -> None:
        self.batches = 0
        self.samples = 0
        self.count = 0
        self.minimum = math.inf
        self.maximum = -math.inf
        self.sum = 0.0
        self.square_sum = 0.0
        self.sample_min_sum = 0.0
        self.sample_max_sum = 0.0
        self.sample_abs_max_sum = 0.0
        self.histogram = StreamingHistogram() if histogram else None

    def update(self, x: Tensor, *, name: str, batch: int | None = None) -> None:
        """Take in a batch or a part of one, samples along axis 0.

        A tensor without elements is skipped, a scalar is one sample.

        Args:
            x: is read as float32.
            name: the value's, for the error.
            batch: its number, for the error; None is that of the calls before.
        Raises:
            CalibrationError: NaN or infinity in what was given, which is then not counted.
        """
        batch = self.batches if batch is None else batch
        self.batches += 1
        if x.numel() == 0:
            return
        x = x.detach().cpu()
        extremes = [_extremes(block) for block in _blocks(x)]
        min_N = np.concatenate([mins for mins, _ in extremes]).astype(np.float64)
        max_N = np.concatenate([maxs for _, maxs in extremes]).astype(np.float64)
        minimum, maximum = float(min_N.min()), float(max_N.max())
        if not math.isfinite(minimum) or not math.isfinite(maximum):  # min and max hand NaN on
            what = "NaN" if math.isnan(minimum) or math.isnan(maximum) else "an infinity"
            raise CalibrationError(
                f"The value {name!r} holds {what} in calibration batch {batch} (counted from 0). Every value must be a "
                "finite float32: look for broken samples there, or check that the float model is sound on them."
            )
        self.samples += len(min_N)
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        self.sample_min_sum += float(min_N.sum())
        self.sample_max_sum += float(max_N.sum())
        self.sample_abs_max_sum += float(np.maximum(-min_N, max_N).sum())
        if self.histogram is None:
            return
        self.histogram.cover(max(-minimum, maximum))
        stride = _stride(x)
        for block in _blocks(x):
            counted = (block if stride == 1 else block.flatten(1)[:, ::stride]).reshape(-1).float()
            self.histogram.count(counted, weight=stride, signed=minimum < 0)
            self._add(counted, weight=stride)

    def _add(self, flat: Tensor, *, weight: int) -> None:
        """Take `flat`, shape (n,), into the sums, each element `weight` times."""
        exponent = self._sum_exponent
        for piece in pieces(flat):  # scaled by a power of two, so that no square leaves the range of float32
            scaled = piece if exponent == 0 else torch.ldexp(piece, torch.tensor(-exponent))
            self.sum += weight * math.ldexp(float(scaled.sum()), exponent)
            self.square_sum += weight * math.ldexp(float(torch.dot(scaled, scaled)), 2 * exponent)
        self.count += weight * len(flat)

    @property
    def _sum_exponent(self) -> int:
        """Power of two by which elements are divided before they are squared; 0 for every value of ordinary size."""
        exponent = math.frexp(self.abs_max)[1]
        return exponent if abs(exponent) > 40 else 0

    def merge(self, other: "ValueStatistics") -> None:
        """Take in what `other` has seen of the same value; `other` stays as it is."""
        assert (self.histogram is None) == (other.histogram is None)
        self.batches += other.batches
        self.samples += other.samples
        self.count += other.count
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.sum += other.sum
        self.square_sum += other.square_sum
        self.sample_min_sum += other.sample_min_sum
        self.sample_max_sum += other.sample_max_sum
        self.sample_abs_max_sum += other.sample_abs_max_sum
        if self.histogram is not None and other.histogram is not None:
            self.histogram.merge(other.histogram)

    @property
    def abs_max(self) -> float:
        """max|x|."""
        return max(-self.minimum, self.maximum)

    @property
    def mean(self) -> float:
        """Mean of the elements."""
        assert self.histogram is not None, "these statistics were made without a histogram"
        return self.sum / self.count

    @property
    def std(self) -> float:
        """Standard deviation of the elements, divided by their number, not by one less."""
        return math.sqrt(max(self.square_sum / self.count - self.mean**2, 0.0))

    def density(self, *, absolute: bool = False) -> Density:
        """Distribution of x, or of |x|, within one bin of the histogram."""
        assert self.histogram is not None, "these statistics were made without a histogram"
        counts = self.histogram.counts.astype(np.float64)
        for end in (self.minimum, self.maximum):  # which may not be among the elements that were counted
            bin_ = int(abs(end) / self.histogram.width)
            bin_ = BINS + bin_ if end >= 0 else BINS - 1 - bin_
            counts[bin_] = max(counts[bin_], 1.0)
        if absolute:
            counts = counts[BINS:] + counts[BINS - 1 :: -1]
            first, low, high = 0, 0.0, self.abs_max
        else:
            first, low, high = -BINS, self.minimum, self.maximum
        occupied = np.flatnonzero(counts)
        begin, end = (0 if absolute else occupied[0]), occupied[-1] + 1
        edges = np.arange(first + begin, first + end + 1, dtype=np.float64) * self.histogram.width
        edges[0], edges[-1] = low, high
        return Density(edges, counts[begin:end])


def _blocks(x: Tensor) -> list[Tensor]:
    """Views of some samples each, at least one, with so few elements that a float32 copy costs little memory."""
    x = x.reshape(len(x) if x.dim() else 1, -1) if x.dim() < 2 else x
    size = max(1, 2**20 // x[0].numel())
    return [x[start : start + size] for start in range(0, len(x), size)]


def _stride(x: Tensor) -> int:
    """Distance of the elements of a sample that are counted; without a common factor it walks through all channels."""
    elements = x.numel() // len(x) if x.dim() > 1 else 1
    stride = max(1, elements // SPREAD)
    while math.gcd(stride, elements) > 1:
        stride += 1
    return stride


def _extremes(block: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimum and maximum of each sample."""
    values = block.float().numpy()  # NumPy, for the reason given at PIECE: it does not use threads
    axes = tuple(range(1, values.ndim))
    with np.errstate(invalid="ignore"):
        return values.min(axis=axes), values.max(axis=axes)
