"""Put the indices of groups into another order, which changes no output."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, ProgramError, closest
from slimgraph.program.program import HistoryEntry, Program, require_program
from slimgraph.pruning.apply import slice_tensors
from slimgraph.pruning.axes import Atom, Cat, Pick, Prod, Tree, resolved, size_of
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.kept import Kept
from slimgraph.pruning.plan import PruningPlan
from slimgraph.pruning.prove import TOLERANCE, largest_difference


def reorder(
    program: Program, order: Mapping[str, Sequence[int]], *, proof: bool = True, groups: Groups | None = None
) -> Program:
    """The program whose index i of a group is index order[i] of the one given; it computes the same.

    Args:
        order: by group name, each index of the group once.
        proof: compute, in float64, that the outputs are those of the program, to 1e-9 of their range.
        groups: of this very program, where they are at hand.
    Raises:
        ConfigError: there is no such group, or an order is none.
        ProgramError: the program is none, its indices have places in a fixed order, or the proof fails.
    """
    require_program(program)
    found = groups if groups is not None else find_groups(program)
    checked = {name: _checked(found, name, indices) for name, indices in order.items()}
    orders = {found.atoms[name]: indices for name, indices in checked.items()}
    tensors: dict[str, dict[int, tuple[int, ...]]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        if node in found.traced.axes and edit.constant_of(program.graph_module, node) is not None:
            for axis, tree in enumerate(found.traced.of(node)):
                places = _reordered(tree, orders)
                if places.tolist() != list(range(len(places))):
                    tensors.setdefault(str(node.target), {})[axis] = tuple(places.tolist())
    result = program.copy()
    slice_tensors(result, tensors)
    result = result.with_history(HistoryEntry(step="reorder", parameters={"groups": [*order]}))
    if proof:
        apart = largest_difference(program, result, Kept(found, PruningPlan(groups=())))
        if apart > TOLERANCE:
            raise ProgramError(
                f"The reordered program differs from the one given by {apart:.1e} of its outputs' range, where "
                f"rounding stays below {TOLERANCE:.0e}. This is a fault in how slimgraph follows the program's axes: "
                "leave groups out until the proof holds, and report it."
            )
    return result


def _checked(groups: Groups, name: str, indices: Sequence[int]) -> Tensor:
    if name not in groups.atoms:
        raise ConfigError(f"The program has no group {name!r}. {closest(name, groups.atoms)}")
    size = groups[name].size
    if sorted(indices) != list(range(size)):
        raise ConfigError(f"The order of the group {name!r} has to name each of its indices, 0 to {size - 1}, once.")
    return torch.tensor(indices)


def _reordered(tree: Tree, orders: Mapping[Atom, Tensor]) -> Tensor:
    """For each index of the new axis the one that comes there."""
    tree = resolved(tree)
    match tree:
        case Atom():
            return orders[tree] if tree in orders else torch.arange(tree.size)
        case Cat(parts):
            starts = [sum(map(size_of, parts[:number])) for number in range(len(parts))]
            return torch.cat([_reordered(part, orders) + start for part, start in zip(parts, starts, strict=True)])
        case Prod(parts):
            result = torch.zeros(1, dtype=torch.int64)
            for part in parts:
                result = (result[:, None] * size_of(part) + _reordered(part, orders)[None, :]).flatten()
            return result
        case Pick(atom, indices):
            if atom in orders:
                raise ProgramError(
                    f"A group of {atom.size} indices is shuffled one by one in the program, and so has a fixed order."
                )
            return torch.arange(len(indices))
