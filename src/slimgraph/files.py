"""Write files whole or not at all."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from slimgraph.errors import OutputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Path of a temporary file beside `path`, which takes the place of `path` when the block ends well.

    The new content is flushed to the disk before it gets the name. When the block raises, the temporary file is
    removed and an older file at `path` stays as it was.

    Raises:
        OutputError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        # Not mkstemp, whose files only their owner reads: a result is readable like any file that its user writes. The
        # system applies the umask itself; to ask for it is to change it, for all threads.
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise OutputError(
            f"Cannot write {target}: {error.strerror}. Give a folder that exists and is writable."
        ) from error
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        aside.replace(target)
    except OSError as error:
        raise OutputError(
            f"Cannot write {target}: {error.strerror or error}. What stood there before is unchanged."
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file as UTF-8, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def output_directory(path: str | os.PathLike[str]) -> Path:
    """The folder at `path`, made if it was missing.

    Raises:
        OutputError: something else has that name, or nothing may be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"Cannot write into {folder}: {error.strerror}. Give a folder that is writable.") from error
    return folder


_SCRATCH, _OWNER = ".slimgraph-", "owner"


@contextmanager
def scratch_directory(folder: Path) -> Iterator[Path]:
    """A new folder within `folder`, gone with all that is in it when the block ends.

    Those that processes left here which were killed are removed first. A living process holds a lock within its own, so
    none of another one is touched, in whatever container it runs.

    Raises:
        OutputError: `folder` does not exist or cannot be written.
    """
    with ExitStack() as stack:
        try:
            _remove_abandoned(folder)
            outer = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder)))
            unlocked = outer / f"{_OWNER}.new"
            owner = os.open(unlocked, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            stack.callback(os.close, owner)
            if _lock(owner):
                unlocked.rename(outer / _OWNER)  # it gets its name when it is locked: nobody finds it free
            inner = outer / "files"
            inner.mkdir()
        except OSError as error:
            raise OutputError(
                f"Cannot write into {folder}: {error.strerror}. Give a folder that exists and is writable."
            ) from error
        yield inner


def _remove_abandoned(folder: Path) -> None:
    for scratch in folder.glob(f"{_SCRATCH}*"):
        try:
            owner = os.open(scratch / _OWNER, os.O_RDWR)
        except OSError:
            continue  # being made, somebody else's, or gone
        try:
            if _lock(owner) and not scratch.is_symlink():
                shutil.rmtree(scratch, ignore_errors=True)
        finally:
            os.close(owner)


def _lock(opened: int) -> bool:
    """Lock a file until it is closed or the process ends; False where another one has, or there are no such locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def move_together(source: Path, target: Path) -> None:
    """Move the files of one folder into another: all of them, or none, older ones then being back in their places.

    Folders within `source` stay. Both folders lie on one file system, where a move is at once and whole.

    Raises:
        OutputError: a file cannot be moved.
    """
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
