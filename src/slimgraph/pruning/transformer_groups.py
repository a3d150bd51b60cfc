"""Which groups of a program are heads of attention, and which feed-forward neurons."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from slimgraph.errors import ProgramError
from slimgraph.program.names import operator_name
from slimgraph.pruning.axes import Atom, Tree, atoms, size_of
from slimgraph.pruning.fisher import Reading, computed_values, readings
from slimgraph.pruning.groups import Group, Groups
from slimgraph.pruning.trace import BATCH
from slimgraph.table import text_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """The groups of a program that attention and feed-forward layers are made of."""

    heads: tuple[Group, ...]
    """What attention does several times side by side; of queries that share keys and values, the shared ones."""
    feed_forward: tuple[Group, ...]
    """Hidden neurons between the width that attention works on and that width again."""

    def table(self) -> str:
        """A line for each group."""
        kinds = ((self.heads, "heads"), (self.feed_forward, "neurons"))
        rows = [
            (group.name, group.size, kind, ", ".join(group.layers[:4])) for groups, kind in kinds for group in groups
        ]
        return text_table(("group", "indices", "kind", "layers"), rows)


def find_transformer(groups: Groups) -> Transformer:
    """The heads and the feed-forward neurons among the groups of a program, told by what it computes, not by names.

    Heads are what a product of two computed matrices is done for one by one: queries with keys, and what comes of it
    with values, by whatever operators. Neurons are made of a width that heads, or their widths, are made of or make,
    and become such a width again, token by token; gates and what they gate are one group.

    Raises:
        ProgramError: nothing in the program is attention, or nothing of it can be pruned.
    """
    heads, feed_forward = _heads(groups), _feed_forward(groups)
    if not heads and not feed_forward:
        raise ProgramError(
            "The program has no attention whose heads, and no feed-forward layer beside attention whose neurons, could "
            "be pruned. `slimgraph groups` shows what it has; slimgraph.prune takes channels of any kind."
        )
    return Transformer(heads=heads, feed_forward=feed_forward)


_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"})


def _products(groups: Groups) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Products of two values that both depend on the inputs, with these values."""
    traced = groups.traced
    computed = computed_values(traced.program)
    for node in traced.program.graph.nodes:
        if node.op == "call_function" and operator_name(node.target) in _PRODUCTS and node in traced.axes:
            operands = [each for each in node.all_input_nodes if each in traced.axes]
            if operator_name(node.target) == "baddbmm":
                operands = operands[1:]
            if len(operands) > 1 and all(each in computed for each in operands[:2]):
                yield node, operands


def _repeated(groups: Groups, node: fx.Node) -> list[Tree]:
    """The axes of a product for each of whose indices it is done anew."""
    axes = groups.traced.of(node)
    if operator_name(node.target) != "einsum":
        return axes[:-2]
    read, _, made = str(node.args[0]).replace(" ", "").partition("->")
    return [tree for letter, tree in zip(made, axes, strict=True) if all(letter in part for part in read.split(","))]


def _heads(groups: Groups) -> tuple[Group, ...]:
    by_atom = {groups.atoms[group.name]: group for group in groups.groups}
    found: dict[str, Group] = {}
    for node, _ in _products(groups):
        repeated = [by_atom[atom] for tree in _repeated(groups, node) for atom in atoms(tree) if atom in by_atom]
        if repeated:
            # Queries that share a key are a factor of their own, which keys have no part in.
            chosen = max(repeated, key=lambda group: len(group.members))
            found[chosen.name] = chosen
    return tuple(group for group in groups.groups if group.name in found)


def _feed_forward(groups: Groups) -> tuple[Group, ...]:
    traced = groups.traced
    in_products = {
        atom
        for node, operands in _products(groups)
        for each in (node, *operands)
        for tree in traced.of(each)
        for atom in atoms(tree)
    }

    def widths(group: Group) -> list[frozenset[Atom]]:
        """What the matrices of a group have on their other axis."""
        found = []
        for member in group.members:
            for axis, tree in enumerate(traced.of(traced.stored[member.parameter])):
                leaves = frozenset(atoms(tree))
                if axis != member.axis and size_of(tree) > 1 and not any("kernel" in leaf.pins for leaf in leaves):
                    found.append(leaves)
        return found

    streams = {width for group in groups.groups if groups.atoms[group.name] in in_products for width in widths(group)}
    places = {reading.group: reading for reading in readings(groups)}
    return tuple(
        group
        for group in groups.groups
        if groups.atoms[group.name] not in in_products
        if group.name in places and _token_by_token(groups, places[group.name])
        if len(found := widths(group)) > 1 and all(width in streams for width in found)
    )


def _token_by_token(groups: Groups, reading: Reading) -> bool:
    """Whether there is a value for each token or position, and not one for the whole sample, as of a squeeze."""
    traced = groups.traced
    others = [size for axis, size in enumerate(traced.values[reading.operand].shape) if axis != reading.axis]
    positions = math.prod(others) // (1 if traced.program.signature.batch_axis is None else BATCH)
    is_convolution = operator_name(reading.node.target).startswith("conv")
    return positions > 1 or (len(others) > 1 and not is_convolution)
