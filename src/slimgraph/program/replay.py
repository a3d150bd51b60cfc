"""Run a program once and, from chosen places on, run only the rest again otherwise."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
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

    What stands before the start of a variant is computed once for all of them; as `replay`. A variant that differs at
    one node, and not even there for these inputs, is not run: it gives what the program gives, right before that.
    """
    starting: dict[fx.Node, list[int]] = defaultdict(list)
    for index, variant in enumerate(variants):
        starting[variant.start].append(index)
    unchanged: list[int] = []
    run = _Resumable(program.graph_module, [tensor.to(program.device) for tensor in inputs.values()])
    for position, node in enumerate(run.nodes):
        plain = run.compute(node)
        for index in starting.get(node, ()):
            result = run.compute(node, variants[index].instead[node])
            if len(variants[index].instead) == 1 and _same(result, plain):
                unchanged.append(index)
            else:
                yield index, run.branch(position, result, variants[index])
        run.keep(node, plain)
    for index in unchanged:
        yield index, tuple(run.returned)
    yield None, tuple(run.returned)


def _same(result: Any, plain: Any) -> bool:
    return isinstance(result, Tensor) and isinstance(plain, Tensor) and torch.equal(result, plain)


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

    def compute(self, node: fx.Node, instead: Instead | None = None) -> Any:
        """The result of one node."""
        if node.op == "call_function" or instead is not None:
            # Not by `run_node`, whose bookkeeping takes as long as a small operator.
            args, kwargs = self._arguments(node)
            return node.target(*args, **kwargs) if instead is None else instead(node, args, kwargs)  # type: ignore[operator]
        return self._inputs[node] if node.op == "placeholder" else self.run_node(node)

    def keep(self, node: fx.Node, result: Any) -> None:
        """Take a result, and free what nothing behind it reads."""
        self.env[node] = result
        if node.op == "output":
            self.returned = result
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]

    def branch(self, position: int, result: Any, variant: Variant) -> tuple[Tensor, ...]:
        """What the program returns if it is another from `position` on; this run stays where it is."""
        here = self.env
        self.env = dict(here)
        try:
            self.keep(self.nodes[position], result)
            for node in self.nodes[position + 1 :]:
                self.keep(node, self.compute(node, variant.instead.get(node)))
            return tuple(self.returned)
        finally:
            self.env = here
