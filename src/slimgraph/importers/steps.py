"""Run a graph that was read from a file, operator by operator, in plain PyTorch."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from keyword import kwlist
from typing import Any, SupportsIndex, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimgraph.errors import ModelImportError
from slimgraph.importers.host import LARGEST, SYMBOLS, Host, product
from slimgraph.program.edit import put

Value: TypeAlias = "Tensor | Host | list[Any] | None"
Handler: TypeAlias = Callable[..., Any]
Preparation: TypeAlias = "Callable[[Step, Mapping[str, Tensor]], tuple[Step, dict[str, Tensor]] | None]"

EVERY = range(2**16)
"""For `Operator.weights`: constants are weights at every position."""

MOST_AXES = 32
"""Of one value. PyTorch takes minutes over a tensor of thousands."""

MOST_ELEMENTS = 2**29
"""Of one value. A file can ask for more in a few bytes; no network that is trained has it."""

_CHANNELS = 2**14
"""A statistic of more is not copied for a second layer: a file can ask for that in a few bytes."""

_DEEPEST = 20
"""Operators in a row that make a shape of constants."""

MOST_KNOWN = 2**23
"""Numbers read and computed while importing in one run, all steps together: Python's are slow, and stay in memory."""

MOST_PARTS = 2**10
"""Of the expression for a size that depends on a free axis: a few operators in a row can double it each."""

