"""A program in which indices of one group are not read, as a variant of the whole one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.program import Program
from slimgraph.program.replay import Instead, Variant
from slimgraph.pruning.axes import Tree, size_of
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.kept import Kept
from slimgraph.pruning.kept_norms import norm_of_kept, takes_statistics
from slimgraph.pruning.plan import PrunedGroup, PruningPlan
from slimgraph.pruning.prove import sums_over_axes
from slimgraph.pruning.trace import BATCH

aten = torch.ops.aten

_CONVOLUTIONS_2D = (aten.conv2d.default, aten.conv2d.padding)
_WEIGHTED = frozenset(
    {
        *(aten.conv1d.default, aten.conv1d.padding, *_CONVOLUTIONS_2D, aten.conv3d.default, aten.conv3d.padding),
        aten.linear.default,
    }
)
"""Operators that sum over axis 1 of their weight and make axis 0 of it: one that is pruned there computes the rest."""


def made_quick(program: Program, *, fold: bool = True) -> Program:
    """The program in a form that runs faster: batch norms folded, and the channels of pictures in the last place.

    It computes the same, up to rounding, and its parameters keep their names.
    """
    quick = (fold_batch_norm(program) if fold else program.copy()).eval()
    convolutions = [node for node in quick.graph.nodes if node.target in _CONVOLUTIONS_2D]
    if not convolutions:
        return quick
    for node in quick.graph.nodes:
        if node.target is aten.view.default:  # which would need the channels in their old place
            node.target = aten.reshape.default
    for node in convolutions:
        if (weight := edit.constant_of(quick.graph_module, node.args[1])) is not None:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    quick.graph_module.recompile()
    return quick


def quick_inputs(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs as a program reads them the fastest that `made_quick` gave."""
    has_pictures = any(node.target in _CONVOLUTIONS_2D for node in program.graph.nodes)
    return {
        name: x.contiguous(memory_format=torch.channels_last) if has_pictures and x.dim() == 4 else x
        for name, x in inputs.items()
    }


def variant_without(groups: Groups, group: str, removed: tuple[int, ...]) -> Variant | None:
    """The program without some indices of a group, begun where they would first be read; None where nobody reads them.

    Nothing becomes smaller: whoever would sum over the indices finds zeros, which is the same function. So everything
    before the first reader is shared with the whole program, the layer too that makes the indices.
    """
    pruned = PrunedGroup(name=group, size=groups[group].size, removed=removed)
    kept = Kept(groups, PruningPlan(groups=(pruned,)))
    instead = {
        node: reading for node in groups.traced.program.graph.nodes if (reading := _reading(kept, node)) is not None
    }
    return Variant(start=next(iter(instead)), instead=instead) if instead else None


def _reading(kept: Kept, node: fx.Node) -> Instead | None:
    """How an operator that sums, or a norm, is computed without the indices; None where it reads none of them."""
    if takes_statistics(node):
        axes = _pruned_axes(kept, node.args[0])
        return _Normed(kept, axes) if axes else None
    if not sums_over_axes(node):
        return None
    weight: Any = node.args[1]
    if node.target in _WEIGHTED and weight in kept.traced.axes:
        axes = {axis: tree for axis, tree in _pruned_axes(kept, weight).items() if axis == 1}
        return _Zeroed(kept, {weight: axes}) if axes else None
    found = {operand: axes for operand in node.all_input_nodes if (axes := _pruned_axes(kept, operand))}
    return _Zeroed(kept, found) if found else None


def _pruned_axes(kept: Kept, operand: Any) -> dict[int, Tree]:
    if operand not in kept.traced.axes:
        return {}
    return {axis: tree for axis, tree in enumerate(kept.traced.of(operand)) if not kept.is_whole(tree)}


def _masks(kept: Kept, axes: Mapping[int, Tree], value: Tensor) -> dict[int, Tensor]:
    """Which indices of a value stay, with as many samples as it has."""
    return {axis: kept.mask(tree, batch=BATCH * value.shape[axis] // size_of(tree)) for axis, tree in axes.items()}


@dataclass(frozen=True, slots=True)
class _Zeroed:
    """Calls an operator with zeros at the indices of its operands that do not stay."""

    kept: Kept
    operands: Mapping[fx.Node, Mapping[int, Tree]]
    """By operand, what the axes are made of of which indices go."""

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node.target(*self._zeroed(node.args, args), **kwargs)  # type: ignore[operator]

    def _zeroed(self, operand: Any, value: Any) -> Any:
        if isinstance(operand, (list, tuple)):
            return [self._zeroed(each, one) for each, one in zip(operand, value, strict=True)]
        if isinstance(operand, fx.Node) and isinstance(value, Tensor) and value.is_floating_point():
            for axis, keep in _masks(self.kept, self.operands.get(operand, {}), value).items():
                shape = [-1 if other == axis else 1 for other in range(value.dim())]
                value = value * keep.to(value).reshape(shape)
        return value


@dataclass(frozen=True, slots=True)
class _Normed:
    """Computes a norm of the indices that stay."""

    kept: Kept
    axes: Mapping[int, Tree]
    """Of its input."""

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = edit.named_arguments(node, args, kwargs)
        return norm_of_kept(node.target, given, _masks(self.kept, self.axes, given["input"]))
