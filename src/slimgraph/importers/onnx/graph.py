"""An ONNX model as plain data: checked, in running order, its weights as tensors.

What holds tensors is compared by identity, since tensors cannot be compared to one truth value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, Union

import torch

Attribute: TypeAlias = Union[int, float, str, torch.Tensor, "Graph", tuple["Attribute", ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What a file says about an input or an output."""

    name: str
    dtype: torch.dtype | None
    """None where the file does not say, or PyTorch has no such values; never None for an input of the model."""
    shape: tuple[int | str | None, ...] | None
    """A word is a free axis with that name, None one of which nothing is said, and no tuple an unknown rank."""
    type: str = field(default="", compare=False)
    """ONNX element type, such as "INT4", which is int8 here; empty where the file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Node:
    """One operator at work."""

    name: str
    """Unique in the model: the file's, or the first output's name where the file has none or a duplicate."""
    operator: str
    domain: str
    """Empty for the standard operators."""
    inputs: tuple[str, ...]
    """Names of values; empty for an optional one that is left out."""
    outputs: tuple[str, ...]
    """Names of values; empty for an optional one that is not wanted."""
    attributes: Mapping[str, Attribute]

    @property
    def subgraphs(self) -> Iterator["Graph"]:
        """The graphs among the attributes."""
        for attribute in self.attributes.values():
            for part in attribute if isinstance(attribute, tuple) else (attribute,):
                if isinstance(part, Graph):
                    yield part


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """Nodes in an order in which they can run, and what they start from; nothing that no output needs."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    """Without those that are initializers."""
    outputs: tuple[Value, ...]
    tensors: Mapping[str, torch.Tensor]
    """Initializers and constants by value name, dense; integers below eight bits as int8 or uint8."""
    types: Mapping[str, str]
    """ONNX element type of each tensor, such as "INT4"."""
    captures: tuple[str, ...] = ()
    """Values of the graphs around this one that it reads, itself or in its own subgraphs; none for a model's graph."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A graph, and the versions of the operators in it."""

    graph: Graph
    opsets: Mapping[str, int]
    """Version by domain; the standard one is the empty word. A domain that nodes use has a version."""
    producer: str


def every(graph: Graph) -> Iterator[Node]:
    """The nodes of a graph, and of the graphs inside of them."""
    for node in graph.nodes:
        yield node
        for body in node.subgraphs:
            yield from every(body)
