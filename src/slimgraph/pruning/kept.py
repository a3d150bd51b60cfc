"""Which indices stay, of groups and of everything that is made of them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.pruning.axes import Atom, Cat, Prod, Tree, atoms, mask, resolved
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.plan import PrunedGroup, PruningPlan
from slimgraph.pruning.trace import BATCH


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

    def mask(self, tree: Tree, *, batch: int = BATCH) -> Tensor:
        """Which indices of an axis stay, as bool[size], with `batch` samples where these are a part of it."""
        whole = {
            atom: torch.ones(atom.size // BATCH * batch, dtype=torch.bool)
            for atom in atoms(tree)
            if batch != BATCH and atom.size % BATCH == 0
        }
        return mask(tree, {**self.atoms, **whole} if whole else self.atoms)

    def is_whole(self, tree: Tree) -> bool:
        """Whether all indices of an axis stay."""
        return not any(atom in self.atoms for atom in atoms(tree))

    def count(self, tree: Tree) -> int:
        """How many indices of an axis stay, which may be a long one, with the batch as a factor."""
        match resolved(tree):
            case Prod(parts):
                return math.prod(map(self.count, parts))
            case Cat(parts):
                return sum(map(self.count, parts))
            case Atom(size=size) as atom if atom not in self.atoms:
                return size
            case leaf:
                return int(self.mask(leaf).sum())

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
            for axis, tree in enumerate(self.traced.of(node)):
                if not self.is_whole(tree):
                    indices = self.mask(tree).nonzero().flatten().tolist()
                    found.setdefault(str(node.target), {})[axis] = tuple(indices)
        return found
