"""The algebra of factored axes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimgraph.pruning.axes import (
    Atom,
    Cat,
    MixedRadixError,
    Prod,
    atoms,
    concatenation,
    factor_inner,
    mask,
    pin,
    product,
    regroup,
    reordered,
    resolved,
    size_of,
    split,
    unify,
)


def test_products_and_concatenations_are_flat_and_leave_out_what_adds_nothing():
    a, b, one = Atom(2), Atom(3), Atom(1)
    assert product(product(a, one), b) == Prod((a, b))
    assert product(one, a) is a
    assert concatenation(concatenation(a, Atom(0)), one, b) == Cat((a, one, b))
    assert size_of(product(a, concatenation(a, b))) == 10


def test_an_atom_that_is_taken_apart_is_apart_wherever_it_stands():
    a = Atom(6)
    elsewhere = product(Atom(2), a)
    outer, inner = factor_inner(a, 3)
    assert resolved(elsewhere) == Prod((elsewhere.parts[0], outer, inner))
    assert [size_of(part) for part in resolved(a).parts] == [2, 3]


def test_concatenations_are_aligned_from_the_left():
    a, b, c = Atom(3), Atom(5), Atom(4)
    assert unify(Cat((a, b)), Cat((c, Atom(4))))
    assert size_of(a) == 3
    assert [size_of(part) for part in resolved(b).parts] == [1, 4]
    assert list(atoms(c)) == [resolved(a), next(iter(atoms(b)))]


def test_products_are_aligned_from_the_right():
    a, b = Atom(4), Atom(6)
    assert unify(Prod((a, b)), Prod((Atom(8), Atom(3))))
    assert [size_of(part) for part in resolved(b).parts] == [2, 3]


def test_a_concatenation_is_a_product_where_every_segment_is():
    a, b = Atom(4), Atom(6)
    assert unify(Cat((a, b)), Prod((Atom(5), inner := Atom(2))))
    assert [size_of(part) for part in resolved(a).parts] == [2, 2]
    assert list(atoms(a))[1] is list(atoms(b))[1] is next(iter(atoms(inner)))


def test_blocks_that_start_within_a_segment_are_alike():
    a, b = Atom(3), Atom(5)
    outer, inner = factor_inner(Cat((a, b)), 4)
    assert next(iter(atoms(outer))).pins == {"blocks across a concatenation"}
    keep = {
        atom: torch.tensor([index != 1]) if atom.size == 1 else torch.tensor([False, True, True])
        for index, atom in enumerate(dict.fromkeys(atoms(inner)))
    }
    assert mask(Cat((a, b)), keep).reshape(2, 4).tolist() == [mask(inner, keep).tolist()] * 2
    assert not mask(inner, keep).all()


def test_an_axis_in_another_order_has_each_index_by_itself():
    a, b = Atom(2), Atom(2)
    mixed = reordered(Cat((a, b)), [0, 2, 1, 3])
    first, rest = split(mixed, 1)
    keep = {next(iter(atoms(first))): torch.tensor([False])}
    assert mask(a, keep).tolist() == [False, True]
    assert mask(b, keep).all()
    assert mask(rest, keep).all()


def test_one_factor_of_a_product_goes_into_another_order_and_the_others_stay():
    a, b = Atom(2), Atom(3)
    order = [0, 3, 1, 4, 2, 5]
    mixed = reordered(Prod((a, b)), order)
    assert a.pins == {"reordered"}
    keep = {next(iter(atoms(b))): torch.tensor([False])}
    assert (
        mask(mixed, keep).tolist() == mask(Prod((a, b)), keep)[order].tolist() == [False, False, True, True, True, True]
    )


def test_axes_without_a_common_refinement_are_pinned_whole():
    a, b, c, d = Atom(8), Atom(3), Atom(3), Atom(8)
    assert not unify(Prod((a, b)), Prod((c, d)))
    assert all(atom.pins == {"mixed radix"} for tree in (a, b, c, d) for atom in atoms(tree))


def test_an_axis_is_never_a_part_of_itself():
    a = Atom(4)
    b = Atom(2)
    outer, inner = factor_inner(a, 2)
    assert unify(Prod((outer, inner)), Prod((inner, outer)))  # a transpose of itself: both factors are one
    assert not unify(b, Prod((b, Atom(1)))) or resolved(b) is b


def test_pins_go_with_what_an_atom_becomes():
    a, b = Atom(6), Atom(6)
    pin(a, "output")
    assert unify(a, b)
    assert next(iter(atoms(b))).pins == {"output"}
    split(b, 2)
    assert all(atom.pins == {"output"} for atom in atoms(a))


def test_cuts_lie_between_the_blocks_of_a_product():
    a, b = Atom(4), Atom(3)
    head, tail = split(Prod((a, b)), 6)
    assert (size_of(head), size_of(tail)) == (6, 6)
    assert list(atoms(head))[1] is list(atoms(tail))[1] is b
    with pytest.raises(MixedRadixError):
        split(Prod((Atom(4), Atom(3))), 5)


def test_a_reshape_matches_the_smallest_groups():
    batch, channels, height, width = Atom(101), Atom(64), Atom(8), Atom(8)
    result = regroup([batch, channels, height, width], [101, 64, 1, 64])
    assert result[0] is batch
    assert result[1] is channels
    assert size_of(result[2]) == 1
    assert result[3] == Prod((height, width))


def test_heads_are_the_outer_factor_of_an_embedding():
    embedding = Atom(12)
    batch, tokens = Atom(101), Atom(7)
    _, _, heads, width = regroup([batch, tokens, embedding], [101, 7, 3, 4])
    assert resolved(embedding) == Prod((heads, width))
    assert regroup([batch, heads, tokens, width], [101, 3, 28])[2] == Prod((tokens, width))


def test_the_mask_of_a_tree_is_that_of_its_atoms():
    a, b = Atom(2), Atom(3)
    keep = {b: torch.tensor([True, False, True])}
    assert mask(Prod((a, b)), keep).tolist() == [True, False, True] * 2
    assert mask(Cat((b, a)), keep).tolist() == [True, False, True, True, True]


@st.composite
def trees(draw, depth=3):
    kind = draw(st.sampled_from(["atom", "prod", "cat"] if depth else ["atom"]))
    if kind == "atom":
        return Atom(draw(st.integers(1, 6)))
    parts = draw(st.lists(trees(depth=depth - 1), min_size=1, max_size=3))
    return (product if kind == "prod" else concatenation)(*parts)


def some_of(*trees_of_one):
    """Indices to keep, of all atoms that could be pruned."""
    leaves = [atom for tree in trees_of_one for atom in atoms(tree) if not atom.pins and atom.size > 1]
    return {atom: torch.rand(atom.size) < 0.6 for atom in leaves}


@given(trees(), st.data())
def test_taking_an_axis_apart_keeps_its_indices(tree, data):
    size = size_of(tree)
    if size > 1 and data.draw(st.booleans()):
        try:
            parts = split(tree, data.draw(st.integers(1, size - 1)))
            again = concatenation(*parts)
        except MixedRadixError:
            return
    else:
        divisors = [count for count in range(1, size + 1) if size % count == 0]
        try:
            again = product(*factor_inner(tree, data.draw(st.sampled_from(divisors))))
        except MixedRadixError:
            return
    assert size_of(again) == size
    keep = some_of(again)
    assert torch.equal(mask(again, keep), mask(tree, keep))


@given(trees(), trees())
def test_unified_axes_keep_the_same_indices(left, right):
    if size_of(left) != size_of(right):
        right = concatenation(right, Atom(size_of(left) - size_of(right))) if size_of(left) > size_of(right) else left
    agreed = unify(left, right)
    keep = some_of(left, right)
    if agreed:
        assert torch.equal(mask(left, keep), mask(right, keep))
    else:
        assert all("mixed radix" in atom.pins for tree in (left, right) for atom in atoms(tree))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_a_reshape_moves_indices_as_torch_does(sizes, data):
    total = math.prod(sizes)
    shape, rest = [], total
    while rest > 1:
        size = data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
        shape.append(size)
        rest //= size
    shape.insert(data.draw(st.integers(0, len(shape))), 1)
    old = [Atom(size) for size in sizes]
    new = regroup(old, shape)
    keep = some_of(*old, *new)

    def whole(trees):
        result = torch.ones([size_of(tree) for tree in trees], dtype=torch.bool)
        for axis, tree in enumerate(trees):
            result &= mask(tree, keep).reshape([-1 if other == axis else 1 for other in range(len(trees))])
        return result

    assert torch.equal(whole(old).reshape(shape), whole(new))
