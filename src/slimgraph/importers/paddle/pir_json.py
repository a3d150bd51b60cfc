"""Read the notation of Paddle 3's JSON: checked nodes, types of values, attributes.

Its short keys: `#` is what a thing is, `%` the number of a value, `A` attributes, `I` operands, `O` results, `TT` a
type, `D` data, `N` a name, `AT` an attribute, `VD` a number that JSON cannot write.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.parameters import MAX_RANK

_ELEMENTS = MappingProxyType(
    {
        "0.t_bool": torch.bool,
        "0.t_i8": torch.int8,
        "0.t_ui8": torch.uint8,
        "0.t_i16": torch.int16,
        "0.t_i32": torch.int32,
        "0.t_i64": torch.int64,
        "0.t_index": torch.int64,
        "0.t_f16": torch.float16,
        "0.t_bf16": torch.bfloat16,
        "0.t_f32": torch.float32,
        "0.t_f64": torch.float64,
        "0.t_c64": torch.complex64,
        "0.t_c128": torch.complex128,
        "0.t_f8e4m3fn": torch.float8_e4m3fn,
        "0.t_f8e5m2": torch.float8_e5m2,
    }
)
_DTYPES: Mapping[str, torch.dtype | None] = MappingProxyType(
    {
        "bool": torch.bool,
        "int8": torch.int8,
        "uint8": torch.uint8,
        "int16": torch.int16,
        "int32": torch.int32,
        "int64": torch.int64,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "float64": torch.float64,
        "complex64": torch.complex64,
        "complex128": torch.complex128,
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
        "undefined": None,  # the operator takes the type of its input
        "Undefined": None,
    }
)
_NO_NUMBERS = MappingProxyType({"NAN": math.nan, "INF": math.inf, "-INF": -math.inf})
# Where and for what role an operator ran, on the machine that saved it.
_BOOKKEEPING = frozenset(["place", "op_role", "op_callstack"])
_T = TypeVar("_T")


def _number(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ModelImportError(f"it has the number {text[:40]}, which does not fit 64 bits. The file is damaged.")
    return int(text)


def _real(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ModelImportError(f"it has the number {text[:40]}, which is beyond double precision.")
    return number


def _no_number(text: str) -> float:
    raise ModelImportError(f"it has {text}, which is no JSON. The file is damaged.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ModelImportError(f"it has an object with a key twice, among {[key[:50] for key, _ in pairs[:10]]}.")
    return found


def read_document(data: bytes) -> Any:
    """What a JSON text says, without what JSON does not know: NaN, keys twice, numbers of more than 64 bits."""
    try:
        return json.loads(
            data.decode("utf-8"),
            parse_int=_number,
            parse_float=_real,
            parse_constant=_no_number,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise ModelImportError(f"it is no text in UTF-8 (byte {error.start}). The file is damaged.") from error
    except json.JSONDecodeError as error:
        raise ModelImportError(f"it is no JSON: {error}. The file is damaged or cut off.") from error


def expect(node: Any, kind: type[_T], where: str) -> _T:
    """The node, which must be exactly of that type: True is no number. `where` names it in errors, here and below."""
    if type(node) is not kind:
        raise ModelImportError(f"{where} is {str(node)[:80]!r}, where {kind.__name__} was expected. It is damaged.")
    return node


def under(node: Any, key: str, where: str) -> Any:
    """What stands under a key, which must be there."""
    found = expect(node, dict, where)
    if key not in found:
        raise ModelImportError(f"{where} lacks {key!r}. The file is damaged.")
    return found[key]


def at(node: Any, key: str, kind: type[_T], where: str) -> _T:
    """What stands under a key, which must be there and of that type."""
    return expect(under(node, key, where), kind, where)


def sequence(node: Any, length: int, where: str) -> list[Any]:
    """The node, which must be a list of at least that length."""
    found = expect(node, list, where)
    if len(found) < length:
        raise ModelImportError(f"{where} has {len(found)} items, where {length} were expected. It is damaged.")
    return found


def _float(node: Any, where: str) -> float:
    return float(node) if type(node) is int else expect(node, float, where)


@dataclass(frozen=True, slots=True)
class TensorType:
    """The type of a tensor; None is a free axis."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class ListType:
    """The type of a list of values."""

    items: "tuple[Type, ...]"


