"""What rounding to an integer grid does to a distribution."""

from dataclasses import dataclass

import numpy as np
import torch

from slimgraph.program.scheme import IntScheme
from slimgraph.quantization.density import Density, Floats


@dataclass(frozen=True, slots=True)
class RoundedMoments:
    """Of x and its rounded and saturated x', means over all elements; one entry for each grid, shape (K,)."""

    mean: Floats
    """Of x'."""
    mean_square: Floats
    """Of x'²."""
    mean_product: Floats
    """Of x·x'."""


def rounded_moments(density: Density, scheme: IntScheme, low_K: Floats, high_K: Floats) -> RoundedMoments:
    """Moments after quantization by the grids that cover `low_K` to `high_K`.

    Each code's elements are those between the points where rounding changes to the next code, and to infinity for the
    first and the last code. Where such a point splits a bin, so are the elements that are spread evenly over it.
    """
    first, last = scheme.code_range
    scale, zero_point = scheme.parameters(torch.tensor(low_K), torch.tensor(high_K))
    scale_K1 = scale.double().numpy()[:, None]
    value_KC = (np.arange(first, last + 1) - zero_point.double().numpy()[:, None]) * scale_K1  # C = codes
    mass_KB, sum_KB = density.below(value_KC[:, :-1] + scale_K1 / 2)  # B = boundaries between codes
    count = density.mass_at_edges[-1]
    mass_KC = np.diff(mass_KB, axis=1, prepend=0.0, append=count)
    sum_KC = np.diff(sum_KB, axis=1, prepend=0.0, append=density.sum_at_edges[-1])
    return RoundedMoments(
        mean=(value_KC * mass_KC).sum(axis=1) / count,
        mean_square=(value_KC**2 * mass_KC).sum(axis=1) / count,
        mean_product=(value_KC * sum_KC).sum(axis=1) / count,
    )
