"""Which bins of a histogram to keep so that clipping and rounding lose the least information."""

import numpy as np

from slimgraph.quantization.density import Floats


def divergences(counts: Floats, *, levels: int, outliers_below: float = 0.0) -> Floats:
    """Kullback-Leibler divergence KL(P || Q) for keeping the first i bins, i = 0 to len(counts) - 1.

    P is `counts[:i]`, with all that lies beyond added to its last bin. Q is `counts[:i]` (without the outliers) merged
    into `levels` groups of i // levels bins, the last of which takes the remainder, and spread again, evenly, over
    those bins of a group that are not empty in P. Where bin i - 1 is empty there is no candidate: the result is inf.

    Args:
        counts: of elements in each bin, at least one of them positive.
        levels: codes for the kept bins.
        outliers_below: elements clipped at the other end; P has them in its first bin that is not empty.
    """
    total = counts.sum() + outliers_below
    result = np.full(len(counts), np.inf)
    kept_C = np.flatnonzero(counts[:-1]) + 1  # C = candidates
    if len(kept_C) == 0:
        return result
    # KL = Σ p ln(p / total) - Σ p ln(q / kept) over the kept bins. Within a group q is one number, the group's sum over
    # its non-empty bins: so the second sum runs over groups, and for one group size all groups but the last are common
    # to all candidates. Everything becomes a difference of cumulative sums.
    p = counts.copy()
    p[kept_C[0] - 1] += outliers_below
    below = _from_zero(counts)
    below_p = _from_zero(p)
    filled = _from_zero((counts > 0).astype(np.float64))
    below_plogp = _from_zero(_xlogx(p))
    for size in np.unique(np.maximum(kept_C // levels, 1)):
        kept = kept_C[np.maximum(kept_C // levels, 1) == size]
        edges = np.arange(0, kept[-1] + 1, size)
        group_logq = _xlogy(np.diff(below_p[edges]), np.diff(below[edges]), np.diff(filled[edges]))
        last = np.minimum(kept, levels) - 1  # of the groups; there are fewer bins than levels at 12 bits and more
        start = edges[last]
        p_last = p[kept - 1] + (total - below_p[kept])
        p_logp = below_plogp[kept - 1] + _xlogx(p_last)
        p_logq = _from_zero(group_logq)[last] + _xlogy(
            total - below_p[start], below[kept] - below[start], filled[kept] - filled[start]
        )
        result[kept] = (p_logp - p_logq) / total + np.log(below[kept] / total)
    return result


def bins_to_keep(counts: Floats, *, levels: int, at_least: int, outliers_below: float = 0.0) -> int:
    """The i from `at_least` to len(counts) - 1 with the smallest of `divergences`; the first, if several.

    Without any candidate it is the index of the last non-empty bin up to `at_least`, bin 0 left out. If there is none
    either, it is len(counts) - 1: a value of zeros and ones keeps its ones.
    """
    candidates = divergences(counts, levels=levels, outliers_below=outliers_below)[at_least:]
    if np.isfinite(candidates).any():
        return at_least + int(np.argmin(candidates))
    lower = np.flatnonzero(counts[1 : at_least + 1])
    return 1 + int(lower[-1]) if len(lower) else len(counts) - 1


def span_to_keep(counts: Floats, *, levels: int, zero: float) -> tuple[int, int]:
    """The bins [begin, end) to keep, when zero lies `zero` bins from the left.

    Of the bins on each side of zero at least half are kept. Where both sides have bins, each end is chosen in turn,
    given the other, the upper one first, until both stay or have been chosen four times.
    """
    bins = len(counts)
    at_least_above = int(zero + (bins - zero - 1) / 2)
    at_least_below = int(bins - zero + (zero - 1) / 2)  # the same, counted from the right
    begin, end = 0, bins
    # At 8 bits two rounds suffice as a rule. With few levels the ends can go round by some bins for ever, since the
    # groups start from the end that is held.
    for _ in range(4 if 0 < zero < bins else 1):
        before = (begin, end)
        if zero < bins:
            at_least = max(at_least_above - begin, 1)
            clipped = counts[:begin].sum()
            end = begin + bins_to_keep(counts[begin:], levels=levels, at_least=at_least, outliers_below=clipped)
        if zero > 0:
            at_least = max(at_least_below - (bins - end), 1)
            clipped = counts[end:].sum()
            begin = end - bins_to_keep(counts[:end][::-1], levels=levels, at_least=at_least, outliers_below=clipped)
        if before == (begin, end):
            break
    return begin, end


def _from_zero(amounts: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(amounts)))


def _xlogx(x: Floats) -> Floats:
    return x * np.log(np.where(x > 0, x, 1.0))


def _xlogy(x: Floats, numerator: Floats, denominator: Floats) -> Floats:
    return x * np.log(np.where(numerator > 0, numerator, 1.0) / np.maximum(denominator, 1.0))