@dataclass(frozen=True, slots=True)
class ForeignType:
    """A type of value that is no tensor: arrays that grow, sparse tensors, the stacks of control flow."""


Type = TensorType | ListType | ForeignType | None
"""None for a value that is left out."""


def read_type(node: Any, where: str) -> Type:
    """The type of a value."""
    kind = at(node, "#", str, where)
    if kind == "NULL":
        return None
    if kind == "0.t_vec":
        return ListType(tuple(read_type(item, where) for item in at(node, "D", list, where)))
    if kind != "0.t_dtensor":
        return ForeignType()
    described, sizes = sequence(under(node, "D", where), 2, where)[:2]
    element = at(described, "#", str, where)
    shape = tuple(expect(size, int, where) for size in expect(sizes, list, where))
    if element not in _ELEMENTS:
        raise ModelImportError(f"{where} has elements of the type {element[:80]!r}, which is none that can be read.")
    if len(shape) > MAX_RANK or any(not -1 <= size < 2**63 for size in shape):
        raise ModelImportError(f"{where} has the shape {list(shape[:20])}, which no tensor of Paddle has.")
    return TensorType(_ELEMENTS[element], tuple(None if size == -1 else size for size in shape))


def _dtype(name: str, where: str) -> torch.dtype | None:
    if name not in _DTYPES:
        raise ModelImportError(f"{where} names the type {name[:80]!r}; known are {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _scalar(data: list[Any], where: str) -> bool | int | float | complex:
    dtype = _dtype(expect(data[0], str, where), where)
    if dtype is None or dtype in (torch.float16, torch.bfloat16):  # written as their bits, which nothing here needs
        raise ModelImportError(f"{where} is a scalar of the type {data[0]}, which cannot be read.")
    if dtype.is_complex:
        return complex(_float(data[1], where), _float(sequence(data, 3, where)[2], where))
    if dtype.is_floating_point:
        return _float(data[1], where)
    return expect(data[1], bool, where) if dtype == torch.bool else expect(data[1], int, where)


def _attribute(node: Any, where: str) -> Any:
    kind = at(node, "#", str, where)
    if kind == "NULL":
        return None
    if kind in ("0.a_f32", "0.a_f64") and "VD" in node:
        word = at(node, "VD", str, where)
        if word not in _NO_NUMBERS:
            raise ModelImportError(f"{where} is the number {word[:40]!r}; known are {', '.join(_NO_NUMBERS)}.")
        return _NO_NUMBERS[word]
    data = under(node, "D", where)
    match kind:
        case "0.a_bool":
            return expect(data, bool, where)
        case "0.a_i32" | "0.a_i64" | "0.a_index":
            return expect(data, int, where)
        case "0.a_f32" | "0.a_f64":
            return _float(data, where)
        case "0.a_str" | "0.a_tensorname":
            return expect(data, str, where)
        case "0.a_array":
            return tuple(_attribute(item, where) for item in expect(data, list, where))
        case "0.a_c64" | "0.a_c128":
            return complex(*(_float(part, where) for part in sequence(data, 2, where)[:2]))
        case "0.a_type":
            return _ELEMENTS.get(at(data, "#", str, where))
        case "1.a_dtype":
            return _dtype(expect(data, str, where), where)
        case "1.a_intarray":
            return tuple(expect(item, int, where) for item in expect(data, list, where))
        case "1.a_scalar":
            return _scalar(sequence(data, 2, where), where)
    raise ModelImportError(f"{where} is of the type {kind[:80]!r}, which is unknown.")


def read_attributes(nodes: Iterable[Any], where: str) -> dict[str, Any]:
    """Attributes by name: bool, int, float, complex, str, torch.dtype, None, or nested tuples of these."""
    found: dict[str, Any] = {}
    for node in nodes:
        name = at(node, "N", str, f"an attribute of {where}")
        if name in found:
            raise ModelImportError(f"{where} has the attribute {name[:200]!r} twice.")
        if name not in _BOOKKEEPING:
            found[name] = _attribute(under(node, "AT", where), f"attribute {name[:200]!r} of {where}")
    return found
