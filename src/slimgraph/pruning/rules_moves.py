"""Operators that move numbers about without computing any."""

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from slimgraph.pruning.axes import (
    Atom,
    MixedRadixError,
    Tree,
    atoms,
    concatenation,
    factor_inner,
    pin,
    product,
    regroup,
    size_of,
    split,
    unify,
)
from slimgraph.pruning.shuffle import is_loose, shuffle_from, shuffled
from slimgraph.pruning.trace import Axes, Rule, Trace

aten = torch.ops.aten


def reshape(trace: Trace, node: fx.Node) -> Axes:
    """Row-major: new axes are products and factors of old ones; unless all that becomes of them is another order."""
    if node in trace.shuffles:
        return shuffled(trace.axes(trace.shuffles[node].source), trace.shuffles[node])
    shuffle = shuffle_from(node, trace.values)
    if shuffle is not None and is_loose(trace.axes(shuffle.source)[shuffle.axis]):
        trace.shuffles[shuffle.end] = shuffle
        return trace.fresh(trace.values[node], reason="within a shuffle")
    return regroup(trace.axes(node.args[0]), trace.shape(node))


def permute(trace: Trace, node: fx.Node) -> Axes:
    """The same axes in another order, which the sizes of a fake tensor cannot tell: its arguments do."""
    axes = trace.axes(node.args[0])
    order = [int(dim) % len(axes) for dim in trace.number(trace.given(node)["dims"])]
    return [axes[dim] for dim in order]


def transpose(trace: Trace, node: fx.Node) -> Axes:
    """Two axes change places; without arguments the last two."""
    axes = trace.axes(node.args[0])
    given = trace.given(node)
    if len(axes) < 2:
        return axes
    pair = [value for name, value in given.items() if name in ("dim0", "dim1", "axis0", "axis1")] or [-2, -1]
    first, second = (int(dim) % len(axes) for dim in pair)
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def movedim(trace: Trace, node: fx.Node) -> Axes:
    """Some axes move, the others keep their order."""
    axes = trace.axes(node.args[0])
    given = trace.given(node)
    sources, targets = (
        [int(dim) % len(axes) for dim in ([value] if isinstance(value, int) else value)]
        for value in (given["source"], given["destination"])
    )
    rest = iter([axis for axis in range(len(axes)) if axis not in sources])
    moved = dict(zip(targets, sources, strict=True))
    return [axes[moved[place] if place in moved else next(rest)] for place in range(len(axes))]


