"""Take data in every form in which a caller may have it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature
from slimgraph.training.data import DataSource, open_data
from slimgraph.training.stream import stream_batches

Data = str | DataSource | Iterable[Any] | Callable[[], Iterable[Any]]
"""What `open_data` takes; or batches that can be read more than once: a list, a loader, or a function that begins anew.

A batch is a tensor, a mapping by input name, or a pair of inputs and labels.
"""


def open_given(data: Data, signature: Signature, *, what: str, seed: int) -> DataSource:
    """The data as checked batches; `what` names them in messages.

    Raises:
        DataError: they do not fit the program, are empty, or can be read only once.
    """
    if isinstance(data, str):
        return open_data(data, signature, seed=seed)
    if isinstance(data, DataSource):
        return data
    if isinstance(data, Iterator):
        raise DataError(
            f"{what} is an iterator, which can be read only once, and the data are read several times. Give a list, a "
            "loader, or a function that returns a new iterator each time."
        )
    read = stream_batches(data if callable(data) else lambda: data, what, signature)
    first = next(read(), None)
    if first is None:
        raise DataError(f"{what} has no batch.")
    return DataSource(what, read, samples=None, has_labels=first.labels is not None)


def first_samples(
    data: DataSource, signature: Signature, samples: int, *, at_once: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Inputs of the first samples, a few at a time; whole batches where the program fixes their size."""
    free = signature.batch_axis
    batched = signature.batched
    seen = 0
    for batch in data:
        size = len(batch) if free is None else at_once
        for start in range(0, len(batch), size):
            if seen >= samples:
                return
            part = slice(start, start + size)
            yield {name: value[part] if name in batched else value for name, value in batch.inputs.items()}
            seen += min(size, len(batch) - start)
