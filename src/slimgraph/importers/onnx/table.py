"""Every operator that can be imported, by domain and name: the families together."""

from collections.abc import Mapping

from slimgraph.errors import ModelImportError, closest
from slimgraph.importers.onnx import activation, arithmetic, convolution, shape
from slimgraph.importers.onnx.graph import Graph, Node
from slimgraph.importers.steps import Operator, Step

OPERATORS: Mapping[str, Mapping[str, Operator]] = {
    "": {**arithmetic.OPERATORS, **activation.OPERATORS, **convolution.OPERATORS, **shape.OPERATORS},
}
"""By domain; "" is ONNX's own."""

OLDEST = 7
"""The first version of ONNX's operators that broadcasts as NumPy does."""


def find(node: Node, opsets: Mapping[str, int]) -> Operator | None:
    """The operator of a node, or None where it cannot be imported."""
    return OPERATORS.get(node.domain, {}).get(node.operator)


def steps_of(graph: Graph, opsets: Mapping[str, int]) -> list[Step]:
    """The nodes of a graph as steps.

    Raises:
        ModelImportError: an operator cannot be imported; the message names it and the closest ones.
    """
    steps = []
    for node in graph.nodes:
        operator = find(node, opsets)
        if operator is None:
            known = OPERATORS.get(node.domain)
            where = f"the domain {node.domain!r}" if node.domain else "ONNX"
            what = (
                f"Known domains: {', '.join(repr(name) for name in OPERATORS)}."
                if known is None
                else closest(node.operator, known)
            )
            raise ModelImportError(
                f"The operator {node.operator} of {where}, version {opsets.get(node.domain, 0)}, at {node.name!r} "
                f"cannot be imported. {what} `slimgraph inspect --coverage` lists what a model needs."
            )
        steps.append(
            Step(
                name=node.name,
                kind=node.operator,
                operator=operator,
                inputs=node.inputs,
                outputs=node.outputs,
                attributes=node.attributes,
                version=opsets.get(node.domain, 0),
            )
        )
    return steps
