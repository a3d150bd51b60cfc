"""Find operators that make one sample's results depend on the others."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.program.names import operator_name

Axes = Callable[[fx.Node, int], Collection[int]]
"""The axes over which a node computes, of so many."""


def _argument(node: fx.Node, *names: str) -> Any:
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name in names:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            return argument.default_value if given is None else given
    return None


def _chosen(node: fx.Node, rank: int) -> Collection[int]:
    """What its argument says; all where it says nothing."""
    axes = _argument(node, "dim", "dims")
    if axes is None or axes == []:
        return range(rank)
    return {axis % rank for axis in ([axes] if isinstance(axes, int) else axes)}


def _extremes(node: fx.Node, rank: int) -> Collection[int]:
    """As `_chosen`; of two tensors it is the larger number of each two."""
    elementwise = any(argument.name == "other" for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    return () if elementwise else _chosen(node, rank)


def _own_statistics(node: fx.Node, rank: int) -> Collection[int]:
    """A batch norm without stored statistics takes those of its input."""
    return {*range(rank)} - {1} if _argument(node, "running_mean") is None else ()


OVER_AXES: Mapping[str, Axes] = MappingProxyType(
    {
        **dict.fromkeys(("sum", "nansum", "mean", "nanmean", "prod", "amax", "amin", "aminmax", "all", "any"), _chosen),
        **dict.fromkeys(("max", "min"), _extremes),
        **dict.fromkeys(("argmax", "argmin", "median", "nanmedian", "mode", "kthvalue", "quantile"), _chosen),
        **dict.fromkeys(("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp"), _chosen),
        **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"), _chosen),
        **dict.fromkeys(("sort", "argsort", "topk", "count_nonzero"), _chosen),
        "batch_norm": _own_statistics,
    }
)
"""Operators whose results each depend on all that lies along some axes."""


def over_samples(graph: fx.Graph, batched: Collection[int]) -> tuple[fx.Node, int] | None:
    """The first node that computes over an axis whose size depends on the number of samples, and that axis.

    What weights alone give has no such axis.

    Args:
        graph: as it was traced, with sizes as symbols.
        batched: positions of the inputs whose first axis counts samples.
    """
    inputs = graph.find_nodes(op="placeholder")
    symbols = set[Any]().union(*(_symbols(inputs[i].meta["val"].shape[0]) for i in batched))
    for node in graph.nodes:
        axes = OVER_AXES.get(operator_name(node.target)) if isinstance(node.target, torch._ops.OpOverload) else None
        x = node.args[0].meta.get("val") if axes and node.args and isinstance(node.args[0], fx.Node) else None
        if axes is None or not isinstance(x, Tensor):
            continue
        for axis in sorted(axes(node, max(x.dim(), 1))):
            if axis < x.dim() and not symbols.isdisjoint(_symbols(x.shape[axis])):
                return node, axis
    return None


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def unlike(x: Tensor) -> Tensor:
    """Uniform samples of unlike scale, offset and sign; of 0 and 1, samples that are different rows.

    What a statistic over several of them does to each then shows.
    """
    samples = []
    for k, sample in enumerate(x):
        if x.is_floating_point():
            scale, offset = ((1, 0), (-4, 1), (16, 8))[k % 3]
            samples.append(sample * scale + offset)
        else:  # as the first, its opposite, and every other number of it changed
            row = x[0].reshape(-1)
            changed = torch.arange(row.numel()) % 2 == 0 if k % 3 == 2 else torch.tensor(k % 3 == 1)
            samples.append(torch.where(changed, 1 - row.long(), row.long()).to(x.dtype).reshape(sample.shape))
    return torch.stack(samples)