def expand(trace: Trace, node: fx.Node) -> Axes:
    """Axes of one index become longer: new axes, which nothing ties to the old ones."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    result: Axes = [Atom(size) for size in shape]
    for offset, tree in enumerate(reversed(axes)):
        if size_of(tree) == shape[-1 - offset]:
            result[-1 - offset] = tree
    if node.target is aten.expand_as.default:
        for place, (tree, other) in enumerate(zip(result, trace.axes(node.args[1]), strict=True)):
            if size_of(tree) == size_of(other) != 1:
                unify(tree, other)
                result[place] = tree
    return result


def repeat(trace: Trace, node: fx.Node) -> Axes:
    """The whole axis, several times: the outer factor of the new axis counts the repetitions."""
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    result: Axes = [Atom(size) for size in shape]
    for offset, tree in enumerate(reversed(axes)):
        count = shape[-1 - offset] // max(size_of(tree), 1)
        times = Atom(count)
        if count > 1 and size_of(tree) > 1:
            pin(times, "repetitions")
        result[-1 - offset] = tree if count == 1 else times if size_of(tree) == 1 else product(times, tree)
    return result


def repeat_interleave(trace: Trace, node: fx.Node) -> Axes | None:
    """Each index, several times in a row: the inner factor counts them."""
    given = trace.given(node)
    count, dim = given.get("repeats"), given.get("dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        return None
    axes = trace.axes(node.args[0])
    times = Atom(count)
    pin(times, "repetitions")
    axes[dim] = product(axes[dim], times)
    return axes


def cat(trace: Trace, node: fx.Node) -> Axes:
    """Axes one behind the other; all others are shared."""
    given: Any = node.args[0]
    operands = [part for part in given if trace.values[part].numel() or trace.values[part].dim() > 1]
    lists = [trace.axes(part) for part in operands]
    axis = int(trace.given(node)["dim"]) % len(lists[0])
    for other in lists[1:]:
        for place, (ours, theirs) in enumerate(zip(lists[0], other, strict=True)):
            if place != axis:
                unify(ours, theirs)
    result = trace.axes(operands[0])
    result[axis] = concatenation(*(trees[axis] for trees in lists))
    return result


def stack(trace: Trace, node: fx.Node) -> Axes:
    """All axes are shared, and a new one counts the operands."""
    lists = [trace.axes(part) for part in node.args[0]]  # type: ignore[union-attr]
    for other in lists[1:]:
        for ours, theirs in zip(lists[0], other, strict=True):
            unify(ours, theirs)
    result = trace.axes(node.args[0][0])  # type: ignore[index]
    counted = Atom(len(lists))
    pin(counted, "stacked")
    axis = int(trace.given(node)["dim"]) % (len(result) + 1)
    return [*result[:axis], counted, *result[axis:]]


def pieces(trace: Trace, node: fx.Node) -> list[Axes]:
    """An axis cut into several."""
    axes = trace.axes(node.args[0])
    axis = int(trace.given(node)["dim"]) % len(axes)
    result = []
    rest: Tree = axes[axis]
    for value in trace.values[node]:
        count = value.shape[axis]
        first, rest = (rest, Atom(0)) if count == size_of(rest) else split(rest, count)
        result.append([*axes[:axis], first, *axes[axis + 1 :]])
    return result


def unbind(trace: Trace, node: fx.Node) -> list[Axes]:
    """Every index of an axis by itself; the axis stays whole."""
    axes = trace.axes(node.args[0])
    axis = int(trace.given(node)["dim"]) % len(axes)
    pin(axes[axis], "taken apart")
    return [[*axes[:axis], *axes[axis + 1 :]] for _ in trace.values[node]]


def select(trace: Trace, node: fx.Node) -> Axes:
    """One index of an axis, which stays whole."""
    axes = trace.axes(node.args[0])
    axis = int(trace.given(node)["dim"]) % len(axes)
    pin(axes[axis], "taken apart")
    return [*axes[:axis], *axes[axis + 1 :]]


def slice_(trace: Trace, node: fx.Node) -> Axes:
    """A part of an axis; one index of every few is a factor of it, and otherwise, with steps, the axis stays whole."""
    given = trace.given(node)
    axes, shape = trace.axes(node.args[0]), trace.shape(node)
    axis = int(given.get("dim") or 0) % len(axes)
    tree = axes[axis]
    size, count = size_of(tree), shape[axis]
    if count == size:
        return axes
    start, step = trace.number(given.get("start")) or 0, trace.number(given.get("step")) or 1
    start = min(max(start + size if start < 0 else start, 0), size)
    literal = not any(isinstance(given.get(name), fx.Node) for name in ("start", "end", "step", "length"))
    if literal and start < step and count * step == size and (factors := _factors(tree, step)) is not None:
        pin(factors[1], "sliced in steps")
        axes[axis] = factors[0]
        return axes
    if step == 1 and literal and count:
        try:
            rest = split(tree, start)[1] if start else tree
            axes[axis] = rest if count == size_of(rest) else split(rest, count)[0]
            return axes
        except MixedRadixError:  # within a window, say: this axis stays, and the others go through
            pin(tree, "mixed radix")
    pin(tree, "sliced in steps")
    axes[axis] = Atom(count)
    pin(axes[axis], "sliced in steps")
    return axes


def _factors(tree: Tree, step: int) -> tuple[Tree, Tree] | None:
    """An axis as steps, and the indices within a step; None where it is no such product, or has to stay anyhow."""
    if all(atom.pins for atom in atoms(tree)):
        return None
    try:
        return factor_inner(tree, step)
    except MixedRadixError:
        return None


def slice_scatter(trace: Trace, node: fx.Node) -> Axes:
    """A part of an axis is overwritten; all other axes are shared."""
    given = trace.given(node)
    axes, written = trace.axes(node.args[0]), trace.axes(node.args[1])
    axis = int(given.get("dim") or 0) % len(axes)
    for place, (ours, theirs) in enumerate(zip(axes, written, strict=True)):
        if place != axis:
            unify(ours, theirs)
    tree = trace.axes(node.args[0])[axis]
    size, count = size_of(tree), size_of(written[axis])
    start, step = trace.number(given.get("start")) or 0, trace.number(given.get("step")) or 1
    if count == size:
        unify(tree, written[axis])
    elif step != 1 or any(isinstance(given.get(name), fx.Node) for name in ("start", "end", "step")):
        pin(tree, "sliced in steps")
        pin(written[axis], "sliced in steps")
    else:
        start = min(max(start + size if start < 0 else start, 0), size)
        rest = split(tree, start)[1] if start else tree
        unify(rest if count == size_of(rest) else split(rest, count)[0], written[axis])
    return trace.axes(node.args[0])


def select_scatter(trace: Trace, node: fx.Node) -> Axes:
    """One index of an axis is overwritten: the axis stays whole, all others are shared."""
    axes, written = trace.axes(node.args[0]), trace.axes(node.args[1])
    axis = int(trace.given(node)["dim"]) % len(axes)
    pin(axes[axis], "taken apart")
    for ours, theirs in zip((*axes[:axis], *axes[axis + 1 :]), written, strict=True):
        unify(ours, theirs)
    return trace.axes(node.args[0])


def getitem(trace: Trace, node: fx.Node) -> Axes | None:
    """One of several results."""
    found = trace.env.get(node.args[0])  # type: ignore[arg-type]
    position = node.args[1]
    return None if found is None or not isinstance(position, int) else list(found[position])  # type: ignore[arg-type]


RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
                *(aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim),
                *(aten.squeeze.dims, aten.reshape_as.default, aten.view_as.default),
            ),
            reshape,
        ),
        aten.permute.default: permute,
        **dict.fromkeys(
            (aten.transpose.int, aten.t.default, aten.mT.default, aten.swapaxes.default, aten.swapdims.default),
            transpose,
        ),
        aten.movedim.int: movedim,
        aten.movedim.intlist: movedim,
        aten.expand.default: expand,
        aten.expand_as.default: expand,
        aten.broadcast_to.default: expand,
        aten.repeat.default: repeat,
        aten.tile.default: repeat,
        aten.repeat_interleave.self_int: repeat_interleave,
        aten.cat.default: cat,
        aten.concat.default: cat,
        aten.stack.default: stack,
        **dict.fromkeys(
            (
                *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default),
                *(aten.tensor_split.indices, aten.tensor_split.sections),
            ),
            pieces,
        ),
        aten.unbind.int: unbind,
        aten.select.int: select,
        aten.slice.Tensor: slice_,
        aten.narrow.default: slice_,
        aten.slice_scatter.default: slice_scatter,
        aten.select_scatter.default: select_scatter,
        operator.getitem: getitem,
    }
)