MOST_UNROLLED = 2**14
"""Steps inside of others in one run: a few nested loops could go on for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """How an operator of a file is computed.

    `run(call, *inputs)` gets a tensor for each input, None for one that is left out, and a `Host` at the positions in
    `static`; it returns what its outputs are, in order. Where everything is known while importing, `host(call,
    *inputs)` is called instead, with a `Host` for each input; it returns NotImplemented where the sizes of its result,
    or what is in it, depend on free axes in a way that no list of numbers can have.
    """

    run: Handler | None = None
    static: Sequence[int] = ()
    """Inputs that have to be known while importing: shapes, axes, paddings."""
    host: Handler | None = None
    weights: Sequence[int] = ()
    """Inputs whose floating-point constants are parameters; others are buffers."""
    running: Sequence[int] = ()
    """Inputs that training changes, such as running statistics: each layer has its own."""
    views: "Callable[[Step], bool] | None" = None
    """Tells whether the first output is the first input in another form: what is a weight behind it is one before."""
    renames: bool = False
    """Whether its output is its input, under another name."""
    numbers: bool = False
    """Whether a constant of no axes is given as a Python number, which does not become a tensor of the program."""
    prepare: "Preparation | None" = None
    """Gets the step, and what the file stores for this operator alone. It may give another step to run instead, and
    tensors to store for that one: weights in another layout. None: as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operator of a graph: what it reads, what it defines, and how it is computed."""

    name: str
    """The layer."""
    kind: str
    """Operator in the words of the file, for messages."""
    operator: Operator
    inputs: tuple[str, ...]
    """"" for one that is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    version: int = 0
    """Of the operator set."""
    types: tuple[str, ...] = ()
    """Element type of each input in the words of the file, which knows 4-bit integers; "" where it does not say."""

    @property
    def bodies(self) -> Iterator["Body"]:
        """The graphs among the attributes."""
        for attribute in self.attributes.values():
            for part in attribute if isinstance(attribute, tuple) else (attribute,):
                if isinstance(part, Body):
                    yield part


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A graph inside an operator: a branch, or what a loop repeats. It may read all values of the graphs around it."""

    name: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    """What the file stores in it, under names that are unique in the model."""


def every(steps: Iterable[Step]) -> Iterator[Step]:
    """The steps, and those of the graphs inside them."""
    for step in steps:
        yield step
        for body in step.bodies:
            yield from every(body.steps)


@dataclass(frozen=True, slots=True)
class Call:
    """One step while it runs, as its handler sees it."""

    step: Step
    module: "Interpreted"
    values: dict[str, Value]
    """Everything that is defined so far."""
    suffix: str = ""
    """Behind the names of layers and values, where a loop runs again."""

    @property
    def version(self) -> int:
        """Of the operator set."""
        return self.step.version

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute of the operator, or the default where the file leaves it out."""
        return self.step.attributes.get(name, default)

    def body(self, name: str) -> Body:
        """An attribute that is a graph."""
        found = self.attribute(name)
        if not isinstance(found, Body):
            raise self.error(f"its attribute {name!r} is no graph")
        return found

    def inside(self, body: Body, given: Sequence[Value] = (), turn: int = 1) -> list[Value]:
        """What a graph inside this operator computes of its inputs; each turn of a loop has names of its own."""
        if len(given) != len(body.inputs):
            raise self.error(f"the graph {body.name!r} in it has {len(body.inputs)} inputs, and gets {len(given)}")
        self.module.unrolled += len(body.steps)
        if self.module.unrolled > MOST_UNROLLED:
            raise self.error(f"the loops of the model are more than {MOST_UNROLLED} steps, unrolled")
        suffix = f"{self.suffix}#{turn}" if turn > 1 else self.suffix
        values = {**self.values, **dict(zip(body.inputs, given, strict=True))}
        self.module.run(body.steps, values, suffix)
        return [self.module.value(name, values) for name in body.outputs]

    def by(self, operator: Operator, *inputs: Any, version: "int | None" = None) -> Any:
        """What another operator computes of these inputs, by the attributes of this one."""
        assert operator.run is not None
        call = self if version is None else replace(self, step=replace(self.step, version=version))
        return operator.run(call, *inputs)

    def given(self, index: int) -> Value:
        """The input at a position as it is: a `Host` where it is known, None where it is left out."""
        names = self.step.inputs
        return self.module.value(names[index], self.values) if index < len(names) else None

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """An attribute that is a list of integers; one integer counts as a list of one."""
        found = self.attribute(name, default)
        if found is None:
            return None
        items = [found] if isinstance(found, int) else list(found)
        if not all(isinstance(item, int) for item in items):
            raise self.error(f"its attribute {name!r} is {found!r} instead of integers")
        return items

    def int(self, name: str, default: int) -> int:
        """An attribute that is an integer."""
        found = self.attribute(name, default)
        if not isinstance(found, int):
            raise self.error(f"its attribute {name!r} is {found!r} instead of an integer")
        return found

    def float(self, name: str, default: float) -> float:
        """An attribute that is a number."""
        found = self.attribute(name, default)
        if not isinstance(found, (int, float)):
            raise self.error(f"its attribute {name!r} is {found!r} instead of a number")
        return float(found)

    def text(self, name: str, default: str) -> str:
        """An attribute that is a word."""
        found = self.attribute(name, default)
        if not isinstance(found, str):
            raise self.error(f"its attribute {name!r} is {found!r} instead of a word")
        return found

    def reads(self, name: str) -> bool:
        """Whether anything reads the output `name`; "" is an output that is left out."""
        return bool(name) and name in self.module.read

    def stored(self, index: SupportsIndex) -> bool:
        """Whether an input is a tensor of the file, and not computed."""
        return self.step.inputs[index] in self.module.stored

    def error(self, reason: str) -> ModelImportError:
        """An error about this step."""
        return ModelImportError(f"{describe(self.step)} cannot be imported: {reason}.")

    def undecidable(self, reason: str) -> "UndecidableError":
        """An error about this step, which depends on what the model's inputs hold."""
        return UndecidableError(self.step, f"{describe(self.step)} cannot be imported: {reason}.")


class UndecidableError(ModelImportError):
    """A step whose course or sizes depend on what the model's inputs hold, so that no tensor program can have it."""

    def __init__(self, step: Step, message: str) -> None:
        super().__init__(message)
        self.step = step


def describe(step: Step) -> str:
    """The step in a message."""
    version = f" of version {step.version}" if step.version else ""
    return f"The operator {step.kind}{version} at {step.name!r}"


FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    StopIteration,
    MemoryError,
)
"""What operators raise about values that they cannot have: a file may give each of them anything."""


def reason_of(error: BaseException) -> str:
    """What an error says, on one line and not endless: PyTorch's go on about where in its source they arose."""
    return " ".join(str(error).strip().split("\n\n")[0].split())[:300] or type(error).__name__


def _failed(step: Step, error: BaseException) -> ModelImportError:
    return ModelImportError(f"{describe(step)} cannot be imported: {reason_of(error)}")


