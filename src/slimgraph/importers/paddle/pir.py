"""Read the JSON of Paddle 3 (PIR) as a graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

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
from slimgraph.importers.paddle.pir_json import (
    ListType,
    TensorType,
    Type,
    at,
    expect,
    read_attributes,
    read_document,
    read_type,
    sequence,
    under,
)

KNOWN_VERSIONS = (4,)

_DIALECTS = MappingProxyType({"0": "builtin.", "1": "", "2": "cf.", "3": "custom_op.", "4": "pd_dist."})
_MISSING = 0  # the number of the value that is none
_MOST_READS = 10_000_000  # a list is written once and read by its number, so a small file could ask for any amount
_PARAMETER = "builtin.parameter"
_OUTSIDE = frozenset([_PARAMETER, "data", "feed", "fetch"])
_PASSING = _OUTSIDE | {"builtin.combine", "builtin.split", "builtin.slice"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """An operation as it is written, with the numbers of values."""

    kind: str
    where: str
    operands: tuple[int, ...]
    results: tuple[tuple[int, Type], ...]
    attributes: Mapping[str, Any]
    regions: list[Any]

    def text(self, attribute: str) -> str:
        return expect(self.attributes.get(attribute), str, f"attribute {attribute!r} of {self.where}")


def _result(node: Any, where: str) -> tuple[int, Type]:
    number = node.get("%", _MISSING) if isinstance(node, dict) else _MISSING
    return expect(number, int, where), read_type(under(node, "TT", where), where)


def _parameter_step(node: Any, where: str) -> _Step:
    """A parameter in its short form, whose attributes have places instead of names."""
    return _Step(
        kind=_PARAMETER,
        where=where,
        operands=(),
        results=(_result(under(node, "O", where), where),),
        attributes={"parameter_name": expect(sequence(under(node, "A", where), 4, where)[3], str, where)},
        regions=[],
    )


def _step(node: Any, where: str) -> _Step:
    kind = at(node, "#", str, where)
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
        operands=tuple(at(operand, "%", int, where) for operand in at(node, "I", list, where)),
        results=tuple(_result(result, where) for result in at(node, "O", list, where)),
        attributes=read_attributes(at(node, "A", list, where), where),
        regions=sequence(node.get("regions", []), 0, where),
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
        steps = [_step(each, f"{where}, operation {i}") for i, each in enumerate(at(node, "ops", list, where))]
        parameters = {
            number: step.text("parameter_name")
            for step in steps
            if step.kind == _PARAMETER
            for number, _ in step.results
        }
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

    def _new(self, wanted: str, kind: Type) -> str:
        name = self._names.new(wanted)
        if isinstance(kind, TensorType):
            self.values[name] = Value(name=name, dtype=kind.dtype, shape=kind.shape)
        return name

    def _source(self, step: _Step, found: dict[str, Value], name: str) -> None:
        """Define what comes from outside: an input, a parameter."""
        if len(step.results) != 1 or not isinstance(step.results[0][1], TensorType):
            raise ModelImportError(f"{step.where} must give exactly one tensor.")
        if name in found:
            raise ModelImportError(f"{step.where} has the name {name[:200]!r}, which an earlier one has too.")
        ((number, kind),) = step.results
        own = self._new(name, kind)
        found[name] = self.values[own]
        self._define(number, (own,), step.where)

    def _fetch(self, step: _Step) -> None:
        column = expect(step.attributes.get("col", len(self.outputs)), int, step.where)
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
            index = expect(step.attributes.get("index"), int, step.where)
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
            blocks = [block for region in step.regions for block in at(region, "blocks", list, step.where)]
            attributes["regions"] = tuple(
                self._sub_block(block, f"block {i} of {name!r}", name) for i, block in enumerate(blocks)
            )
        results: list[tuple[str, ...]] = []
        count = 0
        for number, kind in step.results:
            names: list[str] = []
            for item in () if kind is None else kind.items if isinstance(kind, ListType) else (kind,):
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
        for argument in (*sequence(under(node, "args", where), 0, where), *sequence(node.get("kwargs", []), 0, where)):
            arguments.append(
                self._new(f"{owner}.argument_{len(arguments)}", read_type(under(argument, "TT", where), where))
            )
            self._define(at(argument, "#", int, where), (arguments[-1],), where)
        operators = self.block(node, where, owner)
        while len(self._known) > outside:  # nobody outside sees what is defined inside
            self._known.popitem()
        reference = BlockReference(len(self.subblocks) + 1)
        self.subblocks[reference.index] = Block(operators=operators, arguments=tuple(arguments))
        return reference


def parse_pir(data: bytes) -> PaddleModel:
    """The model that the JSON of Paddle 3 describes, without its tensors.

    Raises:
        ModelImportError: the data is damaged, of an unknown version, or no inference model.
    """
    try:
        document = read_document(data)
        base = at(document, "base_code", dict, "the file")
        version = at(base, "version", int, "its base_code")
        if base.get("magic") != "pir" or version not in KNOWN_VERSIONS:
            raise ModelImportError(
                f"it has the format {str(base.get('magic'))[:40]!r} of version {version}; known is 'pir' of version "
                f"{', '.join(map(str, KNOWN_VERSIONS))}. Save the model again with Paddle 3.3."
            )
        regions = at(at(document, "program", dict, "the file"), "regions", list, "the program")
        blocks = [block for region in regions for block in at(region, "blocks", list, "the program")]
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
