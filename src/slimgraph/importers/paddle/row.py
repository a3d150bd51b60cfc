"""A row of the table of Paddle's operators: how both generations of files write one, and how it is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.steps import Call, Handler, Operator, Preparation

_MOST_INPUTS = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One input of an operator: a place in `pir`, a name in `program`."""

    names: tuple[str, ...] = ()
    """What `program` calls it, the usual name first. Empty: only `pir` has it."""
    attribute: str = ""
    """What gives it where no value does, as a handler calls it; the handler gets a `Host` all the same."""
    known: bool = False
    """It has to be known while importing."""
    many: bool = False
    """A list of tensors. Handlers get these last, one after the other."""
    weight: bool = False
    """Its floating-point constants are parameters."""

    @property
    def label(self) -> str:
        """What to call it."""
        return self.attribute or (self.names[0] if self.names else "others")


def one(*names: str) -> Argument:
    """A tensor."""
    return Argument(names=names)


def many(*names: str) -> Argument:
    """A list of tensors."""
    return Argument(names=names, many=True)


def weight(*names: str) -> Argument:
    """A tensor whose constants are parameters."""
    return Argument(names=names, weight=True)


def number(attribute: str, *names: str) -> Argument:
    """Numbers that an attribute or a tensor gives."""
    return Argument(names=names, attribute=attribute)


def known(attribute: str, *names: str) -> Argument:
    """Numbers that have to be known while importing, whether an attribute gives them or a tensor."""
    return Argument(names=names, attribute=attribute, known=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An operator in both generations of files, and how it is computed."""

    pir: str
    """Its kinds there, the usual one first, spaces between; "" where it has none."""
    program: str
    run: Handler | None = None
    inputs: tuple[Argument, ...] = (Argument(names=("X",)),)
    """In the order of `pir`."""
    outputs: tuple[str, ...] = ("Out",)
    """What `program` calls them, in the order of `pir`; a star marks a list of tensors, which handlers return last."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Name in `pir`, and for handlers: name in `program`, where they differ."""
    host: Handler | None = None
    """As in `Operator`: where everything is known while importing."""
    prepare: "Preparation | None" = None

    @property
    def singles(self) -> tuple[Argument, ...]:
        """The inputs that are no lists, in which order handlers get them."""
        return tuple(argument for argument in self.inputs if not argument.many)

    @cached_property
    def operator(self) -> Operator:
        """The row without its spelling."""
        singles = self.singles
        lists = [argument for argument in self.inputs if argument.many]
        trained = [index for index, argument in enumerate(singles) if argument.weight]
        if any(argument.weight for argument in lists):
            trained.extend(range(len(singles), _MOST_INPUTS))
        return Operator(
            run=None if self.run is None else _filled(self.run, singles),
            host=None if self.host is None else _filled(self.host, singles),
            static=[index for index, argument in enumerate(singles) if argument.known],
            weights=trained,
            prepare=self.prepare,
        )


def _filled(function: Handler, singles: Sequence[Argument]) -> Handler:
    """A handler that gets what attributes give as if tensors gave it; what has no default has to be given."""
    count = len(singles)
    parameters = list(signature(function).parameters.values())[1 : count + 1]
    required = [
        parameter.kind != Parameter.VAR_POSITIONAL and parameter.default is Parameter.empty for parameter in parameters
    ]

    def run(call: Call, *inputs: Any) -> Any:
        first = [*inputs[:count], *[None] * (count - len(inputs))]
        for index, argument in enumerate(singles):
            if not argument.attribute:
                continue
            given = call.given(index)
            if isinstance(given, Host):
                first[index] = given
            elif given is None and call.attribute(argument.attribute) is not None:
                first[index] = constant(call.attribute(argument.attribute))
        for argument, value, is_required in zip(singles, first, required, strict=False):
            if is_required and value is None:
                raise call.error(f"its input {argument.label!r} is left out")
        return function(call, *first, *inputs[count:])

    return run


def constant(value: Any) -> Host:
    """The value of an attribute as a value that is known."""
    host = Host.of(value)
    floats = any(isinstance(number, float) for number in host.numbers)
    return Host(host.array, torch.float32) if floats else host


def number_of(call: Call, index: int, other: Any = None) -> Any:
    """The input at a position as a Python number, where `other` then decides type and shape all the same; else None."""
    known = call.given(index)
    if not isinstance(known, Host) or known.array.size != 1 or known.array.ndim > 1 or not known.known:
        return None
    if isinstance(other, Tensor) and (
        other.dim() < known.array.ndim or (known.dtype.is_floating_point and not other.is_floating_point())
    ):
        return None
    return known.number


def channels_first(call: Call, x: Tensor) -> tuple[Tensor, bool]:
    """x with its channels as the second axis, and whether they were the last one."""
    layout = call.text("data_format", "NCHW")
    if layout in ("NHWC", "NDHWC", "NLC", "NWC"):
        return x.movedim(-1, 1), True
    if layout not in ("NCHW", "NCDHW", "NCL", "NCW", "AnyLayout", ""):
        raise call.error(f"its data_format is {layout!r}; known are NCHW, NHWC, NCDHW, NDHWC, NCL and NLC")
    return x, False


def in_layout(function: Handler) -> Handler:
    """A handler for channels as the second axis, made to work in the layout that the file says."""

    @wraps(function)
    def run(call: Call, x: Tensor, *rest: Any) -> Any:
        x, last = channels_first(call, x)
        result = function(call, x, *rest)
        if not last:
            return result
        first, *others = result if isinstance(result, tuple) else (result,)
        return (first.movedim(1, -1), *others)

    return run
