"""Split a detector: the network becomes a program, what decides by the contents of its results stays ONNX behind it."""

from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace

from slimgraph.errors import ModelImportError, ProgramError
from slimgraph.importers.onnx.control import MOST_TURNS
from slimgraph.importers.onnx.graph import Graph, Model, Node, Value, every
from slimgraph.importers.onnx.table import find, missing
from slimgraph.importers.onnx.write import write_graph
from slimgraph.program.signature import Signature
from slimgraph.program.tail import LARGEST_BYTES, Tail, require_fit

SELECTING = frozenset(
    [
        "NonMaxSuppression",
        # Plugins of TensorRT, which exporters put into one domain or another.
        *("EfficientNMS_TRT", "EfficientNMS_ONNX_TRT", "EfficientNMS_Explicit_TF_TRT", "EfficientNMS_Implicit_TF_TRT"),
        *("BatchedNMS_TRT", "BatchedNMSDynamic_TRT", "NMS_TRT", "NMSDynamic_TRT", "YoloLayer_TRT"),
        *("DetectionLayer_TRT", "ProposalLayer_TRT"),
        # Of MMDeploy.
        *("TRTBatchedNMS", "TRTBatchedRotatedNMS", "NMSRotated", "NMSMatch"),
    ]
)
"""Operators that are post-processing wherever they stand, in whatever domain."""

