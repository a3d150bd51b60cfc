"""Find out what the axes of every value of a program are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.names import operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.program.shapes import fake_values
from slimgraph.pruning.axes import Atom, MixedRadixError, Tree, pin, resolved, size_of, unify
from slimgraph.pruning.shuffle import Shuffle

Axes: TypeAlias = list[Tree]
"""What each axis of a tensor is made of."""

Rule: TypeAlias = "Callable[[Trace, fx.Node], Axes | list[Axes] | None]"
"""Relates the axes of an operator's results to those of its operands; None where a result is no tensor."""

BATCH = 7919
"""Size of the batch while axes are traced: a prime, so that a product with it is recognised as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What the axes of a program's values are made of."""

    program: Program
    axes: Mapping[fx.Node, Axes]
    """Of values that are tensors, parameters among them."""
    values: Mapping[fx.Node, Any]
    """What each node gives, as tensors without elements."""
    stored: Mapping[str, fx.Node]
    """The node that reads each parameter and buffer, by the name of that."""
    unknown: Mapping[str, str]
    """Values at which tracing gave up, all of whose axes stay as they are, with the operator."""
    shuffles: Mapping[fx.Node, Shuffle]
    """Values that are others in another order, index by index: without some, no reshape can make them."""

    def of(self, node: fx.Node) -> Axes:
        """The axes of a tensor, as far as they were taken apart by now."""
        return [resolved(tree) for tree in self.axes[node]]


class Trace:
    """One run over a graph, in which rules relate axes; a rule may ask for anything that stands before its node."""

    def __init__(self, program: Program, rules: Mapping[Any, Rule]) -> None:
        self.program = program
        self.rules = rules
        batch = program.signature.batch_axis
        self.batch = BATCH if batch is not None else None
        self.values = fake_values(program, {batch: BATCH} if batch is not None else None)
        self.env: dict[fx.Node, Axes | list[Axes]] = {}
        self.unknown: dict[str, str] = {}
        self.shuffles: dict[fx.Node, Shuffle] = {}
        self._tensors: dict[int, Axes] = {}

    def run(self) -> Traced:
        """Trace every node, and pin what the outside of the program sees."""
        for node in self.program.graph.nodes:
            match node.op:
                case "placeholder":
                    self.env[node] = self.fresh(self.values[node], reason="input")
                case "get_attr" if isinstance(self.values[node], Tensor):
                    self.env[node] = self._stored(node)
                case "call_function":
                    self._call(node)
                case "output":
                    for result in node.all_input_nodes:
                        self.pin_all(result, "output")
        axes = {node: trees for node, trees in self.env.items() if isinstance(self.values.get(node), Tensor)}
        return Traced(
            program=self.program,
            axes=axes,  # type: ignore[arg-type]
            values=self.values,
            stored={str(node.target): node for node in self.program.graph.find_nodes(op="get_attr")},
            unknown=self.unknown,
            shuffles=self.shuffles,
        )

    def _stored(self, node: fx.Node) -> Axes:
        """The axes of a parameter or buffer: those of the tensor, under whatever name it is read."""
        tensor = edit.constant_of(self.program.graph_module, node)
        assert tensor is not None
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = [Atom(size) for size in tensor.shape]
        return self._tensors[id(tensor)]

    def _call(self, node: fx.Node) -> None:
        value = self.values.get(node)
        is_tensor = isinstance(value, Tensor)
        if not is_tensor and not (isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value)):
            return  # a number
        several: Any = value
        rule = self.rules.get(node.target)
        try:
            result = rule(self, node) if rule is not None else None
        except MixedRadixError:
            result = None
        if result is not None and self._fits(result, value):
            self.env[node] = result
            return
        self.unknown[value_of(node) or node.name] = operator_name(node.target)
        for source in node.all_input_nodes:
            self.pin_all(source, f"read by {operator_name(node.target)}")
        reason = f"made by {operator_name(node.target)}"
        self.env[node] = (
            self.fresh(value, reason=reason)
            if is_tensor
            else [self.fresh(x, reason=reason) if isinstance(x, Tensor) else [] for x in several]
        )

    @staticmethod
    def _fits(result: Axes | list[Axes], value: Any) -> bool:
        pairs: Any = [(result, value)] if isinstance(value, Tensor) else zip(result, value, strict=False)
        sizes: Any = [([size_of(tree) for tree in axes], x.shape) for axes, x in pairs if isinstance(x, Tensor)]
        return all(made == list(wanted) for made, wanted in sizes)

    # What rules are written with

    def axes(self, operand: Any) -> Axes:
        """The axes of a tensor operand, as far as they were taken apart by now."""
        found = self.env[operand]
        return [resolved(tree) for tree in found]  # type: ignore[arg-type]

    def shape(self, node: Any) -> list[int]:
        """Sizes of a tensor."""
        return list(self.values[node].shape)

    def number(self, operand: Any) -> Any:
        """An operand that is a number, or a list of numbers, computed or not."""
        if isinstance(operand, fx.Node):
            return self.values[operand]
        return [self.number(item) for item in operand] if isinstance(operand, (list, tuple)) else operand

    def given(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a call by the names in its schema."""
        return edit.arguments(node)

    def fresh(self, value: Any, *, reason: str = "") -> Axes:
        """Axes that nothing is known of; pinned where there is a reason."""
        trees: Axes = [Atom(int(size)) for size in value.shape]
        if reason:
            for tree in trees:
                pin(tree, reason)
        return trees

    def pin_all(self, node: fx.Node, reason: str) -> None:
        """Let every axis of a value stay as it is."""
        found = self.env.get(node)
        if found is None:
            return
        for item in found:
            for tree in item if isinstance(item, list) else [item]:
                pin(tree, reason)

    def broadcast(self, operands: Sequence[Any], shape: Sequence[int]) -> Axes:
        """The axes of an element-wise result; operands that have its size on an axis share that axis."""
        result: Axes = [Atom(size) for size in shape]
        for operand in operands:
            if not isinstance(operand, fx.Node) or not isinstance(self.values.get(operand), Tensor):
                continue
            axes = self.axes(operand)
            for offset, tree in enumerate(reversed(axes)):
                place = len(shape) - 1 - offset
                if size_of(tree) == shape[place] and shape[place] != 1:
                    unify(result[place], tree)
        return [resolved(tree) for tree in result]


def trace_axes(program: Program) -> Traced:
    """What the axes of every value of a program are made of, and which of them are one.

    Inputs and outputs are pinned, and whatever an operator needs whole: positions that a softmax or a sum runs over,
    spatial axes, axes that are indexed. An operator without a rule pins all that it reads and makes.
    """
    from slimgraph.pruning.rules import RULES

    return Trace(program, RULES).run()
