"""Split a detector: the network becomes a program, what decides by the contents of its results stays ONNX behind it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from slimgraph.errors import ModelImportError, ProgramError
from slimgraph.importers.onnx.decisions import (
    CHOOSING,
    NO_TENSORS,
    SELECTING,
    Values,
    before_weights,
    chosen_at_the_end,
    decided_by_data,
    reads,
    within,
)
from slimgraph.importers.onnx.graph import Graph, Model, Node, Value, every
from slimgraph.importers.onnx.table import find, missing
from slimgraph.importers.onnx.write import write_graph
from slimgraph.program.signature import Signature
from slimgraph.program.tail import LARGEST_BYTES, Tail, require_fit


class NotPostProcessingError(ModelImportError):
    """What decides by data stands inside of the network, so that nothing can be split off."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """A model in two: the second reads what the first computes, or gets."""

    head: Graph
    tail: Graph
    """Its inputs have no types; the program of the head has them."""
    cut: frozenset[str]
    """Nodes behind which all is in the tail."""
    outputs: tuple[str, ...]
    """Of the whole."""
    operators: str
    """What the tail does, in words for the history."""


def first_split(model: Model) -> tuple[Split | None, str]:
    """Where a model is split before anything is traced; None where nothing has to be, or cannot, and then the reason.

    Behind what is decided by data, and behind what is chosen at the end, such as the highest scores and their places.
    """
    must, may = decided_by_data(model), chosen_at_the_end(model)
    reason = ""
    for cut in (must | may, must):
        if cut:
            try:
                return split_at(model, cut), ""
            except NotPostProcessingError as error:
                reason = str(error) if must else ""  # what may be split off may as well stay
    return None, reason


def owner_of(model: Model, step: str) -> str | None:
    """The node of the model's own graph that is, or holds, the node of that name."""
    return next((node.name for node in model.graph.nodes if any(each.name == step for each in within(node))), None)


def split_at(model: Model, cut: Collection[str]) -> Split:
    """The model without these nodes and all that follows from them, and the rest.

    Raises:
        NotPostProcessingError: weights would be in the tail, or none in the head, or the tail would be too large.
    """
    graph = model.graph
    values = Values.of(graph)
    behind = _following(graph, cut)
    if weighted := next((node for node in _nodes(graph, behind) if values.learned(node)), None):
        raise NotPostProcessingError(
            f"Nor is it post-processing that could be split off: behind it, {weighted.name!r} ({weighted.operator}) "
            "has weights."
        )
    behind |= _choices_before(graph, behind, values)
    behind |= _companions(graph, behind, values)
    tail_nodes = _nodes(graph, behind)
    made = {name for node in tail_nodes for name in node.outputs}
    read = dict.fromkeys(name for node in tail_nodes for name in reads(node) if name not in made)
    inputs = [name for name in read if name not in graph.tensors]
    stored = {name: graph.tensors[name] for name in read if name in graph.tensors}
    if (size := sum(tensor.nbytes for tensor in stored.values())) > LARGEST_BYTES:
        raise NotPostProcessingError(
            f"Nor is it post-processing that could be split off: it reads {size:,} stored bytes, and {LARGEST_BYTES:,} "
            "can be."
        )
    given = {value.name for value in graph.inputs}
    wanted = dict.fromkeys([value.name for value in graph.outputs if value.name not in made])
    wanted |= dict.fromkeys(name for name in inputs if name not in given)
    head_nodes = _needed(graph, wanted)
    if not any(values.learned(node) for node in head_nodes):
        raise NotPostProcessingError(
            "Nor is it post-processing that could be split off: no layer with weights lies before it."
        )
    known = {value.name: value for value in graph.outputs}
    return Split(
        head=replace(
            graph,
            nodes=tuple(head_nodes),
            outputs=tuple(known.get(name) or Value(name=name, dtype=None, shape=None) for name in wanted),
        ),
        tail=Graph(
            name=graph.name,
            nodes=tuple(tail_nodes),
            inputs=tuple(Value(name=name, dtype=None, shape=None) for name in inputs),
            outputs=tuple(value for value in graph.outputs if value.name in made),
            tensors=stored,
            types={name: graph.types[name] for name in read if name in graph.types},
        ),
        cut=frozenset(cut),
        outputs=tuple(value.name for value in graph.outputs),
        operators=", ".join(dict.fromkeys(node.operator for node in tail_nodes)),
    )