class Interpreted(nn.Module):
    """A graph of a file as a module: stored tensors under their names in the file, and steps that run in order.

    Args:
        inputs, outputs: names of values.
        tensors: what the file stores, by value name.
        baked: whether the file fixes the number of samples at 1, while the module is called with any number: reshapes
            to constant sizes then mean the sizes of one sample. Right for networks that treat samples one by one, which
            has to be checked.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[str],
        outputs: Sequence[str],
        tensors: Mapping[str, Tensor],
        *,
        baked: bool = False,
    ) -> None:
        super().__init__()
        tensors = {
            **tensors,
            **{name: t for step in every(steps) for b in step.bodies for name, t in b.tensors.items()},
        }
        self.steps, tensors = _prepared(*_read_directly(steps, tensors, outputs))
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.baked = baked
        self.batch: Any = 1
        """Number of samples of the call that is running."""
        self.unrolled = 0
        """Steps inside of others in the call that is running."""
        self.counted = 0
        """Numbers known while importing in the call that is running."""
        self.asks: dict[tuple[int, int], Step] = {}
        """By input and axis: the step that made a number of a size that was free, in any call. torch.export puts a copy
        of what there was before in its place: whoever wants to know takes hold of it before."""
        self.read = {name for step in every(self.steps) for name in step.inputs} | set(outputs)
        self.read |= {name for step in every(self.steps) for body in step.bodies for name in body.outputs}
        self._makers = {name: step for step in every(self.steps) for name in step.outputs if name}
        self._last_reads = _last_reads(self.steps, kept={*self.inputs, *self.outputs})
        # As arrays, since reading a number out of a tensor cannot be traced.
        self._small = {name: (_array(t), t.dtype) for name, t in tensors.items() if _is_small(t)}
        self._hosts: dict[str, Host] = {}
        """What was asked for of these, as numbers."""
        self._floating = {name for name, t in tensors.items() if t.is_floating_point()}
        self._paths: dict[str, str] = {}
        self._paths |= store(
            self, {name: t for name, t in tensors.items() if name in self.read}, _trained(self.steps, tensors)
        )

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name."""
        self.batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
        values: dict[str, Value] = dict(zip(self.inputs, inputs, strict=True))
        self.unrolled = self.counted = 0
        sizes = {(i, axis): size for i, x in enumerate(inputs) for axis, size in enumerate(x.shape)}
        free = {place: size for place, size in sizes.items() if not _is_known(size)}
        for step, done in zip(self.steps, self._last_reads, strict=True):
            self.run([step], values)
            for place in [place for place, size in free.items() if _is_known(size)]:
                del free[place]
                self.asks.setdefault(place, step)
            for name in done:  # what is known while importing is small, and may be asked for again
                if isinstance(values.get(name), Tensor):
                    del values[name]
        found = {name: self._output(name, values) for name in self.outputs}
        for name, value in found.items():
            if not isinstance(value, Tensor):
                what = "empty" if value is None else "a sequence"
                raise ModelImportError(f"The output {name!r} is {what}; a program gives tensors.")
        return {name: mark(value, "", name) for name, value in found.items()}

    def _output(self, name: str, values: Mapping[str, Value]) -> Any:
        try:
            return self.tensor(name, values)
        except FAILURES as error:  # numbers that were known while importing, and no tensor can hold
            if (maker := self._makers.get(name)) is None:
                raise ModelImportError(f"The output {name!r} cannot be imported: {reason_of(error)}") from error
            raise _failed(maker, error) from error

    def run(self, steps: Sequence[Step], values: dict[str, Value], suffix: str = "") -> None:
        """Compute the steps, reading from and adding to `values`; the suffix is for the names of layers and values."""
        for step in steps:
            results = self._result(step, values, suffix)
            for name, result in zip(step.outputs, results, strict=False):
                if name:
                    if isinstance(result, Tensor):
                        result = mark(result, step.name + suffix, name + suffix)
                    values[name] = result

    def _result(self, step: Step, values: dict[str, Value], suffix: str) -> Sequence[Value]:
        call = Call(step, self, values, suffix)
        operator = step.operator
        try:
            result: Any = NotImplemented
            if operator.host is not None and self._is_host(step, values):
                known = [self.host(name, values) for name in step.inputs]
                self._count(call, known)
                result = operator.host(call, *known)
            if result is NotImplemented and operator.run is not None:
                result = operator.run(call, *(self._given(call, i, name) for i, name in enumerate(step.inputs)))
            if result is NotImplemented:
                raise call.undecidable(
                    "it works on sizes only, and gets values that are known only when the model runs"
                )
        except FAILURES as error:
            raise _failed(step, error) from error
        results = list(result) if isinstance(result, tuple) else [result]
        for value in results:
            _check_size(call, value)
        self._count(call, results)
        return results

    def _count(self, call: Call, values: Sequence[Value]) -> None:
        self.counted += sum(value.array.size for value in values if isinstance(value, Host))
        if self.counted > MOST_KNOWN:
            raise call.error(f"the model computes more than {MOST_KNOWN} numbers of its sizes")

    def _is_host(self, step: Step, values: Mapping[str, Value]) -> bool:
        """Whether all inputs are known, and not all of them floating-point constants, which belong to the program."""
        given = [name for name in step.inputs if name]
        if not all(self.host(name, values) is not None for name in given):
            return False
        return not given or any(name not in self._paths or name not in self._floating for name in given)

    def host(self, name: str, values: Mapping[str, Value]) -> Host | None:
        """The value as known while importing; None where it is not, or is left out."""
        value = values.get(name)
        return value if isinstance(value, Host) else self._stored_host(name) if value is None else None

    def _stored_host(self, name: str) -> Host | None:
        if name in self._small and name not in self._hosts:
            array, dtype = self._small[name]
            self._hosts[name] = Host(array.astype(object), dtype)
        return self._hosts.get(name)

    def _evaluated(
        self, name: str, values: dict[str, Value], depth: int = 0, done: dict[str, Host | None] | None = None
    ) -> Host | None:
        """As `host`, also where it is computed of floating-point constants, which are the program's otherwise."""
        known, step = self.host(name, values), self._makers.get(name)
        if known is not None or step is None or step.operator.host is None or depth > _DEEPEST:
            return known
        done = {} if done is None else done
        if name not in done:  # each value once, however often it is read
            done[name] = None
            inputs = [self._evaluated(each, values, depth + 1, done) if each else None for each in step.inputs]
            if all(found is not None for each, found in zip(step.inputs, inputs, strict=True) if each):
                call = Call(step, self, values)
                result = step.operator.host(call, *inputs)
                results = list(result) if isinstance(result, tuple) else [result]
                self._count(call, results)
                found = results[step.outputs.index(name)] if result is not NotImplemented else None
                done[name] = found if isinstance(found, Host) else None
        return done[name]

    def tensor(self, name: str, values: Mapping[str, Value]) -> Any:
        """The value as a tensor of the program; a sequence stays what it is, "" is None."""
        if not name:
            return None
        value = values.get(name)
        if isinstance(value, Host):
            return value.tensor()
        if value is not None or name in values:  # None is an optional value that is empty
            return value
        if name not in self._paths:
            raise ModelImportError(f"The value {name!r} is read, but nothing defines it.")
        return self.get_parameter_or_buffer(name)

    def value(self, name: str, values: Mapping[str, Value]) -> Value:
        """The value as it is: known while importing, or of the program, to which floating-point constants belong."""
        stored = name not in values and name in self._floating
        known = None if stored else self.host(name, values)
        result: Value = self.tensor(name, values) if known is None else known
        return result

    @property
    def stored(self) -> Collection[str]:
        """Names of the tensors that the file stores."""
        return self._paths.keys()

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        """The stored tensor of a name in the file."""
        path, _, attribute = self._paths[name].rpartition(".")
        found = getattr(self.get_submodule(path), attribute)
        assert isinstance(found, Tensor)
        return found

    def _given(self, call: Call, index: int, name: str) -> Any:
        operator, values = call.step.operator, call.values
        if not name:
            return None
        if index in operator.static:
            known = self._evaluated(name, values)
            if known is None:
                maker = f" (of {describe(self._makers[name])})" if name in self._makers else ""
                raise call.undecidable(
                    f"its input {name!r}{maker} depends on what the model's inputs hold. Shapes, axes, conditions and "
                    "numbers of repetitions have to be known while importing"
                )
            return known
        if operator.numbers and name not in values and name in self._small and not self._small[name][0].ndim:
            return self._small[name][0].item()
        return self.tensor(name, values)


