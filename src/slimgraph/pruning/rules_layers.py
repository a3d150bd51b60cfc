"""Operators with weights, norms, attention, pools and recurrent layers."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.pruning.axes import Atom, Tree, concatenation, factor_inner, pin, product, size_of, unify
from slimgraph.pruning.trace import Axes, Rule, Trace

aten = torch.ops.aten

NORM = "norm"
"""The soft pin: a norm's statistics run over the axis, so that it is pruned on request only."""


def _unify_vectors(trace: Trace, axis: Tree, *vectors: Any) -> None:
    """Let vectors have one element for each index of an axis."""
    for vector in vectors:
        if isinstance(vector, fx.Node) and size_of(trace.axes(vector)[0]) == size_of(axis):
            unify(trace.axes(vector)[0], axis)


def _spatial(trace: Trace, axes: Sequence[Tree], shape: Sequence[int], *, alone: Sequence[bool] = ()) -> Axes:
    """Axes over which a window slides: those it reads and those it makes stay, unless it sees each position alone."""
    made: Axes = []
    for place, (tree, size) in enumerate(zip(axes, shape, strict=True)):
        if alone and alone[place]:
            made.append(tree)
            continue
        made.append(Atom(size))
        pin(tree, "spatial")
        pin(made[-1], "spatial")
    return made


