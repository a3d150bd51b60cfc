"""Read the JSON of Paddle 3 (PIR) as a graph.

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
from slimgraph.importers.paddle.graph import (
    Block,
    BlockReference,
    Names,
    Operator,
    PaddleModel,
    Value,
    name_operators,
)
from slimgraph.importers.paddle.parameters import MAX_RANK

KNOWN_VERSIONS = (4,)

_DIALECTS = MappingProxyType({"0": "builtin.", "1": "", "2": "cf.", "3": "custom_op.", "4": "pd_dist."})
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
_MISSING = 0  # the number of the value that is none
_MOST_READS = 10_000_000  # a list is written once and read by its number, so a small file could ask for any amount
_PARAMETER = "builtin.parameter"
_OUTSIDE = frozenset([_PARAMETER, "data", "feed", "fetch"])
_PASSING = _OUTSIDE | {"builtin.combine", "builtin.split", "builtin.slice"}
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


def _is(node: Any, kind: type[_T], where: str) -> _T:
    """The node, which must be exactly of that type: True is no number."""
    if type(node) is not kind:
        raise ModelImportError(f"{where} is {str(node)[:80]!r}, where {kind.__name__} was expected. It is damaged.")
    return node


def _under(node: Any, key: str, where: str) -> Any:
    """What stands under a key, which must be there."""
    found = _is(node, dict, where)
    if key not in found:
        raise ModelImportError(f"{where} lacks {key!r}. The file is damaged.")
    return found[key]


def _at(node: Any, key: str, kind: type[_T], where: str) -> _T:
    return _is(_under(node, key, where), kind, where)


def _list(node: Any, length: int, where: str) -> list[Any]:
    """The node, which must be a list of at least that length."""
    found = _is(node, list, where)
    if len(found) < length:
        raise ModelImportError(f"{where} has {len(found)} items, where {length} were expected. It is damaged.")
    return found


def _float(node: Any, where: str) -> float:
    return float(node) if type(node) is int else _is(node, float, where)


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: torch.dtype
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class _List:
    items: "tuple[_Type, ...]"


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A type of value that is no tensor: arrays that grow, sparse tensors, the stacks of control flow."""


_Type = _Tensor | _List | _Foreign | None


def _type(node: Any, where: str) -> _Type:
    kind = _at(node, "#", str, where)
    if kind == "NULL":
        return None
    if kind == "0.t_vec":
        return _List(tuple(_type(item, where) for item in _at(node, "D", list, where)))
    if kind != "0.t_dtensor":
        return _Foreign()
    described, sizes = _list(_under(node, "D", where), 2, where)[:2]
    element = _at(described, "#", str, where)
    shape = tuple(_is(size, int, where) for size in _is(sizes, list, where))
    if element not in _ELEMENTS:
        raise ModelImportError(f"{where} has elements of the type {element[:80]!r}, which is none that can be read.")
    if len(shape) > MAX_RANK or any(not -1 <= size < 2**63 for size in shape):
        raise ModelImportError(f"{where} has the shape {list(shape[:20])}, which no tensor of Paddle has.")
    return _Tensor(_ELEMENTS[element], tuple(None if size == -1 else size for size in shape))


