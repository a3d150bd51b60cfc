"""Find the reshapes that bring the indices of an axis into another order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.pruning.axes import Prod, Tree, is_pinned, reordered

aten = torch.ops.aten

_JOINING = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints})
_COPIES = frozenset({aten.contiguous.default, aten.clone.default})
_MOVES = frozenset({aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """A value that is another with the indices of one axis in another order."""

    source: fx.Node
    end: fx.Node
    axis: int
    order: tuple[int, ...]
    """Index i is index order[i] of the source."""


def shuffle_from(apart: fx.Node, values: Mapping[fx.Node, Any]) -> Shuffle | None:
    """The shuffle that begins at a reshape: an axis taken apart, its factors permuted, and put together again."""
    source: Any = apart.args[0]
    whole, factors = list(values[source].shape), list(values[apart].shape)
    extra = len(factors) - len(whole)
    moved = _only_reader(apart)
    end = None if moved is None else _only_reader(moved)
    if extra < 1 or moved is None or end is None or moved.target not in _MOVES or end.target not in _JOINING:
        return None
    if list(values[end].shape) != whole:
        return None
    order = _order(moved, len(factors))
    for axis in range(len(whole)):
        behind = axis + extra + 1
        is_taken_apart = factors[:axis] + factors[behind:] == whole[:axis] + whole[axis + 1 :]
        stays = [*range(axis), *range(behind, len(factors))]
        if is_taken_apart and all(order[place] == place for place in stays):
            inside = [place - axis for place in order[axis:behind]]
            indices = torch.arange(whole[axis]).reshape(factors[axis:behind]).permute(inside).flatten()
            return Shuffle(source=source, end=end, axis=axis, order=tuple(indices.tolist()))
    return None


def is_loose(tree: Tree) -> bool:
    """Whether an axis has no factors, as those of a grouped convolution, which tell more of it than an order does."""
    return not isinstance(tree, Prod) and not is_pinned(tree)


def shuffled(axes: Sequence[Tree], shuffle: Shuffle) -> list[Tree]:
    """The axes of a shuffled value by those of its source."""
    order = reordered(axes[shuffle.axis], shuffle.order)
    return [*axes[: shuffle.axis], order, *axes[shuffle.axis + 1 :]]


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one operator that reads a value, copies of it left aside."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return _only_reader(reader) if reader.target in _COPIES else reader


def _order(moved: fx.Node, rank: int) -> list[int]:
    given = edit.arguments(moved)
    order = list(range(rank))
    if "dims" in given:
        return [int(dim) % rank for dim in given["dims"]]
    first, second = (int(dim) % rank for name, dim in given.items() if name[-1] in "01")
    order[first], order[second] = order[second], order[first]
    return order
