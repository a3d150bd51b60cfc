"""What the removal of each index would cost, by the curvature of the loss: one backward pass for each batch."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import DataError
from slimgraph.program.program import Program
from slimgraph.pruning.axes import Cat, Prod, Tree, atoms, product, resolved, size_of
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.prove import sums_over_axes
from slimgraph.pruning.slices import owners
from slimgraph.pruning.trace import BATCH
from slimgraph.training.batch import Batch
from slimgraph.training.losses import Loss, imitation_probe


@dataclass(frozen=True, slots=True)
class Reading:
    """A place where a program sums over the indices of a group."""

    group: str
    node: fx.Node
    operand: fx.Node
    axis: int
    """Of the operand."""


def computed_values(program: Program) -> frozenset[fx.Node]:
    """Values that depend on the inputs."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def readings(groups: Groups) -> list[Reading]:
    """Where the groups are summed over: an index that is zero there is one that is removed.

    Of a product of two values that both have the indices, it is the first, or the one that depends on the inputs.
    """
    traced = groups.traced
    computed = computed_values(traced.program)
    names = {groups.atoms[group.name]: group.name for group in groups.groups}
    found = []
    for node in traced.program.graph.nodes:
        if not sums_over_axes(node):
            continue
        results = [node] if node in traced.axes else [user for user in node.users if user in traced.axes]
        done = {atom for result in results for tree in traced.of(result) for atom in atoms(tree)}
        operands = [operand for operand in node.all_input_nodes if operand in traced.axes]
        for operand in sorted(operands, key=lambda operand: operand not in computed):
            for axis, tree in enumerate(traced.of(operand)):
                for atom in dict.fromkeys(atoms(tree)):
                    if atom in names and atom not in done:
                        done.add(atom)
                        found.append(Reading(names[atom], node, operand, axis))
    return found


def fisher(
    program: Program, groups: Groups, batches: Iterable[Batch], *, loss: Loss | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """For each index of each group the growth of the loss that its removal is expected to bring, by the group's name.

    A gate of one stands wherever the program sums over an index: at zero the index is removed, and the derivatives at
    one tell what that does. At a minimum the first is zero, and the loss grows by half the second, for which stands the
    Fisher information, the mean over samples of the squared derivative,

        score_i = ½ · mean_n (∂loss_n / ∂gate_i)²,

    whose derivatives of all samples and gates come from one backward pass. Without a loss the program imitates itself:
    the loss `imitate` is then zero at its minimum, and so is its gradient, which is why the mean of |∂loss/∂gate|, as
    PaddleSlim takes it of heads, needs labels; the curvature is estimated by `imitation_probe`, and needs none.

    Args:
        loss: a mean over the samples, of outputs and batch.
        seed: for the answers drawn without a loss.
    Raises:
        DataError: the loss has no gradient.
    Sources: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv 1801.05787,
    section 2.2; gates of heads and neurons: Michel et al., "Are sixteen heads really better than one?", NeurIPS 2019,
    arXiv 1905.10650, and Kwon et al., "A fast post-training pruning framework for transformers", NeurIPS 2022, arXiv
    2204.09656, section 4.1.
    """
    generator = torch.Generator().manual_seed(seed)
    gates = _Gates(program, groups)
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups.groups}
    samples = 0
    for batch in batches:
        inputs = {name: value.to(program.device) for name, value in batch.inputs.items()}
        labels = None if batch.labels is None else batch.labels.to(program.device)
        count = len(batch) if program.signature.batch_axis is not None else 1
        samples += count
        ones = gates.open(count)
        with torch.enable_grad():
            outputs = gates.program(**inputs)
            made = imitation_probe(outputs, generator) if loss is None else loss(outputs, Batch(inputs, labels)) * count
        if not made.requires_grad:
            raise DataError("The loss does not depend on anything that could be removed: it has no gradient.")
        slopes = torch.autograd.grad(made, list(ones.values()), allow_unused=True)
        for name, slope in zip(ones, slopes, strict=True):
            if slope is not None:
                scores[name] += slope.double().square().sum(dim=0).cpu() / 2
    if not any(bool((score > 0).any()) for score in scores.values()):
        raise DataError(
            "The gradient of the loss is zero everywhere. A loss that compares the program with itself has none: leave "
            "it out, and the program is its own teacher."
        )
    return {name: score / samples for name, score in scores.items()}


class _Gates:
    """A copy of a program that multiplies each index, where it is summed over, with a gate for each sample."""

    def __init__(self, program: Program, groups: Groups) -> None:
        self.program = program.copy().eval().requires_grad_(False)
        self._ones: dict[str, Tensor] = {}
        self._sizes = {group.name: group.size for group in groups.groups}
        twins = dict(zip(program.graph.nodes, self.program.graph.nodes, strict=True))
        self._places = readings(groups)
        self._axes = [groups.traced.of(place.operand) for place in self._places]
        self._owners = [
            owners(axes[place.axis], groups.atoms[place.group])
            for place, axes in zip(self._places, self._axes, strict=True)
        ]
        now: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        for number, place in enumerate(self._places):
            reader = twins[place.node]
            key = (place.node, place.operand)
            read = now.get(key, twins[place.operand])
            with self.program.graph.inserting_before(reader):
                now[key] = self.program.graph.call_function(self._multiplied, (read, number))
            reader.replace_input_with(read, now[key])
        edit.finish(self.program)

    def open(self, count: int) -> dict[str, Tensor]:
        """New gates of one for a batch of `count` samples: a tensor (count, size) for each group."""
        device = self.program.device
        self._ones = {name: torch.ones(count, size, device=device) for name, size in self._sizes.items()}
        for gate in self._ones.values():
            gate.requires_grad_()
        return self._ones

    def _multiplied(self, value: Tensor, number: int) -> Tensor:
        axis, axes = self._places[number].axis, self._axes[number]
        gate = self._ones[self._places[number].group].to(value.dtype)
        owner = self._owners[number].to(value.device)
        # What shares the axis with the group and is none of it has a gate of its own, which stays one: the last.
        gate = torch.cat([gate, gate.new_ones(len(gate), 1)], dim=1)[:, owner]
        shape = [1] * value.dim()
        shape[axis] = len(owner)
        batch = next((place for place, tree in enumerate(axes) if place != axis and _has_batch(tree)), None)
        if batch is None:  # the same for all samples
            return value * gate.mean(dim=0).reshape(shape)
        shape[batch] = size = value.shape[batch]
        sample = torch.arange(size, device=value.device) // _stride(axes[batch], size, len(gate)) % len(gate)
        rows = gate[sample]
        return value * (rows if batch < axis else rows.T).reshape(shape)


def _has_batch(tree: Tree) -> bool:
    return any(atom.size % BATCH == 0 for atom in atoms(tree))


def _stride(tree: Tree, size: int, samples: int) -> int:
    """How many indices of an axis of `size` stand between one sample and the next."""
    tree = resolved(tree)
    match tree:
        case Prod(parts) if not _has_batch(parts[0]):
            place = next(number for number, part in enumerate(parts) if _has_batch(part))
            return size_of(product(*parts[place + 1 :]))
        case Cat():
            return 1  # batches one behind the other
        case _:
            return size // samples