_INDICES = (torch.int64, torch.int32, torch.bool)  # narrower integers of several axes are quantized weights


def _is_small(tensor: Tensor) -> bool:
    """Whether it can be a shape, a list of axes, scales, or an index: what is asked for while importing."""
    return tensor.numel() <= (LARGEST if tensor.dim() <= 1 else 0 if tensor.is_floating_point() else 2**12)


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (
        tensor.float() if tensor.dtype.is_floating_point and tensor.dtype != torch.float64 else tensor
    ).numpy()
    return array


def _last_reads(steps: Sequence[Step], kept: Collection[str]) -> list[list[str]]:
    """For each step, the values that nothing reads after it."""
    remaining: set[str] = set(kept)
    last: list[list[str]] = []
    for step in reversed(steps):
        touched = {name for each in every([step]) for name in (*each.inputs, *each.outputs)}
        touched |= {name for each in every([step]) for body in each.bodies for name in body.outputs}
        last.append(sorted(touched - remaining))
        remaining |= touched
    return last[::-1]


def _trained(steps: Sequence[Step], tensors: Mapping[str, Tensor]) -> set[str]:
    """Tensors that are weights of all the steps that read them.

    One number is a weight only to a layer: in arithmetic it is an epsilon or a scale.
    """
    weights, others, of_layers = set[str](), set[str](), set[str]()
    forms: dict[str, str] = {}
    for step in every(steps):
        is_view = step.operator.views is not None and any(step.outputs[:1]) and step.operator.views(step)
        for index, name in enumerate(step.inputs):
            name = forms.get(name, name)
            if is_view and index == 0:  # its readers tell
                forms[step.outputs[0]] = name
                continue
            is_weight = index in step.operator.weights
            (weights if is_weight else others).add(name)
            if is_weight and step.operator.weights is not EVERY:
                of_layers.add(name)
    return {name for name in weights - others if name in tensors and (tensors[name].numel() > 1 or name in of_layers)}