_CHOOSING = frozenset(
    ["TopK", "ArgMax", "ArgMin", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN", "IsInf"]
)
"""What a program can compute, but whose results jump where numbers change a little.

In front of a tail they go with it, so that the outputs of the program can be compared, calibrated and trained: two
scores that change their places would exchange whole rows otherwise. With TopK in the program, outputs of a quantized
detector (tests/detectors.py) were 14 quanta off in ONNX Runtime on average, though every operator rounded alike.
"""

_MEASURING = frozenset(["Shape", "Size"])
_NO_TENSORS = frozenset(
    [
        *("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceMap", "SplitToSequence"),
        *("Optional", "OptionalGetElement"),
    ]
)
"""Their results cannot be outputs of a program."""
_ABOUT_THESE = frozenset(["SequenceAt", "SequenceLength", "ConcatFromSequence", "OptionalHasElement"])

_LEARNED = frozenset(
    [
        *("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv", "Gemm", "MatMul", "MatMulInteger"),
        *("QLinearMatMul", "Einsum", "LSTM", "GRU", "RNN"),
        *("FusedConv", "NhwcConv", "NhwcFusedConv", "QLinearConvTranspose", "FusedGemm", "FusedMatMul", "QGemm"),
        *("FusedMatMulActivation", "GemmFloat8", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "Attention", "QAttention", "MultiHeadAttention"),
        *("DecoderMaskedMultiHeadAttention", "LongformerAttention", "MoE", "QMoE"),
    ]
)
"""What networks are made of, as far as they read weights."""

_FEW_WEIGHTS = 64
"""Elements: a matrix that turns centres and sizes into corners has 16, and is geometry."""

_NORMALIZING = frozenset(
    [
        *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
        *("RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "GroupNorm"),
    ]
)
"""Layers however few weights they read."""


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


def decided_by_data(model: Model) -> set[str]:
    """Names of the nodes of which it is plain, before anything is traced, that no tensor program can have them."""
    values = _Values.of(model.graph)
    found = set()
    for node in model.graph.nodes:
        operator = find(node, model.opsets)
        if operator is None:
            is_bound = any(each.operator in SELECTING for each in _within(node))
        else:
            static = range(len(node.inputs)) if operator.run is None else operator.static
            is_bound = any(node.inputs[i] in values.data for i in static if i < len(node.inputs))
            is_bound |= node.operator == "Loop" and _ends_by_data(node, model.graph, values.data)
            is_bound |= any(each.operator in SELECTING for body in node.subgraphs for each in every(body))
        if is_bound:
            found.add(node.name)
    return found


def _ends_by_data(loop: Node, graph: Graph, data: Collection[str]) -> bool:
    """Whether what the inputs hold decides, beyond doubt, after which turn a loop ends."""
    body, trips = loop.attributes.get("body"), graph.tensors.get(_trips(loop))
    if not isinstance(body, Graph) or not body.outputs or (trips is not None and trips.reshape(-1)[:1].sum() <= 1):
        return False
    inside = {
        *data,
        *(value.name for value, given in zip(body.inputs[2:], loop.inputs[2:], strict=False) if given in data),
    }
    for node in body.nodes:
        if _is_computed(node) and not inside.isdisjoint(_reads(node)):
            inside |= set(node.outputs)
    return body.outputs[0].name in inside


def chosen_at_the_end(model: Model) -> set[str]:
    """Names of the nodes that begin to choose among the results of a network, where no weights follow.

    That is a TopK whose places are read, since these jump where numbers change a little, and a Loop that runs as often
    as sizes say, or longer than it could be unrolled.
    """
    values = _Values.of(model.graph)
    weighted = _before_weights(model.graph, values)
    wanted = {name for node in model.graph.nodes for name in _reads(node)}
    wanted |= {value.name for value in model.graph.outputs}
    return {
        node.name
        for node in model.graph.nodes
        if node.name not in weighted and not values.data.isdisjoint(_reads(node))
        if (node.operator == "TopK" and not wanted.isdisjoint(node.outputs[1:]))
        or (node.operator == "Loop" and (_trips(node) in values.sizes or _is_long(node, model.graph)))
    }


def _trips(loop: Node) -> str:
    return next(iter(loop.inputs), "")


def _is_long(loop: Node, graph: Graph) -> bool:
    trips = graph.tensors.get(_trips(loop))
    return trips is not None and trips.numel() == 1 and trips.item() > MOST_TURNS


def owner_of(model: Model, step: str) -> str | None:
    """The node of the model's own graph that is, or holds, the node of that name."""
    return next((node.name for node in model.graph.nodes if any(each.name == step for each in _within(node))), None)


def split_at(model: Model, cut: Collection[str]) -> Split:
    """The model without these nodes and all that follows from them, and the rest.

    Raises:
        NotPostProcessingError: weights would be in the tail, or none in the head, or the tail would be too large.
    """
    graph = model.graph
    values = _Values.of(graph)
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
    read = dict.fromkeys(name for node in tail_nodes for name in _reads(node) if name not in made)
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


@dataclass(frozen=True, slots=True)
class _Values:
    """Where the values of a graph come from."""

    weights: MutableMapping[str, int]
    """Of what is stored, or computed of this alone: elements of the largest tensor in it."""
    sizes: frozenset[str]
    """Computed of sizes and what is stored."""
    data: frozenset[str]
    """Computed of what the inputs hold, beyond doubt."""

    @staticmethod
    def of(graph: Graph) -> "_Values":
        weights = {name: tensor.numel() for name, tensor in graph.tensors.items()}
        sizes, data = set[str](), {value.name for value in graph.inputs}
        for node in graph.nodes:
            read = set(_reads(node))
            if read <= weights.keys():
                weights |= dict.fromkeys(node.outputs, max((weights[name] for name in read), default=0))
            elif node.operator in _MEASURING or read <= weights.keys() | sizes:
                sizes |= set(node.outputs)
            elif read & data and _is_computed(node):
                data |= set(node.outputs)
        return _Values(weights, frozenset(sizes), frozenset(data))

    def learned(self, node: Node) -> bool:
        """Whether the node, or one inside of it, is a layer of a network."""
        return self._learned(node, self.weights)

    def _learned(self, node: Node, weights: MutableMapping[str, int]) -> bool:
        few = 0 if node.operator in _NORMALIZING else _FEW_WEIGHTS
        if node.operator in _LEARNED | _NORMALIZING and any(weights.get(name, 0) > few for name in node.inputs):
            return True
        for body in node.subgraphs:
            inside = ChainMap({name: tensor.numel() for name, tensor in body.tensors.items()}, weights)
            for each in body.nodes:
                if self._learned(each, inside):
                    return True
                read = set(_reads(each))
                if all(name in inside for name in read):
                    inside.update(dict.fromkeys(each.outputs, max((inside[name] for name in read), default=0)))
        return False


def _is_computed(node: Node) -> bool:
    """Whether results depend on what is in the inputs, and not on their sizes alone, or on a branch."""
    return not any(node.subgraphs) and node.operator not in _MEASURING | _NO_TENSORS | _ABOUT_THESE


def _within(node: Node) -> Iterator[Node]:
    yield node
    for body in node.subgraphs:
        yield from every(body)


def _reads(node: Node) -> Iterator[str]:
    """What a node reads, itself or in the graphs inside of it."""
    yield from (name for name in node.inputs if name)
    for body in node.subgraphs:
        yield from body.captures


def _nodes(graph: Graph, names: Collection[str]) -> list[Node]:
    return [node for node in graph.nodes if node.name in names]


def _following(graph: Graph, names: Collection[str]) -> set[str]:
    """These nodes, and all that read what they compute, directly or not."""
    found, made = set[str](), set[str]()
    for node in graph.nodes:
        if node.name in names or not made.isdisjoint(_reads(node)):
            found.add(node.name)
            made |= set(node.outputs) - {""}
    return found


def _choices_before(graph: Graph, behind: Collection[str], values: _Values) -> set[str]:
    """Nodes that choose on the way to the tail, with all that follows from them, where this has no weights."""
    towards, found = set[str](), set[str]()
    weighted = _before_weights(graph, values)
    for node in reversed(graph.nodes):
        if node.name not in behind and towards.isdisjoint(node.outputs):
            continue
        towards |= set(_reads(node))
        if node.name not in weighted and node.operator in _CHOOSING and not values.data.isdisjoint(node.inputs):
            found.add(node.name)
    return _following(graph, found)


def _before_weights(graph: Graph, values: _Values) -> set[str]:
    """Nodes that have weights, and those of whose results such nodes make something."""
    read, found = set[str](), set[str]()
    for node in reversed(graph.nodes):
        if values.learned(node) or not read.isdisjoint(node.outputs):
            found.add(node.name)
            read |= set(_reads(node))
    return found


def _companions(graph: Graph, behind: Collection[str], values: _Values) -> set[str]:
    """Nodes whose results the tail reads and no program gives: arithmetic on sizes and constants, sequences.

    The network may need them as well, and then has its own.
    """
    found = set[str]()
    wanted = {name for node in _nodes(graph, behind) for name in _reads(node)}
    for node in reversed(graph.nodes):
        if node.name in behind:
            continue
        apart = all(name in values.sizes or name in values.weights for name in node.outputs if name)
        if (apart or node.operator in _NO_TENSORS) and not wanted.isdisjoint(node.outputs):
            found.add(node.name)
            wanted |= set(_reads(node))
    return found


def _needed(graph: Graph, wanted: Iterable[str]) -> list[Node]:
    """The nodes of which these values are computed, in order."""
    needed, found = set(wanted), []
    for node in reversed(graph.nodes):
        if not needed.isdisjoint(node.outputs):
            found.append(node)
            needed |= set(_reads(node))
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
