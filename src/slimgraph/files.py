"""Write files whole or not at all."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
