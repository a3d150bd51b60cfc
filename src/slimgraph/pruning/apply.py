"""Remove what a plan removes: smaller tensors, and the sizes that the graph has in its arguments."""

import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor, fx
from torch.optim import Optimizer

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.shapes import refresh
from slimgraph.pruning.axes import factor_inner, size_of
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.kept import Kept
from slimgraph.pruning.optimizer import slice_optimizer
from slimgraph.pruning.plan import PruningPlan
from slimgraph.pruning.prove import prove
from slimgraph.pruning.shuffle import Shuffle
from slimgraph.pruning.slices import sliced

aten = torch.ops.aten


@overload
def apply_pruning(
    program: Program, plan: PruningPlan, *, proof: bool = True, groups: Groups | None = None
) -> Program: ...


@overload
def apply_pruning(
    program: Program, plan: PruningPlan, *, proof: bool = True, groups: Groups | None = None, optimizer: Optimizer
) -> tuple[Program, Optimizer]: ...


def apply_pruning(
    program: Program,
    plan: PruningPlan,
    *,
    proof: bool = True,
    groups: Groups | None = None,
    optimizer: Optimizer | None = None,
) -> Program | tuple[Program, Optimizer]:
    """The program without the indices that a plan removes, with an optimizer for it where one is given.

    Args:
        proof: compute, in float64, that it gives what the program gives where the removed indices are zero for whoever
            reads them, to 1e-9 of the range of the outputs.
        groups: of this very program, where they are at hand.
        optimizer: of the program's parameters; it stays as it is, and a copy goes on with those that are left, and with
            what it knows of them.
    Raises:
        ConfigError: the plan speaks of groups that the program has not got, or the optimizer is not of the program.
        ProgramError: the proof fails; the message names the group.
    """
    found = groups if groups is not None else find_groups(program, norm_axes=plan.norm_axes)
    kept = Kept(found, plan)
    pruned = program.copy()
    slice_tensors(pruned, plan.kept)
    twins = dict(zip(program.graph.nodes, pruned.graph.nodes, strict=True))
    for node, twin in twins.items():
        if node.op == "call_function" and (rewrite := _REWRITES.get(node.target)) is not None:
            rewrite(kept, node, twin)
    for shuffle in found.traced.shuffles.values():
        _choose(kept, shuffle, pruned, twins)
    edit.finish(pruned)
    refresh(pruned)
    parameters: dict[str, Json] = {
        "groups": {group.name: [group.size, group.size - len(group.removed)] for group in plan.groups}
    }
    result = pruned.with_history(HistoryEntry(step="prune", parameters=parameters))
    if proof:
        prove(program, result, kept, plan)
    return result if optimizer is None else (result, slice_optimizer(optimizer, program, result, plan))


def slice_tensors(module: Any, kept: Mapping[str, Mapping[int, tuple[int, ...]]]) -> None:
    """Replace parameters and buffers by what stays of them; tied ones stay tied."""
    root = module.graph_module if isinstance(module, Program) else module
    persistent = root.state_dict().keys()
    done: dict[int, Tensor] = {}
    for name, axes in kept.items():
        old = edit.tensor_named(root, name)
        if id(old) not in done:
            new = sliced(old.detach(), axes)
            trained = isinstance(old, torch.nn.Parameter)
            done[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad) if trained else new
        edit.put(root, name, done[id(old)], persistent=name in persistent)


# Sizes in arguments

_Rewrite = Callable[[Kept, fx.Node, fx.Node], None]


