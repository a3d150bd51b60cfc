"""Distribution of a value's elements, as its histogram tells it."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Density:
    """Elements spread evenly within each bin."""

    edges: Floats
    """Ascending, shape (bins + 1,). The first and the last are the smallest and the largest element."""
    counts: Floats
    """Elements in each bin, shape (bins,)."""
    mass_at_edges: Floats = field(init=False, repr=False)
    """Number of elements below each edge."""
    sum_at_edges: Floats = field(init=False, repr=False)
    """Sum of the elements below each edge."""

    def __post_init__(self) -> None:
        centres = (self.edges[:-1] + self.edges[1:]) / 2
        for name, amounts in (("mass_at_edges", self.counts), ("sum_at_edges", self.counts * centres)):
            object.__setattr__(self, name, np.concatenate(([0.0], np.cumsum(amounts))))

    def below(self, points: Floats) -> tuple[Floats, Floats]:
        """Number and sum of the elements below each of `points`, which may have any shape."""
        # side="right" finds the bin with edge <= point < next edge, never one of no width.
        bins = np.searchsorted(self.edges, points, side="right") - 1
        inside = np.clip(bins, 0, len(self.counts) - 1)
        left, right = self.edges[inside], self.edges[inside + 1]
        with np.errstate(invalid="ignore", divide="ignore"):
            mass = self.counts[inside] * (points - left) / (right - left)
        sums = mass * (left + points) / 2
        before, after = bins < 0, bins >= len(self.counts)
        mass = np.where(before, 0.0, np.where(after, self.mass_at_edges[-1], self.mass_at_edges[inside] + mass))
        sums = np.where(before, 0.0, np.where(after, self.sum_at_edges[-1], self.sum_at_edges[inside] + sums))
        return mass, sums

    def rebinned(self, low: float, high: float, bins: int) -> Floats:
        """Counts in `bins` equal bins from `low` to `high`, between which all elements lie; they are whole numbers."""
        mass, _ = self.below(np.linspace(low, high, bins + 1))
        mass[0], mass[-1] = 0.0, self.mass_at_edges[-1]
        return np.diff(np.rint(mass))  # an element is in one bin: which bins are empty matters to the KL divergence