def _read_directly(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], outputs: Collection[str]
) -> tuple[list[Step], dict[str, Tensor]]:
    """The steps without those that only rename what is stored, as exporters write where several layers share a tensor.

    A weight stays one that they share. What training changes becomes each layer's own, under the name it is read by.
    """
    kept = {*outputs, *(name for step in every(steps) for body in step.bodies for name in body.outputs)}
    result, stored = list[Step](), dict(tensors)
    sources: dict[str, tuple[str, str]] = {}
    """By new name: the stored one, and its element type."""

    def read_by(step: Step) -> Step:
        inputs, types = list(step.inputs), list(step.types)
        for index, name in enumerate(step.inputs):
            if name not in sources:
                continue
            source, kind = sources[name]
            if index in step.operator.running and tensors[source].numel() <= _CHANNELS:
                stored.setdefault(name, tensors[source].clone())
            else:
                inputs[index] = source
            types[index : index + 1] = [kind] if types else []
        return replace(step, inputs=tuple(inputs), types=tuple(types))

    for step in steps:
        step = _with_bodies(read_by(step), read_by)
        names = (*step.inputs[:1], *step.outputs[:1])
        if step.operator.renames and len(names) == 2 and names[0] in tensors and kept.isdisjoint(step.outputs):
            sources[names[1]] = (names[0], next(iter(step.types), ""))
        else:
            result.append(step)
    return result, stored


def _with_bodies(step: Step, change: "Callable[[Step], Step]") -> Step:
    """A step with the steps inside of it changed, the innermost ones last."""

    def each(attribute: Any) -> Any:
        if isinstance(attribute, tuple):
            return tuple(each(part) for part in attribute)
        if isinstance(attribute, Body):
            return replace(attribute, steps=tuple(_with_bodies(change(inner), change) for inner in attribute.steps))
        return attribute

    if not any(step.bodies):
        return step
    return replace(step, attributes={key: each(value) for key, value in step.attributes.items()})


