"""Numbered samples that are read on demand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slimgraph.training.images import PictureInput, Pixels

Numbers: TypeAlias = NDArray[np.int64]
"""Which samples, counted from 0."""


def said(numbers: Numbers) -> str:
    """The samples of a batch, in words."""
    return f"sample {numbers[0]}" if len(numbers) == 1 else f"samples {numbers[0]} to {numbers[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Numbered samples that are read on demand."""

    name: str
    """What they come from, to begin a message with."""
    count: int
    read: Callable[[Numbers], Mapping[str, Any]]
    """Inputs of the samples of these numbers, by input name, still to be checked against the program."""
    labels: NDArray[Any] | None
    """As they are stored, still to be checked; None where there are none."""


def picture_samples(
    name: str, pictures: PictureInput, count: int, one: Callable[[int], Pixels], labels: NDArray[Any] | None
) -> Samples:
    """Samples that are one picture each, decoded by `one`."""

    def read(numbers: Numbers) -> dict[str, Tensor]:
        decoded = [one(number) for number in numbers.tolist()]
        return {pictures.name: pictures.tensor(decoded, where=f"{name}, {said(numbers)}")}

    return Samples(name=name, count=count, read=read, labels=labels)
