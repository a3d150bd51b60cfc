"""Batches from whatever a user gives."""

from collections.abc import Iterable, Iterator
from typing import Any

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature
from slimgraph.training.batch import Batch
from slimgraph.training.data import open_data
from slimgraph.training.stream import as_batch


def batches_of(data: str | Iterable[Any], signature: Signature) -> Iterator[Batch]:
    """Batches from what a user gives: a specification, or batches in any form, each checked.

    Raises:
        DataError: one does not fit, or there is none.
    """
    items: Iterable[Any] = open_data(data, signature) if isinstance(data, str) else data
    none = True
    for number, item in enumerate(items):
        none = False
        yield as_batch(item, signature, f"Batch {number} of the data")
    if none:
        raise DataError("There is no batch in the data.")
