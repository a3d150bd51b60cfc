"""The stored integers that an operator of an ONNX graph reads as a weight."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from slimgraph.program.names import unused

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredIntegers:
    """Codes of a weight, as the operator sees them; real numbers are scale · (code − zero point)."""

    name: str
    """Of the initializer that holds the codes."""
    codes: Array
    scale: Array
    """One number; or one for each index of `axis`; or, with blocks, as many axes as the codes."""
    zero_point: Array | None
    """Of the scale's shape; None where all are zero."""
    axis: int
    """The axis that has several scales; with blocks the one along which they lie."""
    block: int
    """Elements of a block; 0 for none."""

    @property
    def transposed(self) -> "StoredIntegers":
        """Those of a matrix, turned."""
        several = self.scale.ndim > 1
        return StoredIntegers(
            name=self.name,
            codes=np.ascontiguousarray(self.codes.T),
            scale=np.ascontiguousarray(self.scale.T) if several else self.scale,
            zero_point=None if self.zero_point is None else np.ascontiguousarray(self.zero_point.T),
            axis=1 - self.axis,
            block=self.block,
        )


def stored_integers(value: ir.Value | None) -> StoredIntegers | None:
    """What a value is dequantized from, where that is stored tensors; turned, where a Transpose stands behind."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Transpose":
        found = stored_integers(node.inputs[0])
        if found is None or found.codes.ndim != 2 or list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
            return None
        return found.transposed
    if node.op_type != "DequantizeLinear" or node.domain:
        return None
    codes, scale, zero_point = (_constant(node, index) for index in range(3))
    if codes is None or scale is None or (zero_point is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    assert node.inputs[0] is not None
    axis = node.attributes.get_int("axis", 1)
    return StoredIntegers(
        name=node.inputs[0].name or "",
        codes=codes,
        scale=scale,
        zero_point=zero_point if zero_point is not None and zero_point.any() else None,
        axis=axis % codes.ndim if codes.ndim else 0,
        block=node.attributes.get_int("block_size", 0),
    )


def _constant(node: ir.Node, index: int) -> Array | None:
    return _numbers(node.inputs[index]) if index < len(node.inputs) else None


def _numbers(value: ir.Value | None) -> Array | None:
    """The numbers of a stored tensor, or of what Transposes and Casts make of one."""
    if value is None:
        return None
    node, tensor = value.producer(), ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    if node is None or node.op_type not in ("Transpose", "Cast") or (source := _numbers(node.inputs[0])) is None:
        return None
    if node.op_type == "Cast":
        return source.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    return np.ascontiguousarray(source.transpose(node.attributes.get_ints("perm", None)))


class Writer:
    """Adds nodes and stored tensors to a graph under names that are free."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        named = (*graph.inputs, *(value for node in graph for value in node.outputs))
        self._taken = {value.name or "" for value in named} | set(graph.initializers)
        self._stored: dict[tuple[str, str], ir.Value] = {}

    def store(self, name: str, array: Array, *, kind: str = "", type: ir.DataType | None = None) -> ir.Value:
        """An initializer called like `name`; of the same name and `kind` there is one.

        Args:
            kind: tells tensors of one name apart, such as the codes of a weight and the same turned.
            type: where NumPy's type does not say it.
        """
        key = (name, kind)
        if key not in self._stored:
            free = unused(name, self._taken)
            tensor = ir.tensor(array, dtype=type, name=free)
            value = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
            value.const_value = tensor
            self._graph.register_initializer(value)
            self._taken.add(free)
            self._stored[key] = value
        return self._stored[key]

    def node(
        self,
        operator: str,
        inputs: list[ir.Value | None],
        name: str,
        *,
        before: ir.Node,
        attributes: dict[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The first output of a new node that stands before another."""
        made = ir.node(operator, inputs, attributes=attributes or {}, domain=domain)
        free = unused(name, self._taken)
        made.outputs[0].name = made.name = free
        self._taken.add(free)
        self._graph.insert_before(before, made)
        return made.outputs[0]

    def finish(self) -> None:
        """Drop what nobody reads any more; new tensors take the names of those."""
        for node in reversed(list(self._graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self._graph.remove(node, safe=True)
        initializers = self._graph.initializers
        for name, value in list(initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del initializers[name]
        outputs = {value.name for node in self._graph for value in node.outputs}
        for (name, _), value in self._stored.items():
            if value.uses() and name not in initializers and name not in outputs:
                del initializers[value.name or ""]
                value.name = name
                assert value.const_value is not None
                value.const_value.name = name
                self._graph.register_initializer(value)


def replace(graph: ir.Graph, old: ir.Node, value: ir.Value) -> None:
    """Let everybody read a new value in place of a node's, whose name, type and shape it takes; the node goes."""
    result = old.outputs[0]
    value.type, value.shape = result.type, result.shape
    name, result.name = result.name, None
    producer = value.producer()
    assert producer is not None
    value.name = producer.name = name
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(old, safe=True)
