"""Find the parts of a program whose output is reconstructed as a whole: residual blocks, or single layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from slimgraph.errors import ConfigError, closest
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.quantization.operators import read_through_padding, rectified_range
from slimgraph.quantization.plan import QuantizationPlan

aten = torch.ops.aten

MOST_LAYERS = 12
"""A block with more layers than these is taken apart: what is learned together must fit to the data that there are."""

_ACTIVATIONS = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.mish.default,
        aten.softplus.default,
    }
)
"""Functions of one value behind a layer that belong to it, beside the rectifiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a program, by the names of the values at its ends."""

    inputs: tuple[str, ...]
    output: str
    weights: tuple[str, ...] | None = None
    """Qualified names of the weights whose rounding is learned here; None for all that the plan rounds in it."""

    def __str__(self) -> str:
        return f"{', '.join(self.inputs)} → {self.output}"


def layer_regions(program: Program, plan: QuantizationPlan) -> tuple[Region, ...]:
    """A region for each layer whose weight the plan rounds, with the activation function behind it."""
    flow = DataFlow(program)
    values = program.values
    return tuple(flow.layer(values[weight.value]) for weight in plan.weights)


def block_regions(program: Program, plan: QuantizationPlan, *, most_layers: int = MOST_LAYERS) -> tuple[Region, ...]:
    """The largest regions with one way in and one way out; layers that are in none are regions themselves.

    Where several ways meet, such as that through a residual block and that around it, they come from one value: the
    nearest through which all of them go, in graph terms the immediate dominator. What lies between is a region if
    nobody else reads from inside: a residual block, an attention with its bypass, an Inception module. Of regions
    within regions the largest is taken that has no more than `most_layers` layers whose weights the plan rounds.
    """
    flow = DataFlow(program)
    values = program.values
    layers = {values[weight.value] for weight in plan.weights}
    found = [(entry, exit, nodes) for entry, exit, nodes in flow.enclosed() if 0 < len(nodes & layers) <= most_layers]
    found.sort(key=lambda item: len(item[2] & layers), reverse=True)
    taken: set[fx.Node] = set()
    blocks: dict[fx.Node, Region] = {}
    for entry, exit, nodes in found:
        if not nodes & taken:
            taken |= nodes
            region = Region(inputs=(value_of(entry),), output=value_of(flow.with_activation(exit)))
            blocks[min(nodes & layers, key=flow.position.__getitem__)] = region
    alone = {layer: flow.layer(layer) for layer in layers - taken}
    return tuple(region for _, region in sorted((blocks | alone).items(), key=lambda item: flow.position[item[0]]))


class DataFlow:
    """How tensors that depend on the program's inputs follow from each other; sizes and constants are left out."""

    def __init__(self, program: Program) -> None:
        self.program = program
        nodes = list(program.graph.nodes)
        self.position = {node: index for index, node in enumerate(nodes)}
        self.sources: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            before = [source for source in node.all_input_nodes if source in self.sources]
            if node.op == "placeholder" or (before and _holds_tensors(node)):
                self.sources[node] = before

    def layer(self, node: fx.Node) -> Region:
        """The region of one layer."""
        source = read_through_padding(node)
        entries = dict.fromkeys(source if given is node.args[0] else given for given in self.sources[node])
        return Region(inputs=tuple(map(value_of, entries)), output=value_of(self.with_activation(node)))

    def with_activation(self, node: fx.Node) -> fx.Node:
        """The activation functions behind a node that nothing else reads, or the node itself."""
        while len(node.users) == 1 and _is_activation(reader := next(iter(node.users))):
            node = reader
        return node

    def between(self, entries: Iterable[fx.Node], exit: fx.Node) -> set[fx.Node]:
        """What follows from `entries` and leads to `exit`, which belongs to it: sizes and constants made here, too."""
        entries = set(entries)
        behind = _reached(entries, lambda node: node.users)
        before = _reached([exit], lambda node: () if node in entries else node.all_input_nodes)
        return ((behind & before) | ({exit} & behind)) - entries

    def enclosed(self) -> Iterator[tuple[fx.Node, fx.Node, set[fx.Node]]]:
        """The values where several ways meet, after the value from which these come, with what lies between."""
        dominator = _immediate_dominators(self.sources)
        for exit, sources in self.sources.items():
            entry = dominator[exit]
            if len(sources) < 2 or entry is None or not (_is_tensor(entry) and _is_tensor(exit)):
                continue
            nodes = self.between([entry], exit)
            if all(reader in nodes for node in nodes if node is not exit for reader in node.users):
                yield entry, exit, nodes


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(item, Tensor) for item in items)


