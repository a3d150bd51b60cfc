"""The first samples of calibration data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimgraph.errors import CalibrationError, ConfigError
from slimgraph.program.program import Program
from slimgraph.program.signature import samples_in
from slimgraph.quantization.calibration import require_finite_inputs


def first_samples(program: Program, batches: Iterable[Any], samples: int) -> list[dict[str, Tensor]]:
    """The first samples of calibration data, in as few batches as their sizes allow; else as `first_batches`."""
    found: list[dict[str, Tensor]] = []
    batched = program.signature.batched
    for batch in first_batches(program, batches, samples):
        if found and can_be_joined(found[-1], batch, batched):
            last = found[-1]
            found[-1] = {name: torch.cat([last[name], x]) if name in batched else x for name, x in batch.items()}
        else:
            found.append(batch)
    return found


def first_batches(program: Program, batches: Iterable[Any], samples: int) -> Iterator[dict[str, Tensor]]:
    """The batches of calibration data up to so many samples, the last one cut; no more is read than that needs.

    Where the number of samples in a batch is fixed, the last batch is whole.

    Raises:
        ConfigError: `samples` is less than one.
        CalibrationError: there is no batch.
        DataError: a batch does not fit the program, or has NaN or infinity; the message names it.
    """
    if samples < 1:
        raise ConfigError(f"samples is {samples}; give at least 1.")
    batched = program.signature.batched
    missing = samples
    for index, batch in enumerate(batches):
        bound = program.signature.bind(batch, where=f"Calibration batch {index}")
        require_finite_inputs(bound, index)
        yield {name: x[:missing] if name in batched else x for name, x in bound.items()}
        missing -= samples_in(bound)
        if missing <= 0:
            break
    if missing == samples:
        raise CalibrationError(
            "The calibration data has no batch. Give at least one; an iterator that was read before is empty."
        )


def samples_of(batches: Sequence[Mapping[str, Tensor]], index: int) -> str:
    """What a message calls one of several batches that are not those that were given, but of the same samples.

    >>> samples_of([{"x": torch.zeros(4, 1)}, {"x": torch.zeros(3, 1)}], 1)
    'calibration samples 4 to 6 (counted from 0)'
    """
    sizes = list(map(samples_in, batches))
    return f"calibration samples {sum(sizes[:index])} to {sum(sizes[: index + 1]) - 1} (counted from 0)"


def can_be_joined(batch: Mapping[str, Tensor], other: Mapping[str, Tensor], batched: frozenset[str]) -> bool:
    """Whether two batches can be joined."""
    return bool(batched) and all(
        x.shape[1:] == batch[name].shape[1:] if name in batched else torch.equal(x, batch[name])
        for name, x in other.items()
    )
