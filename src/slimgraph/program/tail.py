"""`Tail`: post-processing that no tensor program can compute, kept as ONNX beside the program that feeds it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from slimgraph.errors import ProgramError
from slimgraph.program.signature import Signature

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

LARGEST_BYTES = 2**25
"""Of the ONNX model: the anchors of a large detector have less than a megabyte, and a tail has no weights."""

_DEEPEST = 16
"""Graphs within graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What comes behind a program in the model that it was read from: non-maximum suppression, loops over detections.

    A program computes tensors whose sizes follow from those of its inputs; a tail is what decides by their contents.
    """

    model: bytes
    """A serialized ONNX model. It has all its tensors inside, and no functions."""
    reads: tuple[str, ...]
    """Inputs of that model, in its order: each is an output of the program, or an input of it."""
    outputs: tuple[str, ...]
    """Outputs of the whole, in order: each is an output of the program, or of the tail."""

    def __post_init__(self) -> None:
        if len(self.model) > LARGEST_BYTES:
            raise ProgramError(f"A tail of {len(self.model):,} bytes is no post-processing; {LARGEST_BYTES:,} can be.")
        for what, names in (("reads", self.reads), ("outputs", self.outputs)):
            if not names or len(set(names)) < len(names) or not all(names):
                raise ProgramError(
                    f"A tail has {what} {list(names)[:10]}; they are names, at least one, and none twice."
                )

    def operators(self) -> dict[str, int]:
        """How often each operator is in it, those of inner graphs included, in order of appearance."""
        return dict(Counter(node.op_type for graph in graphs(parsed(self).graph) for node in graph.node))


def parsed(tail: Tail) -> "ModelProto":
    """The ONNX model of a tail.

    Raises:
        ProgramError: it is none.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load_model_from_string(tail.model)
    except DecodeError as error:
        raise ProgramError("The tail is no ONNX model.") from error


def require_fit(tail: Tail, signature: Signature) -> None:
    """Refuse a tail that does not belong behind a program of this signature, or whose graph is not sound.

    A tail comes out of a file that somebody else may have written, and is given to other libraries, which trust a graph
    to have no cycles, to read only what is there, and to be as large as it says.

    Raises:
        ProgramError: what is wrong with it.
    """
    model = parsed(tail)
    graph = model.graph
    if model.functions or model.training_info:
        raise ProgramError("The tail has functions, or a training graph, and may have neither.")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if len(versions) < len(model.opset_import) or not all(0 < version < 1000 for version in versions.values()):
        raise ProgramError("The tail does not say once for each domain which version of the operators it uses.")
    if unversioned := {node.domain for each in graphs(graph) for node in each.node} - versions.keys():
        raise ProgramError(f"The tail does not say which version of the domain {min(unversioned)!r} it uses.")
    given = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    read = tuple(value.name for value in graph.input)
    if read != tail.reads or not given.issuperset(read):
        raise ProgramError(f"The tail reads {list(read)[:10]}, which are not all inputs and outputs of the program.")
    if any(value.type.WhichOneof("value") != "tensor_type" for value in graph.input):
        raise ProgramError("The tail reads something that is no tensor.")
    own, made = [value.name for value in graph.output], {name for node in graph.node for name in node.output}
    if len(set(own)) < len(own) or not made.issuperset(own):
        raise ProgramError(f"The tail has the outputs {own[:10]}, and no node makes them, or two have one name.")
    results = {*own, *(spec.name for spec in signature.outputs)}
    if not set(own) <= set(tail.outputs) <= results or set(own) & given:
        raise ProgramError(f"The outputs {list(tail.outputs)[:10]} are not made by either the program or the tail.")
    _require_sound(graph, frozenset())
    for tensor in _tensors(graph):
        if tensor.data_location or tensor.external_data:
            raise ProgramError(f"The tail keeps the tensor {tensor.name[:100]!r} in another file.")
        if any(size < 0 for size in tensor.dims) or prod(max(size, 1) for size in tensor.dims) > 8 * len(tail.model):
            raise ProgramError(f"The tail has the tensor {tensor.name[:100]!r}, which is larger than the whole.")


def graphs(graph: "GraphProto", depth: int = 0) -> Iterator["GraphProto"]:
    """The graph, and all within its nodes.

    Raises:
        ProgramError: they are nested deeper than anybody writes them.
    """
    if depth > _DEEPEST:
        raise ProgramError(f"The tail has graphs within graphs, {depth} deep.")
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from graphs(body, depth + 1)


def _bodies(node: "NodeProto") -> Iterator["GraphProto"]:
    for attribute in node.attribute:
        yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)


def _tensors(graph: "GraphProto") -> Iterator["TensorProto"]:
    for each in graphs(graph):
        yield from each.initializer
        sparse = [
            *each.sparse_initializer,
            *(part for node in each.node for a in node.attribute for part in (a.sparse_tensor, *a.sparse_tensors)),
        ]
        yield from (tensor for part in sparse for tensor in (part.values, part.indices))
        yield from (tensor for node in each.node for a in node.attribute for tensor in (a.t, *a.tensors))


def _require_sound(graph: "GraphProto", outer: frozenset[str]) -> None:
    """Refuse a graph that reads what is not there yet, or gives one name to two values."""
    own = [
        *(value.name for value in graph.input),
        *(tensor.name for tensor in graph.initializer),
        *(tensor.values.name for tensor in graph.sparse_initializer),
    ]
    known = set(outer)
    for name in own:
        _define(name, known)
    for node in graph.node:
        words = (node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute))
        if not all(isinstance(word, str) for word in words):  # protobuf gives bytes where there is no text
            raise ProgramError(f"The tail has a node of which the name is no text: {words[:3]}.")
        for name in node.input:
            _require_known(name, known)
        for body in _bodies(node):
            _require_sound(body, frozenset(known))
        for name in node.output:
            if name:
                _define(name, known)
    for value in graph.output:
        _require_known(value.name, known)


def _define(name: str, known: set[str]) -> None:
    if not name or name in known:
        raise ProgramError(f"The tail has two values {name[:100]!r}, or one without a name.")
    known.add(name)


def _require_known(name: str, known: set[str]) -> None:
    if name and name not in known:
        raise ProgramError(f"The tail reads {name[:100]!r}, which nothing has made by then.")
