"""Recognise attention in products of matrices."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.program.patterns import (
    RESHAPES,
    Argument,
    Axes,
    Match,
    Maybe,
    Named,
    Number,
    Pattern,
    Value,
    call,
    fake_of,
    first_of,
)
from slimgraph.program.recognise_products import Transposed, matmul, order_of
from slimgraph.program.recognise_rule import Found, Operator, Rule, fixed, same_sizes

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default


def _transpose(found: Found, node: fx.Node) -> fx.Node:
    """A value with the last two axes of `node` exchanged, by one permutation of what `node` permutes."""
    source, order = node, list(range(4))
    while (permuted := order_of(source)) is not None:
        source, inner = permuted
        order = [inner[axis] for axis in order]
    order[-2:] = order[:-3:-1]
    return source if order == sorted(order) else found.insert(aten.permute.default, source, order)


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
    if not _has_masks(found, scores):
        return None
    key_node = found["key"] if found["key"] is not None else _transpose(found, found["transposed_key"])
    arguments = (found["query"], key_node, found["value"], _mask(found), _dropout(found), False)
    factors = (found[name] for name in ("scale", "query_scale", "key_scale", "inner_key_scale"))
    scale = math.prod((factor for factor in factors if factor is not None), start=1.0)
    return Operator(ATTENTION, arguments, {"scale": scale})


_ADDED = ("mask", "second_mask")
_CHOSEN = ("kept", "dropped")


def _has_masks(found: Found, scores: Sequence[Any]) -> bool:
    """Whether everything that masks the scores can be one mask."""
    dtype = found.root.meta["val"].dtype
    wanted = {**dict.fromkeys(_ADDED, dtype), **dict.fromkeys(_CHOSEN, torch.bool)}
    if any(found[name] is not None and not _is_mask(found.fake(name), scores, wanted[name]) for name in wanted):
        return False
    return found["windows_mask"] is None or _is_mask_of_windows(found, scores)


def _is_mask(mask: torch.Tensor, scores: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether a mask has that type and broadcasts to the scores, which do not broadcast to it."""
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    broadcasts = all(same_sizes((size,), (1,)) or same_sizes((size,), (wanted,)) for size, wanted in sizes)
    return mask.dtype == dtype and 2 <= mask.dim() <= len(scores) and broadcasts


def _is_mask_of_windows(found: Found, scores: Sequence[Any]) -> bool:
    """Whether scores of (batch * windows, heads, …) get a mask for each of a fixed number of windows."""
    unfolded, mask = found.fake("unfolded").shape, found.fake("windows_mask")
    if len(unfolded) != 5 or mask.dim() != 5 or fixed(mask.shape) is None:
        return False
    same = same_sizes(unfolded[2:], scores[1:]) and same_sizes(mask.shape[:2], (1, unfolded[1]))
    return same and _is_mask(mask, unfolded, found.root.meta["val"].dtype)


def _mask(found: Found) -> Any:
    """One mask that does what all of them do, one after the other."""
    added = [found[name] for name in _ADDED if found[name] is not None]
    if found["windows_mask"] is not None:
        added.append(_repeated_for_samples(found))
    kept = found["kept"]
    if found["dropped"] is not None:
        kept = found.insert(aten.logical_not.default, found["dropped"])
    if not added:
        return kept
    mask = reduce(lambda one, other: found.insert(aten.add.Tensor, one, other), added)
    return mask if kept is None else found.insert(aten.where.ScalarOther, kept, mask, -math.inf)


def _repeated_for_samples(found: Found) -> fx.Node:
    """The mask of each window for the windows of each sample: (windows, …) as (batch * windows, …)."""
    _, windows, *sizes = found.fake("windows_mask").shape
    samples: Any = found.fake("unfolded").shape[0]
    if not isinstance(samples, int):
        all_windows = found.insert(aten.sym_size.int, found["query"], 0)
        samples = found.insert(operator.floordiv, all_windows, windows)
    repeated = found.insert(aten.expand.default, found["windows_mask"], [samples, windows, *sizes])
    return found.insert(aten.reshape.default, repeated, [-1, *sizes])


def _dropout(found: Found) -> Any:
    if found["training"] is None or found["training"] is False:
        return 0.0
    if found["training"] is True:
        return found["p"]
    return found.insert(operator.mul, found["p"], found["training"])


