"""Operators that choose positions, put them into another order, or gather those around each."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.pruning.axes import Atom, Tree, concatenation, factor_inner, pin, product, size_of
from slimgraph.pruning.shuffle import Shuffle, is_loose, shuffled
from slimgraph.pruning.trace import Axes, Rule, Trace

aten = torch.ops.aten


def pad(trace: Trace, node: fx.Node) -> Axes:
    """Channels that zeros are put beside are concatenated with these; other axes that are padded stay whole."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    given = trace.given(node)
    amounts = trace.number(given["pad"])
    zeros = node.target is aten.constant_pad_nd.default or given.get("mode") == "constant"
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair : 2 * pair + 2]
        axis = len(axes) - 1 - pair
        if zeros and not given.get("value") and axis == 1 and len(axes) > 2 and min(before, after) >= 0:
            axes[axis] = concatenation(Atom(before), axes[axis], Atom(after))
        elif before or after:
            pin(axes[axis], "padded")
            made = Atom(shape[axis])
            pin(made, "padded")
            axes[axis] = made
    return axes


def moved_along(trace: Trace, node: fx.Node) -> Axes:
    """Roll and flip: the axes along which they move stay whole."""
    axes = trace.axes(node.args[0])
    dims = trace.given(node).get("dims") or range(len(axes))
    for dim in dims:
        pin(axes[int(dim) % len(axes)], "moved along")
    return trace.axes(node.args[0])


def triangle(trace: Trace, node: fx.Node) -> Axes:
    """The last two axes are positions."""
    axes = trace.axes(node.args[0])
    for tree in axes[-2:]:
        pin(tree, "its elements are positions")
    return axes


def index(trace: Trace, node: fx.Node) -> Axes | None:
    """Indices of tensors: the axes they choose from stay whole, the others go through."""
    axes = trace.axes(node.args[0])
    indices = [item if isinstance(item, fx.Node) else None for item in node.args[1]]  # type: ignore[union-attr]
    places = [place for place, item in enumerate(indices) if item is not None]
    if any(trace.values[item].dtype == torch.bool for item in indices if item is not None):
        return None
    for place in places:
        pin(axes[place], "indexed")
    count = max(trace.values[item].dim() for item in indices if item is not None)
    chosen: Axes = []
    for offset in range(count):
        position = offset - count
        sizes = {
            trace.values[item].shape[position]
            for item in indices
            if item is not None and trace.values[item].dim() >= -position
        }
        made = Atom(max(sizes))
        pin(made, "indexed")
        chosen.append(made)
    others = [tree for place, tree in enumerate(axes) if place not in places]
    together = places == list(range(places[0], places[-1] + 1))
    start = places[0] if together else 0
    return [*others[:start], *chosen, *others[start:]]


def index_select(trace: Trace, node: fx.Node) -> Axes:
    """Indices along one axis: stored ones are chosen one by one, for computed ones the axis stays whole."""
    source: Any = node.args[0]
    axes = trace.axes(source)
    axis = int(trace.given(node)["dim"]) % len(axes)
    order = edit.constant_of(trace.program.graph_module, trace.given(node)["index"])
    if order is not None and is_loose(axes[axis]):
        indices = order.remainder(size_of(axes[axis])).tolist()
        trace.shuffles[node] = Shuffle(source=source, end=node, axis=axis, order=tuple(indices))
        return shuffled(axes, trace.shuffles[node])
    pin(axes[axis], "indexed")
    made = Atom(trace.shape(node)[axis])
    pin(made, "indexed")
    axes[axis] = made
    return axes


def pixel_shuffle(trace: Trace, node: fx.Node) -> Axes:
    """The inner factor of the channels becomes a block of pixels."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    factor = int(trace.given(node)["upscale_factor"])
    channels, block = factor_inner(axes[-3], factor * factor)
    pin(block, "spatial")
    return [*axes[:-3], channels, *_whole(axes[-2:], shape[-2:])]


def pixel_unshuffle(trace: Trace, node: fx.Node) -> Axes:
    """A block of pixels becomes the inner factor of the channels."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    block = Atom(int(trace.given(node)["downscale_factor"]) ** 2)
    pin(block, "spatial")
    return [*axes[:-3], product(axes[-3], block), *_whole(axes[-2:], shape[-2:])]


def _whole(axes: list[Tree], shape: list[int]) -> Axes:
    made: Axes = [Atom(size) for size in shape]
    for tree in (*axes, *made):
        pin(tree, "spatial")
    return made


def image_to_columns(trace: Trace, node: fx.Node) -> Axes:
    """The window around each position becomes the inner factor of the channels."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    window = Atom(math.prod(trace.number(trace.given(node)["kernel_size"])))
    pin(window, "spatial")
    for tree in axes[-2:]:
        pin(tree, "spatial")
    return [*axes[:-3], product(axes[-3], window), *_whole([], shape[-1:])]


def columns_to_image(trace: Trace, node: fx.Node) -> Axes:
    """Windows, which are the inner factor of the channels, are added up at their positions."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    channels, window = factor_inner(axes[-2], math.prod(trace.number(trace.given(node)["kernel_size"])))
    pin(window, "spatial")
    pin(axes[-1], "spatial")
    return [*axes[:-2], channels, *_whole([], shape[-2:])]


def windows(trace: Trace, node: fx.Node) -> Axes:
    """An axis is cut into windows that may overlap, with what is in each on a new last axis."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    axis = int(trace.given(node)["dimension"]) % len(axes)
    pin(axes[axis], "spatial")
    number, inside = _whole([], [shape[axis], shape[-1]])
    return [*axes[:axis], number, *axes[axis + 1 :], inside]


def channel_shuffle(trace: Trace, node: fx.Node) -> Axes:
    """Groups and what is in them change places."""
    axes = trace.axes(node.args[0])
    groups = int(trace.given(node)["groups"])
    source: Any = node.args[0]
    if is_loose(axes[1]):
        order = torch.arange(size_of(axes[1])).reshape(groups, -1).T.flatten()
        trace.shuffles[node] = Shuffle(source=source, end=node, axis=1, order=tuple(order.tolist()))
        return shuffled(axes, trace.shuffles[node])
    outer, inner = factor_inner(axes[1], size_of(axes[1]) // groups)
    axes[1] = product(inner, outer)
    return axes


def meshgrid(trace: Trace, node: fx.Node) -> list[Axes]:
    """Grids of positions."""
    return [trace.fresh(value, reason="its elements are positions") for value in trace.values[node]]


RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.pad.default: pad,
        aten.constant_pad_nd.default: pad,
        aten.reflection_pad2d.default: pad,
        aten.replication_pad2d.default: pad,
        aten.roll.default: moved_along,
        aten.flip.default: moved_along,
        aten.triu.default: triangle,
        aten.tril.default: triangle,
        aten.index.Tensor: index,
        aten.index_select.default: index_select,
        aten.pixel_shuffle.default: pixel_shuffle,
        aten.pixel_unshuffle.default: pixel_unshuffle,
        aten.channel_shuffle.default: channel_shuffle,
        aten.im2col.default: image_to_columns,
        aten.col2im.default: columns_to_image,
        aten.unfold.default: windows,
        aten.meshgrid.default: meshgrid,
        aten.meshgrid.indexing: meshgrid,
    }
)
