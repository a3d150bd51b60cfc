"""Find the samples in an `.npz` file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimgraph.errors import DataError, closest
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.training.batch import LABEL_NAMES
from slimgraph.training.image_options import ImageOptions
from slimgraph.training.images import PictureInput, Pixels, picture_spec
from slimgraph.training.npz import ArrayHeader, NpzFile
from slimgraph.training.samples import Numbers, Samples, picture_samples

_CLASS_NAMES = ("names", "classes")
"""Arrays of words that packs of pictures carry beside the labels; nothing here needs them."""


def open_npz(path: Path, signature: Signature, image: ImageOptions | None) -> Samples:
    """Samples of an `.npz` file: JPEG files one after the other, uint8 pictures, or arrays named as the inputs."""
    archive = NpzFile(path)
    inputs = [spec.name for spec in signature.inputs]
    labels = [name for name in LABEL_NAMES if name in archive.headers and name not in inputs]
    if len(labels) > 1:
        raise DataError(f"{path} has both {' and '.join(labels)}; leave one of them.")
    if {"jpeg", "offsets"} <= archive.headers.keys() and not {"jpeg", "offsets"} & set(inputs):
        return _open_packed(archive, labels, PictureInput.of(signature, image, where=str(path)))
    arrays = {name: header for name, header in archive.headers.items() if name not in labels}
    single = _single_array(arrays, inputs)
    holds_pictures = single is not None and picture_spec(signature) is not None and _holds_pixels(arrays[single])
    if not holds_pictures and image not in (None, ImageOptions()):
        raise DataError(
            f"{path} holds numbers, not uint8 pictures, so that options for images do not apply: mean, std, order and "
            f"sizes. Scale the numbers as in training when you store them, and leave these options out."
        )
    if single is None:
        return _open_arrays(archive, {name: name for name in arrays}, labels, signature)
    if holds_pictures:
        return _open_pixels(archive, single, labels, PictureInput.of(signature, image, where=str(path)))
    return _open_arrays(archive, {inputs[0]: single}, labels, signature)


def _single_array(arrays: Mapping[str, ArrayHeader], inputs: Sequence[str]) -> str | None:
    """The array for the only input of a program, which may have any name if no other array could be meant."""
    candidates = [name for name in arrays if name not in _CLASS_NAMES or name in inputs]
    return candidates[0] if len(inputs) == 1 and len(candidates) == 1 else None


def _holds_pixels(header: ArrayHeader) -> bool:
    return header.dtype == np.uint8 and len(header.shape) in (3, 4)


def _open_packed(archive: NpzFile, label_names: Sequence[str], pictures: PictureInput) -> Samples:
    name = str(archive.path)
    for array, kinds, meaning in (("jpeg", "u", "bytes"), ("offsets", "iu", "whole numbers, one more than pictures")):
        header = archive.headers[array]
        if header.dtype.kind not in kinds or len(header.shape) != 1 or (array == "jpeg" and header.dtype.itemsize != 1):
            raise DataError(f"{name} is packed wrongly: {array!r} is {header}, but must be a row of {meaning}.")
    data, offsets, *labels = archive.read("jpeg", "offsets", *label_names)
    bounds = offsets.astype(np.int64)
    if not len(bounds) or bounds[0] < 0 or bounds[-1] > len(data) or (np.diff(bounds) < 0).any():
        raise DataError(f"{name} is packed wrongly: the offsets do not rise from 0 to the {len(data)} bytes of jpeg.")

    def one(number: int) -> Pixels:
        return pictures.decode(data[bounds[number] : bounds[number + 1]].tobytes(), where=f"{name}, sample {number}")

    return picture_samples(name, pictures, len(bounds) - 1, one, labels[0] if labels else None)


def _open_pixels(archive: NpzFile, images: str, label_names: Sequence[str], pictures: PictureInput) -> Samples:
    stored, *labels = archive.read(images, *label_names)
    name = str(archive.path)
    if stored.ndim == 3:
        stored = stored[..., np.newaxis]
    elif stored.shape[3] not in (1, 3):
        stored = np.moveaxis(stored, 1, 3)
    if stored.shape[3] not in (1, 3):
        raise DataError(
            f"{name}: {images!r} is uint8 {archive.headers[images].shape}; pictures are (N, height, width), "
            f"(N, height, width, channels) or (N, channels, height, width) with 1 or 3 channels."
        )
    pixels = stored.astype(np.uint8, copy=False)

    def one(number: int) -> Pixels:
        return pictures.from_array(pixels[number], where=f"{name}, sample {number}")

    return picture_samples(name, pictures, len(pixels), one, labels[0] if labels else None)


def _check_array(where: str, header: ArrayHeader, spec: TensorSpec) -> None:
    if header.dtype.kind not in "biuf" or header.dtype.itemsize > 8:
        raise DataError(f"{where} is {header}; the program takes {spec}.")
    if not header.shape:
        raise DataError(f"{where} is a single number; its first axis must count samples.")
    if header.dtype.kind != "f" and spec.dtype.is_floating_point:
        raise DataError(
            f"{where} is {header}, but the program takes {spec}. Only uint8 pictures for an input with 1 or 3 channels "
            f"are scaled here; store other numbers as float32, scaled as in training."
        )


def _open_arrays(
    archive: NpzFile, sources: Mapping[str, str], label_names: Sequence[str], signature: Signature
) -> Samples:
    """Arrays by input name; `sources` maps an input to the name of its array."""
    name = str(archive.path)
    specs = {spec.name: spec for spec in signature.inputs}
    for given in sources:
        if given not in specs:
            wanted = ", ".join(map(str, signature.inputs))
            raise DataError(
                f"{name} has an array {given!r}, but the program takes {wanted}. {closest(given, specs)} "
                f"Labels are named {' or '.join(LABEL_NAMES)}."
            )
    for wanted_name, spec in specs.items():
        if wanted_name not in sources:
            raise DataError(f"{name} has no array for the input {spec}. {closest(wanted_name, archive.headers)}")
        _check_array(f"{name}: {sources[wanted_name]!r}", archive.headers[sources[wanted_name]], spec)
    counts = {given: archive.headers[source].shape[0] for given, source in sources.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} of {given!r}" for given, count in counts.items())
        raise DataError(f"{name} has unequal numbers of samples: {told}.")
    count = next(iter(counts.values()))
    values = archive.read(*sources.values(), *label_names)
    arrays = dict(zip(sources, values, strict=False))

    def read(numbers: Numbers) -> dict[str, NDArray[Any]]:
        return {given: array[numbers] for given, array in arrays.items()}

    labels = values[-1] if label_names else None
    return Samples(name=name, count=count, read=read, labels=labels)
