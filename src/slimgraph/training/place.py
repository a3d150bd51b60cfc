"""Read where data lie from their text, without reading the data."""

import re
from pathlib import Path

from slimgraph.errors import DataError
from slimgraph.training.callables import is_reference

DIGITS = ("digits", "digits:train", "digits:test")
"""scikit-learn's handwritten digits."""

_SUFFIX = re.compile(r"(?P<place>.*?)\[(?P<inside>[^\[\]]*)\]")


def sliced(spec: str) -> tuple[str, slice]:
    """What stands before `[start:stop]`, and the slice.

    Raises:
        DataError: the slice is malformed.

    >>> sliced("data.npz[:256]"), sliced("digits")
    (('data.npz', slice(None, 256, None)), ('digits', slice(None, None, None)))
    """
    match = _SUFFIX.fullmatch(spec)
    if match is None:
        return spec, slice(None)
    bounds = re.fullmatch(r"(-?\d+)?:(-?\d+)?", match["inside"])
    if bounds is None:
        raise DataError(f"{spec}: samples are chosen by [start:stop], as in {match['place']}[:256].")
    start, stop = (None if bound is None else int(bound) for bound in bounds.groups())
    return match["place"], slice(start, stop)


def is_stream(place: str) -> bool:
    """Whether it names a callable that returns batches."""
    return is_reference(place) and not place.startswith("digits:") and not Path(place).exists()


def require_place(spec: str) -> None:
    """Refuse data that cannot be there, by looking at the file system only.

    Raises:
        DataError: the text is malformed, names no file or folder, or an empty file.
    """
    place, _ = sliced(spec)
    if not place:
        raise DataError(f"{spec!r} names no data.")
    if place in DIGITS or is_stream(place):
        return
    path = Path(place)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()  # and no pipe, which would be waited for
        is_empty = is_file and not path.stat().st_size
    except PermissionError as error:
        raise DataError(f"{place} may not be read: {error.strerror}.") from error
    if not (is_file or is_folder):
        raise DataError(
            f"There is no file or folder {place}. Data are an .npz file, a folder of class folders of pictures, a list "
            f"of `path label` lines, module:callable, or one of {', '.join(DIGITS)}."
        )
    if is_empty:
        raise DataError(f"{place} cannot be read: the file is empty. Copy or write it again.")
