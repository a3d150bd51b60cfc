"""Run a program once and, from chosen places on, run only the rest again otherwise."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, fx

from slimgraph.program.program import Program

Instead: TypeAlias = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""Computes another result for a node from the results that its arguments have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A program that is as it was up to a node, and other from there on."""

    start: fx.Node
    """The first node that gives another result."""
    instead: Mapping[fx.Node, Instead]
    """How nodes are computed otherwise, `start` and whatever stands behind it."""
    before: Mapping[fx.Node, Callable[[Any], Any]] = field(default_factory=dict)
    """What becomes of results of nodes before `start`, where this is read by nodes from there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What the program returns when one value is another."""

    value: str
    """Name of the value that was replaced; "" for the program as it is, which comes last."""
    choice: int
    """Which of its alternatives."""
    outputs: tuple[Tensor, ...]
    """In the order of the signature."""


def replay(
    program: Program, inputs: Mapping[str, Tensor], alternatives: Mapping[str, Sequence[Instead]]
) -> Iterator[Replayed]:
    """The outputs for each alternative of each value, one value replaced at a time, and in the end without any.

    What stands before a value is computed once for all, and every alternative runs only what stands behind it. The
    program is run in the mode in which it is. Live values are kept, nothing else: memory is that of two runs.

    Args:
        inputs: one batch, as `Signature.bind` gives it.
        alternatives: by value name; each gets the node and its evaluated arguments, and must not write into them.
    Raises:
        UnknownNameError: the program has no such value.
    """
    nodes = {name: program.value(name) for name in alternatives}
    offered = [(name, choice) for name, several in alternatives.items() for choice in range(len(several))]
    variants = [
        Variant(start=nodes[name], instead={nodes[name]: alternatives[name][choice]}) for name, choice in offered
    ]
    for index, outputs in replay_variants(program, inputs, variants):
        name, choice = ("", 0) if index is None else offered[index]
        yield Replayed(value=name, choice=choice, outputs=outputs)


def replay_variants(
    program: Program, inputs: Mapping[str, Tensor], variants: Sequence[Variant]
) -> Iterator[tuple[int | None, tuple[Tensor, ...]]]:
    """The outputs of each variant with its index, in the order in which they begin; those of the program in the end.

    What stands before the start of a variant is computed once for all of them; as `replay`.
    """
    starting: dict[fx.Node, list[int]] = defaultdict(list)
    for index, variant in enumerate(variants):
        starting[variant.start].append(index)
    run = _Resumable(program.graph_module, [tensor.to(program.device) for tensor in inputs.values()])
    for position, node in enumerate(run.nodes):
        for index in starting.get(node, ()):
            yield index, run.branch(position, variants[index])
        run.step(node)
    yield None, tuple(run.returned)


class _Resumable(fx.Interpreter):
    """An interpreter that can be left in the middle; each value is freed after its last use."""

    returned: Sequence[Tensor]

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self.nodes = list(graph_module.graph.nodes)
        self._inputs = dict(zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True))

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Results of what the node reads; of an input, the tensor that is given for it."""
        if node.op == "placeholder":
            return (self._inputs[node],), {}
        return self.fetch_args_kwargs_from_env(node)

    def step(self, node: fx.Node, instead: Instead | None = None) -> None:
        """Compute one node, and free what nothing behind it reads."""
        if instead is not None:
            result = instead(node, *self._arguments(node))
        else:
            result = self._inputs[node] if node.op == "placeholder" else self.run_node(node)
        self.env[node] = result
        if node.op == "output":
            self.returned = result
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]

    def branch(self, position: int, variant: Variant) -> tuple[Tensor, ...]:
        """What the program returns if it is another from `position` on; this run stays where it is."""
        here = self.env
        self.env = {
            node: variant.before[node](value) if node in variant.before else value for node, value in here.items()
        }
        try:
            for node in self.nodes[position:]:
                self.step(node, variant.instead.get(node))
            return tuple(self.returned)
        finally:
            self.env = here