def _dtype(name: str, where: str) -> torch.dtype | None:
    if name not in _DTYPES:
        raise ModelImportError(f"{where} names the type {name[:80]!r}; known are {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _scalar(data: list[Any], where: str) -> bool | int | float | complex:
    dtype = _dtype(_is(data[0], str, where), where)
    if dtype is None or dtype in (torch.float16, torch.bfloat16):  # written as their bits, which nothing here needs
        raise ModelImportError(f"{where} is a scalar of the type {data[0]}, which cannot be read.")
    if dtype.is_complex:
        return complex(_float(data[1], where), _float(_list(data, 3, where)[2], where))
    if dtype.is_floating_point:
        return _float(data[1], where)
    return _is(data[1], bool, where) if dtype == torch.bool else _is(data[1], int, where)


def _attribute(node: Any, where: str) -> Any:
    kind = _at(node, "#", str, where)
    if kind == "NULL":
        return None
    if kind in ("0.a_f32", "0.a_f64") and "VD" in node:
        word = _at(node, "VD", str, where)
        if word not in _NO_NUMBERS:
            raise ModelImportError(f"{where} is the number {word[:40]!r}; known are {', '.join(_NO_NUMBERS)}.")
        return _NO_NUMBERS[word]
    data = _under(node, "D", where)
    match kind:
        case "0.a_bool":
            return _is(data, bool, where)
        case "0.a_i32" | "0.a_i64" | "0.a_index":
            return _is(data, int, where)
        case "0.a_f32" | "0.a_f64":
            return _float(data, where)
        case "0.a_str" | "0.a_tensorname":
            return _is(data, str, where)
        case "0.a_array":
            return tuple(_attribute(item, where) for item in _is(data, list, where))
        case "0.a_c64" | "0.a_c128":
            return complex(*(_float(part, where) for part in _list(data, 2, where)[:2]))
        case "0.a_type":
            return _ELEMENTS.get(_at(data, "#", str, where))
        case "1.a_dtype":
            return _dtype(_is(data, str, where), where)
        case "1.a_intarray":
            return tuple(_is(item, int, where) for item in _is(data, list, where))
        case "1.a_scalar":
            return _scalar(_list(data, 2, where), where)
    raise ModelImportError(f"{where} is of the type {kind[:80]!r}, which is unknown.")


def _attributes(nodes: Iterable[Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for node in nodes:
        name = _at(node, "N", str, f"an attribute of {where}")
        if name in found:
            raise ModelImportError(f"{where} has the attribute {name[:200]!r} twice.")
        if name not in _BOOKKEEPING:
            found[name] = _attribute(_under(node, "AT", where), f"attribute {name[:200]!r} of {where}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """An operation as it is written, with the numbers of values."""

    kind: str
    where: str
    operands: tuple[int, ...]
    results: tuple[tuple[int, _Type], ...]
    attributes: Mapping[str, Any]
    regions: list[Any]

    def text(self, attribute: str) -> str:
        return _is(self.attributes.get(attribute), str, f"attribute {attribute!r} of {self.where}")


def _result(node: Any, where: str) -> tuple[int, _Type]:
    number = node.get("%", _MISSING) if isinstance(node, dict) else _MISSING
    return _is(number, int, where), _type(_under(node, "TT", where), where)


def _parameter_step(node: Any, where: str) -> _Step:
    """A parameter in its short form, whose attributes have places instead of names."""
    return _Step(
        kind=_PARAMETER,
        where=where,
        operands=(),
        results=(_result(_under(node, "O", where), where),),
        attributes={"parameter_name": _is(_list(_under(node, "A", where), 4, where)[3], str, where)},
        regions=[],
    )


def _step(node: Any, where: str) -> _Step:
    kind = _at(node, "#", str, where)
    if kind == "p":
        return _parameter_step(node, where)
    dialect, _, name = kind.partition(".")
    if dialect not in _DIALECTS or not name:
        raise ModelImportError(f"{where} is {kind[:80]!r}, which belongs to no dialect that is known.")
    # The underscore marks an operator that may write into its operand; as a value, its result is a new one.
    kind = _DIALECTS[dialect] + (name.removesuffix("_") if dialect == "1" else name)
    where = f"{where} ({kind[:200]})"
    return _Step(
        kind=kind,
        where=where,
        operands=tuple(_at(operand, "%", int, where) for operand in _at(node, "I", list, where)),
        results=tuple(_result(result, where) for result in _at(node, "O", list, where)),
        attributes=_attributes(_at(node, "A", list, where), where),
        regions=_list(node.get("regions", []), 0, where),
    )


class _Reader:
    """What is known of the values of a program while its blocks are read."""

    def __init__(self) -> None:
        self._names, self._layers = Names(), Names()
        self._read_count = 0
        self._known: dict[int, tuple[str, ...]] = {_MISSING: ()}
        self.values: dict[str, Value] = {}
        self.parameters: dict[str, Value] = {}
        self.inputs: dict[str, Value] = {}
        self.outputs: dict[int, Value] = {}
        self.subblocks: dict[int, Block] = {}

    def block(self, node: Any, where: str, owner: str = "") -> tuple[Operator, ...]:
        """The operators of a block; `owner` is the operator that has it, "" for the program's own block."""
        steps = [_step(each, f"{where}, operation {i}") for i, each in enumerate(_at(node, "ops", list, where))]
        parameters = {step.results[0][0]: step.text("parameter_name") for step in steps if step.kind == _PARAMETER}
        named = [step for step in steps if step.kind not in _PASSING]
        layers = iter(
            name_operators(
                [(step.kind, [parameters[n] for n in step.operands if n in parameters]) for step in named],
                self._layers,
                owner,
            )
        )
        operators: list[Operator] = []
        for step in steps:
            if owner and step.kind in _OUTSIDE:
                raise ModelImportError(f"{step.where} stands inside {owner!r}; it belongs into the outermost block.")
            match step.kind:
                case "builtin.parameter":
                    self._source(step, self.parameters, step.text("parameter_name"))
                case "data" | "feed":
                    self._source(step, self.inputs, step.text("name"))
                case "fetch":
                    self._fetch(step)
                case "builtin.combine" | "builtin.split" | "builtin.slice":
                    self._rearrange(step)
                case _:
                    operators.append(self._operator(step, next(layers)))
        return tuple(operators)

    def _define(self, number: int, names: tuple[str, ...], where: str) -> None:
        if number == _MISSING:  # nobody can read it
            return
        if number in self._known:
            raise ModelImportError(f"{where} defines the value {number}, which exists already.")
        self._known[number] = names

    def _read(self, step: _Step) -> tuple[tuple[str, ...], ...]:
        for number in step.operands:
            if number not in self._known:
                raise ModelImportError(f"{step.where} reads the value {number}, which is not defined before.")
        found = tuple(self._known[number] for number in step.operands)
        self._read_count += sum(map(len, found))
        if self._read_count > _MOST_READS:
            raise ModelImportError(f"its operations read more than {_MOST_READS} values. The file is damaged.")
        return found

    def _new(self, wanted: str, kind: _Type) -> str:
        name = self._names.new(wanted)
        if isinstance(kind, _Tensor):
            self.values[name] = Value(name=name, dtype=kind.dtype, shape=kind.shape)
        return name

    def _source(self, step: _Step, found: dict[str, Value], name: str) -> None:
        """Define what comes from outside: an input, a parameter."""
        if len(step.results) != 1 or not isinstance(step.results[0][1], _Tensor):
            raise ModelImportError(f"{step.where} must give exactly one tensor.")
        if name in found:
            raise ModelImportError(f"{step.where} has the name {name[:200]!r}, which an earlier one has too.")
        ((number, kind),) = step.results
        own = self._new(name, kind)
        found[name] = self.values[own]
        self._define(number, (own,), step.where)

    def _fetch(self, step: _Step) -> None:
        column = _is(step.attributes.get("col", len(self.outputs)), int, step.where)
        names = [name for operand in self._read(step) for name in operand]
        if len(names) != 1 or names[0] not in self.values or column in self.outputs:
            raise ModelImportError(f"{step.where} must fetch one tensor, into a column that no other has.")
        self.outputs[column] = self.values[names[0]]

    def _rearrange(self, step: _Step) -> None:
        """Put tensors into a list, or take them out: the results are the operands, in other tuples."""
        operands = self._read(step)
        names = [name for operand in operands for name in operand]
        if step.kind == "builtin.combine":
            if any(len(operand) > 1 for operand in operands):
                raise ModelImportError(f"{step.where} puts a list into a list, which no operator takes.")
            results = [tuple(names)]
        elif step.kind == "builtin.split":
            results = [(name,) for name in names]
        else:
            index = _is(step.attributes.get("index"), int, step.where)
            results = [(names[index],)] if 0 <= index < len(names) else []
        if len(results) != len(step.results):
            raise ModelImportError(
                f"{step.where} has {len(step.results)} results, but {len(results)} follow from the {len(names)} "
                "tensors it reads. The file is damaged."
            )
        for (number, _), found in zip(step.results, results, strict=True):
            self._define(number, found, step.where)

    def _operator(self, step: _Step, name: str) -> Operator:
        operands = self._read(step)
        attributes = dict(step.attributes)
        if step.regions:
            blocks = [block for region in step.regions for block in _at(region, "blocks", list, step.where)]
            attributes["regions"] = tuple(
                self._sub_block(block, f"block {i} of {name!r}", name) for i, block in enumerate(blocks)
            )
        results: list[tuple[str, ...]] = []
        count = 0
        for number, kind in step.results:
            names: list[str] = []
            for item in () if kind is None else kind.items if isinstance(kind, _List) else (kind,):
                names.append(self._new(f"{name}:{count}" if count else name, item))
                count += 1
            self._define(number, tuple(names), step.where)
            results.append(tuple(names))
        return Operator(
            name=name,
            kind=step.kind,
            generation="pir",
            operands=operands,
            results=tuple(results),
            attributes=MappingProxyType(attributes),
        )

    def _sub_block(self, node: Any, where: str, owner: str) -> BlockReference:
        outside = len(self._known)
        arguments: list[str] = []
        for argument in (*_list(_under(node, "args", where), 0, where), *_list(node.get("kwargs", []), 0, where)):
            arguments.append(
                self._new(f"{owner}.argument_{len(arguments)}", _type(_under(argument, "TT", where), where))
            )
            self._define(_at(argument, "#", int, where), (arguments[-1],), where)
        operators = self.block(node, where, owner)
        while len(self._known) > outside:  # nobody outside sees what is defined inside
            self._known.popitem()
        reference = BlockReference(len(self.subblocks) + 1)
        self.subblocks[reference.index] = Block(operators=operators, arguments=tuple(arguments))
        return reference


def _document(data: bytes) -> Any:
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


def parse_pir(data: bytes) -> PaddleModel:
    """The model that the JSON of Paddle 3 describes, without its tensors.

    Raises:
        ModelImportError: the data is damaged, of an unknown version, or no inference model.
    """
    try:
        document = _document(data)
        base = _at(document, "base_code", dict, "the file")
        version = _at(base, "version", int, "its base_code")
        if base.get("magic") != "pir" or version not in KNOWN_VERSIONS:
            raise ModelImportError(
                f"it has the format {str(base.get('magic'))[:40]!r} of version {version}; known is 'pir' of version "
                f"{', '.join(map(str, KNOWN_VERSIONS))}. Save the model again with Paddle 3.3."
            )
        regions = _at(_at(document, "program", dict, "the file"), "regions", list, "the program")
        blocks = [block for region in regions for block in _at(region, "blocks", list, "the program")]
        if len(blocks) != 1:
            raise ModelImportError(f"its program has {len(blocks)} blocks, where exactly one must stand.")
        reader = _Reader()
        operators = reader.block(blocks[0], "the program")
    except RecursionError as error:
        raise ModelImportError("it is nested more deeply than any model is. The file is damaged.") from error
    if not reader.outputs:
        raise ModelImportError(
            "it has no fetch operation, so nothing says what its outputs are. Save it with "
            "paddle.static.save_inference_model or paddle.jit.save."
        )
    return PaddleModel(
        generation="pir",
        version=version,
        operators=operators,
        inputs=tuple(reader.inputs.values()),
        outputs=tuple(reader.outputs[column] for column in sorted(reader.outputs)),
        values=MappingProxyType(reader.values),
        parameters=MappingProxyType(reader.parameters),
        subblocks=MappingProxyType(reader.subblocks),
    )
