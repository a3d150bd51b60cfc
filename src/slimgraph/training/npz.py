"""Read arrays from an `.npz` file that nobody vouches for."""

import lzma
import math
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from slimgraph.errors import DataError, closest

LARGE = 2**30
"""Bytes up to which an array may be packed as tightly as it likes."""
MOST_EXPANSION = 1000
"""Larger arrays may expand by this much: deflate reaches 1032 on zeros, real data are far below."""

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)
"""What zipfile and numpy raise for damaged, encrypted or unknown members."""


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """Type and shape of an array, as its file says before the values."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Memory that the values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def _read_header(file: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:  # 3.0 is for records with Unicode field names
        raise ValueError(f"format version {version[0]}.{version[1]}")
    shape, _, dtype = readers[version](file)
    return ArrayHeader(dtype, shape)


def _installed_memory() -> int:
    """Bytes of memory in this machine, or no bound where the system does not say."""
    if not hasattr(os, "sysconf"):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class NpzFile:
    """The arrays of an `.npz` file: `headers` are read at once, values when asked for. Nothing is unpickled.

    Raises:
        DataError: the file is missing or damaged, or an array holds Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, ArrayHeader] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    self._read_member(archive, member)
        except _DAMAGE as error:
            raise DataError(f"{path} cannot be read as an .npz file: {error}.") from error

    def _read_member(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        name = member.filename.removesuffix(".npy")
        if name in self.headers or name == member.filename:
            raise DataError(
                f"{self.path} holds {member.filename!r}, which is no array of an .npz file, or is there twice."
            )
        with archive.open(member) as file:
            header = _read_header(file)
            values_at = file.tell()
        if header.dtype.hasobject:
            raise DataError(f"{self.path}: {name!r} holds Python objects, which are never unpickled; store numbers.")
        if values_at + header.size_bytes != member.file_size:
            raise DataError(
                f"{self.path}: {name!r} says it is {header}, {header.size_bytes} bytes, "
                f"but {member.file_size - values_at} are stored. The file is damaged."
            )
        if header.size_bytes > LARGE and header.size_bytes > MOST_EXPANSION * member.compress_size:
            raise DataError(
                f"{self.path}: {name!r} expands from {member.compress_size} to {header.size_bytes} bytes, "
                f"more than {MOST_EXPANSION} times; it is refused as a decompression bomb."
            )
        self.headers[name] = header

    def read(self, *names: str) -> tuple[NDArray[np.generic], ...]:
        """The arrays of these names, in the byte order of this machine.

        Raises:
            DataError: there is no such array, it is damaged, or together they do not fit into the memory.
        """
        for name in names:
            if name not in self.headers:
                raise DataError(f"{self.path} has no array {name!r}. {closest(name, self.headers)}")
        needed = sum(self.headers[name].size_bytes for name in names)
        installed = _installed_memory()
        if needed > installed:
            raise DataError(
                f"{self.path}: {', '.join(names)} take {needed} bytes, but this machine has {installed}. "
                f"Give the data as a folder, or as module:callable, which are read batch by batch."
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(self._read_values(archive, name) for name in names)
        except _DAMAGE as error:
            raise DataError(f"{self.path} is damaged: {error}.") from error

    @staticmethod
    def _read_values(archive: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
        with archive.open(f"{name}.npy") as file:
            array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
        return array.astype(array.dtype.newbyteorder("="), copy=False)