def convolution(trace: Trace, node: fx.Node) -> Axes:
    """Channels of input and output are the axes of the weight; with groups, each group has the same ones."""
    given = trace.given(node)
    x, weight = trace.axes(node.args[0]), trace.axes(node.args[1])
    rank = len(weight) - 2
    groups = int(given["groups"])
    lead = len(x) - rank - 1
    for tree in weight[2:]:
        pin(tree, "kernel")
    if groups == 1:
        unify(x[lead], weight[1])
        channels = weight[0]
    else:
        group, inner = factor_inner(x[lead], size_of(weight[1]))
        unify(inner, weight[1])
        outer, _ = factor_inner(weight[0], size_of(weight[0]) // groups)
        unify(outer, group)
        channels = weight[0]
    _unify_vectors(trace, channels, given.get("bias"))
    alone = _alone(given, trace.shape(node.args[1])[2:])
    positions = _spatial(trace, x[lead + 1 :], trace.shape(node)[lead + 1 :], alone=alone)
    return [*trace.axes(node.args[0])[:lead], channels, *positions]


def _alone(given: Mapping[str, Any], kernel: Sequence[int]) -> list[bool]:
    """Along which of its axes a convolution sees each position alone."""

    def each(value: Any) -> list[Any]:
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        return numbers * len(kernel) if len(numbers) == 1 else numbers

    padding = given.get("padding", 0)
    strides, paddings = each(given.get("stride", 1)), each(0 if isinstance(padding, str) else padding)
    return [sizes == (1, 1, 0) for sizes in zip(kernel, strides, paddings, strict=True)]


def transposed_convolution(trace: Trace, node: fx.Node) -> Axes:
    """As a convolution, with the input's channels first in the weight."""
    given = trace.given(node)
    x, weight = trace.axes(node.args[0]), trace.axes(node.args[1])
    rank = len(weight) - 2
    groups = int(given["groups"])
    lead = len(x) - rank - 1
    for tree in weight[2:]:
        pin(tree, "kernel")
    unify(x[lead], weight[0])
    channels: Tree = weight[1]
    if groups > 1:
        group, _ = factor_inner(weight[0], size_of(weight[0]) // groups)
        channels = product(group, weight[1])
    _unify_vectors(trace, channels, given.get("bias"))
    shape = trace.shape(node)
    return [*trace.axes(node.args[0])[:lead], channels, *_spatial(trace, x[lead + 1 :], shape[lead + 1 :])]


def linear(trace: Trace, node: fx.Node) -> Axes:
    """The last axis of the input is the weight's last, that of the output its first."""
    x, weight = trace.axes(node.args[0]), trace.axes(node.args[1])
    unify(x[-1], weight[-1])
    if len(weight) == 1:
        return x[:-1]
    _unify_vectors(trace, weight[0], trace.given(node).get("bias"))
    return [*trace.axes(node.args[0])[:-1], trace.axes(node.args[1])[0]]


def batch_norm(trace: Trace, node: fx.Node) -> Axes:
    """One scale and one shift for each channel; statistics of the input itself run over all other axes."""
    given = trace.given(node)
    axes = trace.axes(node.args[0])
    names = ("weight", "bias", "running_mean", "running_var")
    _unify_vectors(trace, axes[1], *(given.get(name) for name in names))
    if is_of_input(node):
        per_sample = "instance_norm" in str(node.target)
        for axis, tree in enumerate(axes):
            if axis != 1 and not (per_sample and axis == 0):
                pin(tree, NORM)
    return trace.axes(node.args[0])


def is_of_input(norm: fx.Node) -> bool:
    """Whether a norm takes its statistics from its input, also where it is no training; of weights, for one."""
    given = edit.arguments(norm)
    stored = given.get("training") is not True and given.get("use_input_stats") is not True
    return not stored or given.get("running_mean") is None


def group_norm(trace: Trace, node: fx.Node) -> Axes:
    """The channels of a group share statistics, which run over them."""
    given = trace.given(node)
    axes = trace.axes(node.args[0])
    groups = int(given["num_groups"])
    _, inner = factor_inner(axes[1], size_of(axes[1]) // groups)
    pin(inner, NORM)
    _unify_vectors(trace, axes[1], given.get("weight"), given.get("bias"))
    for tree in axes[2:]:
        pin(tree, "a norm runs over it")
    return trace.axes(node.args[0])


def layer_norm(trace: Trace, node: fx.Node) -> Axes:
    """Statistics run over the last axes, which have one scale and one shift for each index."""
    given = trace.given(node)
    axes = trace.axes(node.args[0])
    count = len(given["normalized_shape"])
    for tree in axes[-count:]:
        pin(tree, NORM)
    for name in ("weight", "bias"):
        vector = given.get(name)
        if isinstance(vector, fx.Node):
            for ours, theirs in zip(trace.axes(vector), axes[-count:], strict=True):
                unify(ours, theirs)
    return trace.axes(node.args[0])


def prelu(trace: Trace, node: fx.Node) -> Axes:
    """One slope for each channel, or one for all."""
    axes = trace.axes(node.args[0])
    if size_of(trace.axes(node.args[1])[0]) > 1:
        _unify_vectors(trace, axes[1], node.args[1])
    return trace.axes(node.args[0])


def attention(trace: Trace, node: fx.Node) -> Axes:
    """Queries meet keys in their last axis; values leave by theirs; positions of keys are summed over."""
    given = trace.given(node)
    query, key, value = (trace.axes(operand) for operand in node.args[:3])
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    pin(key[-2], "softmax runs over it")
    batch: Axes = []
    for position, (q, k, v) in enumerate(zip(query[:-2], key[:-2], value[:-2], strict=True)):
        if given.get("enable_gqa") and position == len(query) - 3:  # each head of the keys serves several queries
            unify(k, v)
            outer, _ = factor_inner(q, size_of(q) // size_of(k))
            unify(outer, k)
            batch.append(q)
        else:
            batch.append(_shared(q, k, v))
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        scores = [*batch, query[-2], key[-2]]
        for offset, tree in enumerate(reversed(trace.axes(mask))):
            if size_of(tree) == size_of(scores[-1 - offset]) != 1:
                unify(tree, scores[-1 - offset])
    return [*batch, query[-2], value[-1]]


def _shared(*trees: Tree) -> Tree:
    """An axis that all operands have that have more than one index there."""
    long = [tree for tree in trees if size_of(tree) != 1] or trees[:1]
    for tree in long[1:]:
        unify(long[0], tree)
    return long[0]


def embedding(trace: Trace, node: fx.Node) -> Axes:
    """Rows of a table; which ones, the data say."""
    table = trace.axes(node.args[0])
    pin(table[0], "indexed")
    return [*trace.axes(node.args[1]), table[1]]


def pool(trace: Trace, node: fx.Node) -> Axes | list[Axes]:
    """A window slides over the spatial axes, whose number the kernel tells."""
    axes = trace.axes(node.args[0])
    value = trace.values[node]
    shape = list((value[0] if isinstance(value, (tuple, list)) else value).shape)
    rank = next(int(digit) for digit in str(node.target) if digit in "123")
    made = [*axes[:-rank], *_spatial(trace, axes[-rank:], shape[-rank:])]
    return [made, list(made)] if isinstance(value, (tuple, list)) else made


def recurrent(trace: Trace, node: fx.Node) -> list[Axes] | None:
    """LSTM and GRU: the hidden size is an axis of states, outputs and weights, in which each gate has a block."""
    given = trace.given(node)
    if given.get("batch_first") is None:
        return None  # packed sequences
    params: list[Any] = list(given["params"])
    is_lstm = "lstm" in str(node.target)
    gates = 4 if is_lstm else 3
    states = list(given["hx"]) if is_lstm else [given["hx"]]
    directions = 2 if given["bidirectional"] else 1
    layers, biases = int(given["num_layers"]), bool(given["has_biases"])
    x = trace.axes(node.args[0])
    value = trace.values[node]
    outputs = [trace.fresh(each) for each in value]
    below: Tree = x[-1]
    per_cell = 4 if biases else 2
    if len(params) != layers * directions * per_cell:
        return None  # a projection
    hidden_of_states: list[Tree] = [trace.axes(state)[-1] for state in states]
    for layer in range(layers):
        made: list[Tree] = []
        for direction in range(directions):
            start = (layer * directions + direction) * per_cell
            weights = [trace.axes(operand) for operand in params[start : start + per_cell]]
            size = size_of(weights[1][1])
            unify(weights[0][1], below)
            hidden = weights[1][1]
            for weight in weights:
                gate, inner = factor_inner(weight[0], size)
                if size_of(gate) != gates:
                    return None
                pin(gate, "gates")
                unify(inner, hidden)
            # One tensor holds the states of all layers and directions.
            for tree in hidden_of_states:
                unify(tree, hidden)
            made.append(hidden)
        below = concatenation(*made)
    unify(outputs[0][-1], below)
    for axis in range(len(x) - 1):
        unify(outputs[0][axis], x[axis])
        pin(x[axis], "a recurrence runs over it")
    for state in outputs[1:]:
        unify(state[-1], hidden_of_states[0])
        for tree in state[:-1]:
            pin(tree, "states of layers")
    for state_given in states:
        for tree in trace.axes(state_given)[:-1]:
            pin(tree, "states of layers")
    return outputs


def upsample(trace: Trace, node: fx.Node) -> Axes:
    """Channels go through; positions are made of others."""
    axes = trace.axes(node.args[0])
    return [*axes[:2], *_spatial(trace, axes[2:], trace.shape(node)[2:])]


def _all(packets: Sequence[str], rule: Rule) -> dict[Any, Rule]:
    """Every overload of these operators, as far as this PyTorch has them."""
    return {
        getattr(getattr(aten, packet), overload): rule
        for packet in packets
        if hasattr(aten, packet)
        for overload in getattr(aten, packet).overloads()
    }


RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        **_all(("conv1d", "conv2d", "conv3d"), convolution),
        **_all(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed_convolution),
        **_all(("linear",), linear),
        **_all(("batch_norm", "instance_norm"), batch_norm),
        **_all(("group_norm",), group_norm),
        **_all(("layer_norm", "rms_norm"), layer_norm),
        **_all(("prelu",), prelu),
        **_all(("scaled_dot_product_attention",), attention),
        **_all(("embedding",), embedding),
        **_all(
            (
                *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
                *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
                *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d"),
                *("max_pool2d_with_indices", "lp_pool2d"),
            ),
            pool,
        ),
        **_all(
            (
                *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"),
                *("upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa"),
                *("_upsample_bicubic2d_aa", "_upsample_nearest_exact2d", "grid_sampler"),
            ),
            upsample,
        ),
        aten.lstm.input: recurrent,
        aten.gru.input: recurrent,
    }
)