def tail_of(split: Split, model: Model, signature: Signature) -> Tail:
    """The tail of a split, behind the program that the head became.

    Raises:
        ModelImportError: it cannot be written as ONNX again.
    """
    specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    # The program has names of its own for free axes, or a size where the file leaves one open.
    axes: dict[str, int | str] = {
        said: size
        for value, spec in zip(model.graph.inputs, signature.inputs, strict=True)
        for said, size in zip(value.shape or (), spec.shape, strict=True)
        if isinstance(said, str)
    }

    def renamed(value: Value) -> Value:
        if value.shape is None:
            return value
        return replace(
            value, shape=tuple(axes.get(size, size) if isinstance(size, str) else size for size in value.shape)
        )

    graph = replace(
        split.tail,
        inputs=tuple(
            Value(name=value.name, dtype=specs[value.name].dtype, shape=specs[value.name].shape)
            for value in split.tail.inputs
        ),
        outputs=tuple(map(renamed, split.tail.outputs)),
    )
    written = write_graph(graph, model.opsets).SerializeToString(deterministic=True)
    try:
        tail = Tail(model=written, reads=tuple(value.name for value in graph.inputs), outputs=split.outputs)
        require_fit(tail, signature)
    except ProgramError as error:
        raise ModelImportError(f"The post-processing of the model cannot be split off: {error}") from error
    return tail


def _nodes(graph: Graph, names: Collection[str]) -> list[Node]:
    return [node for node in graph.nodes if node.name in names]


def _following(graph: Graph, names: Collection[str]) -> set[str]:
    """These nodes, and all that read what they compute, directly or not."""
    found, made = set[str](), set[str]()
    for node in graph.nodes:
        if node.name in names or not made.isdisjoint(reads(node)):
            found.add(node.name)
            made |= set(node.outputs) - {""}
    return found


def _choices_before(graph: Graph, behind: Collection[str], values: Values) -> set[str]:
    """Nodes that choose on the way to the tail, with all that follows from them, where this has no weights."""
    towards, found = set[str](), set[str]()
    weighted = before_weights(graph, values)
    for node in reversed(graph.nodes):
        if node.name not in behind and towards.isdisjoint(node.outputs):
            continue
        towards |= set(reads(node))
        if node.name not in weighted and node.operator in CHOOSING and not values.data.isdisjoint(node.inputs):
            found.add(node.name)
    return _following(graph, found)


def _companions(graph: Graph, behind: Collection[str], values: Values) -> set[str]:
    """Nodes whose results the tail reads and no program gives: arithmetic on sizes and constants, sequences.

    The network may need them as well, and then has its own.
    """
    found = set[str]()
    wanted = {name for node in _nodes(graph, behind) for name in reads(node)}
    for node in reversed(graph.nodes):
        if node.name in behind:
            continue
        apart = all(name in values.sizes or name in values.weights for name in node.outputs if name)
        if (apart or node.operator in NO_TENSORS) and not wanted.isdisjoint(node.outputs):
            found.add(node.name)
            wanted |= set(reads(node))
    return found


def _needed(graph: Graph, wanted: Iterable[str]) -> list[Node]:
    """The nodes of which these values are computed, in order."""
    needed, found = set(wanted), []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            found.append(node)
            needed |= set(reads(node))
    return found[::-1]


def unknown(node: Node, model: Model) -> bool:
    """Whether an operator in a tail is neither known nor in `SELECTING`: it might be anything."""
    return find(node, model.opsets) is None and node.operator not in SELECTING


def require_known(split: Split, model: Model) -> None:
    """Refuse a tail with an operator that is not known at all.

    Raises:
        ModelImportError: there is one.
    """
    for node in every(split.tail):
        if unknown(node, model):
            raise missing(node, model.opsets)
