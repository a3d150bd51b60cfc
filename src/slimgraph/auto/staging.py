"""Let the files of one result take their places together, when all of them are complete."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from slimgraph.errors import OutputError
from slimgraph.files import output_directory


@contextmanager
def staging(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files move to the folder `out` when the block ends well.

    When it raises, nothing of it stays: an older result is untouched, and a folder that was made for this one is gone.
    When a file cannot be moved, those that were moved before it are taken back, and older ones return to their places.
    Folders within the temporary one are not moved. It lies inside of `out`, not beside it: what is mounted there may be
    a file system of its own, and only within one is a move at once and whole.

    Raises:
        OutputError: `out` is no folder or cannot be written.
    """
    target = Path(out)
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        with _aside(target) as aside:
            yield Path(aside)
            _move_files(Path(aside), target)
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _aside(target: Path) -> TemporaryDirectory[str]:
    directory = output_directory(target)
    try:
        return TemporaryDirectory(prefix=".slimgraph-", dir=directory)
    except OSError as error:
        raise OutputError(f"Cannot write into {target}: {error.strerror}. Give a folder that is writable.") from error


def _move_files(source: Path, target: Path) -> None:
    # From the end of the alphabet, so that model.onnx.data is there before model.onnx, which reads it.
    files = sorted((path for path in source.iterdir() if path.is_file()), reverse=True)
    blocked = [target / path.name for path in files if (target / path.name).is_dir()]
    if blocked:
        raise OutputError(
            f"{blocked[0]} is a folder, where a file is to be written. Move it away, or give another one."
        )
    older = source / "older"
    older.mkdir()
    with ExitStack() as undo:  # an interruption too must not leave files of two results
        try:
            for path in files:
                place = target / path.name
                if os.path.lexists(place):
                    _keep(place, older / path.name)
                    undo.callback((older / path.name).replace, place)
                else:
                    undo.callback(place.unlink, missing_ok=True)
                path.replace(place)
        except OSError as error:
            raise OutputError(
                f"Cannot write into {target}: {error.strerror}. Give a folder that is writable."
            ) from error
        undo.pop_all()


def _keep(place: Path, older: Path) -> None:
    """Give a file a second name, so that there is one under the first at every moment."""
    try:
        os.link(place, older, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        place.replace(older)
