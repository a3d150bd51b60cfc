"""Let the files of one result take their places together, when all of them are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimgraph.files import move_together, output_directory, scratch_directory


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
        with scratch_directory(output_directory(target)) as aside:
            yield aside
            move_together(aside, target)
    finally:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
