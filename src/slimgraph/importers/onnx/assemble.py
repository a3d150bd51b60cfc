"""Put a checked, sorted graph together from an ONNX graph proto.

First an outline is made, which looks at names only: what is defined where, what reads it, in which order the nodes can
run, and which of them an output needs. Weights and attributes are read afterwards, of what is needed: a string that
nothing reads does no harm.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import torch
from onnx import AttributeProto, GraphProto, NodeProto, SparseTensorProto, TensorProto, TypeProto, ValueInfoProto

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Attribute, Graph, Node, Value
from slimgraph.importers.onnx.names import Names, domain, safe, shown, text
from slimgraph.importers.onnx.tensors import TensorReader, checked_shape, element, type_name

Constant: TypeAlias = TensorProto | SparseTensorProto | AttributeProto

_CONSTANT_ATTRIBUTES = ("value", "sparse_value", "value_float", "value_floats", "value_int", "value_ints")


@dataclass(frozen=True, slots=True)
class _Step:
    """A node, by the names that connect it."""

    proto: NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bodies: Mapping[str, tuple["_Outline", ...]]

    @property
    def needs(self) -> Iterator[str]:
        """Values that must be there before it runs."""
        bodies = chain.from_iterable(self.bodies.values())
        return (name for name in chain(self.inputs, *(body.captures for body in bodies)) if name)

    @property
    def makes(self) -> Iterator[str]:
        return (name for name in self.outputs if name)

    @property
    def what(self) -> str:
        """The node, for a message."""
        return f"node {shown(self.proto.name or self.outputs[0])} ({safe(self.proto.op_type)})"


@dataclass(frozen=True, slots=True)
class _Outline:
    """What of a graph is needed, by name."""

    proto: GraphProto
    steps: tuple[_Step, ...]
    inputs: tuple[ValueInfoProto, ...]
    constants: Mapping[str, Constant]
    captures: Mapping[str, str]
    """Each value of a graph around this one, and what reads it here, for a message."""


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
        outline = self._outline(proto)
        for value, reader in outline.captures.items():
            raise ModelImportError(
                f"{reader} reads {shown(value)}, but nothing makes it: no node, input or initializer."
            )
        if not proto.output:
            raise ModelImportError("its graph has no output, so there is nothing to compute.")
        for info in outline.inputs:
            kind = info.type.WhichOneof("value") or "no type"
            if not info.type.tensor_type.elem_type:
                raise ModelImportError(
                    f"its input {shown(info.name)} is not a tensor of a known type ({kind.replace('_', ' ')})."
                )
        return self._graph(outline)

    # Outlines

    def _outline(self, proto: GraphProto) -> _Outline:
        constants = self._constants(proto)
        inputs = tuple(info for info in proto.input if self._values.of(info.name) not in constants)
        steps = [self._step(node) for node in proto.node if not _is_constant(node)]
        self._check_inputs(proto, constants)

        given = {*constants, *(self._values.of(info.name) for info in proto.input)}
        maker: dict[str, int] = {}
        for index, step in enumerate(steps):
            for name in step.makes:
                if name in given or name in maker:
                    other = steps[maker[name]].what if name in maker else "an input or initializer"
                    raise ModelImportError(f"{step.what} makes {shown(name)}, but {other} already has that name.")
                maker[name] = index
        ordered = _sorted(steps, maker)

        outputs = [self._values.of(info.name) for info in proto.output]
        if "" in outputs:
            raise ModelImportError(f"an output of graph {shown(proto.name)} has no name.")
        needed, live = set(outputs), list[_Step]()
        for step in reversed(ordered):
            if not needed.isdisjoint(step.makes):
                needed.update(step.needs)
                live.append(step)
        live.reverse()
        captures = {name: step.what for step in live for name in step.needs if name not in given and name not in maker}
        captures |= {name: "an output" for name in outputs if name not in given and name not in maker}
        return _Outline(
            proto, tuple(live), inputs, {name: what for name, what in constants.items() if name in needed}, captures
        )

    def _constants(self, proto: GraphProto) -> dict[str, Constant]:
        found: dict[str, Constant] = {}
        named: Iterator[tuple[str, Constant]] = chain(
            ((tensor.name, tensor) for tensor in proto.initializer),
            ((sparse.values.name, sparse) for sparse in proto.sparse_initializer),
            (_constant(node) for node in proto.node if _is_constant(node)),
        )
        for raw, what in named:
            name = self._values.of(raw)
            if not name or name in found:
                raise ModelImportError(
                    f"two initializers or constants are called {shown(name)}."
                    if name
                    else "an initializer or constant has no name."
                )
            found[name] = what
        return found

    def _check_inputs(self, proto: GraphProto, constants: Mapping[str, Constant]) -> None:
        seen: set[str] = set()
        for info in proto.input:
            name = self._values.of(info.name)
            if not name or name in seen:
                raise ModelImportError(f"two inputs are called {shown(name)}." if name else "an input has no name.")
            seen.add(name)
            constant = constants.get(name)
            if constant is not None and not _agree(info.type, constant):
                raise ModelImportError(f"initializer {shown(name)} is also an input, of another type or shape.")

    def _step(self, node: NodeProto) -> _Step:
        bodies = {}
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            if graphs:
                bodies[text(attribute.name)] = tuple(self._outline(graph) for graph in graphs)
        inputs, outputs = (tuple(self._values.of(name) for name in names) for names in (node.input, node.output))
        if not any(outputs):
            raise ModelImportError(f"node {shown(node.name)} ({safe(node.op_type)}) has no output.")
        return _Step(node, inputs, outputs, bodies)

    # From an outline to a graph

    def _graph(self, outline: _Outline) -> Graph:
        tensors: dict[str, torch.Tensor] = {}
        types = {self._values.of(info.name): type_name(info.type.tensor_type.elem_type) for info in outline.inputs}
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

    def _node_names(self, steps: tuple[_Step, ...]) -> list[str]:
        """The file's names first, so that none is lost to a node without one."""
        wanted = [safe(step.proto.name) for step in steps]
        own = [bool(name) and name not in self._nodes and self._nodes.new(name) == name for name in wanted]
        return [
            name if is_own else self._nodes.new(next(step.makes))
            for name, is_own, step in zip(wanted, own, steps, strict=True)
        ]

    def _node(self, step: _Step, name: str) -> Node:
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

    def _attribute(self, proto: AttributeProto, step: _Step) -> Attribute:
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
        dtype = element(kind.elem_type, what).dtype if kind.elem_type else None
        if not kind.HasField("shape"):
            return Value(name=name, dtype=dtype, shape=None)
        shape: list[int | str | None] = []
        for dim in kind.shape.dim:
            if (
                dim.WhichOneof("value") == "dim_value" and dim.dim_value != -1
            ):  # some exporters write -1 for a free axis
                shape.extend(checked_shape([dim.dim_value], what))
            else:
                shape.append(self._axes.of(dim.dim_param) or None)
        return Value(name=name, dtype=dtype, shape=tuple(shape))


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and domain(node.domain) == ""


