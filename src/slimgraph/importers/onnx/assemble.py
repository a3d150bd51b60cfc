"""Turn an ONNX graph proto into a graph: the nodes of its outline with their attributes and tensors."""

import torch
from onnx import AttributeProto, GraphProto, SparseTensorProto, TensorProto, TypeProto, ValueInfoProto

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Attribute, Graph, Node, Value
from slimgraph.importers.onnx.names import Names, domain, safe, shown, text
from slimgraph.importers.onnx.outline import Constant, Outline, Step, outline
from slimgraph.importers.onnx.tensors import ELEMENTS, TensorReader, checked_shape, element, type_name

_CONSTANT_ATTRIBUTES = ("value", "sparse_value", "value_float", "value_floats", "value_int", "value_ints")


class Assembler:
    """Makes graphs; one for all graphs of a model, in which names are unique together."""

    def __init__(self, tensors: TensorReader) -> None:
        self._tensors = tensors
        self._values, self._nodes, self._axes = Names(), Names(), Names()

    def graph(self, proto: GraphProto) -> Graph:
        """The graph of a model.

        Raises:
            ModelImportError: the proto contradicts itself, or needs what cannot be in a program.
        """
        whole = outline(proto, self._values)
        for value, reader in whole.captures.items():
            raise ModelImportError(
                f"{reader} reads {shown(value)}, but nothing makes it: no node, input or initializer."
            )
        if not proto.output:
            raise ModelImportError("its graph has no output, so there is nothing to compute.")
        for info in whole.inputs:
            kind = info.type.WhichOneof("value") or "no type"
            if not info.type.tensor_type.elem_type:
                raise ModelImportError(
                    f"its input {shown(info.name)} is not a tensor of a known type ({kind.replace('_', ' ')})."
                )
            element(info.type.tensor_type.elem_type, f"input {shown(info.name)}")
        return self._graph(whole)

    def _graph(self, outline: Outline) -> Graph:
        tensors, types = {}, {}
        for name, constant in outline.constants.items():
            tensors[name], types[name] = self._tensor(constant, name)
        names = self._node_names(outline.steps)
        return Graph(
            name=safe(outline.proto.name),
            nodes=tuple(self._node(step, name) for step, name in zip(outline.steps, names, strict=True)),
            inputs=tuple(self._value(info) for info in outline.inputs),
            outputs=tuple(self._value(info) for info in outline.proto.output),
            tensors=tensors,
            types=types,
            captures=tuple(outline.captures),
        )

    def _node_names(self, steps: tuple[Step, ...]) -> list[str]:
        """The file's names first, so that none is lost to a node without one."""
        wanted = [safe(step.proto.name) for step in steps]
        own = [bool(name) and name not in self._nodes and self._nodes.new(name) == name for name in wanted]
        return [
            name if is_own else self._nodes.new(next(step.makes))
            for name, is_own, step in zip(wanted, own, steps, strict=True)
        ]

    def _node(self, step: Step, name: str) -> Node:
        attributes: dict[str, Attribute] = {}
        for proto in step.proto.attribute:
            key = safe(proto.name)
            if not key or key in attributes:
                raise ModelImportError(f"{step.what} has the attribute {shown(key)} twice, or one without a name.")
            attributes[key] = self._attribute(proto, step)
        return Node(
            name=name,
            operator=safe(step.proto.op_type),
            domain=domain(step.proto.domain),
            inputs=step.inputs,
            outputs=step.outputs,
            attributes=attributes,
        )

    def _attribute(self, proto: AttributeProto, step: Step) -> Attribute:
        name, kinds = text(proto.name), AttributeProto
        what = f"{safe(step.proto.name or step.outputs[0])}.{safe(name)}"
        if proto.ref_attr_name:
            raise ModelImportError(f"{step.what} takes {shown(name)} from the function around it, but it is in none.")
        match proto.type:
            case kinds.FLOAT:
                return float(proto.f)
            case kinds.INT:
                return int(proto.i)
            case kinds.STRING:
                return proto.s.decode("utf-8", "backslashreplace")
            case kinds.FLOATS:
                return tuple(proto.floats)
            case kinds.INTS:
                return tuple(proto.ints)
            case kinds.STRINGS:
                return tuple(entry.decode("utf-8", "backslashreplace") for entry in proto.strings)
            case kinds.TENSOR:
                return self._tensors.dense(proto.t, what)
            case kinds.TENSORS:
                return tuple(self._tensors.dense(tensor, what) for tensor in proto.tensors)
            case kinds.SPARSE_TENSOR:
                return self._tensors.sparse(proto.sparse_tensor, what)
            case kinds.SPARSE_TENSORS:
                return tuple(self._tensors.sparse(tensor, what) for tensor in proto.sparse_tensors)
            case kinds.GRAPH:
                return self._graph(step.bodies[name][0])
            case kinds.GRAPHS:
                return tuple(self._graph(body) for body in step.bodies.get(name, ()))
            case kinds.TYPE_PROTO:
                return _described(proto.tp)
            case kinds.TYPE_PROTOS:
                return tuple(_described(each) for each in proto.type_protos)
        raise ModelImportError(f"attribute {shown(name)} of {step.what} has the kind {proto.type}, which is unknown.")

    def _tensor(self, constant: Constant, name: str) -> tuple[torch.Tensor, str]:
        if isinstance(constant, TensorProto):
            return self._tensors.dense(constant, name), type_name(constant.data_type)
        if isinstance(constant, SparseTensorProto):
            return self._tensors.sparse(constant, name), type_name(constant.values.data_type)
        match text(constant.name):
            case "value":
                return self._tensor(constant.t, name)
            case "sparse_value":
                return self._tensor(constant.sparse_tensor, name)
            case "value_float":
                return torch.tensor(constant.f, dtype=torch.float32), "FLOAT"
            case "value_floats":
                return torch.tensor(constant.floats, dtype=torch.float32), "FLOAT"
            case "value_int":
                return torch.tensor(constant.i, dtype=torch.int64), "INT64"
            case "value_ints":
                return torch.tensor(constant.ints, dtype=torch.int64), "INT64"
        raise ModelImportError(
            f"constant {shown(name)} has {shown(constant.name)}, which cannot become a tensor. These can: "
            f"{', '.join(_CONSTANT_ATTRIBUTES)}."
        )

    def _value(self, info: ValueInfoProto) -> Value:
        name, what = self._values.of(info.name), f"value {shown(info.name)}"
        if info.type.WhichOneof("value") != "tensor_type":
            return Value(name=name, dtype=None, shape=None)
        kind = info.type.tensor_type
        type_said = type_name(kind.elem_type) if kind.elem_type else ""
        dtype = ELEMENTS[type_said].dtype if type_said in ELEMENTS else None
        if not kind.HasField("shape"):
            return Value(name=name, dtype=dtype, shape=None, type=type_said)
        shape: list[int | str | None] = []
        for dim in kind.shape.dim:
            # Some exporters write -1 for a free axis.
            if dim.WhichOneof("value") == "dim_value" and dim.dim_value != -1:
                shape.extend(checked_shape([dim.dim_value], what))
            else:
                shape.append(self._axes.of(dim.dim_param) or None)
        return Value(name=name, dtype=dtype, shape=tuple(shape), type=type_said)


def _described(proto: TypeProto) -> str:
    """A type in words: the operators that are told one work on what programs have none of."""
    return proto.WhichOneof("value") or "unknown type"
