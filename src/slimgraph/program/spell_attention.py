"""Spell attention out as the matrix products, the softmax and the masks that it is made of."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Program

aten = torch.ops.aten


def spell_out_attention(program: Program, *, keep: Callable[[fx.Node], bool] = lambda _: False) -> Program:
    """A program whose `scaled_dot_product_attention` are products, softmax and dropout; it computes the same.

    Quantizers can then stand inside of it. The last product bears the name of the operator that it replaces, `attend`
    say; before it stand `attend/scores`, `attend/scaled`, `attend/masked`, `attend/probabilities` and more, as far as
    there are such steps. A query that may attend to nothing gets zeros, as in PyTorch, and not NaN. Operators for which
    `keep` is true stay.
    """
    spelled = program.copy()
    found = spelled.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    attentions = [node for node in found if not keep(node)]
    taken = set(spelled.values)
    for node in attentions:
        _spell_out(node, _Steps(node, taken))
    edit.finish(spelled)
    return spelled.with_history(HistoryEntry(step="spell_out_attention", parameters={"operators": len(attentions)}))


class _Steps:
    """Writes operators in front of an attention, in its layer, each named after it and after what it does."""

    def __init__(self, attention: fx.Node, taken: set[str]) -> None:
        self._attention = attention
        self._taken = taken

    def __call__(self, step: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._attention.graph.inserting_before(self._attention):
            new = self._attention.graph.call_function(target, args, kwargs)
        new.meta["val"] = target(*fx.map_arg(args, _example), **kwargs)
        if isinstance(new.meta["val"], Tensor):
            name = unused(f"{value_of(self._attention)}/{step}", self._taken)
            self._taken.add(name)
            set_names(new, layer=layer_of(self._attention), value=name)
        return new

    def size(self, tensor: fx.Node, axis: int) -> int | fx.Node:
        size = _example(tensor).shape[axis]
        return size if isinstance(size, int) else self("", aten.sym_size.int, tensor, axis)


def _example(node: fx.Node) -> Any:
    return False if node.target in edit.FLAGS else node.meta["val"]


def _spell_out(attention: fx.Node, step: _Steps) -> None:
    given = edit.arguments(attention)
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    if given["enable_gqa"]:
        heads = _example(query).shape[-3]
        key = _repeated(step, "keys", key, heads)
        value = _repeated(step, "values", value, heads)
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(_example(query).shape[-1])
    scores = step("scores", aten.matmul.default, query, step("transposed", aten.transpose.int, key, -2, -1))
    scores = step("scaled", aten.mul.Tensor, scores, scale)
    if given["is_causal"]:
        mask = _triangle(step, query, key)
    if mask is not None:
        scores = _masked(step, scores, mask)
    probabilities = step("probabilities", aten.softmax.int, scores, -1)
    if given["attn_mask"] is not None:
        # The softmax of nothing but minus infinity is NaN.
        highest = step("highest", aten.amax.default, scores, [-1], True)
        nothing = step("nothing", aten.eq.Scalar, highest, -math.inf)
        probabilities = step("attended", aten.where.ScalarSelf, nothing, 0.0, probabilities)
    if given["dropout_p"] != 0.0:
        probabilities = _dropped(step, attention, probabilities, given["dropout_p"])
    result = step("result", aten.matmul.default, probabilities, value)
    attention.replace_all_uses_with(result)
    names = {"layer": layer_of(attention), "value": value_of(attention)}
    attention.graph.erase_node(attention)
    set_names(result, **names)


def _repeated(step: _Steps, name: str, shared: fx.Node, heads: int) -> fx.Node:
    """Keys or values with a head for each of the query's, whose neighbours share one."""
    own = _example(shared).shape[-3]
    return shared if own == heads else step(name, aten.repeat_interleave.self_int, shared, heads // own, -3)


def _triangle(step: _Steps, query: fx.Node, key: fx.Node) -> fx.Node:
    """Where a query may attend to: the keys up to its own place, counted from the first of each."""
    sizes = [step.size(query, -2), step.size(key, -2)]
    everywhere = step("everywhere", aten.new_ones.default, query, sizes, dtype=torch.bool)
    return step("allowed", aten.tril.default, everywhere)


def _masked(step: _Steps, scores: fx.Node, mask: fx.Node) -> fx.Node:
    if _example(mask).dtype == torch.bool:
        return step("masked", aten.where.ScalarOther, mask, scores, -math.inf)
    return step("masked", aten.add.Tensor, scores, mask)


def _dropped(step: _Steps, attention: fx.Node, probabilities: fx.Node, probability: float | fx.Node) -> fx.Node:
    """Dropout by a number, or by one times the flag that tells whether the program trains (`stochastic`)."""
    flag: bool | fx.Node = True
    if isinstance(probability, fx.Node):
        probability, flag = probability.args  # type: ignore[assignment]
    return step("dropped", aten.dropout.default, probabilities, probability, flag)