def _prepared(steps: Sequence[Step], tensors: Mapping[str, Tensor]) -> tuple[tuple[Step, ...], dict[str, Tensor]]:
    """The steps as their operators want them, and what is stored for these."""
    result = dict(tensors)
    readers: dict[str, list[Operator]] = {}
    for step in every(steps):
        for name in step.inputs:
            readers.setdefault(name, []).append(step.operator)

    def of_one(step: Step) -> Step:
        own = {
            name: tensors[name]
            for name in step.inputs
            if name in tensors and all(reader is step.operator for reader in readers[name])
        }
        try:
            found = step.operator.prepare(step, own) if step.operator.prepare else None
        except FAILURES as error:
            raise _failed(step, error) from error
        if found is None or any(name in tensors and name not in own for name in found[1]):  # a name of another tensor
            return step
        result.update(found[1])
        return found[0]

    return tuple(_with_bodies(of_one(step), of_one) for step in steps), result


def store(module: nn.Module, tensors: Mapping[str, Tensor], trained: set[str]) -> dict[str, str]:
    """Keep tensors in a module under their names, where a dot is a level; returns the path of each.

    A name that would be a level of another one (`a` beside `a.b`), an attribute of modules, or a word of Python gets an
    underscore.
    """
    own = {*dir(nn.Module()), *dir(module), *kwlist}
    levels = {name[:i] for name in tensors for i, sign in enumerate(name) if sign == "."}
    taken: set[str] = set()
    paths = {}
    for name, tensor in tensors.items():
        path = ".".join(f"{part}_" if not part or part in own else part for part in name.split("."))
        while path in levels or path in taken:
            path += "_"
        taken.add(path)
        is_weight = name in trained and tensor.is_floating_point()
        put(module, path, nn.Parameter(tensor) if is_weight else tensor)
        paths[name] = path
    return paths


def require_room(sizes: Sequence[Any]) -> None:
    """Refuse a tensor that a file asks for, before anything is allocated for it.

    Raises:
        ValueError: it would have more elements than any that a network has.
    """
    elements = product([_hint(size) for size in sizes])
    if elements > MOST_ELEMENTS:
        raise ValueError(f"a tensor would have {elements} elements, more than the {MOST_ELEMENTS} that are allowed")


def _check_size(call: Call, value: Value) -> None:
    if not isinstance(value, (Tensor, Host)):
        return
    if isinstance(value, Tensor) and value.dim() > MOST_AXES:
        raise call.error(f"its result would have {value.dim()} axes, more than the {MOST_AXES} that are allowed")
    elements = product([_hint(size) for size in (value.shape if isinstance(value, Tensor) else value.array.shape)])
    if isinstance(value, Host):
        _check_symbols(call, value)
    most = MOST_ELEMENTS if isinstance(value, Tensor) else LARGEST
    if elements > most:
        raise call.error(f"its result would have {elements} elements, more than the {most} that are allowed")


def _check_symbols(call: Call, value: Host) -> None:
    """Refuse what no size can be, before the next operator makes more of it."""
    for number in value.numbers:
        if not isinstance(number, SYMBOLS):
            continue
        if number.node.has_hint() and not abs(number.node.hint) < 2**63:
            raise call.error("its result is larger than any size")
        parts = [number.node.expr]
        for _ in range(MOST_PARTS):
            if parts:
                parts += parts.pop().args
        if parts:
            raise call.error(f"its result depends on a free axis by more than {MOST_PARTS} operations")


def _is_known(size: Any) -> bool:
    """Whether it is a number, or a symbol that a comparison has made one."""
    return not isinstance(size, SYMBOLS) or bool(size.node.expr.is_number)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) and size.node.has_hint() else int(size)


# While a graph is traced, an operator of ours carries the names of values through torch.export; `trace` takes it out.


@torch.library.custom_op("slimgraph::named", mutates_args=())
def _named(x: Tensor, layer: str, value: str) -> Tensor:
    return x.clone()


@_named.register_fake
def _(x: Tensor, layer: str, value: str) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


MARK = torch.ops.slimgraph.named.default


def mark(x: Tensor, layer: str, value: str) -> Tensor:
    """`x` with its names, while it is exported; else `x`."""
    return torch.ops.slimgraph.named(x, layer, value) if torch.compiler.is_exporting() else x
