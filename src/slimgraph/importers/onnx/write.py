"""Write a graph that was read from an ONNX file as an ONNX model again."""

from collections.abc import Mapping, Sequence
from functools import cache

import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Attribute, Graph, Node, Value
from slimgraph.importers.onnx.tensors import ELEMENTS

_NAMES = {kind.dtype: name for name, kind in ELEMENTS.items() if kind.bits == kind.dtype.itemsize * 8}
"""ONNX element type of tensors whose own was not kept: those of attributes, which have at least eight bits."""


def write_graph(graph: Graph, opsets: Mapping[str, int]) -> ModelProto:
    """The model proto of a graph, with all tensors inside; equal graphs give equal bytes.

    Args:
        graph: reads no graph around it.
        opsets: version of the operators by domain; "" for the standard ones.
    Raises:
        ModelImportError: it has what was not kept when it was read: types that are no tensors.
    """
    used = _domains(graph)
    return helper.make_model(
        _graph(graph, opsets),
        producer_name="slimgraph",
        ir_version=helper.find_min_ir_version_for(
            [helper.make_opsetid("", min(opsets.get("", 1), onnx.defs.onnx_opset_version()))]
        ),
        opset_imports=[helper.make_opsetid(name, opsets[name]) for name in sorted(used | {""}) if name in opsets],
    )


def _domains(graph: Graph) -> set[str]:
    return {node.domain for node in graph.nodes}.union(*(_domains(b) for node in graph.nodes for b in node.subgraphs))


def _graph(graph: Graph, opsets: Mapping[str, int]) -> GraphProto:
    return helper.make_graph(
        [_node(node, opsets) for node in graph.nodes],
        graph.name or "graph",
        [_value(value) for value in graph.inputs],
        [_value(value) for value in graph.outputs],
        [tensor_proto(tensor, name, graph.types.get(name, "")) for name, tensor in graph.tensors.items()],
    )


def _value(value: Value) -> ValueInfoProto:
    kind = value.type or (_NAMES.get(value.dtype, "") if value.dtype else "")
    if kind not in ELEMENTS:  # a runtime infers it
        return ValueInfoProto(name=value.name)
    # None, and not "", is an axis of which nothing is said.
    return helper.make_tensor_value_info(value.name, TensorProto.DataType.Value(kind), value.shape)


def _node(node: Node, opsets: Mapping[str, int]) -> NodeProto:
    proto = NodeProto(name=node.name, op_type=node.operator, domain=node.domain)
    proto.input.extend(node.inputs)
    proto.output.extend(node.outputs)
    types = _attribute_types(node.operator, node.domain, opsets.get(node.domain, 1))
    for name, attribute in node.attributes.items():
        proto.attribute.append(_attribute(name, attribute, types.get(name), node, opsets))
    return proto


@cache
def _attribute_types(operator: str, domain: str, version: int) -> Mapping[str, AttributeProto.AttributeType]:
    """What ONNX says that the attributes are; an empty list tells nothing by itself."""
    try:
        schema = onnx.defs.get_schema(operator, version, domain)
    except onnx.defs.SchemaError:
        return {}
    words = {name: str(attribute.type).rpartition(".")[2] for name, attribute in schema.attributes.items()}
    return {name: AttributeProto.AttributeType.Value(word) for name, word in words.items()}


_PLURAL = {
    AttributeProto.FLOAT: AttributeProto.FLOATS,
    AttributeProto.INT: AttributeProto.INTS,
    AttributeProto.STRING: AttributeProto.STRINGS,
    AttributeProto.TENSOR: AttributeProto.TENSORS,
    AttributeProto.GRAPH: AttributeProto.GRAPHS,
}


def _attribute(
    name: str, value: Attribute, said: AttributeProto.AttributeType | None, node: Node, opsets: Mapping[str, int]
) -> AttributeProto:
    if said in (AttributeProto.TYPE_PROTO, AttributeProto.TYPE_PROTOS):
        raise ModelImportError(
            f"The attribute {name!r} of {node.operator} at {node.name!r} is a type, which cannot be written again."
        )
    proto = AttributeProto(name=name)
    if not isinstance(value, tuple):
        proto.type = _fill(proto, [value], name, opsets, plural=False)
    elif value:
        proto.type = _PLURAL[_fill(proto, value, name, opsets, plural=True)]
    else:
        proto.type = said if said and said in _PLURAL.values() else AttributeProto.INTS
    return proto


def _fill(
    proto: AttributeProto, values: Sequence[Attribute], name: str, opsets: Mapping[str, int], *, plural: bool
) -> AttributeProto.AttributeType:
    """Put values of one kind where an attribute has these, and tell the kind."""
    for value in values:
        match value:
            case int():
                kind = AttributeProto.INT
                proto.ints.append(value) if plural else setattr(proto, "i", value)
            case float():
                kind = AttributeProto.FLOAT
                proto.floats.append(value) if plural else setattr(proto, "f", value)
            case str():
                kind = AttributeProto.STRING
                proto.strings.append(value.encode()) if plural else setattr(proto, "s", value.encode())
            case torch.Tensor():
                kind = AttributeProto.TENSOR
                (proto.tensors.add() if plural else proto.t).CopyFrom(tensor_proto(value, name, ""))
            case Graph():
                kind = AttributeProto.GRAPH
                (proto.graphs.add() if plural else proto.g).CopyFrom(_graph(value, opsets))
            case _:
                raise AssertionError(f"no attribute has a {type(value).__name__}")
    return kind


def tensor_proto(tensor: torch.Tensor, name: str, kind: str) -> TensorProto:
    """A tensor in ONNX's form, as raw bytes.

    Args:
        kind: ONNX element type; empty for the one that is the tensor's own.
    """
    kind = kind or _NAMES[tensor.dtype]
    bits = ELEMENTS[kind].bits
    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    if bits < 8:  # the lowest bits of a byte come first
        count = 8 // bits
        codes = torch.nn.functional.pad(raw & (2**bits - 1), (0, -len(raw) % count)).reshape(-1, count)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        raw = (codes << shifts).sum(1, dtype=torch.uint8)
    return TensorProto(
        name=name,
        data_type=TensorProto.DataType.Value(kind),
        dims=tensor.shape,
        raw_data=raw.numpy().tobytes(),
    )
