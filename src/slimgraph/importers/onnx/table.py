"""Every operator that can be imported, by domain and name: the families together."""

from collections.abc import Mapping
from functools import cache
from itertools import count
from typing import Any

from onnx import defs

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
from slimgraph.importers.onnx.graph import Graph, Model, Node
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

_OF_EVERY_VERSION = ("LayerNormalization", "ThresholdedRelu")
"""ONNX Runtime has these in versions that did not have them yet, and its optimizer writes the first into such files."""

OLDEST = 7
"""The first version of ONNX's operators that broadcasts as NumPy does."""


def require_version(model: Model) -> None:
    """Refuse a model whose standard operators are older than the oldest that are read.

    Raises:
        ModelImportError: they are.
    """
    version = model.opsets.get("", OLDEST)
    if version < OLDEST:
        raise ModelImportError(
            f"The model uses version {version} of ONNX's operators; read are versions from {OLDEST} on. Convert it "
            "with onnx.version_converter."
        )


def find(node: Node, opsets: Mapping[str, int]) -> Operator | None:
    """The operator of a node; None where it cannot be imported, or the version of its domain has no such operator."""
    if _gone(node.operator, node.domain, opsets.get(node.domain, 0)):
        return None
    return OPERATORS.get(node.domain, {}).get(node.operator)


@cache
def _gone(operator: str, domain: str, version: int) -> str:
    """Why a version of a domain does not have an operator that another one has; empty where it does, or none has it."""
    if not defs.has(operator, domain) or operator in _OF_EVERY_VERSION:
        return ""
    try:
        schema = defs.get_schema(operator, version, domain)
    except defs.SchemaError:
        return f"It came with version {_first(operator, domain, version)}."
    # What came as deprecated, as GroupNormalization 18 did, has a meaning all the same, and files have it.
    given_up = schema.deprecated and schema.since_version > _first(operator, domain, 0)
    return f"It was given up with version {schema.since_version}." if given_up else ""


def _first(operator: str, domain: str, before: int) -> int:
    return next(version for version in count(before + 1) if defs.has(operator, version, domain))


def steps_of(graph: Graph, opsets: Mapping[str, int]) -> list[Step]:
    """The nodes of a graph as steps, those of the graphs inside them too.

    In the branches of an `If`, an operator that cannot be imported is an error when it runs, since perhaps it never
    does.

    Raises:
        ModelImportError: another operator cannot be imported; the message names it and the closest ones.
    """
    return list(_body(graph, opsets, set(), {}).steps)


def _body(
    graph: Graph, opsets: Mapping[str, int], taken: set[str], renamed: Mapping[str, str], *, is_branch: bool = False
) -> Body:
    """A graph as what an operator runs.

    Args:
        taken: names in the graphs so far. Two branches may store different tensors under one name, the model may not.
        renamed: new names of tensors in the graphs around this one.
        is_branch: whether it may never run.
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

    def converted(attribute: Any, is_branch: bool) -> Any:
        if isinstance(attribute, tuple):
            return tuple(converted(part, is_branch) for part in attribute)
        if not isinstance(attribute, Graph):
            return attribute
        return _body(attribute, opsets, taken, names, is_branch=is_branch)

    return Body(
        name=graph.name,
        steps=tuple(
            Step(
                name=node.name,
                kind=node.operator,
                operator=find(node, opsets) or _missing(node, opsets, is_branch),
                inputs=tuple(names.get(name, name) for name in node.inputs),
                outputs=node.outputs,
                attributes={
                    name: converted(attribute, is_branch or node.operator == "If")
                    for name, attribute in node.attributes.items()
                },
                version=opsets.get(node.domain, 0),
                types=tuple(types.get(name, "") for name in node.inputs),
            )
            for node in graph.nodes
        ),
        inputs=tuple(value.name for value in graph.inputs),
        outputs=tuple(names.get(value.name, value.name) for value in graph.outputs),
        tensors={names.get(name, name): tensor for name, tensor in graph.tensors.items()},
    )


def _missing(node: Node, opsets: Mapping[str, int], is_branch: bool) -> Operator:
    if not is_branch:
        raise missing(node, opsets)

    def run(*_: Any) -> Any:
        raise missing(node, opsets)

    return Operator(run=run)


def missing(node: Node, opsets: Mapping[str, int]) -> ModelImportError:
    """The error about a node whose operator cannot be imported."""
    return ModelImportError(f"{refusal(node, opsets)} `slimgraph inspect --coverage` lists what a model needs.")


def refusal(node: Node, opsets: Mapping[str, int]) -> str:
    """What to say of a node whose operator cannot be imported."""
    known, version = OPERATORS.get(node.domain), opsets.get(node.domain, 0)
    where = f"the domain {node.domain!r}" if node.domain else "ONNX"
    if node.domain in _OF_ONE_PROCESSOR:
        what = "Its weights are laid out for one processor: write the model at the level ORT_ENABLE_EXTENDED at most."
    elif gone := _gone(node.operator, node.domain, version):
        what = f"{gone} Export the model again, or convert it with onnx.version_converter."
    elif known is None:
        what = f"Known domains: {', '.join(repr(name) for name in OPERATORS)}."
    else:
        what = closest(node.operator, known)
    return f"The operator {node.operator} of {where}, version {version}, at {node.name!r} cannot be imported. {what}"
