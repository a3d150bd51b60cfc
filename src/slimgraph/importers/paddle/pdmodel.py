"""Read the `ProgramDesc` of Paddle 1 and 2 (`.pdmodel`, `__model__`) as a graph.

Field numbers are those of `framework.proto`, which Paddle publishes.
"""

from collections.abc import Callable, Container, Iterable, Mapping
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
from slimgraph.importers.paddle.parameters import tensor_type
from slimgraph.importers.paddle.wire import Message

NEWEST_MAJOR_VERSION = 3
"""Paddle 3 still writes this format on demand; nobody knows what a Paddle 4 would write."""

_NO_VARIABLE = "@EMPTY@"
_TENSOR_VARIABLE = 7  # VarType.LOD_TENSOR
# What every operator carries of the Python that made it: file names of somebody's machine, training roles.
_BOOKKEEPING = frozenset(["op_callstack", "op_namescope", "op_role", "op_role_var", "op_device"])
_VARIABLE, _VARIABLES = 13, 14


def _scalar(message: Message) -> bool | int | float | complex:
    kind = message.one(message.integers, 1)
    if kind == 1:
        return message.one(message.flags, 2)
    if kind == 2:
        return message.one(message.integers, 3)
    if kind == 3:
        return message.one(message.doubles, 4)
    if kind == 4:
        number = message.message(5, "a complex scalar")
        return complex(number.one(number.doubles, 1), number.one(number.doubles, 2))
    raise ModelImportError(f"A scalar has the kind {kind}; 1 (bool) to 4 (complex) are known.")


