"""Say operator by operator what of a model file can be imported, without importing it."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimgraph.importers.onnx.graph import Model, Node

PROGRAM, TAIL, NOT = "program", "post-processing", "not supported"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One kind of operator in a model file."""

    operator: str
    """In the file's words, with its domain where that is not the standard one: "com.microsoft.Gelu"."""
    version: int | str
    """Of the operator set; of the Paddle that wrote the file, as "2.6.2", or of the format of its JSON."""
    count: int
    support: str
    """"program"; "post-processing", which is kept as ONNX behind it; "not supported"."""
    reason: str = ""
    """Of what is not supported: what importing would say."""


def coverage(path: str | os.PathLike[str]) -> tuple[Coverage, ...]:
    """The kinds of operators in an ONNX or Paddle model, what is not supported first, then the most frequent.

    It is read from the graph alone: data in other files need not be there.

    What nothing needs is not counted, nor is a branch that never runs. That an operator is supported does not promise
    that every use of it is: attributes and shapes are seen by importing.

    Raises:
        ModelImportError: the file is missing or damaged, or its operators are of a version that is not read.
    """
    rows = _of_onnx(path) if Path(path).suffix.lower() == ".onnx" else _of_paddle(path)
    order = (NOT, TAIL, PROGRAM)
    return tuple(sorted(rows, key=lambda row: (order.index(row.support), -row.count, row.operator)))


def _of_onnx(path: str | os.PathLike[str]) -> Iterator[Coverage]:
    from slimgraph.importers.onnx.branches import without_branches
    from slimgraph.importers.onnx.read import read_model
    from slimgraph.importers.onnx.table import require_version

    model = read_model(path, weights=False)
    require_version(model)
    model = without_branches(model)
    kinds: Counter[tuple[str, str, str]] = Counter()
    reasons: dict[tuple[str, str, str], str] = {}
    for node, support, reason in _nodes(model):
        kind = (node.domain, node.operator, support)
        kinds[kind] += 1
        reasons.setdefault(kind, reason)
    for (domain, operator, support), count in kinds.items():
        yield Coverage(
            operator=f"{domain}.{operator}" if domain else operator,
            version=model.opsets.get(domain, 0),
            count=count,
            support=support,
            reason=reasons[domain, operator, support],
        )


def _nodes(model: "Model") -> Iterator[tuple["Node", str, str]]:
    """Each node, what becomes of it, and why nothing does."""
    from slimgraph.importers.onnx.decisions import decided_by_data
    from slimgraph.importers.onnx.graph import every
    from slimgraph.importers.onnx.table import find, refusal
    from slimgraph.importers.onnx.tail import first_split, unknown

    split, why_not = first_split(model)
    bound = decided_by_data(model) if why_not else set[str]()
    behind = (
        {node.name for node in split.tail.nodes} - {node.name for node in split.head.nodes} if split else set[str]()
    )
    for node in model.graph.nodes:
        for each in every(replace(model.graph, nodes=(node,))):
            if node.name in behind:
                yield (each, NOT, refusal(each, model.opsets)) if unknown(each, model) else (each, TAIL, "")
            elif find(each, model.opsets) is None:
                yield each, NOT, f"{refusal(each, model.opsets)} {why_not if node.name in bound else ''}".rstrip()
            elif each.name in bound:
                yield (
                    each,
                    NOT,
                    f"What {each.operator} at {each.name!r} makes depends on what the inputs hold. {why_not}",
                )
            else:
                yield each, PROGRAM, ""


def _of_paddle(path: str | os.PathLike[str]) -> Iterator[Coverage]:
    from slimgraph.importers.paddle.detection import SUPPRESSING
    from slimgraph.importers.paddle.operators import coverage as of_model
    from slimgraph.importers.paddle.read import read_model

    model = read_model(path, weights=False)
    for operator, count, known in of_model(model):
        support = TAIL if operator in SUPPRESSING else PROGRAM if known else NOT
        yield Coverage(operator=operator, version=model.version_text, count=count, support=support)
