"""Open data of many kinds as batches that fit a program."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.signature import Signature
from slimgraph.training.batch import Batch, checked_inputs, checked_labels
from slimgraph.training.callables import import_callable
from slimgraph.training.digits import open_digits
from slimgraph.training.image_options import ImageOptions
from slimgraph.training.npz_samples import open_npz
from slimgraph.training.picture_files import open_folder, open_list
from slimgraph.training.place import DIGITS, is_stream, require_place, sliced
from slimgraph.training.samples import Numbers, Samples, said
from slimgraph.training.stream import stream_batches

__all__ = ["Batch", "DataSource", "ImageOptions", "open_data"]


class DataSource:
    """Batches that can be iterated again and again, in the same order; only one of them is in memory at a time."""

    def __init__(
        self, name: str, read: Callable[[], Iterator[Batch]], *, samples: int | None, has_labels: bool
    ) -> None:
        self.name = name
        self.samples = samples
        """How many samples there are; None for a stream, where only the end tells."""
        self.has_labels = has_labels
        self._read = read

    def __iter__(self) -> Iterator[Batch]:
        return self._read()

    def __len__(self) -> int:
        """Number of samples, not of batches.

        Raises:
            TypeError: it is a stream.
        """
        if self.samples is None:
            raise TypeError(f"{self.name} is a stream of unknown length.")
        return self.samples

    def __bool__(self) -> bool:
        return True  # there is always a sample, and a stream cannot be asked for its length

    def __repr__(self) -> str:
        count = "a stream" if self.samples is None else f"{self.samples} samples"
        return f"DataSource({self.name!r}, {count}, {'with' if self.has_labels else 'without'} labels)"


def open_data(
    spec: str,
    signature: Signature,
    *,
    batch_size: int = 32,
    image: ImageOptions | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> DataSource:
    """Batches of the data that `spec` names, checked against what the program takes.

    Args:
        spec: one of
            an `.npz` of arrays named as the inputs (or of one array), with optional `label` or `labels`;
            an `.npz` of uint8 pictures, or of packed JPEG files (`jpeg`, `offsets`), with optional `labels`;
            a folder of class folders of pictures, or of pictures;
            a text file of `path label` lines;
            `module:callable`, which returns an iterable of batches: a mapping, a tensor, or a tuple (inputs, labels);
            `digits`, `digits:train`, `digits:test`: scikit-learn's handwritten digits, scaled to [0, 1].
            A suffix chooses samples by position: `data.npz[:256]`, `data.npz[256:]`, `data.npz[-100:]`.
        signature: what the program takes.
        batch_size: samples in a batch; the last may have fewer. A program with a fixed batch has its own, and so has a
            callable.
        image: how pictures become numbers. The digits and what a callable returns are numbers already; an `.npz` of
            numbers is refused with it, unless it says nothing.
        limit: at most so many samples, after the suffix: drawn at random, in their old order; of a stream, the first.
        seed: of that draw.

    Raises:
        DataError: there is nothing there, it cannot be read, does not fit the program, or is empty. The first batch is
            read here, so that most errors show before any work is done; the others are raised where they are met.
        ConfigError: batch_size or limit is less than 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch_size is {batch_size} and limit is {limit}; give at least 1.")
    if not signature.inputs:
        raise DataError("The program takes no input, so no data can be given to it.")
    require_place(spec)
    place, chosen = sliced(spec)
    if is_stream(place):
        return _open_stream(spec, place, chosen, limit, signature)
    samples = _open_samples(place, signature, image)
    numbers = np.arange(samples.count, dtype=np.int64)[chosen]
    if limit is not None and limit < len(numbers):
        numbers = np.sort(np.random.default_rng(seed).choice(numbers, limit, replace=False))
    return _batched(spec, samples, numbers, signature, batch_size)


def _open_samples(place: str, signature: Signature, image: ImageOptions | None) -> Samples:
    if place in DIGITS:
        return open_digits(place.partition(":")[2], signature)
    path = Path(place)
    try:
        if path.is_dir():
            return open_folder(path, signature, image)
        return open_npz(path, signature, image) if path.suffix == ".npz" else open_list(path, signature, image)
    except PermissionError as error:
        raise DataError(f"{error.filename or path} may not be read: {error.strerror}.") from error


def _batched(spec: str, samples: Samples, numbers: Numbers, signature: Signature, batch_size: int) -> DataSource:
    if not len(numbers):
        raise DataError(f"{spec} has no sample; there are {samples.count} in all.")
    fixed = signature.inputs[0].shape[:1] if signature.batch_axis is None else ()
    if fixed and isinstance(fixed[0], int):
        batch_size = fixed[0]
        if len(numbers) % batch_size:
            raise DataError(
                f"{spec} has {len(numbers)} samples, but the program takes exactly {batch_size} at a time. "
                f"Choose a multiple of that, as by [:{len(numbers) // batch_size * batch_size or batch_size}]."
            )
    given = samples.labels
    labels = None if given is None else checked_labels(given, samples.count, signature, samples.name)

    def read() -> Iterator[Batch]:
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            inputs = checked_inputs(samples.read(some), signature, f"{samples.name}, {said(some)}", some)
            yield Batch(inputs, None if labels is None else labels[torch.from_numpy(some)])

    next(read())
    return DataSource(spec, read, samples=len(numbers), has_labels=labels is not None)


def _open_stream(spec: str, reference: str, chosen: slice, limit: int | None, signature: Signature) -> DataSource:
    start, stop = chosen.start or 0, chosen.stop
    if start < 0 or (stop is not None and stop < 0):
        raise DataError(f"{spec} counts from the end, which a stream does not know; count from the beginning.")
    if limit is not None:
        stop = start + limit if stop is None else min(start + limit, stop)
    function = import_callable(reference, what="The data", error=DataError)
    read = stream_batches(function, reference, signature, start=start, stop=stop)
    first = next(read(), None)
    if first is None:
        raise DataError(f"{spec} has no sample.")
    return DataSource(spec, read, samples=None, has_labels=first.labels is not None)
