"""Write the members of a `.pt2` file, and read them if none could run code or grow beyond the file."""

import io
import os
import re
import struct
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from slimgraph.errors import ModelLoadError

MODEL = "models/model.json"
WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"
CONSTANTS = "data/constants/"
CONSTANTS_CONFIG = f"{CONSTANTS}model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
EXTRA = "extra/"

_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|models/model\.json"
    r"|data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)"
    r"|data/sample_inputs/model\.pt|extra/[\w.-]+",
    re.ASCII,
)
# Format and version of the archive; `.data/version` is that of PyTorch's zip files.
_STAMPS = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": sys.byteorder.encode()}

# A network of a thousand operators needs two megabytes; Python needs about ten times as much for the parsed text.
_LARGEST_TEXT = 2**26

_PICKLED = re.compile(r".*\.pkl|data/constants/(custom|opaque)_obj_\d+|data/\d+|.*\.so", re.ASCII)


class Members:
    """The members of an open archive by their names below its root folder. Nothing here is unpickled."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._entries = _checked(archive.infolist(), size)
        for name, expected in _STAMPS.items():
            if self.read(name) != expected:
                raise ModelLoadError(f"its {name} is {self.read(name)[:20]!r} instead of {expected!r}.")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def size(self, name: str) -> int:
        """Bytes of a member.

        Raises:
            ModelLoadError: there is none of this name.
        """
        if name not in self._entries:
            raise ModelLoadError(f"the archive has no {name}.")
        return self._entries[name].file_size

    def read(self, name: str) -> bytes:
        """A member of moderate size.

        Raises:
            ModelLoadError: there is none of this name, it is too large, or its checksum is wrong.
        """
        if self.size(name) > _LARGEST_TEXT:
            raise ModelLoadError(f"{name} has {self.size(name)} bytes; the description of a program has fewer.")
        return self._archive.read(self._entries[name])

    def read_tensor(self, name: str) -> Tensor:
        """The bytes of a member as a uint8 tensor of its own, without a second copy in memory."""
        content = torch.empty(self.size(name), dtype=torch.uint8)
        view, filled = memoryview(content.numpy()), 0  # type: ignore[arg-type]  # NumPy 1 has no buffer type
        with self._archive.open(self._entries[name]) as opened:
            member = cast(io.BufferedIOBase, opened)
            while got := member.readinto(view[filled : filled + 2**20]):
                filled += got
        if filled != len(content):
            raise ModelLoadError(f"{name} ends after {filled} of {len(content)} bytes.")
        return content


def _checked(entries: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name below the root folder, of an archive that has known members only, whole and as they are."""
    found: dict[str, zipfile.ZipInfo] = {}
    root = entries[0].orig_filename.split("/")[0] if entries else ""
    for entry in entries:
        folder, _, name = entry.orig_filename.partition("/")
        if _PICKLED.fullmatch(name):
            raise ModelLoadError(
                f"it holds pickled or compiled code ({name}), which would run while it is read. Give a program that "
                "`slimgraph` or `torch.export.save` wrote, or safetensors weights with the module that they belong to."
            )
        if folder != root or not _KNOWN.fullmatch(name):
            raise ModelLoadError(f"it has a member {entry.orig_filename[:200]!r}, which is no part of a .pt2.")
        if name in found:
            raise ModelLoadError(f"it has two members {name!r}.")
        # PyTorch stores its members as they are. Compression has no use here except to make a small file a huge one.
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ModelLoadError(f"its member {name!r} is compressed or encrypted, which PyTorch's own never are.")
        found[name] = entry
    if sum(entry.file_size for entry in found.values()) > size:
        raise ModelLoadError("its members claim more bytes than the file has.")
    return found


@contextmanager
def open_members(path: Path) -> Iterator[Members]:
    """The members of the `.pt2` at `path`.

    Raises:
        ModelLoadError: there is no such file, or it is empty, cut off, damaged, a pickle, or has members that no `.pt2`
            has.
    """
    try:
        with open(path, "rb") as file:
            _require_archive(file)
            with zipfile.ZipFile(file) as archive:
                yield Members(archive, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise ModelLoadError("there is no such file.") from error
    except IsADirectoryError as error:
        raise ModelLoadError("this is a folder; give the .pt2 file inside it.") from error
    except OSError as error:
        raise ModelLoadError(f"it cannot be read: {error.strerror or error}.") from error
    # What the zip module raises on damaged bytes: its own class, and whatever its parsing of fields happens to meet.
    except (zipfile.BadZipFile, struct.error, EOFError, ValueError, OverflowError, RuntimeError) as error:
        raise ModelLoadError(f"the archive is cut off or damaged ({error}). Copy or save it again.") from error


def _require_archive(file: io.BufferedReader) -> None:
    start = file.read(2)
    if not start:
        raise ModelLoadError("the file is empty.")
    if start == b"PK":
        return
    file.seek(-1, os.SEEK_END)
    # Pickles begin with 0x80 and the number of their protocol, and older ones with a mark, a global or a container.
    if start[0] == 0x80 or (start[0] in b"(c]}" and file.read() == b"."):
        raise ModelLoadError(
            "this is a pickle, which would run code of its author's choice while it is read, so it is refused. "
            "Capture the module with `slimgraph.capture`, or give its weights as safetensors."
        )
    raise ModelLoadError(
        "this is no .pt2: it is not a zip archive. Give a file that `slimgraph` or `torch.export.save` wrote."
    )


def write_members(path: Path, members: Iterable[tuple[str, bytes | Tensor]]) -> None:
    """Write an archive that this module and `torch.export.load` read; equal members give equal bytes.

    PyTorch's own writer is not used, because it ends the process when the disk is full.

    Args:
        members: contents by name below the root folder; of a tensor, its elements in the order of memory.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in chain(_STAMPS.items(), [(".data/version", b"6\n")], members):
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.create_system = 3  # the same bytes on every system
            data = content if isinstance(content, bytes) else _bytes_of(content)
            with archive.open(entry, "w", force_zip64=len(data) >= 2**31) as member:
                member.write(data)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The elements of a dense tensor in the order of memory."""
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
