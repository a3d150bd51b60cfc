"""The slices of tensors that belong to each index of a group."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import slimgraph.program.edit as edit
from slimgraph.pruning.axes import Atom, Cat, Pick, Prod, Tree, resolved, size_of
from slimgraph.pruning.groups import Group, Groups


def owners(tree: Tree, atom: Atom) -> Tensor:
    """For each index of an axis the index of the atom that it goes with, as int64[size]; -1 where it goes with none.

    In a product that has the atom twice, the slower of the two decides.
    """
    tree = resolved(tree)
    match tree:
        case Atom():
            return torch.arange(tree.size) if tree is atom else torch.full((tree.size,), -1)
        case Cat(parts):
            return torch.cat([owners(part, atom) for part in parts])
        case Pick(picked, indices):
            return torch.tensor(indices) if picked is atom else torch.full((len(indices),), -1)
        case Prod(parts):
            result = torch.full((1,), -1)
            for part in parts:
                inner = owners(part, atom)
                result = torch.where(result[:, None] >= 0, result[:, None], inner[None, :]).flatten()
            return result


def rows_of(tensor: Tensor, axis: int, owner: Tensor) -> Tensor:
    """One row for each index of a group: all elements of the tensor that go with it.

    Args:
        owner: as `owners` gives it for that axis; every index owns equally many places.
    """
    places = (owner >= 0).nonzero().flatten()
    order = places[torch.sort(owner[places], stable=True).indices]
    count = int(owner.max()) + 1
    return tensor.movedim(axis, 0)[order.to(tensor.device)].reshape(count, -1)


def group_owners(groups: Groups, group: Group) -> dict[str, Tensor]:
    """`owners` for each parameter of a group that is trained, by "parameter:axis"; buffers are left out."""
    traced = groups.traced
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for member in group.members:
        tensor = edit.tensor_named(traced.program.graph_module, member.parameter)
        if not isinstance(tensor, nn.Parameter):
            continue
        key = (id(tensor), member.axis)
        if key in seen:
            continue  # tied, under another name
        seen.add(key)
        tree = traced.of(traced.stored[member.parameter])[member.axis]
        assert size_of(tree) == member.size
        found[f"{member.parameter}:{member.axis}"] = owners(tree, groups.atoms[group.name])
    return found


def sliced(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The part of a tensor that stays, by axis."""
    for axis, indices in kept.items():
        tensor = tensor.index_select(axis, torch.tensor(indices, device=tensor.device))
    return tensor
