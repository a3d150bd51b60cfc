"""Factored axes: what an axis of a value is made of, and which axes share what they are made of.

An axis is a tree. Its leaves are atoms; `Prod` is a product, written from the slowest to the fastest factor, as a
row-major reshape makes one axis of several; `Cat` is a concatenation. Operators that let two axes be one unify their
trees, and an atom that turns out to be a product or a concatenation is bound to it wherever it stands. What remains in
the end are the atoms whose indices live and die together, through every reshape, residual and concatenation.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Atom:
    """A part of an axis that nothing has taken apart yet."""

    size: int
    bound: "Tree | None" = None
    """What the atom turned out to be; it then stands for that everywhere."""
    pins: set[str] = field(default_factory=set)
    """Why its indices must all stay."""

    def __repr__(self) -> str:
        return f"Atom({self.size})" if self.bound is None else repr(self.bound)


@dataclass(frozen=True, slots=True)
class Prod:
    """A row-major product of axes, the slowest first."""

    parts: tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Cat:
    """Axes one behind the other."""

    parts: tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """Some indices of an atom, in an order of their own; what units become once it is known which go together."""

    atom: Atom
    indices: tuple[int, ...]


Tree: TypeAlias = Atom | Prod | Cat | Pick


class MixedRadixError(Exception):
    """Two axes have no common refinement: eight times three indices against three times eight."""


def size_of(tree: Tree) -> int:
    """Number of indices."""
    match tree:
        case Atom(size=size):
            return size
        case Prod(parts):
            return math.prod(map(size_of, parts))
        case Cat(parts):
            return sum(map(size_of, parts))
        case Pick(indices=indices):
            return len(indices)


def product(*trees: Tree) -> Tree:
    """One axis of several, the slowest first; factors of one index are left out, and so that index has to stay."""
    parts: list[Tree] = []
    for tree in map(resolved, trees):
        if isinstance(tree, Prod):
            parts += tree.parts
        elif size_of(tree) != 1:
            parts.append(tree)
        else:
            pin(tree, "a factor of one index")
    return parts[0] if len(parts) == 1 else Prod(tuple(parts)) if parts else Atom(1)


def concatenation(*trees: Tree) -> Tree:
    """Axes one behind the other; empty ones are left out, and one of a single index stays."""
    parts: list[Tree] = []
    for tree in map(resolved, trees):
        for part in tree.parts if isinstance(tree, Cat) else (tree,):
            last = parts[-1] if parts else None
            if isinstance(part, Pick) and isinstance(last, Pick) and part.atom is last.atom:
                parts[-1] = Pick(part.atom, last.indices + part.indices)
            elif size_of(part):
                parts.append(part)
    return parts[0] if len(parts) == 1 else Cat(tuple(parts)) if parts else Atom(0)


def resolved(tree: Tree) -> Tree:
    """The tree with every bound atom replaced by what it is, products and concatenations flat."""
    match tree:
        case Atom(bound=None):
            return tree
        case Atom(bound=bound):
            assert bound is not None
            tree.bound = resolved(bound)  # later walks are short
            return tree.bound
        case Prod(parts):
            return product(*parts)
        case Cat(parts):
            return concatenation(*parts)
        case Pick():
            return tree


def atoms(tree: Tree) -> Iterator[Atom]:
    """The leaves, from left to right; one that stands twice comes twice."""
    tree = resolved(tree)
    match tree:
        case Atom():
            yield tree
        case Pick(atom):
            yield atom
        case Prod(parts) | Cat(parts):
            for part in parts:
                yield from atoms(part)


def pin(tree: Tree, reason: str) -> None:
    """Let all indices of an axis stay, and say why."""
    for atom in atoms(tree):
        atom.pins.add(reason)


def is_pinned(tree: Tree) -> bool:
    """Whether some index of an axis has to stay by now, for whatever reason."""
    return any(atom.pins for atom in atoms(tree))


def unify(left: Tree, right: Tree) -> bool:
    """Let two axes of equal size be one; where they have no common refinement both are pinned. Returns success."""
    try:
        _unify(left, right)
    except MixedRadixError:
        pin(left, "mixed radix")
        pin(right, "mixed radix")
        return False
    return True


def _unify(left: Tree, right: Tree) -> None:
    left, right = resolved(left), resolved(right)
    if left is right or left == right:
        return
    if size_of(left) != size_of(right):
        raise MixedRadixError(f"{size_of(left)} indices against {size_of(right)}")
    match left, right:
        case Atom(), _:
            _bind(left, right)
        case _, Atom():
            _bind(right, left)
        case Cat(), Cat():
            _unify_from_left(left, right)
        case Prod(), Prod():
            _unify_from_right(left, right)
        case Cat(), Prod():
            _unify_factored(left, right)
        case Prod(), Cat():
            _unify_factored(right, left)


def _bind(atom: Atom, tree: Tree) -> None:
    if any(leaf is atom for leaf in atoms(tree)):
        raise MixedRadixError("an axis would be a part of itself")
    atom.bound = tree
    for reason in atom.pins:
        pin(tree, reason)


def _unify_from_left(left: Cat, right: Cat) -> None:
    ends = sorted({end for tree in (left, right) for end in accumulate(map(size_of, tree.parts))})
    sizes = [end - start for start, end in pairwise((0, *ends))]
    for ours, theirs in zip(cut(left, sizes), cut(right, sizes), strict=True):
        _unify(ours, theirs)


def _unify_from_right(left: Prod, right: Prod) -> None:
    # A factor is taken off both ends as long as one of the two fastest factors divides the other.
    ours: Tree = left
    theirs: Tree = right
    while size_of(ours) > 1:
        common = math.gcd(size_of(_fastest(ours)), size_of(_fastest(theirs)))
        if common == 1:
            raise MixedRadixError(f"factors of {size_of(_fastest(ours))} and {size_of(_fastest(theirs))}")
        ours, mine = factor_inner(ours, common)
        theirs, other = factor_inner(theirs, common)
        _unify(mine, other)


def _fastest(tree: Tree) -> Tree:
    tree = resolved(tree)
    return tree.parts[-1] if isinstance(tree, Prod) else tree


def _unify_factored(left: Cat, right: Prod) -> None:
    inner = size_of(right.parts[-1])
    outer, fastest = factor_inner(left, inner)
    _unify(fastest, right.parts[-1])
    _unify(outer, product(*right.parts[:-1]))


def split(tree: Tree, count: int) -> tuple[Tree, Tree]:
    """The first `count` indices and the rest, 0 < count < size.

    Raises:
        MixedRadixError: the cut would lie inside an inner factor of a product.
    """
    first, rest = cut(tree, (count, size_of(tree) - count))
    return first, rest


def cut(tree: Tree, sizes: Sequence[int]) -> list[Tree]:
    """Pieces of these sizes, which are positive and sum to that of the axis.

    Raises:
        MixedRadixError: a cut would lie inside an inner factor of a product.
    """
    tree = resolved(tree)
    if len(sizes) == 1:
        return [tree]
    match tree:
        case Atom():
            pieces: list[Tree] = [Atom(size) for size in sizes]
            _bind(tree, Cat(tuple(pieces)))
            return pieces
        case Prod(parts):
            inner = product(*parts[1:])
            block = size_of(inner)
            if any(size % block for size in sizes):
                raise MixedRadixError(f"cuts into {list(sizes)} in blocks of {block}")
            return [product(piece, inner) for piece in cut(parts[0], [size // block for size in sizes])]
        case Cat(parts):
            ends = list(accumulate(sizes))
            made: list[list[Tree]] = [[] for _ in sizes]
            start = 0
            for part in parts:
                end = start + size_of(part)
                inside = [start, *(each for each in ends if start < each < end), end]
                for piece, (low, _) in zip(
                    cut(part, [b - a for a, b in pairwise(inside)]), pairwise(inside), strict=True
                ):
                    made[bisect_right(ends, low)].append(piece)
                start = end
            return [concatenation(*pieces) for pieces in made]
        case Pick():
            raise MixedRadixError("the axes are told already")


def factor_inner(tree: Tree, count: int) -> tuple[Tree, Tree]:
    """The axis as a product of two: an outer and a fastest factor of `count` indices.

    Raises:
        MixedRadixError: it is no such product.
    """
    tree = resolved(tree)
    if size_of(tree) == count:
        return Atom(1), tree
    if count == 1:
        return tree, Atom(1)
    if size_of(tree) % count:
        raise MixedRadixError(f"{size_of(tree)} indices in blocks of {count}")
    match tree:
        case Atom():
            outer, inner = Atom(tree.size // count), Atom(count)
            _bind(tree, Prod((outer, inner)))
            return outer, inner
        case Prod(parts):
            last, others = parts[-1], product(*parts[:-1])
            if size_of(last) % count == 0:
                rest, fastest = factor_inner(last, count)
                return product(others, rest), fastest
            if count % size_of(last) == 0:
                rest, fastest = factor_inner(others, count // size_of(last))
                return rest, product(fastest, last)
            raise MixedRadixError(f"blocks of {count} in blocks of {size_of(last)}")
        case Cat(parts):
            if any(size_of(part) % count for part in parts):
                return _blocks(tree, count)
            pieces = [factor_inner(part, count) for part in parts]
            shared = pieces[0][1]
            for _, fastest in pieces[1:]:
                _unify(fastest, shared)
            for segment, _ in pieces:
                if size_of(segment) == 1:
                    pin(segment, "a factor of one index")
            return concatenation(*(outer for outer, _ in pieces)), resolved(shared)
        case Pick():
            raise MixedRadixError("the axes are told already")


def _blocks(tree: Cat, count: int) -> tuple[Tree, Tree]:
    """Blocks that start within the segments: they stay as many, and of each the same indices stay."""
    number = size_of(tree) // count
    first, *others = cut(tree, [count] * number)
    for block in others:
        _unify(block, first)
    outer = Atom(number)
    pin(outer, "blocks across a concatenation")
    return outer, resolved(first)


def reordered(tree: Tree, order: Sequence[int]) -> Tree:
    """An axis whose index i is index order[i] of this one; every index is then by itself, wherever it stands."""
    parts = _units(tree)
    return concatenation(*(parts[index] for index in order))


def _units(tree: Tree) -> list[Tree]:
    """Every index as an atom of its own; of a product, all factors but the largest that is free are pinned."""
    tree = resolved(tree)
    match tree:
        case Atom(size=1):
            return [tree]
        case Atom():
            parts: list[Tree] = [Atom(1) for _ in range(tree.size)]
            _bind(tree, Cat(tuple(parts)))
            return parts
        case Cat(pieces):
            return [unit for piece in pieces for unit in _units(piece)]
        case Prod(factors):
            places = range(len(factors))
            free = max(places, key=lambda place: (not is_pinned(factors[place]), size_of(factors[place])))
            for place in places:
                if place != free:
                    pin(factors[place], "reordered")
            inner = math.prod(map(size_of, factors[free + 1 :]))
            units = _units(factors[free])
            return [units[index // inner % len(units)] for index in range(size_of(tree))]
        case Pick():
            raise MixedRadixError("the axes are told already")


def regroup(axes: Sequence[Tree], shape: Sequence[int]) -> list[Tree]:
    """The axes of a row-major reshape to `shape`: what each new axis is made of.

    Axes whose sizes multiply to the same are matched in the smallest groups; within one the products are unified. Axes
    of one index belong to no group: a new one is made of nothing that was there.
    """
    fresh: list[Tree] = [Atom(size) for size in shape]
    waiting = [tree for tree in axes if size_of(tree) != 1]
    new: list[Tree] = []
    old: list[Tree] = []
    for tree in fresh:
        if size_of(tree) == 1:
            continue
        new.append(tree)
        while waiting and math.prod(map(size_of, old)) < math.prod(map(size_of, new)):
            old.append(waiting.pop(0))
        if math.prod(map(size_of, old)) == math.prod(map(size_of, new)):
            unify(product(*new), product(*old))
            new, old = [], []
    for tree in (*new, *old, *waiting):
        pin(tree, "mixed radix")
    return [resolved(tree) for tree in fresh]


def mask(tree: Tree, keep: Mapping[Atom, Tensor]) -> Tensor:
    """Which indices of an axis stay, as bool[size], if of some atoms only these do."""
    tree = resolved(tree)
    match tree:
        case Atom():
            return keep[tree] if tree in keep else torch.ones(tree.size, dtype=torch.bool)
        case Cat(parts):
            return torch.cat([mask(part, keep) for part in parts])
        case Pick(atom, indices):
            return mask(atom, keep)[list(indices)]
        case Prod(parts):
            result = torch.ones(1, dtype=torch.bool)
            for part in parts:
                result = (result[:, None] & mask(part, keep)[None, :]).flatten()
            return result
