"""Parse an ONNX file without its weights, which stay where they are.

Protobuf holds all of a message in memory, and hands out copies of it; functions cannot be inlined but in whole models.
So the file is gone through field by field, and raw data of some size becomes what ONNX calls external data: an offset
and a length, here with an empty location, which stands for this very file.
"""

from collections.abc import Mapping
from types import MappingProxyType

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto

_WORTH_IT = 4096
_DEEPEST = 100  # protobuf parses no deeper
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Which fields of which message lead to tensors.
_RAW = "raw"
_WAYS: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {ModelProto.GRAPH_FIELD_NUMBER: "graph", ModelProto.FUNCTIONS_FIELD_NUMBER: "function"},
        "graph": {GraphProto.NODE_FIELD_NUMBER: "node", GraphProto.INITIALIZER_FIELD_NUMBER: "tensor"},
        "function": {FunctionProto.NODE_FIELD_NUMBER: "node"},
        "node": {NodeProto.ATTRIBUTE_FIELD_NUMBER: "attribute"},
        "attribute": {
            AttributeProto.T_FIELD_NUMBER: "tensor",
            AttributeProto.TENSORS_FIELD_NUMBER: "tensor",
            AttributeProto.G_FIELD_NUMBER: "graph",
            AttributeProto.GRAPHS_FIELD_NUMBER: "graph",
        },
        "tensor": {TensorProto.RAW_DATA_FIELD_NUMBER: _RAW},
    }
)


def without_weights(content: memoryview) -> bytes:
    """The bytes of a model proto in which large raw data are external data of the file itself.

    What is not well formed stays as it is, for protobuf to refuse.
    """
    parts: list[bytes | memoryview] = []
    _rewrite(content, 0, len(content), "model", 0, parts)
    return b"".join(parts)


def _rewrite(content: memoryview, start: int, end: int, kind: str, depth: int, parts: list[bytes | memoryview]) -> None:
    """Append the message between `start` and `end`, with the tensors in it changed."""
    ways, kept, position = _WAYS[kind], start, start
    while position < end:
        field_start = position
        tag, position = _varint(content, position, end)
        wire, length = tag & 7, 0
        if wire == _VARINT:
            _, position = _varint(content, position, end)
        elif wire == _BYTES:
            length, position = _varint(content, position, end)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, end)
        if position < 0 or length > end - position:
            break
        way = ways.get(tag >> 3) if wire == _BYTES and length >= _WORTH_IT and depth < _DEEPEST else None
        if way is not None:
            parts.append(content[kept:field_start])
            if way == _RAW:
                parts.append(_reference(position, length))
            else:
                inner: list[bytes | memoryview] = []
                _rewrite(content, position, position + length, way, depth + 1, inner)
                parts += [_encoded(tag), _encoded(sum(map(len, inner))), *inner]
            kept = position + length
        position += length
    parts.append(content[kept:end])


def _varint(content: memoryview, position: int, end: int) -> tuple[int, int]:
    """The number that begins at `position`, and where the next thing begins: -1 if this is no number."""
    value = 0
    for shift in range(0, 70, 7):
        if not 0 <= position < end:
            break
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    return 0, -1


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _reference(offset: int, length: int) -> bytes:
    where = {"location": "", "offset": str(offset), "length": str(length)}
    entries = [StringStringEntryProto(key=key, value=value) for key, value in where.items()]
    return TensorProto(data_location=TensorProto.EXTERNAL, external_data=entries).SerializeToString()