def _constant(node: NodeProto) -> tuple[str, AttributeProto]:
    if len(node.output) != 1 or len(node.attribute) != 1 or node.attribute[0].ref_attr_name or node.input:
        raise ModelImportError(
            f"constant {shown(node.name or ', '.join(map(text, node.output)))} has {len(node.input)} inputs, "
            f"{len(node.attribute)} values and {len(node.output)} outputs, and not 0, 1 and 1."
        )
    return node.output[0], node.attribute[0]


def _agree(info: TypeProto, constant: Constant) -> bool:
    """Whether the type of an input can be that of a constant; what is not said agrees with everything."""
    if not isinstance(constant, TensorProto) or info.WhichOneof("value") is None:
        return True
    kind = info.tensor_type
    if kind.elem_type not in (0, constant.data_type):
        return False
    if not kind.HasField("shape"):
        return True
    said = [dim.dim_value if dim.WhichOneof("value") == "dim_value" else -1 for dim in kind.shape.dim]
    return len(said) == len(constant.dims) and all(
        size in (-1, dim) for size, dim in zip(said, constant.dims, strict=True)
    )


def _described(proto: TypeProto) -> str:
    """A type in words: the operators that are told one work on what programs have none of."""
    return proto.WhichOneof("value") or "unknown type"


def _sorted(steps: list[_Step], maker: Mapping[str, int]) -> list[_Step]:
    """The steps so that each stands behind those it needs, otherwise as in the file."""
    waits = [{maker[name] for name in step.needs if name in maker} for step in steps]
    followers: list[list[int]] = [[] for _ in steps]
    for index, sources in enumerate(waits):
        for source in sources:
            followers[source].append(index)
    ready = [index for index, sources in enumerate(waits) if not sources]
    done: list[_Step] = []
    while ready:
        index = heapq.heappop(ready)
        done.append(steps[index])
        for follower in followers[index]:
            waits[follower].discard(index)
            if not waits[follower]:
                heapq.heappush(ready, follower)
    if len(done) < len(steps):
        path = [next(index for index, sources in enumerate(waits) if sources)]
        while path[-1] not in path[:-1]:
            path.append(min(waits[path[-1]]))
        circle = path[path.index(path[-1]) :]
        raise ModelImportError(
            f"its nodes wait for one another in a circle: {', '.join(steps[index].what for index in circle[:10])}."
        )
    return done
