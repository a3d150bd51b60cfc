"""Recognise linear layers and attention in products of matrices."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from slimgraph.program.patterns import (
    RESHAPES,
    Argument,
    Axes,
    Match,
    Maybe,
    Number,
    Pattern,
    Stored,
    Value,
    call,
    fake_of,
    first_of,
)
from slimgraph.program.recognise_rule import Found, Operator, Rule, replace_stored, same_sizes

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default)


def _order(node: Any) -> tuple[Any, list[int]] | None:
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
    if (permuted := _order(node)) is not None:
        source, order = permuted
        return (source, frozenset({node})) if _swaps_last_two(order) else None
    # torch.onnx folds the axes of batch and heads into one around every transposition.
    if (turned := _reshaped(node)) is None or (permuted := _order(turned)) is None:
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


def _transpose(found: Found, node: fx.Node) -> fx.Node:
    """A value with the last two axes of `node` exchanged, by one permutation of what `node` permutes."""
    source, order = node, list(range(4))
    while (permuted := _order(source)) is not None:
        source, inner = permuted
        order = [inner[axis] for axis in order]
    order[-2:] = order[:-3:-1]
    return source if order == sorted(order) else found.insert(aten.permute.default, source, order)


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
        replace_stored(found.program, node, torch.t)
    return Operator(aten.linear.default, (found["x"], node, found.stored_as("bias", (outputs,))))


def _attention(found: Found) -> Operator | None:
    query, value, result = found.fake("query"), found.fake("value"), found.root.meta["val"]
    key = found.fake("key").mT if found["key"] is not None else found.fake("transposed_key")
    # The ONNX exporter takes no other rank, and the operator broadcasts no heads.
    if not all(fake.dim() == 4 and fake.dtype == result.dtype for fake in (query, key, value, result)):
        return None
    scores = (*query.shape[:3], key.shape[3])
    if found["axes"] != (3,) or not same_sizes(result.shape, (*query.shape[:3], value.shape[3])):
        return None
    if not all(same_sizes(query.shape[:2], fake.shape[:2]) for fake in (key, value)):
        return None
    mask = next((name for name in ("mask", "kept", "dropped") if found[name] is not None), "none")
    if mask != "none" and not _is_mask(found.fake(mask), scores, result.dtype if mask == "mask" else torch.bool):
        return None
    key_node = found["key"] if found["key"] is not None else _transpose(found, found["transposed_key"])
    mask_node = found.insert(aten.logical_not.default, found[mask]) if mask == "dropped" else found[mask]
    arguments = (found["query"], key_node, found["value"], mask_node, _dropout(found), False)
    factors = (found[name] for name in ("scale", "query_scale", "key_scale", "inner_key_scale"))
    scale = math.prod((factor for factor in factors if factor is not None), start=1.0)
    return Operator(aten.scaled_dot_product_attention.default, arguments, {"scale": scale})


def _is_mask(mask: torch.Tensor, scores: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether a mask has that type and broadcasts to the scores, which do not broadcast to it."""
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    broadcasts = all(same_sizes((size,), (1,)) or same_sizes((size,), (wanted,)) for size, wanted in sizes)
    return mask.dtype == dtype and 2 <= mask.dim() <= 4 and broadcasts


def _dropout(found: Found) -> Any:
    if found["training"] is None or found["training"] is False:
        return 0.0
    if found["training"] is True:
        return found["p"]
    return found.insert(operator.mul, found["p"], found["training"])


_matmul = call(aten.matmul.default, aten.bmm.default, aten.mm.default)
_where = call(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)

_x, _bias = Value("x"), Stored("bias")
_linear_pattern = first_of(
    _matmul(_x, Transposed(Stored("weight"))) + Maybe(_bias),
    _matmul(_x, Stored("transposed_weight")) + Maybe(_bias),
    call(aten.addmm.default)(_bias, _x, Transposed(Stored("weight")), beta=1.0, alpha=1.0),
    call(aten.addmm.default)(_bias, _x, Stored("transposed_weight"), beta=1.0, alpha=1.0),
)

# Exporters multiply the queries, the keys or both, before or after the keys are transposed, or the scores.
_query = Number("query_scale") * Value("query")
_keys = Number("key_scale") * (Transposed(Number("inner_key_scale") * Value("key")))
_scores = Number("scale") * first_of(
    _matmul(_query, _keys),
    _matmul(_query, Number("key_scale") * Value("transposed_key")),
)
_masked = first_of(
    _scores + Maybe(Value("mask")),
    _where(Value("kept"), _scores, -math.inf),
    _where(Value("dropped"), -math.inf, _scores),
    call(aten.masked_fill.Scalar)(_scores, Value("dropped"), -math.inf),
)
_softmax = call(aten.softmax.int)(_masked, dim=Axes("axes"), dtype=None)
# A row of which everything is masked has no softmax; exporters make it zero, as the operator does.
_weights = _softmax | _where(call(aten.isnan.default)(_softmax), 0.0, _softmax)
_dropped = _weights | call(aten.dropout.default)(_weights, p=Argument("p"), train=Argument("training"))

PRODUCTS = (
    Rule("linear", _linear_pattern, _linear),
    Rule("attention", _matmul(_dropped, Value("value")), _attention),
)
