"""How a tensor becomes integers: bits, sign, symmetry, granularity."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.errors import ConfigError

EMPTY_SCALE = 1e-8
"""Scale of an interval without extent, such as that of zeros, so that nothing divides by zero."""

SMALLEST_SCALE = 1e-18
"""Scales are at least this: the product of two, which is a bias's, is then an ordinary float32 still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntScheme:
    """Integer grid of a tensor: x ≈ scale * (code - zero_point)."""

    bits: int = 8
    """2 to 16. Fewer bits than the storage type use only the codes of `code_range`."""
    signed: bool = True
    """Codes are stored as int8 / int16, otherwise as uint8 / uint16."""
    symmetric: bool = True
    """The zero point is fixed: 0 for signed codes, the middle code for unsigned ones."""
    narrow: bool = False
    """Leave out the lowest code, so that x and -x round alike. Used for weights."""
    axis: int | None = None
    """The axis *kept*: one scale for each index of it; None is one scale for the tensor."""
    group: int | None = None
    """Of a matrix, how many elements along the axis that is not kept share a scale; None is all of them."""

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise ConfigError(f"bits is {self.bits!r}; give a whole number from 2 to 16.")
        if self.group is not None and (self.group < 2 or self.axis is None):
            raise ConfigError(f"group is {self.group}; give at least 2, and the axis that is kept.")

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code, both used.

        >>> IntScheme().code_range, IntScheme(narrow=True).code_range, IntScheme(signed=False).code_range
        ((-128, 127), (-127, 127), (0, 255))
        """
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        return (low + (1 if self.narrow else 0), low + 2**self.bits - 1)

    @property
    def described(self) -> str:
        """What a reader calls it.

        >>> IntScheme().described, IntScheme(axis=0).described, IntScheme(bits=4, axis=0, group=32).described
        ('int8', 'int8 per channel', 'int4 per 32')
        """
        each = "" if self.axis is None else " per channel" if self.group is None else f" per {self.group}"
        return f"int{self.bits}{each}"

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the codes."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.uint16

    @property
    def middle(self) -> int | None:
        """The zero point of a symmetric grid; None where the tensor sets it."""
        return None if not self.symmetric else 0 if self.signed else 2 ** (self.bits - 1)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) of the grid that covers the real interval from `low` to `high`.

        Zero is always on the grid: the interval is extended to hold it. An empty interval gets `EMPTY_SCALE`.
        `low` and `high` have one element, or one for each index of `axis`, or shape (channels, groups); so do the
        results.
        """
        return grid_of(low, high, codes=self.code_range, middle=self.middle)


def grid_of(low: Tensor, high: Tensor, *, codes: tuple[int, int], middle: int | None) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of the grid with these first and last codes; as `IntScheme.parameters`.

    Args:
        middle: the zero point of a symmetric grid; None where the interval sets it.
    """
    first, last = codes
    low64, high64 = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if middle is not None:
        scale = _usable(torch.maximum(-low64, high64) / (last - middle))
        zero_point = torch.full_like(scale, middle)
    else:
        scale = _usable((high64 - low64) / (last - first))
        zero_point = (first - low64 / scale).round().clamp(first, last)
    return scale.float(), zero_point.to(torch.int32)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale > 0.0, scale.clamp(min=SMALLEST_SCALE), EMPTY_SCALE)


def rows_of(x: Tensor, scheme: IntScheme) -> Tensor:
    """The elements of a tensor with one row for each scale: each channel, or each group of one channel after another.

    Raises:
        ConfigError: the groups do not divide the matrix.
    """
    if scheme.axis is None:
        return x.reshape(1, -1)
    by_channel = x.movedim(scheme.axis, 0).flatten(1)
    if scheme.group is None:
        return by_channel
    if x.dim() != 2 or by_channel.shape[1] % scheme.group:
        raise ConfigError(
            f"Groups of {scheme.group} do not divide a tensor of shape {list(x.shape)}, of which axis {scheme.axis} is "
            "kept. Groups are those of a matrix, and divide its other axis."
        )
    return by_channel.reshape(-1, scheme.group)


def _broadcast(values: Tensor, like: Tensor, scheme: IntScheme) -> Tensor:
    if scheme.axis is None:
        return values.reshape(())
    if scheme.group is not None:
        spread_CK = values.repeat_interleave(scheme.group, dim=1)  # C = channels, K = elements of each
        return spread_CK if scheme.axis == 0 else spread_CK.T
    shape = [1] * like.dim()
    shape[scheme.axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: IntScheme) -> Tensor:
    """Codes of `x` in the scheme's storage type; ties go to even, as in ONNX QuantizeLinear, and codes saturate."""
    first, last = scheme.code_range
    code = torch.round(x / _broadcast(scale, x, scheme)) + _broadcast(zero_point, x, scheme)
    return code.clamp(first, last).to(scheme.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: IntScheme) -> Tensor:
    """Real values of `codes`, float32."""
    shifted = codes.to(torch.int32) - _broadcast(zero_point, codes, scheme)
    return shifted.float() * _broadcast(scale, codes, scheme)
