"""How far two results are apart, with what is not finite in both left out."""

from torch import Tensor


def differences(expected: Tensor, got: Tensor) -> Tensor:
    """Absolute differences in float64, flat, without the places where both are NaN or the same infinity.

    NaN or an infinity on one side only stays: a limit has to be tested as `not largest <= limit`, which NaN fails.
    """
    a, b = expected.double(), got.double()
    equal = (a.isnan() & b.isnan()) | (a.isinf() & (a == b))
    return (a - b).abs()[~equal]


def finite(values: Tensor) -> Tensor:
    """The values that are neither NaN nor infinite, in float64, flat: an infinite one would make any limit infinite."""
    wide = values.double()
    return wide[wide.isfinite()]


def largest_difference(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """The largest of the `differences`, and the largest absolute value that was expected; 0 where there is none."""
    apart, values = differences(expected, got), finite(expected)
    return apart.max().item() if apart.numel() else 0.0, values.abs().max().item() if values.numel() else 0.0
