"""Two of four: of every four weights that are summed over next to each other, at most two are not zero."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ProgramError
from slimgraph.program.program import Program, require_program
from slimgraph.program.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS, is_quantized
from slimgraph.pruning.weights import Skip, Weight, find_weights
from slimgraph.pruning.zeros import SparsityPlan
from slimgraph.table import text_table
from slimgraph.training.masks import Masks

KEPT, GROUP = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedWeight:
    """Whether a weight is two of four."""

    name: str
    groups: int
    """Groups of four that operators read."""
    broken: int
    """Those with more than two elements that are not zero."""

    @property
    def holds(self) -> bool:
        """Whether every group has at most two."""
        return self.broken == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoFourCheck:
    """Which weights are two of four."""

    weights: tuple[CheckedWeight, ...]
    dense: Mapping[str, str]
    """Those that cannot be, with the reason."""

    @property
    def sparse(self) -> tuple[str, ...]:
        """Weights all of whose groups have at most two elements that are not zero."""
        return tuple(weight.name for weight in self.weights if weight.holds)

    def table(self) -> str:
        """A line for each weight."""
        rows = [(w.name, w.groups, "yes" if w.holds else f"no, in {w.broken:,}") for w in self.weights]
        return text_table(("weight", "groups of four", "two of four"), rows)


def check_two_four(program: Program) -> TwoFourCheck:
    """Which weights of a program are two of four, by their elements and the operators that read them alone.

    Weights that a quantized program holds in integers are judged by the numbers that these stand for.

    Raises:
        ProgramError: the program is none, has no weights, or one with NaN or infinity.
    """
    require_program(program)
    found = find_weights(_in_floats(program))
    dense = {weight.name: reason for weight in found.found if (reason := _why_dense(weight))} | dict(found.others)
    checked = []
    for weight in found.found:
        if weight.name in dense:
            continue
        live = list(_groups(weight, weight.parameter.detach().cpu() != 0))
        broken = sum(int((groups.sum(dim=-1) > KEPT).sum()) for groups in live)
        checked.append(CheckedWeight(name=weight.name, groups=sum(map(len, live)), broken=broken))
    return TwoFourCheck(weights=tuple(checked), dense=dense)


_DEQUANTIZE = (DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS)


def _in_floats(program: Program) -> Program:
    """The program with the numbers that its integer weights stand for."""
    if not is_quantized(program.graph):
        return program
    result = program.copy()
    made: dict[str, fx.Node] = {}
    for node in [node for node in result.graph.nodes if node.target in _DEQUANTIZE]:
        if any(source.op != "get_attr" for source in node.all_input_nodes):
            continue  # a value
        codes: Any = node.args[0]
        if codes.target not in made:
            args = fx.map_arg(node.args, lambda source: edit.constant_of(result.graph_module, source))
            numbers = node.target(*args, **node.kwargs)
            made[codes.target] = edit.read_tensor(result, codes.target, numbers, trainable=True)
        node.replace_all_uses_with(made[codes.target])
    edit.finish(result)
    return result


def plan_two_four(program: Program, *, skip: Skip = ()) -> SparsityPlan:
    """The masks that make every weight two of four that can be; the program is only read.

    Groups of four follow each other along what a product sums over: the inputs of a linear layer, however the graph
    transposes its weight, those of a matrix product and of a recurrent layer, and the input channels of a convolution
    at each position of its kernel. The two of the largest magnitude stay; of equals, those that come first.

    Args:
        skip: weights that stay as they are: parameters, layers, globs or `re:…`; or a function of the program that
            returns such names.
    Raises:
        ProgramError: the program is none, has no weights, one with NaN or infinity, or none that can be two of four.
        UnknownNameError: `skip` has a name that selects nothing.
    """
    found = find_weights(program)
    chosen = found.chosen(program, skip=skip)
    masks: dict[str, Tensor] = {}
    dense = found.reasons(chosen)
    for weight in chosen:
        reason = _why_dense(weight)
        if reason is None:
            mask = _mask(weight)
            if all(bool((groups.sum(dim=-1) == KEPT).all()) for groups in _groups(weight, mask)):
                masks[weight.name] = mask
                continue
            reason = "is read along different axes, which have no groups of four in common"
        dense[weight.name] = reason
    if not masks:
        told = "; ".join(f"{name!r} {reason}" for name, reason in list(dense.items())[:5])
        raise ProgramError(f"No weight of the program can be two of four: {told}.")
    return SparsityPlan(masks=Masks(masks), dense=dense)


def _why_dense(weight: Weight) -> str | None:
    """Why a weight cannot be two of four, or None if it can."""
    summing = [reading for reading in weight.readings if reading.sums]
    if not summing:
        return "is a table of which rows are looked up: nothing is summed over"
    sizes = {reading.matrices(weight.parameter.detach()).shape[2] for reading in summing}
    wrong = next((size for size in sorted(sizes) if size % GROUP), None)
    return None if wrong is None else f"sums over {wrong}, which is no multiple of {GROUP}"


def _mask(weight: Weight) -> Tensor:
    """What stays, by every operator that reads the weight."""
    magnitudes = weight.parameter.detach().abs().flatten().cpu()
    kept = torch.ones_like(magnitudes, dtype=torch.bool)
    for indices in _group_indices(weight):
        kept[indices] &= _largest(magnitudes[indices])
    return kept.reshape(weight.parameter.shape)


def _group_indices(weight: Weight) -> Iterator[Tensor]:
    """For each operator that sums over a weight, where its groups lie in the flat parameter: [groups, 4]."""
    for reading in weight.readings:
        if reading.sums:
            yield reading.indices(weight.parameter).reshape(-1, GROUP)


def _largest(groups: Tensor) -> Tensor:
    """Which two of each four are the largest, as bool; of equals, the first."""
    one, other = groups[..., :, None], groups[..., None, :]
    earlier = torch.ones(GROUP, GROUP, dtype=torch.bool).tril(-1)
    ahead = (other > one) | ((other == one) & earlier)
    return ahead.sum(dim=-1) < KEPT


def _groups(weight: Weight, mask: Tensor) -> Iterator[Tensor]:
    """For each operator that sums over a weight, what is said of its elements by groups."""
    return (mask.flatten()[indices] for indices in _group_indices(weight))