# AttrType: what an attribute of that type holds, in which field of OpDesc.Attr.
_ATTRIBUTES: Mapping[int, Callable[[Message], Any]] = MappingProxyType(
    {
        0: lambda attribute: attribute.one(attribute.integers, 3),
        1: lambda attribute: attribute.one(attribute.floats, 4),
        2: lambda attribute: attribute.one(attribute.texts, 5),
        3: lambda attribute: attribute.integers(6),
        4: lambda attribute: attribute.floats(7),
        5: lambda attribute: attribute.texts(8),
        6: lambda attribute: attribute.one(attribute.flags, 10),
        7: lambda attribute: attribute.flags(11),
        8: lambda attribute: BlockReference(attribute.one(attribute.integers, 12)),
        9: lambda attribute: attribute.one(attribute.integers, 13),
        10: lambda attribute: tuple(BlockReference(index) for index in attribute.integers(14)),
        11: lambda attribute: attribute.integers(15),
        12: lambda attribute: attribute.doubles(16),
        _VARIABLE: lambda attribute: (attribute.one(attribute.texts, 17),),
        _VARIABLES: lambda attribute: attribute.texts(18),
        15: lambda attribute: attribute.one(attribute.doubles, 19),
        16: lambda attribute: _scalar(attribute.message(20, "a scalar")),
        17: lambda attribute: tuple(_scalar(each) for each in attribute.messages(21, "a scalar")),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variable:
    persistable: bool
    declared: Value | None
    """None for what is no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """An operator as it is written, with the names of variables."""

    kind: str
    where: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    attributes: Mapping[str, Any]

    def only(self, arguments: Mapping[str, tuple[str, ...]], parameter: str) -> str:
        names = arguments.get(parameter, ())
        if len(names) != 1:
            raise ModelImportError(f"{self.where} has {len(names)} variables in {parameter}, where one must stand.")
        return names[0]


def _variables(block: Message) -> dict[str, _Variable]:
    found: dict[str, _Variable] = {}
    for message in block.messages(3, "a variable"):
        name = message.one(message.texts, 1)
        what = f"variable {name[:200]!r}"
        if name in found:
            raise ModelImportError(f"{what} is declared twice.")
        kind = message.message(2, what)
        declared = None
        if kind.one(kind.integers, 1) == _TENSOR_VARIABLE and kind.data(3):
            dtype, shape = tensor_type(kind.message(3, what).message(1, what), what)
            declared = Value(name=name, dtype=dtype, shape=tuple(None if size == -1 else size for size in shape))
        found[name] = _Variable(persistable=message.one(message.flags, 3, False), declared=declared)
    return found


def _arguments(message: Message, field: int, where: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for each in message.messages(field, where):
        parameter = each.one(each.texts, 1)
        if parameter in found:
            raise ModelImportError(f"{where} has {parameter[:200]!r} twice.")
        found[parameter] = tuple(name for name in each.texts(2) if name != _NO_VARIABLE)
    return found


def _step(message: Message, where: str) -> _Step:
    kind = message.one(message.texts, 3)
    where = f"{where} ({kind[:200]})"
    inputs = _arguments(message, 1, where)
    attributes: dict[str, Any] = {}
    for each in message.messages(4, where):
        name = each.one(each.texts, 1)
        number = each.one(each.integers, 2)
        if number not in _ATTRIBUTES:
            raise ModelImportError(
                f"{where} has an attribute {name[:200]!r} of the type {number}; 0 to {max(_ATTRIBUTES)} are known."
            )
        if name in _BOOKKEEPING:
            continue
        goes_to: dict[str, Any] = inputs if number in (_VARIABLE, _VARIABLES) else attributes
        if name in goes_to:
            raise ModelImportError(f"{where} has {name[:200]!r} twice.")
        goes_to[name] = _ATTRIBUTES[number](each)
    return _Step(
        kind=kind,
        where=where,
        inputs=inputs,
        outputs=_arguments(message, 2, where),
        attributes=MappingProxyType(attributes),
    )


def _steps(block: Message, index: int) -> list[_Step]:
    return [
        _step(Message(data, f"block {index}, operator {i}"), f"block {index}, operator {i}")
        for i, data in enumerate(block.data(4))
    ]


def _by_column(steps: Iterable[_Step], kind: str) -> list[_Step]:
    """The operators that feed or fetch, in the order of their columns."""
    found: dict[int, _Step] = {}
    for step in steps:
        if step.kind == kind:
            column = step.attributes.get("col", 0)
            if type(column) is not int or column in found:
                raise ModelImportError(
                    f"{step.where} has the column {str(column)[:80]}; it must be a number that no other {kind} has."
                )
            found[column] = step
    return [found[column] for column in sorted(found)]


class _Versions:
    """Gives each writing of a variable a name of its own: old programs write `relu(X)` into X."""

    def __init__(self, variables: Mapping[str, _Variable]) -> None:
        self._variables = variables
        self._names = Names()
        self._current: dict[str, str] = {}
        self.values: dict[str, Value] = {}

    def write(self, variable: str, where: str) -> str:
        known = self._variables.get(variable)
        declared = known.declared if known else None
        if variable in self._current and declared is None:
            # An array of tensors keeps what it had: a second writing reads it without saying so.
            raise ModelImportError(f"{where} changes {variable[:200]!r}, which is no tensor; that cannot be followed.")
        name = self._current[variable] = self._names.new(variable)
        if declared is not None:
            self.values[name] = Value(name=name, dtype=declared.dtype, shape=declared.shape)
        return name

    def read(self, variable: str, where: str) -> str:
        if variable not in self._current:
            raise ModelImportError(
                f"{where} reads {variable[:200]!r}, which is neither an input, nor a parameter, nor written before. "
                "Save the model again with paddle.static.save_inference_model or paddle.jit.save."
            )
        return self._current[variable]

    def held(self, variables: Iterable[str]) -> dict[str, str]:
        """What those of the variables hold that are written already."""
        return {variable: self._current[variable] for variable in variables if variable in self._current}

    def tensor(self, name: str, where: str) -> Value:
        if name not in self.values:
            raise ModelImportError(f"{where} names {name[:200]!r}, which is not declared as a tensor.")
        return self.values[name]


_Arguments = Mapping[str, tuple[str, ...]]


def _operators(
    steps: list[_Step], arguments: list[tuple[_Arguments, _Arguments]], layers: list[str]
) -> tuple[Operator, ...]:
    """The operators of a block, from what is written, the names of what goes in and out, and their own names."""
    return tuple(
        Operator(
            name=layer,
            kind=step.kind,
            generation="program",
            inputs=MappingProxyType(dict(inputs)),
            outputs=MappingProxyType(dict(outputs)),
            attributes=step.attributes,
        )
        for step, (inputs, outputs), layer in zip(steps, arguments, layers, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a block inside another is run."""

    scope: Mapping[str, str]
    writes: Mapping[str, str]


def _main_block(
    steps: list[_Step],
    versions: _Versions,
    names: Names,
    parameters: Container[str],
    inner: Mapping[int, list[_Step]],
) -> tuple[tuple[Operator, ...], dict[int, _Place]]:
    """The operators of the outermost block, in single assignment, and the places of the blocks `inner`."""
    arguments: list[tuple[_Arguments, _Arguments]] = []
    places: dict[int, _Place] = {}
    for step in steps:
        inputs = {key: tuple(versions.read(name, step.where) for name in found) for key, found in step.inputs.items()}
        blocks = [each.index for each in step.attributes.values() if isinstance(each, BlockReference)]
        scopes = {index: versions.held(_mentioned([step, *inner.get(index, [])])) for index in blocks}
        outputs = {
            key: tuple(versions.write(name, step.where) for name in found) for key, found in step.outputs.items()
        }
        arguments.append((inputs, outputs))
        for index, scope in scopes.items():
            if index in places:
                raise ModelImportError(f"{step.where} runs the block {index}, which another operator runs, too.")
            writes = dict(zip(step.outputs.get("Out", ()), outputs.get("Out", ()), strict=True))
            places[index] = _Place(scope=scope, writes=writes)
    owned = [[name for found in inputs.values() for name in found if name in parameters] for inputs, _ in arguments]
    kinds = [step.kind for step in steps]
    return _operators(steps, arguments, name_operators(list(zip(kinds, owned, strict=True)), names)), places


def _mentioned(steps: Iterable[_Step]) -> dict[str, None]:
    """The variables that operators read or write."""
    return dict.fromkeys(
        name for step in steps for found in (*step.inputs.values(), *step.outputs.values()) for name in found
    )


def _sub_block(steps: list[_Step], index: int, names: Names, place: _Place | None) -> Block:
    """A block inside another, as it is written."""
    layers = name_operators([(step.kind, ()) for step in steps], names, owner=f"block_{index}")
    return Block(
        operators=_operators(steps, [(step.inputs, step.outputs) for step in steps], layers),
        scope=MappingProxyType(dict(place.scope) if place else {}),
        writes=MappingProxyType(dict(place.writes) if place else {}),
    )


def _check_references(operators: Iterable[Operator], known: Mapping[int, Block]) -> None:
    for operator in operators:
        for name, attribute in operator.attributes.items():
            for each in attribute if isinstance(attribute, tuple) else (attribute,):
                if isinstance(each, BlockReference) and each.index not in known:
                    raise ModelImportError(
                        f"operator {operator.name!r} has in {name[:200]!r} the block {each.index}, which is not there."
                    )


def parse_program(data: bytes) -> PaddleModel:
    """The model that a `ProgramDesc` describes, without its tensors.

    Raises:
        ModelImportError: the data is damaged, of an unknown version, or no inference model.
    """
    program = Message(memoryview(data), "the program")
    stated = program.message(4, "the version")
    version = stated.one(stated.integers, 1, 0)
    if not 0 <= version < (NEWEST_MAJOR_VERSION + 1) * 1_000_000:
        raise ModelImportError(
            f"the program has the version {version}; those of Paddle up to {NEWEST_MAJOR_VERSION} are known "
            "(2006002 is 2.6.2)."
        )
    blocks = program.messages(1, "a block")
    if not blocks:
        raise ModelImportError("it has no block of operators: this is no Paddle program, or an empty file.")
    variables = _variables(blocks[0])
    steps = _steps(blocks[0], 0)

    versions = _Versions(variables)
    parameters = {
        variable: versions.tensor(versions.write(variable, "the program"), "the program")
        for variable, known in variables.items()
        if known.persistable and known.declared is not None
    }
    inputs = []
    for feed in _by_column(steps, "feed"):
        variable = feed.only(feed.outputs, "Out")
        if variable in parameters:
            raise ModelImportError(f"{feed.where} feeds the parameter {variable[:200]!r}.")
        inputs.append(versions.tensor(versions.write(variable, feed.where), feed.where))

    names = Names()
    inner = {i: _steps(block, i) for i, block in enumerate(blocks[1:], start=1)}
    operators, places = _main_block(
        [step for step in steps if step.kind not in ("feed", "fetch")],
        versions,
        names,
        {value.name for value in parameters.values()},
        inner,
    )
    fetches = _by_column(steps, "fetch")
    if not fetches:
        raise ModelImportError(
            "it has no fetch operator, so nothing says what its outputs are. Save it with "
            "paddle.static.save_inference_model or paddle.jit.save."
        )
    subblocks = {i: _sub_block(each, i, names, places.get(i)) for i, each in inner.items()}
    _check_references([*operators, *(each for block in subblocks.values() for each in block.operators)], subblocks)
    return PaddleModel(
        generation="program",
        version=version,
        operators=operators,
        inputs=tuple(inputs),
        outputs=tuple(
            versions.tensor(versions.read(fetch.only(fetch.inputs, "X"), fetch.where), fetch.where) for fetch in fetches
        ),
        values=MappingProxyType(versions.values),
        parameters=MappingProxyType(parameters),
        subblocks=MappingProxyType(subblocks),
    )
