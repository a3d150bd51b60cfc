"""Take data in every form in which a caller may have it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature
from slimgraph.training.data import Batch, DataSource, open_data
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


def first_samples(data: DataSource, samples: int) -> Iterator[Batch]:
    """The first batches, until they hold that many samples or more."""
    seen = 0
    for batch in data:
        yield batch
        seen += len(batch)
        if seen >= samples:
            return