_where = call(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_reshape = call(*RESHAPES)

# Exporters multiply the queries, the keys or both, before or after the keys are transposed, or the scores.
_query = Number("query_scale") * Value("query")
_keys = Number("key_scale") * (Transposed(Number("inner_key_scale") * Value("key")))
_scores = Number("scale") * first_of(
    matmul(_query, _keys),
    matmul(_query, Number("key_scale") * Value("transposed_key")),
)
_biased = _scores + Maybe(Value("mask")) + Maybe(Value("second_mask"))
_masked = first_of(
    _biased,
    # Shifted windows: each window of a sample has a mask of its own.
    _reshape(Named("unfolded", _reshape(_biased)) + Value("windows_mask")),
    _where(Value("kept"), _biased, -math.inf),
    _where(Value("dropped"), -math.inf, _biased),
    call(aten.masked_fill.Scalar)(_biased, Value("dropped"), -math.inf),
)
_softmax = call(aten.softmax.int)(_masked, dim=Axes("axes"), dtype=None)
# A row of which everything is masked has no softmax; exporters make it zero, as the operator does.
_weights = _softmax | _where(call(aten.isnan.default)(_softmax), 0.0, _softmax)
_dropped = _weights | call(aten.dropout.default)(_weights, p=Argument("p"), train=Argument("training"))


@dataclass(frozen=True)
class Repeated(Pattern):
    """Keys or values (batch, heads, …) with copies of each head in a row, one for each of its queries."""

    pattern: Pattern

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        if (found := _unrepeated(value)) is not None:
            source, inner = found
            yield from self.pattern._matches(source, match.through(*inner))


_VIEWS = frozenset((*RESHAPES, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default, aten.contiguous.default))
_MOST_VIEWS = 8
"""How many of them may stand around the step that repeats: `keys[:, :, None]` alone is four."""


def _unrepeated(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """The heads before they are repeated, and the operators by which they are."""
    if (result := fake_of(node)) is None or result.dim() != 4:
        return None
    if node.target is aten.repeat_interleave.self_int:
        return (node.args[0], [node]) if edit.arguments(node)["dim"] in (1, -3) else None
    inner, repeated = list[fx.Node](), None
    value: Any = node
    while len(inner) < _MOST_VIEWS and value.op == "call_function":
        before = value.args[0] if value.args else None
        if (fake := fake_of(before)) is None:
            return None
        shapes = fake.shape, value.meta["val"].shape
        if value.target is aten.expand.default and repeated is None:
            repeated = shapes
        elif value.target not in _VIEWS or (value.target is aten.slice.Tensor and not same_sizes(*shapes)):
            return None
        inner.append(value)
        value = before
        if repeated is not None and fake.dim() == 4 and _repeats_heads(fake.shape, *repeated, result.shape):
            return value, inner
    return None


def _repeats_heads(heads: Sequence[Any], one: Sequence[Any], many: Sequence[Any], result: Sequence[Any]) -> bool:
    """Whether an expansion of views from shape `one` to `many` puts copies of each head next to it."""
    batch, _, *sizes = heads
    if not same_sizes((result[0], *result[2:]), (batch, *sizes)):
        return False
    if len(one) == 4:
        return same_sizes(heads[1:2], (1,)) and same_sizes(one, heads)
    return same_sizes(one, (*heads[:2], 1, *sizes)) and same_sizes((*many[:2], *many[3:]), (*heads[:2], *sizes))


def _grouped(found: Found) -> Operator | None:
    heads, shared = found.fake("query").shape[1], [found.fake(name).shape[1] for name in ("key", "value")]
    if fixed((heads, *shared)) is None or shared[0] != shared[1] or heads % shared[0] or heads == shared[0]:
        return None
    arguments = [found[name] for name in ("query", "key", "value", "mask", "p", "causal")]
    return Operator(ATTENTION, tuple(arguments), {"scale": found["scale"], "enable_gqa": True})


_grouped_attention = call(ATTENTION)(
    Value("query"),
    Repeated(Value("key")),
    Repeated(Value("value")),
    attn_mask=Argument("mask"),
    dropout_p=Argument("p"),
    is_causal=Argument("causal"),
    scale=Argument("scale"),
    enable_gqa=False,
)

ATTENTIONS = (
    Rule("attention", matmul(_dropped, Value("value")), _attention),
    Rule("grouped_attention", _grouped_attention, _grouped),
)
"""In this order: the second takes up what the first has made."""
