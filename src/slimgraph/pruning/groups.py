"""What can be pruned: sets of indices that live and die together."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.pruning.axes import Atom, Pick, atoms
from slimgraph.pruning.rules_layers import NORM
from slimgraph.pruning.trace import Traced, trace_axes
from slimgraph.table import text_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An axis of a parameter that loses indices with its group."""

    parameter: str
    """Qualified name."""
    axis: int
    size: int
    """Of the whole axis: the group may be a factor or a part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Indices that are removed together from all members."""

    name: str
    """The parameter, and its axis, that produces them: "layer1.0.conv1.weight:0"."""
    size: int
    """Number of indices: channels, heads, or what else there is one of."""
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    """Layers that read one of the parameters."""
    makers: tuple[str, ...]
    """Those among them whose outputs the indices are; the others only read them."""
    normed: bool
    """A layer or group norm runs over the indices, so that removing some changes the statistics of the others."""

    @property
    def place(self) -> str:
        """The parameter and its axis that the group is named after; other factors of that axis are other groups."""
        return self.name.partition("#")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """All groups of a program, and why the rest of its parameters stays as it is."""

    groups: tuple[Group, ...]
    kept: Mapping[str, tuple[str, ...]]
    """Layers with weights of which nothing can be pruned, and why."""
    fixed: Mapping[str, tuple[str, ...]]
    """Layers all of whose outputs stay, and why; what they read may be pruned."""
    unknown: Mapping[str, str]
    """Values of operators without a rule, and the operator."""
    traced: Traced
    atoms: Mapping[str, Atom]
    """What each group is in the algebra."""

    def __getitem__(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def table(self) -> str:
        """A line for each group, and what stays."""
        rows = [
            (
                group.name,
                group.size,
                len(group.members),
                ", ".join(group.layers[:4]) + (" …" if len(group.layers) > 4 else ""),
            )
            for group in self.groups
        ]
        lines = [text_table(("group", "indices", "tensors", "layers"), rows)]
        lines += self.told()
        return "\n".join(lines)

    def told(self) -> list[str]:
        """A sentence on each layer that stays as it is, or keeps its outputs, and on each operator without a rule."""
        return [
            *(f"{layer} stays whole: {'; '.join(reasons)}." for layer, reasons in self.kept.items()),
            *(
                f"{layer} keeps its outputs: {'; '.join(reasons)}."
                for layer, reasons in self.fixed.items()
                if layer not in self.kept
            ),
            *(f"{value}: there is no rule for {operator}." for value, operator in self.unknown.items()),
        ]


def find_groups(program: Program, *, norm_axes: bool = False) -> Groups:
    """The groups of a program: channels, heads, hidden sizes, as far as nothing needs them whole.

    Args:
        norm_axes: also those that a layer or group norm runs over; its statistics then run over the kept ones, so that
            the pruned program is not the masked one.
    """
    traced = trace_axes(program)
    _gather_units(traced)
    parameters = dict(program.named_parameters(remove_duplicate=False))
    members: dict[Atom, list[Member]] = defaultdict(list)
    readers: dict[Atom, dict[str, None]] = defaultdict(dict)
    makers: dict[Atom, dict[str, None]] = defaultdict(dict)
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    outputs: dict[str, dict[str, None]] = defaultdict(dict)
    seen: set[tuple[int, int]] = set()
    for node in program.graph.find_nodes(op="get_attr"):
        tensor = edit.constant_of(program.graph_module, node)
        if tensor is None or not tensor.is_floating_point() or node not in traced.axes:
            continue
        name = str(node.target)
        owners = [layer_of(user) or value_of(user) for user in node.users]
        making = [
            (layer_of(user) or value_of(user), made)
            for user in node.users
            if (made := _made_axis(user, node, tensor.dim())) is not None
        ]
        trained = name in parameters or isinstance(tensor, nn.Parameter)
        for axis, tree in enumerate(traced.of(node)):
            for atom in dict.fromkeys(atoms(tree)):
                hard = atom.pins - {NORM}
                if atom.size == 1 or hard or (atom.pins and not norm_axes):
                    if trained and tensor.dim() > 1 and atom.size > 1:
                        for owner in owners:
                            reasons[owner].update(dict.fromkeys(sorted(atom.pins)))
                        for owner, made in making:
                            if made == axis:
                                outputs[owner].update(dict.fromkeys(sorted(atom.pins)))
                    continue
                readers[atom].update(dict.fromkeys(owners))
                makers[atom].update(dict.fromkeys(owner for owner, made in making if made == axis))
                if (id(tensor), axis) not in seen or all(m.parameter != name for m in members[atom]):
                    members[atom].append(Member(parameter=name, axis=axis, size=tensor.shape[axis]))
            seen.add((id(tensor), axis))
    found: dict[str, Atom] = {}
    groups = []
    for atom, held in members.items():
        if not any(member.parameter in parameters for member in held):
            continue
        name = _name(held, found, parameters)
        found[name] = atom
        groups.append(
            Group(
                name=name,
                size=atom.size,
                members=tuple(held),
                layers=tuple(readers[atom]),
                makers=tuple(makers[atom]),
                normed=NORM in atom.pins,
            )
        )
    pruned = {layer for group in groups for layer in group.layers}
    kept = {layer: tuple(why) for layer, why in reasons.items() if layer not in pruned}
    makes = {layer for group in groups for layer in group.makers}
    fixed = {layer: tuple(why) for layer, why in outputs.items() if layer not in makes}
    return Groups(groups=tuple(groups), kept=kept, fixed=fixed, unknown=traced.unknown, traced=traced, atoms=found)


def _gather_units(traced: Traced) -> None:
    """Make one atom of all indices that stand by themselves and are on the same axes of the same values.

    Then no axis is left without an index as long as the new atom keeps one.
    """
    places: dict[Atom, Counter[tuple[fx.Node, int]]] = defaultdict(Counter)
    for node, axes in traced.axes.items():
        for axis, tree in enumerate(axes):
            for atom in atoms(tree):
                if atom.size == 1:
                    places[atom][node, axis] += 1
    alike: dict[tuple[object, ...], list[Atom]] = defaultdict(list)
    for atom, where in places.items():
        alike[frozenset(where.items()), frozenset(atom.pins)].append(atom)
    for units in alike.values():
        if len(units) > 1:
            whole = Atom(len(units), pins=set(units[0].pins))
            for index, unit in enumerate(units):
                unit.bound = Pick(whole, (index,))


# Where the outputs of an operator stand in its weight, if not on the first axis.
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "addmm", "baddbmm"})


def _made_axis(reader: fx.Node, weight: fx.Node, rank: int) -> int | None:
    """The axis of a weight that becomes the outputs of the operator that reads it; None where it is no weight."""
    if reader.op != "call_function" or rank < 2:
        return None
    operator = operator_name(reader.target)
    if operator.startswith("conv_transpose"):
        return 1
    is_last = operator == "embedding" or (operator in _PRODUCTS and reader.args[0] is not weight)
    return rank - 1 if is_last else 0


def _name(members: list[Member], taken: Mapping[str, Atom], parameters: Mapping[str, nn.Parameter]) -> str:
    """After the first weight that makes the indices: axis 0 of a matrix or kernel, or whatever comes first."""
    trained = [member for member in members if member.parameter in parameters]
    made = [member for member in trained if member.axis == 0 and parameters[member.parameter].dim() > 1]
    first = (made or trained)[0]
    name = f"{first.parameter}:{first.axis}"
    count = 1
    while name in taken:  # several factors of one axis: heads, and what is in a head
        count += 1
        name = f"{first.parameter}:{first.axis}#{count}"
    return name
