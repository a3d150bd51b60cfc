"""Read the tensors of a Paddle model from its parameter file."""

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.graph import Value
from slimgraph.importers.paddle.wire import Message

DTYPES = MappingProxyType(
    {
        0: torch.bool,
        1: torch.int16,
        2: torch.int32,
        3: torch.int64,
        4: torch.float16,
        5: torch.float32,
        6: torch.float64,
        20: torch.uint8,
        21: torch.int8,
        22: torch.bfloat16,
        23: torch.complex64,
        24: torch.complex128,
        32: torch.float8_e4m3fn,
        33: torch.float8_e5m2,
    }
)
"""The numbers of `VarType.Type` that stand for the types of elements, also in attributes such as `dtype`."""

MAX_RANK = 9
"""Axes that a tensor of Paddle has at most."""


def tensor_type(description: Message, what: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Element type and shape of a `TensorDesc`; -1 is a free axis.

    Raises:
        ModelImportError: no such type, more axes than Paddle allows, or an axis that is negative and not -1.
    """
    number = description.one(description.integers, 1)
    shape = description.integers(2)
    if number not in DTYPES:
        raise ModelImportError(f"{what} has elements of the type {number}, which is none that can be read.")
    if len(shape) > MAX_RANK or any(size < -1 for size in shape):
        raise ModelImportError(f"{what} has the shape {list(shape[:20])}, which no tensor of Paddle has.")
    return DTYPES[number], shape


class _Records:
    """A file of tensors, read from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.left = os.fstat(file.fileno()).st_size

    def _numbers(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout), what))

    def _bytes(self, count: int, what: str) -> bytes:
        if not 0 <= count <= self.left:
            raise ModelImportError(
                f"{what} needs {count} bytes, but {self.left} are left. The file is damaged, was cut off, or belongs "
                "to another model."
            )
        self.left -= count
        return self._file.read(count)

    def tensor(self, what: str) -> torch.Tensor:
        """The next tensor, read straight into its own memory."""
        version, levels, tensor_version, length = self._numbers("<IQIi", what)
        if version != 0 or tensor_version != 0:
            raise ModelImportError(
                f"{what} has the format version {version or tensor_version}; only 0 is known. The file is damaged, or "
                "no parameter file of Paddle."
            )
        if levels != 0:
            raise ModelImportError(f"{what} is a ragged tensor with {levels} levels; a parameter has none.")
        description = Message(memoryview(self._bytes(length, what)), what)
        dtype, shape = tensor_type(description, what)
        size = math.prod(shape) * dtype.itemsize
        if any(axis < 0 for axis in shape) or size > self.left or math.prod(axis or 1 for axis in shape) >= 2**48:
            raise ModelImportError(
                f"{what} of the shape {list(shape)} needs {size} bytes, but {self.left} are left. The file is "
                "damaged, was cut off, or belongs to another model."
            )
        tensor = torch.empty(shape, dtype=dtype)
        if size:
            raw = tensor.reshape(-1).view(torch.uint8)
            if self._file.readinto(raw.numpy()) != size:  # type: ignore[attr-defined]  # buffered files have it
                raise ModelImportError(f"{what} could not be read whole: the file changes while it is read.")
            if dtype == torch.bool and int(raw.max()) > 1:
                raise ModelImportError(f"{what} has truth values other than 0 and 1. The file is damaged.")
            self.left -= size
        return tensor


def _checked(tensor: torch.Tensor, declared: Value, what: str) -> torch.Tensor:
    fits = len(declared.shape) == tensor.ndim and all(
        wanted in (None, size) for wanted, size in zip(declared.shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != declared.dtype:
        wanted = [-1 if size is None else size for size in declared.shape]
        raise ModelImportError(
            f"{what} is {tensor.dtype} of the shape {list(tensor.shape)}, but the model declares {declared.dtype} of "
            f"{wanted}. These are the parameters of another model."
        )
    return tensor


def read_parameters(path: Path, parameters: Mapping[str, Value]) -> dict[str, torch.Tensor]:
    """Tensors of a file that holds all parameters, by the names in the `Value`s.

    The file has no names: its tensors stand in the sorted order of the keys of `parameters`.

    Raises:
        ModelImportError: the file ends early or late, or a tensor is not what the model declares.
    """
    tensors: dict[str, torch.Tensor] = {}
    with open(path, "rb") as file:
        records = _Records(file)
        for index, (name, declared) in enumerate(sorted(parameters.items())):
            what = f"tensor {index} of {len(parameters)} ({name[:200]!r})"
            tensors[declared.name] = _checked(records.tensor(what), declared, what)
        if records.left:
            raise ModelImportError(
                f"{records.left} bytes follow the last of the {len(parameters)} parameters that the model has. The "
                "file is damaged, or belongs to another model."
            )
    return tensors


def read_parameter_files(folder: Path, parameters: Mapping[str, Value]) -> dict[str, torch.Tensor]:
    """Tensors of a folder with a file for each parameter, as Paddle 1.x wrote it.

    Raises:
        ModelImportError: a file is missing, or does not hold exactly what the model declares.
    """
    # A name from the model never becomes a path.
    files = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
    missing = sorted(name for name in parameters if name not in files)
    if missing:
        shown = ", ".join(repr(name[:200]) for name in missing[:5])
        raise ModelImportError(
            f"{len(missing)} of {len(parameters)} parameters have no file: {shown}{', …' if missing[5:] else ''}. "
            "Give the file that holds them all as params_filename, or put it beside the model."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, declared in parameters.items():
        tensors |= read_parameters(files[name], {name: declared})
    return tensors
