"""Find the pictures in a folder or a list."""

import re
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature
from slimgraph.training.batch import class_count
from slimgraph.training.image_options import ImageOptions
from slimgraph.training.images import PICTURE_SUFFIXES, PictureInput, Pixels
from slimgraph.training.samples import Samples, picture_samples


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _picture_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES and not _hidden(file))


def open_folder(path: Path, signature: Signature, image: ImageOptions | None) -> Samples:
    """Pictures of a folder of class folders; the classes are numbered in the order of their names.

    The order is one picture of each class, then the next of each, so that every beginning is a fair sample. A folder
    that directly holds pictures gives them in the order of their names, without labels.

    Raises:
        DataError: there are no pictures, or as many class folders as the program has classes are not there.
    """
    pictures = PictureInput.of(signature, image, where=str(path))
    own = _picture_files(path)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not _hidden(folder))
    if own and folders:
        raise DataError(
            f"{path} has pictures, {own[0].name} first, beside class folders, {folders[0].name} first; move them."
        )
    if not own and not folders:
        raise DataError(f"{path} has neither class folders nor pictures ({' '.join(sorted(PICTURE_SUFFIXES))}).")
    if not folders:
        return _from_files(str(path), own, None, pictures)
    by_class = [[(file, label) for file in _picture_files(folder)] for label, folder in enumerate(folders)]
    for folder, files in zip(folders, by_class, strict=True):
        if not files:
            raise DataError(f"The class folder {folder} has no pictures ({' '.join(sorted(PICTURE_SUFFIXES))}).")
    _require_every_class(path, folders, class_count(signature))
    interleaved = [sample for sample in chain.from_iterable(zip_longest(*by_class)) if sample is not None]
    return _from_files(str(path), [file for file, _ in interleaved], [label for _, label in interleaved], pictures)


_NAMED = 8
"""Class folders that a message names; of more it gives the number."""


def _require_every_class(path: Path, folders: Sequence[Path], classes: int | None) -> None:
    """Refuse folders that cannot be all classes: every class behind a missing one would get a wrong number."""
    if classes is None or len(folders) == classes:
        return
    names = ", ".join(folder.name for folder in folders[:_NAMED])
    more = f" and {len(folders) - _NAMED} more" if len(folders) > _NAMED else ""
    raise DataError(
        f"{path} has {len(folders)} class folders ({names}{more}), but the program has {classes} classes. Folders are "
        f"numbered by their sorted names, {folders[0].name} is 0, so that labels would be wrong where one is missing. "
        f"Give a text file with a line `path label` for each picture instead."
    )


_LINE = re.compile(r"(?P<path>\S.*?)\s+(?P<label>\d{1,9})")


def open_list(path: Path, signature: Signature, image: ImageOptions | None) -> Samples:
    """Pictures of a text file with `path label` on each line; paths are relative to the file, and may hold spaces."""
    pictures = PictureInput.of(signature, image, where=str(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither an .npz file nor a text file of `path label` lines.") from error
    files: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(f"{path}, line {number}: {line[:80]!r} is not `path label` with a label of 0 or more.")
        file = path.parent / match["path"]
        if not file.is_file():
            raise DataError(f"{path}, line {number}: there is no file {file}.")
        files.append(file)
        labels.append(int(match["label"]))
    return _from_files(str(path), files, labels, pictures)


def _from_files(name: str, files: Sequence[Path], labels: Sequence[int] | None, pictures: PictureInput) -> Samples:
    def one(number: int) -> Pixels:
        return pictures.decode(files[number], where=str(files[number]))

    return picture_samples(
        name, pictures, len(files), one, None if labels is None else np.array(labels, dtype=np.int64)
    )
