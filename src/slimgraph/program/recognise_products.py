"""Recognise linear layers in products of matrices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from slimgraph.program.patterns import (
    RESHAPES,
    Match,
    Maybe,
    Pattern,
    Stored,
    Value,
    call,
    fake_of,
    first_of,
)
from slimgraph.program.recognise_rule import Found, Operator, Rule, same_sizes

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default)


def order_of(node: Any) -> tuple[Any, list[int]] | None:
    """What a node permutes, and the axis of it that comes first, second, …; None for other operators."""
    if not isinstance(node, fx.Node) or (fake := fake_of(node)) is None:
        return None
    rank, arguments = fake.dim(), list[Any](node.args)
    axes = list(range(rank))
    if node.target is aten.permute.default:
        return arguments[0], [axis % rank for axis in arguments[1]]
    if node.target is aten.transpose.int:
        one, other = (axis % rank for axis in arguments[1:])
    elif node.target in _TRANSPOSES and rank == 2:
        one, other = 0, 1
    elif node.target is aten.mT.default:
        one, other = rank - 2, rank - 1
    else:
        return None
    axes[one], axes[other] = axes[other], axes[one]
    return arguments[0], axes


def _swaps_last_two(order: Sequence[int]) -> bool:
    rank = len(order)
    return rank > 1 and list(order) == [*range(rank - 2), rank - 1, rank - 2]


def _untransposed(node: Any) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """The value whose last two axes a node exchanges, and the operators by which it does."""
    if (permuted := order_of(node)) is not None:
        source, order = permuted
        return (source, frozenset({node})) if _swaps_last_two(order) else None
    # torch.onnx folds the axes of batch and heads into one around every transposition.
    if (turned := _reshaped(node)) is None or (permuted := order_of(turned)) is None:
        return None
    folded, order = permuted
    if not _swaps_last_two(order) or (source := _reshaped(folded)) is None:
        return None
    start, middle, result = (value.meta["val"].shape for value in (source, folded, node))
    kept = same_sizes(start[-2:], middle[-2:]) and same_sizes(result, (*start[:-2], start[-1], start[-2]))
    return (source, frozenset({node, turned, folded})) if kept else None


def _reshaped(node: Any) -> fx.Node | None:
    """The tensor that a node gives another shape."""
    if not isinstance(node, fx.Node) or node.target not in RESHAPES:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and fake_of(source) is not None else None


@dataclass(frozen=True)
class Transposed(Pattern):
    """A value with its last two axes exchanged."""

    pattern: Pattern

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        if (found := _untransposed(value)) is not None:
            source, inner = found
            yield from self.pattern._matches(source, match.through(*inner))


def _linear(found: Found) -> Operator | None:
    x, result = found.fake("x"), found.root.meta["val"]
    name = "weight" if found["weight"] is not None else "transposed_weight"
    node, shape = found[name], found.fake(name).shape
    if x.dim() < 2 or len(shape) != 2 or node.op != "get_attr":
        return None
    outputs = int(shape[0 if name == "weight" else 1])
    if not same_sizes(result.shape, (*x.shape[:-1], outputs)) or result.dtype != x.dtype:
        return None
    if not found.can_store("bias", (outputs,), (outputs,)) or (name != "weight" and not found.reads_alone(name)):
        return None
    if name != "weight":
        found.draft.replace_stored(node, torch.t)
    return Operator(aten.linear.default, (found["x"], node, found.stored_as("bias", (outputs,))))


matmul = call(aten.matmul.default, aten.bmm.default, aten.mm.default)

_x, _bias = Value("x"), Stored("bias")
_linear_pattern = first_of(
    matmul(_x, Transposed(Stored("weight"))) + Maybe(_bias),
    matmul(_x, Stored("transposed_weight")) + Maybe(_bias),
    call(aten.addmm.default)(_bias, _x, Transposed(Stored("weight")), beta=1.0, alpha=1.0),
    call(aten.addmm.default)(_bias, _x, Stored("transposed_weight"), beta=1.0, alpha=1.0),
)

PRODUCTS = (Rule("linear", _linear_pattern, _linear),)
