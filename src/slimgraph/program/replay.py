"""Run a program once and, at chosen values, run only the rest again with another result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, fx

from slimgraph.errors import UnknownNameError, closest
from slimgraph.program.names import value_of
from slimgraph.program.program import Program

Instead: TypeAlias = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]
"""Computes another result for a node from the results that its arguments have."""


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
    existing = program.values
    for name in alternatives:
        if name not in existing:
            raise UnknownNameError(f"The program has no value {name!r}. {closest(name, existing)}")
    run = _Resumable(program.graph_module, [tensor.to(program.device) for tensor in inputs.values()])
    for position, node in enumerate(run.nodes):
        name = value_of(node)
        for choice, instead in enumerate(alternatives.get(name, ())):
            args, kwargs = run.arguments(node)
            result = instead(node, args, kwargs)
            yield Replayed(value=name, choice=choice, outputs=run.branch(position, result))
        run.step(node)
    yield Replayed(value="", choice=0, outputs=tuple(run.returned))


class _Resumable(fx.Interpreter):
    """An interpreter that can be left in the middle; each value is freed after its last use."""

    returned: Sequence[Tensor]

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self.nodes = list(graph_module.graph.nodes)
        self.args_iter = iter(inputs)
        self._inputs = dict(zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True))

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Results of what the node reads; of an input, the tensor that is given for it."""
        if node.op == "placeholder":
            return (self._inputs[node],), {}
        return self.fetch_args_kwargs_from_env(node)

    def step(self, node: fx.Node) -> None:
        self._keep(node, self.run_node(node))

    def _keep(self, node: fx.Node, result: Any) -> None:
        self.env[node] = result
        if node.op == "output":
            self.returned = result
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]

    def branch(self, position: int, result: Any) -> tuple[Tensor, ...]:
        """What the rest of the program returns if the node at `position` gives `result`; this run stays where it is."""
        here = self.env
        self.env = dict(here)
        try:
            self._keep(self.nodes[position], result)
            for node in self.nodes[position + 1 :]:
                self.step(node)
            return tuple(self.returned)
        finally:
            self.env = here
