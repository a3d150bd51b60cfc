"""Values that are known while a model is imported: sizes, axes, and what the file computes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 2**20
"""Elements. What is larger is data, not a shape; a file may ask for any number."""

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""What depends on a free axis."""

_NUMPY_TYPES = MappingProxyType(
    {
        torch.bool: np.bool_,
        torch.int8: np.int8,
        torch.int16: np.int16,
        torch.int32: np.int32,
        torch.int64: np.int64,
        torch.uint8: np.uint8,
        torch.uint16: np.uint16,
        torch.uint32: np.uint32,
        torch.uint64: np.uint64,
        torch.float16: np.float16,
        torch.bfloat16: np.float32,  # NumPy has none: computed in 32 bits, then rounded, as runtimes do
        torch.float32: np.float32,
        torch.float64: np.float64,
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """An array of Python numbers, some of them perhaps sizes of free axes (`torch.SymInt`)."""

    array: NDArray[np.object_]
    dtype: torch.dtype = torch.int64
    """As which type the file knows it."""

    @staticmethod
    def of(values: Any, dtype: torch.dtype = torch.int64) -> "Host":
        """From a number or a (nested) sequence of numbers."""
        return Host(np.array(values, dtype=object), dtype)

    @staticmethod
    def read(tensor: Tensor) -> "Host":
        """From a tensor that the file stores."""
        wide = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        return Host(np.array(wide.tolist(), dtype=object).reshape(tuple(tensor.shape)), tensor.dtype)

    @property
    def numbers(self) -> list[Any]:
        """The elements, flat."""
        return self.array.reshape(-1).tolist()

    @property
    def number(self) -> Any:
        """The only element."""
        (only,) = self.numbers
        return only

    @property
    def ints(self) -> list[int]:
        """The elements as plain integers.

        Raises:
            ValueError: one of them depends on a free axis.
        """
        if not self.known:
            raise ValueError("it depends on the size of a free axis")
        return [int(number) for number in self.numbers]

    @property
    def known(self) -> bool:
        """Whether no element depends on a free axis."""
        return not any(isinstance(number, SYMBOLS) for number in self.numbers)

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The same numbers as a tensor of the program."""
        numbers = self.numbers
        # Of one number a trace makes an operator, not a constant that needs a name; -0.0 is another one than 0.0.
        if self.known and len(set(numbers)) == 1 == len(set(map(str, numbers))):
            return torch.full(self.array.shape, numbers[0], dtype=self.dtype, device=device)
        if self.known:
            return torch.tensor(self.array.tolist(), dtype=self.dtype, device=device).reshape(self.array.shape)
        parts = [torch.scalar_tensor(number, dtype=self.dtype, device=device) for number in numbers]
        return torch.stack(parts).reshape(self.array.shape)


def product(sizes: Sequence[Any]) -> Any:
    """Product of sizes, 1 for none; `math.prod` would start with a symbol's own type."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def affordable(sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of an array that is to be known while importing, before anything is allocated for it.

    Raises:
        ValueError: one is negative, or there would be more than `LARGEST` elements.
    """
    if any(size < 0 for size in sizes):
        raise ValueError(f"its result would have the shape {list(sizes)}")
    if product(sizes) > LARGEST:
        raise ValueError(f"its result would have more numbers than the {LARGEST} that can be known while importing")
    return tuple(sizes)


def broadcast(*parts: Host, shape: Sequence[int] = ()) -> list[NDArray[np.object_]]:
    """The arrays of the parts, all with the one shape that they and `shape` stretch to, checked to be affordable."""
    sizes = affordable(np.broadcast_shapes(tuple(shape), *(part.array.shape for part in parts)))
    return [np.broadcast_to(part.array, sizes) for part in parts]


def elementwise(
    known: Callable[..., NDArray[Any]],
    free: Callable[..., Any],
    *parts: Host,
    reads: torch.dtype | None = None,
    gives: torch.dtype | None = None,
) -> Host:
    """What an operator on single numbers makes of broadcast parts.

    Known numbers are computed in the type that the file computes in, so that they are rounded and wrap round as in a
    runtime: 130 × 0.7 is 91 in 32 bits, and a little less in 64.

    Args:
        known: gets NumPy arrays of the type `reads`.
        free: gets numbers, of which one at least depends on a free axis; these have no type to be rounded to.
        reads: type in which it is computed; None: the one of the parts.
        gives: type of the result; None: `reads`.
    Raises:
        ValueError: the result would be too large, the shapes do not fit, or the file computes in 8-bit floats.
        OverflowError: a number does not fit the type that the file says it has.
    """
    reads = reads or reduce(torch.promote_types, (part.dtype for part in parts))
    gives = gives or reads
    arrays = broadcast(*parts)
    flats = [array.reshape(-1) for array in arrays]
    is_free = np.zeros(arrays[0].size, dtype=bool)
    for flat in flats:
        is_free |= np.fromiter((isinstance(number, SYMBOLS) for number in flat), dtype=bool, count=flat.size)
    result = np.empty(is_free.shape, dtype=object)
    with np.errstate(all="ignore"):  # infinities and numbers that wrap round are what the file asks for
        found = known(*(typed(flat[~is_free], reads) for flat in flats))
    result[~is_free] = rounded(found, gives).astype(object)
    for place in np.flatnonzero(is_free):
        result[place] = free(*(flat[place] for flat in flats))
    return Host(result.reshape(arrays[0].shape), gives)


def typed(numbers: NDArray[np.object_], dtype: torch.dtype) -> NDArray[Any]:
    """Known numbers as an array of a type, to compute in it.

    Raises:
        ValueError: NumPy has no such type, or an integer type is said to hold a fraction.
        OverflowError: a number is beyond the type.
    """
    wanted = _NUMPY_TYPES.get(dtype)
    if wanted is None:
        raise ValueError(f"sizes are not computed in {dtype}")
    if not dtype.is_floating_point and any(isinstance(number, float) for number in numbers.reshape(-1)):
        raise ValueError(f"it says that {dtype} holds a number with a fraction")
    array: NDArray[Any] = numbers.astype(wanted)
    return array


def rounded(array: NDArray[Any], dtype: torch.dtype) -> NDArray[Any]:
    """Computed numbers in the type of the result; integers keep their lowest bits.

    Raises:
        OverflowError: a floating-point number is beyond the integers of the type, for which runtimes differ.
    """
    wanted = _NUMPY_TYPES.get(dtype)
    if wanted is None:
        raise ValueError(f"sizes are not computed in {dtype}")
    if array.dtype.kind == "f" and not dtype.is_floating_point and wanted is not np.bool_:
        array = np.trunc(array.astype(np.float64))
        least, most = float(torch.iinfo(dtype).min), float(torch.iinfo(dtype).max)
        # The largest of 63 bits is no floating-point number: the one above it is.
        if not np.all((array >= least) & ((array < most) | ((array == most) & (most < 2**53)))):
            raise OverflowError(f"a result that does not fit {dtype} is no size")
    with np.errstate(all="ignore"):
        if array.dtype.kind in "iu" and wanted is np.float16:
            array = array.astype(np.float32)
        array = array.astype(wanted)
    return _to_bfloat16(array) if dtype == torch.bfloat16 else array


def _to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers of which the lower 16 bits are zero, ties to even."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(array), nearest.view(np.float32), array)
