"""Batches that a callable of the user's makes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature
from slimgraph.training.batch import LABEL_NAMES, Batch, checked_inputs, checked_labels


def stream_batches(
    function: Callable[[], Any], name: str, signature: Signature, *, start: int = 0, stop: int | None = None
) -> Callable[[], Iterator[Batch]]:
    """A function that begins at the first batch each time it is called.

    The callable is called once if it returns something that can be iterated again, as a list or a loader; if it returns
    an iterator, it is called for each new beginning.

    Args:
        function: returns an iterable of batches: mappings, tensors, arrays, or sequences (inputs, labels).
        name: of the function, for error messages.
        signature: what the program takes.
        start: first sample, counted over all batches; a batch that crosses a bound is cut.
        stop: the sample after the last.
    """
    made: Any = None

    def begin() -> Iterable[Any]:
        nonlocal made
        if made is None or isinstance(made, Iterator):
            before, made = made, function()
            if not isinstance(made, Iterable):
                raise DataError(
                    f"{name} returned an object of type {type(made).__name__}; it must return an iterable of batches."
                )
            if made is before:
                raise DataError(
                    f"{name} returned an iterator that is used up already; it must return a new one each time."
                )
        return made  # type: ignore[no-any-return]

    def read() -> Iterator[Batch]:
        position = 0
        labelled: bool | None = None
        for number, item in enumerate(begin()):
            where = f"{name}, batch {number}"
            batch = as_batch(item, signature, where)
            if labelled is not None and labelled != (batch.labels is not None):
                raise DataError(f"{where} has {'no labels' if labelled else 'labels'}, unlike the batches before it.")
            labelled = batch.labels is not None
            wanted = batch[max(start - position, 0) : None if stop is None else max(stop - position, 0)]
            position += len(batch)
            if 0 < len(wanted) < len(batch) and signature.batch_axis is None:
                raise DataError(f"{where} would be cut, but the program takes exactly {len(batch)} samples at a time.")
            if len(wanted):
                yield wanted
            if stop is not None and position >= stop:
                return

    return read


def as_batch(item: Any, signature: Signature, where: str) -> Batch:
    """A batch in any of the forms that `stream_batches` takes, checked.

    Raises:
        DataError: it does not fit the program, or is empty; the message begins with `where`.
    """
    if isinstance(item, Batch):
        item = (item.inputs, item.labels)
    given, labels = _without_labels(item, [spec.name for spec in signature.inputs])
    inputs = checked_inputs(given, signature, where)
    count = len(Batch(inputs, None))
    if count == 0:
        raise DataError(f"{where} has no sample.")
    return Batch(inputs, None if labels is None else checked_labels(labels, count, signature, where))


def _without_labels(item: Any, names: Sequence[str]) -> tuple[Any, Any]:
    """What a callable yields, parted into inputs and labels.

    A pair is (inputs, labels), unless the program takes two inputs and the pair begins with a bare tensor. A sequence
    one longer than the inputs ends in labels.
    """
    if isinstance(item, Mapping):
        keys = [key for key in LABEL_NAMES if key in item and key not in names]
        return {key: value for key, value in item.items() if key not in keys}, item[keys[0]] if keys else None
    if isinstance(item, Sequence):
        pair = len(item) == 2 and (len(names) != 2 or isinstance(item[0], (Mapping, Sequence)))
        if pair or len(item) == len(names) + 1:
            *inputs, labels = item
            return inputs[0] if pair else inputs, labels
    return item, None
