"""A program in which indices of one group are not read, as a variant of the whole one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.program import Program
from slimgraph.program.replay import Variant
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.kept import Kept
from slimgraph.pruning.plan import PrunedGroup, PruningPlan
from slimgraph.pruning.prove import sums_over_axes

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
        node: reading
        for node in groups.traced.program.graph.nodes
        if sums_over_axes(node) and (reading := _reading(kept, node)) is not None
    }
    return Variant(start=next(iter(instead)), instead=instead) if instead else None


def _reading(kept: Kept, node: fx.Node) -> "_Zeroed | None":
    operands: list[fx.Node] = node.all_input_nodes
    weight: Any = node.args[1]
    if node.target in _WEIGHTED and weight in kept.traced.axes:
        keep = kept.masks(weight)[1]
        return None if bool(keep.all()) else _Zeroed({weight: {1: keep}})
    zeros = {
        operand: {axis: keep for axis, keep in enumerate(kept.masks(operand)) if not bool(keep.all())}
        for operand in operands
        if operand in kept.traced.axes
    }
    found = {operand: axes for operand, axes in zeros.items() if axes}
    return _Zeroed(found) if found else None


@dataclass(frozen=True, slots=True)
class _Zeroed:
    """Calls an operator with zeros at the indices of its operands that do not stay."""

    operands: Mapping[fx.Node, Mapping[int, Tensor]]
    """Which indices stay, by operand and axis."""

    def __call__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return node.target(*self._zeroed(node.args, args), **kwargs)  # type: ignore[operator]

    def _zeroed(self, operand: Any, value: Any) -> Any:
        if isinstance(operand, (list, tuple)):
            return [self._zeroed(each, one) for each, one in zip(operand, value, strict=True)]
        if isinstance(operand, fx.Node) and isinstance(value, Tensor) and value.is_floating_point():
            for axis, keep in self.operands.get(operand, {}).items():
                shape = [-1 if other == axis else 1 for other in range(value.dim())]
                value = value * keep.to(value).reshape(shape)
        return value
