"""Put the branch that always runs in place of each `If` whose condition follows from what the file stores."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Attribute, Graph, Model, Node, Value, every
from slimgraph.importers.onnx.table import find, steps_of
from slimgraph.importers.steps import Interpreted
from slimgraph.program.names import unused

_LONGEST = 32
"""Nodes that make a condition. Exporters write two or three: a constant, a Cast, perhaps a comparison."""
_LARGEST = 2**12
"""Elements of what is stored for one."""


def without_branches(model: Model) -> Model:
    """The model without the branches that never run, and without what is computed for these alone.

    Where a condition follows from shapes, tracing decides; where it follows from what the inputs hold, nothing can.
    """
    if all(node.operator != "If" for node in every(model.graph)):
        return model
    inliner = _Inliner(model.opsets)
    inliner.learn(model.graph)
    graph = inliner.graph(model.graph)
    return replace(model, graph=graph) if inliner.found else model


@dataclass(slots=True)
class _Inliner:
    opsets: Mapping[str, int]
    stored: dict[str, Tensor] = field(default_factory=dict)
    makers: dict[str, Node] = field(default_factory=dict)
    """Of values, in all graphs of the model."""
    defined: Counter[str] = field(default_factory=Counter)
    """How many graphs define a name."""
    taken: set[str] = field(default_factory=set)
    found: bool = False

    def learn(self, graph: Graph) -> None:
        """Take up what is in a graph, and in those inside of it."""
        names = list(_defined(graph))
        self.defined.update(names)
        self.taken.update(names)
        self._learn(graph)

    def _learn(self, graph: Graph) -> None:
        self.stored.update(graph.tensors)
        for node in graph.nodes:
            self.makers.update(dict.fromkeys(node.outputs, node))
            for body in node.subgraphs:
                self._learn(body)

    def graph(self, graph: Graph) -> Graph:
        """A graph with the branches that run in place."""
        tensors, types, nodes = dict(graph.tensors), dict(graph.types), list[Node]()
        for node in graph.nodes:
            branches = self._branches(node)
            if branches is None:
                nodes.append(self._inside(node))
                continue
            self.found = True
            runs, never = branches
            self.defined.subtract(_defined(never))
            body = self._apart(self.graph(runs))
            added = [*body.nodes, *self._handed_over(node, body)]
            self.stored |= body.tensors
            self.makers |= {name: each for each in added for name in each.outputs}
            tensors |= body.tensors
            types |= body.types
            nodes += added
        return _needed(replace(graph, nodes=tuple(nodes), tensors=tensors, types=types))

    def _inside(self, node: Node) -> Node:
        def each(attribute: Attribute) -> Attribute:
            if isinstance(attribute, tuple):
                return tuple(map(each, attribute))
            return self.graph(attribute) if isinstance(attribute, Graph) else attribute

        if not any(node.subgraphs):
            return node
        return replace(node, attributes={name: each(attribute) for name, attribute in node.attributes.items()})

    def _branches(self, node: Node) -> tuple[Graph, Graph] | None:
        """Of a node whose course is plain, the branch that runs, and the one that does not."""
        if node.operator != "If" or node.domain or len(node.inputs) != 1:
            return None
        branches = [node.attributes.get(name) for name in ("then_branch", "else_branch")]
        truth = self._truth(node.inputs[0])
        runs, never = branches if truth else branches[::-1]
        if truth is None or not isinstance(runs, Graph) or not isinstance(never, Graph):
            return None
        return (runs, never) if len(runs.outputs) == len(node.outputs) and not runs.inputs else None

    def _truth(self, name: str) -> bool | None:
        nodes, wanted, leaves = list[Node](), [name], dict[str, Tensor]()
        while wanted:
            value = wanted.pop()
            if self.defined[value] > 1:  # whichever is meant
                return None
            if value in self.stored:
                leaves[value] = self.stored[value]
            elif value in self.makers and len(nodes) < _LONGEST and find(self.makers[value], self.opsets) is not None:
                nodes.append(self.makers[value])
                wanted += [each for each in nodes[-1].inputs if each]
            else:
                return None
        # What was found last runs first; of what was found twice, the later place counts.
        nodes = list({node.name: node for node in reversed(nodes)}.values())
        if any(any(node.subgraphs) for node in nodes) or sum(leaf.numel() for leaf in leaves.values()) > _LARGEST:
            return None
        output = Value(name=name, dtype=None, shape=None)
        graph = Graph(name="", nodes=tuple(nodes), inputs=(), outputs=(output,), tensors=leaves, types={})
        try:
            found = Interpreted(steps_of(graph, self.opsets), [], [name], leaves).eval()()[name]
        except ModelImportError:  # tracing says better what is wrong
            return None
        return bool(found) if found.numel() == 1 else None

    def _handed_over(self, node: Node, body: Graph) -> Iterator[Node]:
        """What gives the results of a branch the names that they have outside."""
        name = node.name
        for value, output in zip(body.outputs, node.outputs, strict=True):
            if output:
                yield Node(
                    name=name, operator="Identity", domain="", inputs=(value.name,), outputs=(output,), attributes={}
                )
                name = self._new(node.name)

    def _new(self, name: str) -> str:
        found = unused(name, self.taken)
        self.taken.add(found)
        return found

    def _apart(self, body: Graph) -> Graph:
        """A branch whose values have names that no other graph has: two branches may share them, one graph may not."""
        own = [*body.tensors, *(name for node in body.nodes for name in node.outputs if name)]
        shared = [name for name in own if self.defined[name] > 1]
        self.defined.subtract(shared)
        return _renamed(body, {name: self._new(name) for name in shared}, is_own=True)


def _defined(graph: Graph) -> Iterator[str]:
    """Names of values, once for each graph that defines them, and of nodes."""
    yield from graph.tensors
    yield from (value.name for value in graph.inputs)
    for node in graph.nodes:
        yield from {node.name, *node.outputs} - {""}
        for body in node.subgraphs:
            yield from _defined(body)


def _renamed(graph: Graph, names: Mapping[str, str], *, is_own: bool = False) -> Graph:
    """A graph that has other names for values: its own ones, or those of the graphs around it."""
    if not is_own:
        own = {*graph.tensors, *(value.name for value in graph.inputs)}
        own |= {name for node in graph.nodes for name in node.outputs}
        names = {old: new for old, new in names.items() if old not in own}
    if not names:
        return graph

    def each(attribute: Attribute) -> Attribute:
        if isinstance(attribute, tuple):
            return tuple(map(each, attribute))
        return _renamed(attribute, names) if isinstance(attribute, Graph) else attribute

    def words(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in given)

    def keys(given: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in given.items()}

    return replace(
        graph,
        nodes=tuple(
            replace(
                node,
                inputs=words(node.inputs),
                outputs=words(node.outputs),
                attributes={name: each(attribute) for name, attribute in node.attributes.items()},
            )
            for node in graph.nodes
        ),
        outputs=tuple(replace(value, name=names.get(value.name, value.name)) for value in graph.outputs),
        tensors=keys(graph.tensors),
        types=keys(graph.types),
        captures=words(graph.captures),
    )


def _needed(graph: Graph) -> Graph:
    """A graph without what none of its outputs needs, and with what it reads of the graphs around it now."""
    needed, nodes = {value.name for value in graph.outputs}, list[Node]()
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            nodes.append(node)
            needed |= {name for name in node.inputs if name}.union(*(body.captures for body in node.subgraphs))
    nodes.reverse()
    own = {value.name for value in graph.inputs} | {name for node in nodes for name in node.outputs}
    return replace(
        graph,
        nodes=tuple(nodes),
        tensors={name: tensor for name, tensor in graph.tensors.items() if name in needed},
        types={name: kind for name, kind in graph.types.items() if name in needed},
        captures=tuple(sorted(needed - own - graph.tensors.keys())),
    )
