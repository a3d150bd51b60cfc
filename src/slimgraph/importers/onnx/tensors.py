"""Tensors of an ONNX file as PyTorch tensors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from onnx import SparseTensorProto, TensorProto

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.external import Files, read_bytes
from slimgraph.importers.onnx.names import shown, text

# A model may need this many bytes for its tensors beside a multiple of what its files have. Without a bound, a file of
# a few hundred bytes fills the memory: by sparse tensors, or by thousands of tensors that are the same bytes of a file.
_FREE_BYTES = 2**28
_MOST_GROWTH = 16


@dataclass(frozen=True, slots=True)
class Element:
    """How elements of one ONNX type are stored, and what they become."""

    dtype: torch.dtype
    bits: int
    field: str = "int32_data"
    """Where they are when they are not raw bytes."""

    @property
    def signed(self) -> bool:
        """Whether the highest bit is a sign; asked of integers below eight bits."""
        return self.dtype == torch.int8


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {
        "FLOAT": Element(torch.float32, 32, "float_data"),
        "DOUBLE": Element(torch.float64, 64, "double_data"),
        "FLOAT16": Element(torch.float16, 16),
        "BFLOAT16": Element(torch.bfloat16, 16),
        "FLOAT8E4M3FN": Element(torch.float8_e4m3fn, 8),
        "FLOAT8E4M3FNUZ": Element(torch.float8_e4m3fnuz, 8),
        "FLOAT8E5M2": Element(torch.float8_e5m2, 8),
        "FLOAT8E5M2FNUZ": Element(torch.float8_e5m2fnuz, 8),
        "FLOAT8E8M0": Element(torch.float8_e8m0fnu, 8),
        "BOOL": Element(torch.bool, 8),
        "INT64": Element(torch.int64, 64, "int64_data"),
        "INT32": Element(torch.int32, 32),
        "INT16": Element(torch.int16, 16),
        "INT8": Element(torch.int8, 8),
        "INT4": Element(torch.int8, 4),
        "INT2": Element(torch.int8, 2),
        "UINT64": Element(torch.uint64, 64, "uint64_data"),
        "UINT32": Element(torch.uint32, 32, "uint64_data"),
        "UINT16": Element(torch.uint16, 16),
        "UINT8": Element(torch.uint8, 8),
        "UINT4": Element(torch.uint8, 4),
        "UINT2": Element(torch.uint8, 2),
    }
)

# The NumPy type in which the entries of a field are collected.
_FIELDS: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "float_data": np.float32,
        "double_data": np.float64,
        "int32_data": np.int32,
        "int64_data": np.int64,
        "uint64_data": np.uint64,
    }
)
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def type_name(number: int) -> str:
    """Name of an ONNX element type, or the number as text if this version of the `onnx` package knows none."""
    names: Mapping[int, str] = {value: name for name, value in TensorProto.DataType.items()}
    return names.get(number, str(number))


def element(number: int, what: str) -> Element:
    """What becomes of an ONNX element type; `what` is of it, for the message.

    Raises:
        ModelImportError: PyTorch has no such type.
    """
    name = type_name(number)
    if name not in ELEMENTS:
        raise ModelImportError(
            f"{what} has elements of type {name}, which cannot be part of a program. These can: {', '.join(ELEMENTS)}."
        )
    return ELEMENTS[name]


def checked_shape(dims: Iterable[int], what: str) -> tuple[int, ...]:
    """The shape of a tensor.

    Raises:
        ModelImportError: an axis is negative, or there are more elements than any memory has bytes.
    """
    shape = tuple(dims)
    if any(dim < 0 for dim in shape):
        raise ModelImportError(f"{what} has the shape {list(shape)[:10]}, with an axis below zero.")
    if len(shape) > 64 or math.prod(max(dim, 1) for dim in shape) >= 2**56:
        raise ModelImportError(f"{what} has the shape {list(shape)[:10]}, which fits into no memory.")
    return shape


class TensorReader:
    """Makes tensors, and sees that they need no more memory than the model's files account for.

    Args:
        files: where external data is; without, all of it is zero.
        size: bytes that the model itself has.
    """

    def __init__(self, files: Files | None, size: int) -> None:
        self._files, self._size, self._used = files, size, 0

    def dense(self, proto: TensorProto, name: str) -> torch.Tensor:
        """The tensor of a proto; it shares no memory with it.

        Raises:
            ModelImportError: type, shape and data contradict each other, or the data cannot be had.
        """
        what = f"tensor {shown(name)}"
        kind, shape = element(proto.data_type, what), checked_shape(proto.dims, what)
        count = math.prod(shape)
        if self._is_left_out(proto):
            return torch.zeros((), dtype=kind.dtype).expand(shape)
        content = self._content(proto, kind, (count * kind.bits + 7) // 8, name)
        if kind.bits < 8:
            self._account(count, what)
            content = _unpacked(content, kind, count)
        elif kind.dtype == torch.bool:
            content = content != 0
        return content.view(kind.dtype).reshape(shape)

    def _content(self, proto: TensorProto, kind: Element, size: int, name: str) -> torch.Tensor:
        """The bytes that raw data of this tensor would have."""
        what = f"tensor {shown(name)}"
        external = proto.data_location == TensorProto.EXTERNAL
        filled = [field for field in (*_FIELDS, "string_data") if len(getattr(proto, field))]
        if len(filled) + proto.HasField("raw_data") + external > 1:
            raise ModelImportError(f"{what} has its data in several places, and only one can be right.")
        if proto.HasField("segment"):
            raise ModelImportError(f"{what} is a segment of a tensor. Write the model with whole tensors.")
        if external:
            where = {text(entry.key): text(entry.value) for entry in proto.external_data}
            if len(where) < len(proto.external_data):
                raise ModelImportError(f"{what} says twice where its external data is.")
            assert self._files is not None
            path, offset = self._files.locate(where, size, name)
            self._account(size, what)
            return read_bytes(path, offset, size)
        if proto.HasField("raw_data"):
            raw = proto.raw_data
            _require_size(len(raw), size, f"bytes of {what}", proto)
            self._account(size, what)
            content = torch.empty(size, dtype=torch.uint8)
            content.numpy()[:] = np.frombuffer(raw, dtype=np.uint8)
            return content
        entries = getattr(proto, kind.field)
        entry_bits = max(kind.bits, 8)  # two of four bits, or four of two, are one entry
        _require_size(len(entries), size * 8 // entry_bits, f"entries in {kind.field} of {what}", proto)
        self._account(size, what)
        values = np.fromiter(entries, _FIELDS[kind.field], len(entries))
        if kind.field not in ("float_data", "double_data"):
            values = values.astype(_UNSIGNED[entry_bits])  # wraps: some writers give bits, others numbers with a sign
        return torch.from_numpy(values.view(np.uint8))

    def sparse(self, proto: SparseTensorProto, name: str) -> torch.Tensor:
        """The dense tensor of a sparse one.

        Raises:
            ModelImportError: as `dense`; or an index is out of range or there twice; or the dense form is too large.
        """
        what = f"sparse tensor {shown(name)}"
        shape = checked_shape(proto.dims, what)
        if self._is_left_out(proto.values) or self._is_left_out(proto.indices):
            return torch.zeros((), dtype=element(proto.values.data_type, what).dtype).expand(shape)
        values, indices = self.dense(proto.values, name), self.dense(proto.indices, name)
        if values.dim() != 1 or indices.dtype != torch.int64 or indices.shape[:1] != values.shape or indices.dim() > 2:
            raise ModelImportError(
                f"{what} has values of shape {list(values.shape)} and indices of shape {list(indices.shape)} and type "
                f"{indices.dtype}. Values have one axis, and each has one index, or one for each axis, of type INT64."
            )
        if indices.dim() == 2:
            if indices.shape[1] != len(shape):
                raise ModelImportError(f"{what} has {len(shape)} axes, but indices for {indices.shape[1]}.")
            inside = bool(((indices >= 0) & (indices < torch.tensor(shape, dtype=torch.int64))).all())
            strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            indices = (indices * torch.tensor(strides, dtype=torch.int64)).sum(1)
        else:
            inside = bool(((indices >= 0) & (indices < math.prod(shape))).all())
        if not inside or len(indices.unique()) < len(indices):
            raise ModelImportError(f"{what} of shape {list(shape)} has an index that is out of range or there twice.")
        self._account(math.prod(shape) * values.itemsize, what)
        bits = _BITS[values.itemsize * 8]  # PyTorch cannot index tensors of every type, but of any type's bits
        dense = torch.zeros(math.prod(shape), dtype=bits)
        dense[indices] = values.view(bits)
        return dense.view(values.dtype).reshape(shape)

    def _is_left_out(self, proto: TensorProto) -> bool:
        return self._files is None and proto.data_location == TensorProto.EXTERNAL

    def _account(self, size: int, what: str) -> None:
        self._used += size
        present = self._size + (0 if self._files is None else self._files.total_size)
        if self._used > _FREE_BYTES + _MOST_GROWTH * present:
            raise ModelImportError(
                f"with {what}, the tensors of this model need {self._used:,} bytes, but its files have {present:,}. "
                "Such a model is damaged, or meant to fill the memory."
            )


def _require_size(found: int, expected: int, what: str, proto: TensorProto) -> None:
    if found != expected:
        raise ModelImportError(
            f"there are {found} {what}, but its type {type_name(proto.data_type)} and shape {list(proto.dims)[:10]} "
            f"need {expected}. The file is damaged."
        )


def _unpacked(content: torch.Tensor, kind: Element, count: int) -> torch.Tensor:
    """One element a byte; the lowest bits of a byte come first."""
    shifts = torch.arange(0, 8, kind.bits, dtype=torch.uint8)
    codes = (content.unsqueeze(1) >> shifts).flatten()[:count] & (2**kind.bits - 1)
    if not kind.signed:
        return codes
    sign = 2 ** (kind.bits - 1)
    return (codes ^ sign).view(torch.int8) - sign
