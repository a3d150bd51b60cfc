"""Estimate how sure the difference of two means over the same samples is."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from slimgraph.errors import DataError

RESAMPLES = 5000
"""Draws of a bootstrap; the ends of the interval then vary by about 2 % of its width between seeds."""


class PairedDifference(NamedTuple):
    """A difference of two means over the same samples, with its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_difference(before: Tensor, after: Tensor, seed: int = 0) -> PairedDifference:
    """Mean of `after` minus mean of `before`, with the 95 % interval of a paired percentile bootstrap.

    Both hold one entry for each sample, in the same order, as `Evaluation.correct` does. Pairing takes out how hard the
    samples are, which is most of the variance. Where no sample changed, the interval is a point; that does not prove
    that none would change among others: up to 3 / n of them may, at the same confidence.

    Raises:
        DataError: they are empty, not of one length, or not finite.
    """
    if before.dim() != 1 or before.shape != after.shape or not len(before):
        raise DataError(
            f"Paired samples are needed, one entry each, but there are {list(before.shape)} and {list(after.shape)}."
        )
    changes = (after.double() - before.double()).numpy()
    if not np.isfinite(changes).all():
        raise DataError("A NaN or an infinity is among the samples, so no difference of means can be estimated.")
    count = len(changes)
    # Resampling n samples with replacement draws how often each distinct change occurs: for right and wrong, three.
    values, occurrences = np.unique(changes, return_counts=True)
    random = np.random.default_rng(seed)
    rows = max(1, 2**22 // len(values))
    means = np.concatenate(
        [
            random.multinomial(count, occurrences / count, size=min(rows, RESAMPLES - start)) @ values / count
            for start in range(0, RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(float(changes.sum()) / count, float(low), float(high))
