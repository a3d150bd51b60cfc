"""Cut the sub-program between named values out of a program."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import ConfigError, ProgramError
from slimgraph.program.edit import finish, on_tensors_of
from slimgraph.program.names import set_names, value_of
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.shapes import fake_values
from slimgraph.program.signature import Signature, TensorSpec


def extract(program: Program, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
    """The program that computes the values `outputs` from the values `inputs`, which are its inputs in this order.

    Names of layers, values and parameters stay. Axes that depend on a free axis are free. One output is returned bare,
    several as a dictionary by value name. The tensors are those of `program`: train a `copy()`. A tail is left behind:
    it belongs to the outputs of the whole.

    Raises:
        UnknownNameError: there is no such value.
        ProgramError: a value is named twice, is not one tensor, is an input that no output needs, or the outputs depend
            on inputs of the program besides; the message names them.
    """
    for role, names in (("inputs", inputs), ("outputs", outputs)):
        if len(set(names)) != len(names) or not names:
            raise ProgramError(f"{role} is {list(names)}; give at least one value, and none twice.")
    entries, results = [program.value(name) for name in inputs], [program.value(name) for name in outputs]
    sizes = _Sizes.of(program)
    for node in (*entries, *results):
        if not isinstance(sizes.runs[0][node], Tensor):
            parts = [name for user in node.users if (name := value_of(user))]
            raise ProgramError(f"{value_of(node)!r} is not one tensor; take what is read from it: {', '.join(parts)}.")
    kept, derived = _kept(entries, results, sizes)

    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {node: _placeholder(graph, node) for node in entries}
    for node, number in derived.items():
        copies[node] = number.made_of(copies[number.owner], graph) if isinstance(number, _Derived) else number
    for node in program.graph.nodes:
        if node in kept:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    signature = Signature(
        inputs=tuple(sizes.spec(node) for node in entries),
        outputs=tuple(sizes.spec(node) for node in results),
        output_form="tensor" if len(results) == 1 else "dict",
        example_sizes=sizes.example_of(entries),
    )
    entry = HistoryEntry(step="extract", parameters={"inputs": [*inputs], "outputs": [*outputs]})
    return finish(Program(on_tensors_of(program.graph_module, graph), signature, (*program.history, entry)))


_Extent = tuple[int, ...]
"""One size for several choices of the free axes: those of the example, and each axis changed in turn."""


@dataclass(frozen=True, slots=True)
class _Derived:
    """A size that is a multiple or a part of the size of one axis of a new input."""

    owner: fx.Node
    axis: int
    factor: int = 1
    divisor: int = 1

    def made_of(self, tensor: fx.Node, graph: fx.Graph) -> fx.Node:
        size = graph.call_function(torch.ops.aten.sym_size.int, (tensor, self.axis))
        if self.factor > 1:
            size = graph.call_function(operator.mul, (size, self.factor))
        if self.divisor > 1:
            size = graph.call_function(operator.floordiv, (size, self.divisor))
        return size


def _ratio(extent: _Extent, base: _Extent) -> tuple[int, int] | None:
    """Factor and divisor by which `base` gives `extent` in all cases, one of them 1; None where there are none."""
    factor, divisor = extent[0] // base[0], base[0] // max(extent[0], 1)
    if factor and all(size == factor * given for size, given in zip(extent, base, strict=True)):
        return factor, 1
    if divisor and all(size == given // divisor for size, given in zip(extent, base, strict=True)):
        return 1, divisor
    return None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How the shapes of values depend on the free axes, found by trying a second size for each."""

    runs: tuple[dict[fx.Node, Any], ...]
    """What nodes produce for the example sizes; then, with each free axis changed."""
    names: dict[_Extent, str]
    """Of the free axes."""

    @staticmethod
    def of(program: Program) -> "_Sizes":
        free = {name: program.signature.example_sizes[name] for name in program.signature.free_axes}
        tried, runs = [free], [fake_values(program, free)]
        for name, size in free.items():
            # Twice as much fulfils most conditions; one more shows what was rounded.
            for other in (2 * size + 1, 2 * size, size + 1, size - 1):
                try:
                    runs.append(fake_values(program, {**free, name: other}))
                except (ProgramError, ConfigError):
                    continue
                tried.append({**free, name: other})
                break
        return _Sizes(tuple(runs), {tuple(sizes[name] for sizes in tried): name for name in free})

    def extent(self, node: fx.Node, axis: int) -> _Extent:
        return tuple(int(run[node].shape[axis]) for run in self.runs)

    def size_name(self, node: fx.Node, axis: int) -> int | str:
        extent = self.extent(node, axis)
        if len(set(extent)) == 1:
            return extent[0]
        for base, name in self.names.items():
            if ratio := _ratio(extent, base):
                factor, divisor = ratio
                return f"{factor}*{name}" if factor > 1 else f"{name}//{divisor}" if divisor > 1 else name
        return f"{value_of(node)}.{axis}"

    def spec(self, node: fx.Node) -> TensorSpec:
        tensor = self.runs[0][node]
        shape = tuple(self.size_name(node, axis) for axis in range(tensor.dim()))
        return TensorSpec(name=value_of(node), dtype=tensor.dtype, shape=shape)

    def example_of(self, entries: Sequence[fx.Node]) -> dict[str, int]:
        return {
            size: int(self.runs[0][node].shape[axis])
            for node in entries
            for axis, size in enumerate(self.spec(node).shape)
            if isinstance(size, str)
        }

    def derived(self, node: fx.Node, entries: Sequence[fx.Node]) -> int | _Derived | None:
        """The number that a node produces, where it is fixed or follows from the shapes of the new inputs."""
        if type(self.runs[0][node]) is not int:
            return None
        extent: _Extent = tuple(run[node] for run in self.runs)
        if len(set(extent)) == 1:
            return extent[0]
        found = [
            _Derived(entry, axis, *ratio)
            for entry in entries
            for axis in range(self.runs[0][entry].dim())
            if (ratio := _ratio(extent, self.extent(entry, axis)))
        ]
        return min(found, key=lambda size: size.factor * size.divisor, default=None)


def _kept(
    entries: Sequence[fx.Node], results: Sequence[fx.Node], sizes: _Sizes
) -> tuple[set[fx.Node], dict[fx.Node, int | _Derived]]:
    """Nodes to copy, and numbers to compute from the shapes of the new inputs instead."""
    kept: set[fx.Node] = set()
    derived: dict[fx.Node, int | _Derived] = {}
    read: set[fx.Node] = set()
    missing: dict[str, None] = {}
    pending = list(results)
    while pending:
        node = pending.pop()
        if node in entries:
            read.add(node)
        elif node.op == "placeholder":
            missing[value_of(node)] = None
        elif node not in kept and node not in derived:
            number = sizes.derived(node, entries)
            if number is None:
                kept.add(node)
                pending += node.all_input_nodes
            else:
                derived[node] = number
                read |= {number.owner} if isinstance(number, _Derived) else set()
    if missing:
        raise ProgramError(
            f"{', '.join(map(value_of, results))} cannot be computed from {', '.join(map(value_of, entries))} alone. "
            f"Add {', '.join(missing)} to the inputs, or values that lie between."
        )
    if unread := [value_of(node) for node in entries if node not in read]:
        raise ProgramError(f"No output needs the input {', '.join(unread)}; leave it out.")
    return kept, derived


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.placeholder(node.name)
    copy.target = copy.name
    if "val" in node.meta:
        copy.meta["val"] = node.meta["val"]
    set_names(copy, layer="", value=value_of(node))
    return copy
