"""Find in a graph what decides by the contents of results, and where its weights are."""

from collections import ChainMap
from collections.abc import Collection, Iterator, MutableMapping
from dataclasses import dataclass

from slimgraph.importers.onnx.control import MOST_TURNS
from slimgraph.importers.onnx.graph import Graph, Model, Node, every
from slimgraph.importers.onnx.table import find

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

CHOOSING = frozenset(
    ["TopK", "ArgMax", "ArgMin", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN", "IsInf"]
)
"""What a program can compute, but whose results jump where numbers change a little.

In front of a tail they go with it, so that the outputs of the program can be compared, calibrated and trained: two
scores that change their places would exchange whole rows otherwise. With TopK in the program, outputs of a quantized
detector (tests/detectors.py) were 14 quanta off in ONNX Runtime on average, though every operator rounded alike.
"""

_MEASURING = frozenset(["Shape", "Size"])
NO_TENSORS = frozenset(
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


@dataclass(frozen=True, slots=True)
class Values:
    """Where the values of a graph come from."""

    weights: MutableMapping[str, int]
    """Of what is stored, or computed of this alone: elements of the largest tensor in it."""
    sizes: frozenset[str]
    """Computed of sizes and what is stored."""
    data: frozenset[str]
    """Computed of what the inputs hold, beyond doubt."""

    @staticmethod
    def of(graph: Graph) -> "Values":
        """Those of a graph."""
        weights = {name: tensor.numel() for name, tensor in graph.tensors.items()}
        sizes, data = set[str](), {value.name for value in graph.inputs}
        for node in graph.nodes:
            read = set(reads(node))
            if read <= weights.keys():
                weights |= dict.fromkeys(node.outputs, max((weights[name] for name in read), default=0))
            elif node.operator in _MEASURING or read <= weights.keys() | sizes:
                sizes |= set(node.outputs)
            elif read & data and _is_computed(node):
                data |= set(node.outputs)
        return Values(weights, frozenset(sizes), frozenset(data))

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
                read = set(reads(each))
                if all(name in inside for name in read):
                    inside.update(dict.fromkeys(each.outputs, max((inside[name] for name in read), default=0)))
        return False


def _is_computed(node: Node) -> bool:
    """Whether results depend on what is in the inputs, and not on their sizes alone, or on a branch."""
    return not any(node.subgraphs) and node.operator not in _MEASURING | NO_TENSORS | _ABOUT_THESE


def within(node: Node) -> Iterator[Node]:
    """The node, and all in the graphs inside of it."""
    yield node
    for body in node.subgraphs:
        yield from every(body)


def reads(node: Node) -> Iterator[str]:
    """What a node reads, itself or in the graphs inside of it."""
    yield from (name for name in node.inputs if name)
    for body in node.subgraphs:
        yield from body.captures


def before_weights(graph: Graph, values: Values) -> set[str]:
    """Nodes that have weights, and those of whose results such nodes make something."""
    read, found = set[str](), set[str]()
    for node in reversed(graph.nodes):
        if values.learned(node) or not read.isdisjoint(node.outputs):
            found.add(node.name)
            read |= set(reads(node))
    return found


def decided_by_data(model: Model) -> set[str]:
    """Names of the nodes of which it is plain, before anything is traced, that no tensor program can have them."""
    values = Values.of(model.graph)
    found = set()
    for node in model.graph.nodes:
        operator = find(node, model.opsets)
        if operator is None:
            is_bound = any(each.operator in SELECTING for each in within(node))
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
        if _is_computed(node) and not inside.isdisjoint(reads(node)):
            inside |= set(node.outputs)
    return body.outputs[0].name in inside


def chosen_at_the_end(model: Model) -> set[str]:
    """Names of the nodes that begin to choose among the results of a network, where no weights follow.

    That is a TopK whose places are read, since these jump where numbers change a little, and a Loop that runs as often
    as sizes say, or longer than it could be unrolled.
    """
    values = Values.of(model.graph)
    weighted = before_weights(model.graph, values)
    wanted = {name for node in model.graph.nodes for name in reads(node)}
    wanted |= {value.name for value in model.graph.outputs}
    return {
        node.name
        for node in model.graph.nodes
        if node.name not in weighted and not values.data.isdisjoint(reads(node))
        if (node.operator == "TopK" and not wanted.isdisjoint(node.outputs[1:]))
        or (node.operator == "Loop" and (_trips(node) in values.sizes or _is_long(node, model.graph)))
    }


def _trips(loop: Node) -> str:
    return next(iter(loop.inputs), "")


def _is_long(loop: Node, graph: Graph) -> bool:
    trips = graph.tensors.get(_trips(loop))
    return trips is not None and trips.numel() == 1 and trips.item() > MOST_TURNS
