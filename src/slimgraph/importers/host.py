"""Values that are known while a model is imported: sizes, axes, and what the file computes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 2**20
"""Elements. What is larger is data, not a shape; a file may ask for any number."""


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
        return not any(isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) for number in self.numbers)

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
