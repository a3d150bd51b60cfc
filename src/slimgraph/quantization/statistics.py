"""What calibration keeps of a value: one pass over the data, constant memory."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimgraph.errors import CalibrationError
from slimgraph.quantization.density import Density
from slimgraph.quantization.histogram import BINS, Counts, StreamingHistogram, pieces

_Tally = tuple[float, float, Counts]  # sum, sum of squares, counts of the histogram


class ValueStatistics:
    """Statistics of one value of a program, from which every range algorithm reads.

    Counts are exact; sums are float32 within a piece and float64 over pieces. Neither the order nor the size of the
    batches matters, except for the rounding of the sums. With `histogram=False` only the extremes are kept, all that
    abs_max, min_max and avg need, at a fraction of the time.
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

    def update(self, x: Tensor, *, name: str, batch: int | None = None, pool: ThreadPoolExecutor | None = None) -> None:
        """Take in a batch or a part of one, samples along axis 0.

        A tensor without elements is skipped, a scalar is one sample.

        Args:
            x: is read as float32.
            name: the value's, for the error.
            batch: its number, for the error; None is that of the calls before.
            pool: threads that share the work.
        Raises:
            CalibrationError: NaN or infinity in what was given, which is then not counted.
        """
        batch = self.batches if batch is None else batch
        self.batches += 1
        if x.numel() == 0:
            return
        blocks = _blocks(x.detach().cpu())
        each = map if pool is None or len(blocks) == 1 else pool.map  # NumPy and PyTorch compute side by side
        extremes = list(each(_extremes, blocks))
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
        self.count += x.numel()
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        self.sample_min_sum += float(min_N.sum())
        self.sample_max_sum += float(max_N.sum())
        self.sample_abs_max_sum += float(np.maximum(-min_N, max_N).sum())
        if self.histogram is None:
            return
        self.histogram.cover(max(-minimum, maximum))
        tally = partial(self._tally, self.histogram, signed=minimum < 0)
        for block_sum, block_square_sum, counts in each(tally, blocks):
            self.sum += block_sum
            self.square_sum += block_square_sum
            self.histogram.counts += counts

    def _tally(self, histogram: StreamingHistogram, block: Tensor, *, signed: bool) -> _Tally:
        flat = block.reshape(-1).float()
        total = square_total = 0.0
        exponent = self._sum_exponent
        for piece in pieces(flat):  # scaled by a power of two, so that no square leaves the range of float32
            scaled = piece if exponent == 0 else torch.ldexp(piece, torch.tensor(-exponent))
            total += math.ldexp(float(scaled.sum()), exponent)
            square_total += math.ldexp(float(torch.dot(scaled, scaled)), 2 * exponent)
        return total, square_total, histogram.counts_of(flat, signed=signed)

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


def _extremes(block: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimum and maximum of each sample."""
    values = block.float().numpy()  # NumPy, for the reason given at PIECE: it does not use threads
    axes = tuple(range(1, values.ndim))
    with np.errstate(invalid="ignore"):
        return values.min(axis=axes), values.max(axis=axes)
