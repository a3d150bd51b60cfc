"""What a program would cost with fewer indices, counted from its axes without making it."""

import math
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

import slimgraph.program.edit as edit
from slimgraph.program.count import MAC_RULES
from slimgraph.pruning.axes import Atom, Cat, Pick, Prod, Tree, resolved
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.trace import BATCH

Cost: TypeAlias = Callable[[Mapping[str, int]], float]
"""From how many indices of which groups stay (all of those that are not named) to a cost."""

Measure: TypeAlias = Literal["macs", "parameters", "memory"]


class Costs:
    """MACs, parameters and bytes of a program by how many indices of its groups stay; for one sample."""

    def __init__(self, groups: Groups) -> None:
        traced = groups.traced
        graph_module = traced.program.graph_module
        self._atoms = groups.atoms
        self._products: list[tuple[fx.Node, dict[fx.Node, list[Tree]]]] = []
        self._stored: list[tuple[Tensor, list[Tree]]] = []
        self._others = dict(traced.values)
        seen: set[int] = set()
        for node in traced.program.graph.nodes:
            if node.op == "call_function" and node.target in MAC_RULES:
                read = {each: traced.of(each) for each in (*node.all_input_nodes, node) if each in traced.axes}
                self._products.append((node, read))
            tensor = edit.constant_of(graph_module, node)
            if tensor is not None and node in traced.axes and id(tensor) not in seen:
                seen.add(id(tensor))
                self._stored.append((tensor, traced.of(node)))

    def measure(self, kind: Measure) -> Cost:
        """One of the costs."""
        return {"macs": self.macs, "parameters": self.parameters, "memory": self.memory}[kind]

    def macs(self, kept: Mapping[str, int]) -> float:
        """Multiply–accumulates by the rules of `slimgraph.program.count`."""
        counts = self._counts(kept)
        total = 0
        for node, read in self._products:
            shapes = {each: [_count(tree, counts) for tree in axes] for each, axes in read.items()}
            made = {each: torch.empty(shape, device="meta") for each, shape in shapes.items()}
            given = fx.map_arg(edit.arguments(node), ChainMap(made, self._others).__getitem__)
            total += MAC_RULES[node.target](given, made.get(node))
        return float(total)

    def parameters(self, kept: Mapping[str, int]) -> float:
        """Elements of the parameters that the outputs depend on."""
        counts = self._counts(kept)
        return float(sum(_elements(axes, counts) for tensor, axes in self._stored if isinstance(tensor, nn.Parameter)))

    def memory(self, kept: Mapping[str, int]) -> float:
        """Bytes of the parameters and buffers that the outputs depend on."""
        counts = self._counts(kept)
        return float(sum(_elements(axes, counts) * tensor.element_size() for tensor, axes in self._stored))

    def _counts(self, kept: Mapping[str, int]) -> dict[Atom, int]:
        return {self._atoms[name]: count for name, count in kept.items()}


def _elements(axes: list[Tree], counts: Mapping[Atom, int]) -> int:
    return math.prod(_count(tree, counts) for tree in axes)


def _count(tree: Tree, counts: Mapping[Atom, int]) -> int:
    """How many indices of an axis stay, with one sample in the batch."""
    tree = resolved(tree)
    match tree:
        case Atom(size=size):
            return counts[tree] if tree in counts else size // BATCH if size % BATCH == 0 else size
        case Prod(parts):
            return math.prod(_count(part, counts) for part in parts)
        case Cat(parts):
            # An axis has every index of an atom equally often, here and there.
            picked = Counter[Atom]()
            for part in parts:
                if isinstance(part, Pick):
                    picked[part.atom] += len(part.indices)
            others = sum(_count(part, counts) for part in parts if not isinstance(part, Pick))
            return others + sum(number // atom.size * counts.get(atom, atom.size) for atom, number in picked.items())
        case Pick(atom, indices):
            return len(indices) // atom.size * counts.get(atom, atom.size)
