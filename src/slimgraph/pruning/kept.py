"""Which indices stay, of groups and of everything that is made of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.pruning.axes import Atom, Tree, mask
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.plan import PrunedGroup, PruningPlan


def plan_removal(groups: Groups, removed: Mapping[str, tuple[int, ...]], *, norm_axes: bool = False) -> PruningPlan:
    """The plan that removes these indices, by group name, and what it means for each tensor.

    Raises:
        ConfigError: a group has no such index, or would lose all.
    """
    names = {group.name: group for group in groups.groups}
    for name in removed:
        if name not in names:
            raise ConfigError(f"The program has no group {name!r}. {closest(name, names)}")
    pruned = tuple(
        PrunedGroup(name=name, size=names[name].size, removed=tuple(sorted(indices)))
        for name, indices in removed.items()
        if indices
    )
    plan = PruningPlan(groups=pruned, norm_axes=norm_axes)
    found = Kept(groups, plan)
    return PruningPlan(groups=pruned, kept=found.of_tensors(), norm_axes=norm_axes)


class Kept:
    """What stays of every axis of a program, by a plan."""

    def __init__(self, groups: Groups, plan: PruningPlan) -> None:
        self.traced = groups.traced
        sizes = {group.name: group.size for group in groups.groups}
        self.atoms: dict[Atom, Tensor] = {}
        for pruned in plan.groups:
            if sizes.get(pruned.name) != pruned.size:
                raise ConfigError(
                    f"The plan prunes the group {pruned.name!r} of {pruned.size} indices, which this program does not "
                    f"have. {closest(pruned.name, sizes)} Apply it to the program that it was made for."
                )
            keep = torch.ones(pruned.size, dtype=torch.bool)
            keep[list(pruned.removed)] = False
            self.atoms[groups.atoms[pruned.name]] = keep

    def mask(self, tree: Tree) -> Tensor:
        """Which indices of an axis stay, as bool[size]."""
        return mask(tree, self.atoms)

    def count(self, tree: Tree) -> int:
        """How many indices of an axis stay."""
        return int(self.mask(tree).sum())

    def masks(self, node: fx.Node) -> list[Tensor]:
        """Which indices of each axis of a value stay."""
        return [self.mask(tree) for tree in self.traced.of(node)]

    def of_tensors(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """The indices that stay, by tensor and axis; what stays whole is left out."""
        found: dict[str, dict[int, tuple[int, ...]]] = {}
        program = self.traced.program
        for node in program.graph.find_nodes(op="get_attr"):
            if node not in self.traced.axes or edit.constant_of(program.graph_module, node) is None:
                continue
            for axis, keep in enumerate(self.masks(node)):
                if not bool(keep.all()):
                    found.setdefault(str(node.target), {})[axis] = tuple(keep.nonzero().flatten().tolist())
        return found
