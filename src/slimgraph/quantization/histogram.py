"""Histogram of a stream of values whose range is not known beforehand."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BINS = 8192
"""Bins on each side of zero. After the last doubling more than half of them lie below max|x|."""

# From 2**15 elements on PyTorch spreads an operation over threads, and on a busy machine each then waits until all its
# threads have had their turn: statistics took 20 times as long.
PIECE = 2**15 - 256
"""Elements worked on at a time: few enough to stay in the processor's cache and on one thread."""

Counts = NDArray[np.int64]

_SMALLEST_EXPONENT = -112  # keeps BINS / 2**exponent a float32; what is smaller shares the bins next to zero


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Views of `x`, shape (n,), of `PIECE` elements, the last with the rest."""
    return (x[start : start + PIECE] for start in range(0, len(x), PIECE))


class StreamingHistogram:
    """Counts of finite values, each in exactly one bin, whatever the order in which they come.

    The bins cover -2**exponent to 2**exponent, both excluded, and are mirrored at zero: `counts[BINS + k]` holds the
    values with k <= x / width < k + 1, and `counts[BINS - 1 - k]` the negative ones with k <= -x / width < k + 1. The
    width is a power of two, so that dividing by it is exact in floating point, and two bins merge into precisely one
    bin of the doubled width. Hence the counts depend on the values only: they are those of one histogram of them all.
    """

    __slots__ = ("counts", "exponent")

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(2 * BINS, dtype=np.int64)
        self.exponent = _SMALLEST_EXPONENT

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent) / BINS

    def cover(self, abs_max: float) -> None:
        """Double the range until it holds all values up to `abs_max`."""
        if abs_max > 0.0:  # zero is in every range
            self._widen(math.frexp(abs_max)[1])  # the one exponent with abs_max < 2**exponent <= 2 * abs_max

    def count(self, x: Tensor, *, weight: int = 1, signed: bool = True) -> None:
        """Take in the float32 `x`, shape (n,), each element `weight` times; not `signed`: none of it is negative.

        The range must cover `x`.
        """
        # torch.histc drops what lies outside of its bounds, subtracts the lower bound first (which moves values across
        # edges by rounding), counts in float32 (which stops at 2**24) and takes 5.5 ns a value on one thread. Counting
        # 16-bit indices takes 0.7 to 1.1 ns, and computing them 0.3 to 0.6 ns where they stay in cache.
        scaled = torch.empty_like(x[:PIECE])
        indices, negative = torch.empty_like(scaled, dtype=torch.int16), torch.empty_like(scaled, dtype=torch.int16)
        bins, counts = (2 * BINS, self.counts) if signed else (BINS, self.counts[BINS:])
        for piece in pieces(x):
            n = len(piece)
            torch.mul(piece, 1.0 / self.width, out=scaled[:n])
            index = indices[:n].copy_(scaled[:n])  # drops the fraction, so rounds towards zero
            if signed:
                index.sub_(torch.lt(piece, 0.0, out=negative[:n])).add_(BINS)
            counts += torch.bincount(index, minlength=bins).mul_(weight).numpy()

    def merge(self, other: "StreamingHistogram") -> None:
        """Count also what `other` has counted; `other` stays as it is."""
        self._widen(other.exponent)
        self.counts += other._counts_at(self.exponent)

    def _widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = self._counts_at(exponent)
            self.exponent = exponent

    def _counts_at(self, exponent: int) -> Counts:
        # After log2(BINS) doublings all values are in the two bins next to zero, where they stay.
        merged_bins = min(2 ** (exponent - self.exponent), BINS)
        sums = self.counts.reshape(-1, merged_bins).sum(axis=1)
        counts = np.zeros_like(self.counts)
        counts[BINS - len(sums) // 2 : BINS + len(sums) // 2] = sums
        return counts