def _set(twin: fx.Node, name: str, value: Any) -> None:
    names = [argument.name for argument in twin.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(twin.args):
        twin.update_arg(position, value)
    else:
        twin.update_kwarg(name, value)


def _result_sizes(kept: Kept, node: fx.Node) -> list[int]:
    return [kept.count(tree) for tree in kept.traced.of(node)]


def _sizes(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    """Sizes of a result; -1 stays, and so does what is computed, unless a factor of it is pruned."""
    given = edit.arguments(node)
    name = "size" if "size" in given else "shape" if "shape" in given else "sizes"
    old: list[Any] = list(given[name])
    sizes = _result_sizes(kept, node)
    if name == "sizes" and "dim" in given:  # unflatten: only the axes that it makes
        start = int(given["dim"]) % (len(sizes) - len(old) + 1)
        sizes = sizes[start : start + len(old)]
    new: list[Any] = list(edit.arguments(twin)[name])
    for place, (size, given_size) in enumerate(zip(sizes, old, strict=True)):
        if isinstance(given_size, fx.Node):
            new[place] = _scaled(twin, new[place], Fraction(size, _number(kept, given_size)))
        elif given_size != -1:
            new[place] = size
    _set(twin, name, new)


def _number(kept: Kept, operand: Any) -> Any:
    """What is computed of sizes, when it reads those that stay."""
    if not isinstance(operand, fx.Node):
        return operand
    if operand.target is aten.sym_size.int:
        source, axis = operand.args
        return kept.count(kept.traced.of(source)[axis])  # type: ignore[arg-type, index]
    return operand.target(*(_number(kept, argument) for argument in operand.args))  # type: ignore[operator]


def _scaled(twin: fx.Node, computed: fx.Node, part: Fraction) -> fx.Node:
    """A size that is computed, as the batch times the heads, when only a part of one factor stays."""
    if part == 1:
        return computed
    with twin.graph.inserting_before(twin):
        times = twin.graph.call_function(operator.mul, (computed, part.numerator))
        return twin.graph.call_function(operator.floordiv, (times, part.denominator))


def _pieces(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    """Cut where the kept indices of each piece end."""
    given = edit.arguments(node)
    axis = int(given["dim"]) % len(kept.traced.axes[node.args[0]])  # type: ignore[index]
    readers = [user for user in node.users if user.op == "call_function"]
    if kept.is_whole(tree := kept.traced.of(node.args[0])[axis]):  # type: ignore[arg-type]
        return
    counts = {int(user.args[1]): kept.count(kept.traced.of(user)[axis]) for user in readers}  # type: ignore[arg-type]
    before = [value.shape[axis] for value in kept.traced.values[node]]
    sizes = [int(piece.sum()) for piece in torch.split(kept.mask(tree), before)]
    assert all(sizes[index] == count for index, count in counts.items())
    if sizes != before:
        twin.target = aten.split_with_sizes.default
        twin.args = (twin.args[0], sizes, axis)
        twin.kwargs = {}


def _slice(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    """The same indices, where they stand now; of a slice in steps whole steps go."""
    given = edit.arguments(node)
    source: Any = node.args[0]
    axis = int(given.get("dim") or 0) % len(kept.traced.axes[source])
    if kept.is_whole(tree := kept.traced.of(source)[axis]):
        return
    keep = kept.mask(tree)
    size = len(keep)
    start = given.get("start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    if (given.get("step") or 1) > 1:
        _set(twin, "start", start)
        _set(twin, "end", int(keep.sum()))
        return
    part: Any = node.args[1] if node.target is aten.slice_scatter.default else node
    count = kept.traced.values[part].shape[axis]
    first = int(keep[:start].sum())
    if node.target is aten.narrow.default:
        _set(twin, "start", first)
        _set(twin, "length", int(keep[start : start + count].sum()))
    else:
        _set(twin, "start", first)
        _set(twin, "end", first + int(keep[start : start + count].sum()))


def _groups_of_convolution(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    given = edit.arguments(node)
    groups = int(given["groups"])
    if groups == 1:
        return
    weight: Any = node.args[1]
    axis = kept.traced.of(weight)[0]
    outer, _ = factor_inner(axis, size_of(axis) // groups)
    _set(twin, "groups", kept.count(outer))


def _groups_of_norm(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    groups = int(edit.arguments(node)["num_groups"])
    axis = kept.traced.of(node)[1]
    outer, _ = factor_inner(axis, size_of(axis) // groups)
    _set(twin, "num_groups", kept.count(outer))


def _groups_of_shuffle(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    groups = int(edit.arguments(node)["groups"])
    source: Any = node.args[0]
    axis = kept.traced.of(source)[1]
    outer, _ = factor_inner(axis, size_of(axis) // groups)
    _set(twin, "groups", kept.count(outer))


def _choose(kept: Kept, shuffle: Shuffle, pruned: Program, twins: dict[fx.Node, fx.Node]) -> None:
    """Say index by index what stands where in a shuffled axis that is no product any more."""
    if kept.is_whole(tree := kept.traced.of(shuffle.source)[shuffle.axis]):
        return
    keep = kept.mask(tree)
    order = torch.tensor(shuffle.order)
    places = keep.cumsum(0) - 1
    end = twins[shuffle.end]
    name = unused(f"{value_of(end)}_order", edit.tensor_names(pruned.graph_module))
    chosen = edit.read_tensor(pruned, name, places[order[keep[order]]], before=end)
    with pruned.graph.inserting_before(end):
        made = pruned.graph.call_function(aten.index_select.default, (twins[shuffle.source], shuffle.axis, chosen))
    set_names(made, layer=layer_of(end), value=value_of(end))
    end.replace_all_uses_with(made)
    pruned.graph.erase_node(end)
    twins[shuffle.end] = made


def _normalized_shape(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    count = len(edit.arguments(node)["normalized_shape"])
    _set(twin, "normalized_shape", _result_sizes(kept, node)[-count:])


def _scale(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    """Attention divides by the root of the width unless it is told otherwise: by that of the original."""
    query: Any = node.args[0]
    axis = kept.traced.of(query)[-1]
    if edit.arguments(node).get("scale") is None and kept.count(axis) != size_of(axis):
        _set(twin, "scale", 1.0 / math.sqrt(size_of(axis)))


def _padding(kept: Kept, node: fx.Node, twin: fx.Node) -> None:
    """How many channels of zeros stay on either side."""
    channels, given = kept.traced.of(node)[1], edit.arguments(node)
    amounts: list[Any] = list(given["pad"])
    place = 2 * (len(kept.traced.of(node)) - 2)
    if len(amounts) <= place or kept.is_whole(channels):
        return
    stays, (before, after) = kept.mask(channels), amounts[place : place + 2]
    amounts[place : place + 2] = int(stays[:before].sum()), int(stays[len(stays) - after :].sum())
    _set(twin, "pad", amounts)


_REWRITES: Mapping[Any, _Rewrite] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int),
                *(aten.expand.default, aten.broadcast_to.default, aten.zeros.default, aten.ones.default),
                *(
                    aten.full.default,
                    aten.new_zeros.default,
                    aten.new_ones.default,
                    aten.new_full.default,
                    aten.empty.memory_format,
                ),
            ),
            _sizes,
        ),
        **dict.fromkeys(
            (
                *(aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default),
                *(aten.tensor_split.indices, aten.tensor_split.sections),
            ),
            _pieces,
        ),
        aten.slice.Tensor: _slice,
        aten.narrow.default: _slice,
        aten.slice_scatter.default: _slice,
        **dict.fromkeys(
            (
                *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding),
                *(aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default),
                *(aten.conv_transpose2d.input, aten.conv_transpose3d.input),
            ),
            _groups_of_convolution,
        ),
        aten.constant_pad_nd.default: _padding,
        aten.pad.default: _padding,
        aten.group_norm.default: _groups_of_norm,
        aten.channel_shuffle.default: _groups_of_shuffle,
        aten.layer_norm.default: _normalized_shape,
        aten.rms_norm.default: _normalized_shape,
        aten.scaled_dot_product_attention.default: _scale,
    }
)
"""What to do about the sizes in the arguments of each operator."""
