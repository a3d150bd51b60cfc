"""The graph of a Paddle inference model, the same for both generations of its files."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

Generation = Literal["program", "pir"]
"""`program`: the protobuf of `.pdmodel`; `pir`: the JSON of Paddle 3."""

# What must not stand in the generated Python of a graph: quotes, backslashes, control characters, line separators;
# lone surrogates cannot be written to a file.
_UNSAFE = re.compile(r"[\"'`\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONGEST_NAME = 500
# Paddle names the parameters of a layer `conv2d_0.w_0`, `conv2d_0.b_0`; people name them `conv1_weights`, `bn1_mean`.
_PARAMETER_OF_LAYER = re.compile(r"(.+?)[._](?:[wb]_\d+|weights?|bias|scale|offset|mean|variance)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor as the file declares it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]
    """None is an axis whose length is free."""


@dataclass(frozen=True, slots=True)
class BlockReference:
    """An attribute that names a block of operators: a key of `PaddleModel.subblocks`."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One step of a model: named arguments in the `program` generation, positional ones in `pir`.

    Every argument is a tuple of value names: one for a tensor, several for a list of tensors, none for what is left
    out. So the two generations differ in the names only: `inputs["X"]` of one is `operands[0]` of the other.
    """

    name: str
    """Unique: the layer that owns the first parameter read (`conv2d_0`), else the kind with a number (`relu_3`)."""
    kind: str
    """Paddle's name of the operator, without PIR's dialect `pd_op.` and the underscore of its in-place form."""
    generation: Generation
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`program`: by Paddle's parameter name, or by the name of an attribute that is given by a value."""
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    operands: tuple[tuple[str, ...], ...] = ()
    """`pir`: in the order of the operator's definition."""
    results: tuple[tuple[str, ...], ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """bool, int, float, complex, str, torch.dtype, BlockReference, None, or (nested) tuples of these."""

    @property
    def reads(self) -> list[str]:
        """Names of all values that go in."""
        return [name for names in (*self.inputs.values(), *self.operands) for name in names]

    @property
    def writes(self) -> list[str]:
        """Names of all values that come out."""
        return [name for names in (*self.outputs.values(), *self.results) for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The body of a loop or a branch.

    In `pir` it reads the values of the blocks around it by the names they have there. In `program` it is kept as the
    file has it: its names are variables, which it may write again and share with the block around it.
    """

    operators: tuple[Operator, ...]
    arguments: tuple[str, ...] = ()
    scope: Mapping[str, str] = field(default_factory=dict)
    """`program`: what the variables that stand in it hold where its operator begins; not all hold something."""
    writes: Mapping[str, str] = field(default_factory=dict)
    """`program`: which values of the block around it the variables are that it writes for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddleModel:
    """A whole model: every value is an input, a tensor, or written by exactly one operator, before it is read."""

    generation: Generation
    version: int
    """`program`: the Paddle that saved it, 2006002 for 2.6.2, 0 where it does not say; `pir`: the format's version."""
    operators: tuple[Operator, ...]
    """In an order in which they can run; those that no output depends on are left out."""
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    values: Mapping[str, Value]
    """What the file declares of its values, by name; not all are declared."""
    parameters: Mapping[str, Value]
    """All that the parameter file holds, by the names written there (their own `name` is the one used here)."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The parameters that are read; those that nothing reads are left out."""
    subblocks: Mapping[int, Block] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    """Names of the operators and parameters that were left out."""

    @property
    def version_text(self) -> str:
        """The version as people write it: "2.6.2" for 2006002."""
        if self.generation == "pir":
            return str(self.version)
        return f"{self.version // 1_000_000}.{self.version // 1_000 % 1_000}.{self.version % 1_000}"


class Names:
    """Gives what a file names a name that is safe in generated code, and different from all given before."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._repeats: Counter[str] = Counter()

    def new(self, wanted: str) -> str:
        """`wanted` without unsafe characters; `wanted~1`, `wanted~2`, … where that is taken."""
        clean = name = _UNSAFE.sub("_", wanted)[:_LONGEST_NAME] or "_"
        while name in self._taken:
            self._repeats[clean] += 1
            name = f"{clean}~{self._repeats[clean]}"
        self._taken.add(name)
        return name


def _layer_of(parameter: str) -> str | None:
    match = _PARAMETER_OF_LAYER.fullmatch(parameter[:_LONGEST_NAME])
    return match[1] if match else None


def name_operators(operators: Sequence[tuple[str, Sequence[str]]], names: Names, owner: str = "") -> list[str]:
    """A new name for each operator of a block, given its kind and the parameters it reads.

    >>> name_operators([("conv2d", ["conv2d_7.w_0"]), ("add", ["conv2d_7.b_0"]), ("relu", []), ("relu", [])], Names())
    ['conv2d_7', 'conv2d_7.add', 'relu_0', 'relu_1']
    """
    layers, counts = set[str](), Counter[str]()
    found: list[str] = []
    for kind, parameters in operators:
        layer = next((layer for name in parameters if (layer := _layer_of(name))), None)
        if layer is None:
            found.append(f"{kind}_{counts[kind]}")
            counts[kind] += 1
        else:
            found.append(f"{layer}.{kind}" if layer in layers else layer)
            layers.add(layer)
    return [names.new(f"{owner}.{name}" if owner else name) for name in found]


def without_unused(model: PaddleModel) -> PaddleModel:
    """The model without operators that no output depends on and parameters that nothing reads."""
    needed = {value.name for value in model.outputs}
    entered: set[int] = set()
    kept: list[Operator] = []
    unused: list[str] = []
    for operator in reversed(model.operators):
        if needed.isdisjoint(operator.writes):
            unused.append(operator.name)
        else:
            kept.append(operator)
            needed.update(operator.reads)
            needed.update(_read_inside(operator, model.subblocks, entered))
    unused.reverse()
    return replace(
        model,
        operators=tuple(reversed(kept)),
        tensors={name: tensor for name, tensor in model.tensors.items() if name in needed},
        unused=(*unused, *(name for name in model.tensors if name not in needed)),
    )


def _read_inside(operator: Operator, subblocks: Mapping[int, Block], entered: set[int]) -> Iterable[str]:
    """Names that the blocks of an operator read, and the blocks inside them, unless they were `entered` before."""
    waiting = _blocks_of(operator)
    while waiting:
        index = waiting.pop()
        if index not in entered:
            entered.add(index)
            block = subblocks[index]
            yield from (block.scope[name] for name in block.writes if name in block.scope)  # perhaps not written
            for inner in block.operators:
                yield from (block.scope.get(name, name) for name in inner.reads)
                waiting.extend(_blocks_of(inner))


def _blocks_of(operator: Operator) -> list[int]:
    return [
        reference.index
        for attribute in operator.attributes.values()
        for reference in (attribute if isinstance(attribute, tuple) else (attribute,))
        if isinstance(reference, BlockReference)
    ]
