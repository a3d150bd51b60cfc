"""Every operator that can be imported, by domain and name: the families together."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from slimgraph.errors import ModelImportError, closest
from slimgraph.importers.onnx import (
    activation,
    arithmetic,
    attention,
    contrib,
    control,
    convolution,
    indexing,
    losses,
    ngrams,
    normalization,
    quantized,
    recurrent,
    reduction,
    resize,
    sampling,
    sequence,
    shape,
    signals,
    unsigned,
)
from slimgraph.importers.onnx.graph import Graph, Node
from slimgraph.importers.steps import Body, Operator, Step

OPERATORS: Mapping[str, Mapping[str, Operator]] = {
    "": unsigned.widened(
        {
            **arithmetic.OPERATORS,
            **activation.OPERATORS,
            **convolution.OPERATORS,
            **shape.OPERATORS,
            **normalization.OPERATORS,
            **reduction.OPERATORS,
            **indexing.OPERATORS,
            **resize.OPERATORS,
            **sampling.OPERATORS,
            **signals.OPERATORS,
            **losses.OPERATORS,
            **ngrams.OPERATORS,
            **control.OPERATORS,
            **recurrent.OPERATORS,
            **attention.OPERATORS,
            **sequence.OPERATORS,
            **quantized.OPERATORS,
            **contrib.STANDARD,
        }
    ),
    "com.microsoft": contrib.OPERATORS,
    "ai.onnx.preview": attention.PREVIEW,
}
"""By domain; "" is ONNX's own."""

_OF_ONE_PROCESSOR = ("com.microsoft.nchwc", "com.ms.internal.nhwc")
"""What ONNX Runtime writes at its highest level of optimization."""

OLDEST = 7
"""The first version of ONNX's operators that broadcasts as NumPy does."""


def find(node: Node, opsets: Mapping[str, int]) -> Operator | None:
    """The operator of a node, or None where it cannot be imported."""
    return OPERATORS.get(node.domain, {}).get(node.operator)


def steps_of(graph: Graph, opsets: Mapping[str, int]) -> list[Step]:
    """The nodes of a graph as steps, those of the graphs inside them too.

    Raises:
        ModelImportError: an operator cannot be imported; the message names it and the closest ones.
    """
    return list(_body(graph, opsets, set(), {}).steps)


def _body(graph: Graph, opsets: Mapping[str, int], taken: set[str], renamed: Mapping[str, str]) -> Body:
    """A graph as what an operator runs.

    Args:
        taken: names in the graphs so far. Two branches may store different tensors under one name, the model may not.
        renamed: new names of tensors in the graphs around this one.
    """
    own = {
        *graph.tensors,
        *(value.name for value in graph.inputs),
        *(out for node in graph.nodes for out in node.outputs),
    }
    names = {old: new for old, new in renamed.items() if old not in own}
    before = set(taken)
    taken |= own
    for name in graph.tensors:
        if name in before:
            names[name] = next(new for k in count(1) if (new := f"{name}_{k}") not in taken)
            taken.add(names[name])

    types = {**{value.name: value.type for value in graph.inputs}, **graph.types}

    def converted(attribute: Any) -> Any:
        if isinstance(attribute, tuple):
            return tuple(converted(part) for part in attribute)
        return _body(attribute, opsets, taken, names) if isinstance(attribute, Graph) else attribute

    return Body(
        name=graph.name,
        steps=tuple(
            Step(
                name=node.name,
                kind=node.operator,
                operator=_known(node, opsets),
                inputs=tuple(names.get(name, name) for name in node.inputs),
                outputs=node.outputs,
                attributes={name: converted(attribute) for name, attribute in node.attributes.items()},
                version=opsets.get(node.domain, 0),
                types=tuple(types.get(name, "") for name in node.inputs),
            )
            for node in graph.nodes
        ),
        inputs=tuple(value.name for value in graph.inputs),
        outputs=tuple(names.get(value.name, value.name) for value in graph.outputs),
        tensors={names.get(name, name): tensor for name, tensor in graph.tensors.items()},
    )


def _known(node: Node, opsets: Mapping[str, int]) -> Operator:
    operator = find(node, opsets)
    if operator is not None:
        return operator
    known = OPERATORS.get(node.domain)
    where = f"the domain {node.domain!r}" if node.domain else "ONNX"
    if node.domain in _OF_ONE_PROCESSOR:
        what = "Its weights are laid out for one processor: write the model at the level ORT_ENABLE_EXTENDED at most."
    elif known is None:
        what = f"Known domains: {', '.join(repr(name) for name in OPERATORS)}."
    else:
        what = closest(node.operator, known)
    raise ModelImportError(
        f"The operator {node.operator} of {where}, version {opsets.get(node.domain, 0)}, at {node.name!r} "
        f"cannot be imported. {what} `slimgraph inspect --coverage` lists what a model needs."
    )
