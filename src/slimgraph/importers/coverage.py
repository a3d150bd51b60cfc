"""Say operator by operator what of a model file can be imported, without importing it."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimgraph.importers.onnx.graph import Graph, Node

PROGRAM, TAIL, NOT = "program", "post-processing", "not supported"


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One kind of operator in a model file."""

    operator: str
    """In the file's words, with its domain where that is not the standard one: "com.microsoft.Gelu"."""
    version: int
    """Of the operator set, or of the format of a Paddle file."""
    count: int
    support: str
    """"program"; "post-processing", which is kept as ONNX behind it; "not supported"."""


def coverage(path: str | os.PathLike[str]) -> tuple[Coverage, ...]:
    """The kinds of operators in an ONNX or Paddle model, what is not supported first, then the most frequent.

    That an operator is supported does not promise that every use of it is: attributes and shapes are seen by importing.

    Raises:
        ModelImportError: the file is missing or damaged.
    """
    rows = _of_onnx(path) if Path(path).suffix.lower() == ".onnx" else _of_paddle(path)
    order = (NOT, TAIL, PROGRAM)
    return tuple(sorted(rows, key=lambda row: (order.index(row.support), -row.count, row.operator)))


def _of_onnx(path: str | os.PathLike[str]) -> Iterator[Coverage]:
    from slimgraph.importers.onnx.read import read_model
    from slimgraph.importers.onnx.table import find
    from slimgraph.importers.onnx.tail import decided_by_data

    model = read_model(path)
    behind = decided_by_data(model)
    kinds: Counter[tuple[str, str, str]] = Counter()
    for node in _nodes(model.graph):
        known = PROGRAM if find(node, model.opsets) is not None else NOT
        kinds[node.domain, node.operator, TAIL if node.name in behind else known] += 1
    for (domain, operator, support), count in kinds.items():
        name = f"{domain}.{operator}" if domain else operator
        yield Coverage(operator=name, version=model.opsets.get(domain, 0), count=count, support=support)


def _nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        for inner in node.subgraphs:
            yield from _nodes(inner)


def _of_paddle(path: str | os.PathLike[str]) -> Iterator[Coverage]:
    from slimgraph.importers.paddle.operators import coverage as of_model
    from slimgraph.importers.paddle.read import read_model

    model = read_model(path)
    for operator, count, known in of_model(model):
        yield Coverage(operator=operator, version=model.version, count=count, support=PROGRAM if known else NOT)