def _is_activation(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target in _ACTIVATIONS or rectified_range(node) is not None)


def _reached(starts: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found, pending = set[fx.Node](), list(starts)
    while pending:
        for other in following(pending.pop()):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def _immediate_dominators(before: Mapping[fx.Node, Sequence[fx.Node]]) -> dict[fx.Node, fx.Node | None]:
    """For each node the nearest one through which every way to it goes; None where there is none.

    Args:
        before: what comes right before each node, in an order of computation.

    In a graph without cycles one walk in topological order finds them: the nearest common ancestor, in the tree of
    dominators so far, of the nodes that come right before.
    Source: Cooper, Harvey, Kennedy, "A simple, fast dominance algorithm", 2001.
    """
    dominator: dict[fx.Node, fx.Node | None] = {}
    depth: dict[fx.Node | None, int] = {None: 0}
    for node, sources in before.items():
        common: fx.Node | None = sources[0] if sources else None
        for other in sources[1:]:
            meeting: fx.Node | None = other
            while meeting is not common:
                if depth[meeting] >= depth[common]:
                    assert meeting is not None
                    meeting = dominator[meeting]
                else:
                    assert common is not None
                    common = dominator[common]
        dominator[node] = common
        depth[node] = depth[common] + 1
    return dominator


@dataclass(frozen=True, slots=True)
class Span:
    """A region as nodes, and what is computed before it."""

    region: Region
    before: tuple[fx.Node, ...]
    """What it needs that no earlier span has computed, in order of computation."""
    entries: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    """In order of computation; the last one gives the output."""
    layers: tuple[fx.Node, ...]
    """Those whose weights are learned."""

    @property
    def exit(self) -> fx.Node:
        """The node that gives the region's output."""
        return self.nodes[-1]


def resolve(program: Program, plan: QuantizationPlan, regions: Sequence[Region]) -> tuple[Span, ...]:
    """The regions as nodes, in an order in which none needs what comes later.

    Raises:
        UnknownNameError: the program has no such value.
        ConfigError: a region cannot be computed from its inputs, has no weight to learn, or two regions share a layer
            or need each other's outputs; the message names them.
    """
    flow = DataFlow(program)
    spans = [_span(flow, plan, region) for region in regions]
    owner: dict[fx.Node, Region] = {}
    for span in spans:
        for layer in span.layers:
            if layer in owner:
                raise ConfigError(
                    f"The layer {value_of(layer)!r} is in two regions, {owner[layer]} and {span.region}. "
                    "Leave it to one of them."
                )
            owner[layer] = span.region
    done: set[fx.Node] = set()
    ordered: list[Span] = []
    for span in sorted(spans, key=lambda span: flow.position[span.layers[0]]):
        needed = _reached(span.nodes, lambda node: node.all_input_nodes) - set(span.nodes) - done
        if early := next((layer for layer in span.layers if layer in done), None):
            other = next(s.region for s in ordered if early in s.before or early in s.nodes)
            raise ConfigError(
                f"The region {other} needs the layer {value_of(early)!r} of the region {span.region}, which begins "
                "later. Regions must follow each other."
            )
        before = tuple(sorted(needed, key=flow.position.__getitem__))
        ordered.append(replace(span, before=before))
        done |= needed | set(span.nodes)
    return tuple(ordered)


def _span(flow: DataFlow, plan: QuantizationPlan, region: Region) -> Span:
    program = flow.program
    entries, exit = tuple(map(program.value, region.inputs)), program.value(region.output)
    inside = flow.between(entries, exit)
    outside = dict.fromkeys(
        value_of(source)
        for node in sorted(inside, key=flow.position.__getitem__)
        for source in flow.sources.get(node, ())
        if source not in inside and source not in entries
    )
    if outside or not inside:
        missing = f"Add {', '.join(outside)} to the inputs." if outside else "The output does not depend on them."
        raise ConfigError(f"The region {region} cannot be computed from its inputs alone. {missing}")
    weights = {program.value(weight.value): weight.weight for weight in plan.weights}
    layers = {node: weights[node] for node in flow.position if node in inside and node in weights}
    if region.weights is not None:
        unknown = [name for name in region.weights if name not in layers.values()]
        if unknown:
            raise ConfigError(
                f"The region {region} has no weight {unknown[0]!r} that the plan rounds. "
                f"{closest(unknown[0], layers.values())}"
            )
        layers = {node: name for node, name in layers.items() if name in region.weights}
    if not layers:
        raise ConfigError(f"The region {region} has no weight that the plan rounds.")
    nodes = tuple(sorted(inside, key=flow.position.__getitem__))
    return Span(region, (), entries, nodes, tuple(layers))
