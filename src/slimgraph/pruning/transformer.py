"""Prune transformers by heads and feed-forward neurons, or sort both so that any width is the beginning of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from slimgraph.errors import ConfigError, ProgramError, closest
from slimgraph.program.program import Program, require_program
from slimgraph.pruning.allocate import FLOOR, count_removed, lowest, removed_by_ratios, steps, without
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.criteria import Criterion, Rows, score_groups
from slimgraph.pruning.groups import Group, Groups, find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.plan import PruningPlan
from slimgraph.pruning.reorder import reorder
from slimgraph.pruning.transformer_groups import find_transformer
from slimgraph.training.losses import Loss

Allocation: TypeAlias = Literal["uniform", "global"]

Part: TypeAlias = float | Mapping[str, float]
"""A part of every layer; or of those that a pattern selects, by pattern, as `slimgraph.pruning.allocate.matching` takes
it."""


def plan_transformer_pruning(
    program: Program,
    *,
    heads_removed: Part = 0.0,
    feed_forward_removed: Part = 0.0,
    data: str | Iterable[Any] | None = None,
    loss: str | Loss | None = None,
    criterion: str | Criterion = "fisher",
    allocation: Allocation = "uniform",
    skip: Sequence[str] = (),
    multiple_of: int = 8,
    floor: float | None = None,
    seed: int = 0,
    groups: Groups | None = None,
) -> PruningPlan:
    """The least important heads and feed-forward neurons of a transformer, for `apply_pruning` to remove.

    Which these are is read off the graph (`slimgraph.pruning.transformer_groups.find_transformer`), in whatever way
    attention is written. The width between the layers stays.

    Args:
        program: it is only read.
        heads_removed: the part of the heads that goes; a key and value that serves several queries goes with them.
        feed_forward_removed: the part of the hidden neurons.
        data: batches, with or without labels, for "fisher" and "taylor".
        loss: of outputs and labels; without one the program imitates itself, and labels are not looked at.
        criterion: what matters: "fisher", from one backward pass for each batch, or any other that
            `slimgraph.pruning.criteria.score_groups` has.
        allocation: "uniform" takes the part of every layer, "global" the least important of all heads, and of all
            neurons. Parts by pattern are of their layers either way.
        skip: layers that stay whole: names, globs or `re:…`.
        multiple_of: what the width that stays is a multiple of: of all heads of a layer together, and of its neurons; 1
            keeps the parts exactly.
        floor: the part of each layer that stays at least; None is a tenth where the allocation is global, else
            nothing but one head or neuron.
        seed: for "fisher" without a loss, and "random".
        groups: of this very program, where they are at hand.
    Raises:
        ConfigError: a part that is out of range, or cannot be reached; no data where the criterion reads some.
        UnknownNameError: no such layer or criterion.
        ProgramError: the program is none, or has no such heads or neurons.
        DataError: the data do not fit.
    """
    require_program(program)
    found = groups if groups is not None else find_groups(program)
    transformer = find_transformer(found)
    free = {group.name for group in without(found, skip)}
    kinds = {
        "heads_removed": (heads_removed, transformer.heads),
        "feed_forward_removed": (feed_forward_removed, transformer.feed_forward),
    }
    asked: list[tuple[Part, Groups]] = []
    for name, (part, all_of_kind) in kinds.items():
        _check(name, part, all_of_kind)
        if part:
            chosen = tuple(group for group in all_of_kind if group.name in free)
            asked.append((part, dataclasses.replace(found, groups=chosen)))
    if not asked:
        raise ConfigError("Nothing is to be removed. Give heads_removed, feed_forward_removed or both.")
    if allocation not in ("uniform", "global"):
        raise ConfigError(
            f"There is no allocation {allocation!r} of heads and neurons. {closest(allocation, ['uniform', 'global'])}"
        )
    scored = dataclasses.replace(found, groups=tuple(group for _, kind in asked for group in kind.groups))
    scores = score_groups(program, scored, criterion, data=data, loss=loss, seed=seed)
    removed: dict[str, tuple[int, ...]] = {}
    for part, kind in asked:
        if isinstance(part, Mapping):
            removed |= removed_by_ratios(kind, scores, part, multiple_of=multiple_of)
            continue
        least = floor if floor is not None else FLOOR if allocation == "global" else 0.0
        ratios = _ranked(kind.groups, scores, part, least) if allocation == "global" else [part] * len(kind.groups)
        for group, ratio in zip(kind.groups, ratios, strict=True):
            count = count_removed(group.size, ratio, steps(kind, group, multiple_of), least)
            removed[group.name] = lowest(scores[group.name], count)
    return plan_removal(found, removed, norm_axes=any(group.normed for group in found.groups))


def _check(name: str, part: Part, groups: Sequence[Group]) -> None:
    for key, ratio in part.items() if isinstance(part, Mapping) else [("", part)]:
        if not 0 <= ratio < 1:
            of = f" of {key!r}" if key else ""
            raise ConfigError(f"{name}{of} is {ratio}; give the part that goes, in [0, 1).")
    if part and not groups:
        missing = {
            "heads_removed": "attention with several heads that could go one by one",
            "feed_forward_removed": "hidden neurons between the width that its attention works on and that width again",
        }[name]
        raise ProgramError(
            f"{name} is given, but the program has no {missing}. `slimgraph groups` shows what it has; slimgraph.prune "
            "takes channels of any kind."
        )


def _ranked(groups: Sequence[Group], scores: Mapping[str, Tensor], part: float, floor: float) -> list[float]:
    """The part of each group that goes if the least important of all go, and of each group the floor stays."""
    free = [group.size - max(math.ceil(group.size * floor - 1e-9), 1) for group in groups]
    whole = sum(group.size for group in groups)
    wanted = round(whole * part)
    if wanted > sum(free):
        raise ConfigError(
            f"{part:.1%} were to be removed, and at most {sum(free) / whole:.1%} can be where {floor:.0%} of each "
            "layer stay, or one. Ask for less, or for a lower floor."
        )
    gone = [0] * len(groups)
    for _, number in sorted((s, number) for number, group in enumerate(groups) for s in scores[group.name].tolist()):
        if sum(gone) < wanted and gone[number] < free[number]:
            gone[number] += 1
    return [count / group.size for count, group in zip(gone, groups, strict=True)]


def sort_transformer(
    program: Program,
    *,
    data: str | Iterable[Any] | None = None,
    loss: str | Loss | None = None,
    criterion: str | Criterion = "fisher",
    seed: int = 0,
    proof: bool = True,
) -> Program:
    """The same function with the heads and neurons of each layer in order, the most important first.

    Then `cut_transformer` finds the best ones of any width at the beginning, which is what a supernet of widths is
    trained from.

    Args:
        data, loss, criterion, seed: as `plan_transformer_pruning` has them.
        proof: compute that the outputs are the same.
    Source: Hou et al., "DynaBERT: dynamic BERT with adaptive width and depth", NeurIPS 2020, arXiv 2004.04037.
    """
    require_program(program)
    found = find_groups(program)
    transformer = find_transformer(found)
    chosen = dataclasses.replace(found, groups=(*transformer.heads, *transformer.feed_forward))
    scores = score_groups(program, chosen, criterion, data=data, loss=loss, seed=seed)
    order = {name: score.argsort(descending=True, stable=True).tolist() for name, score in scores.items()}
    return reorder(program, order, proof=proof, groups=found)


def cut_transformer(
    program: Program, *, heads: float = 1.0, feed_forward: float = 1.0, multiple_of: int = 1, proof: bool = True
) -> Program:
    """The program with the first heads and neurons of each layer only; `sort_transformer` puts the best ones there.

    Args:
        heads, feed_forward: the part that stays, in (0, 1].
        multiple_of: as `plan_transformer_pruning` has it.
        proof: compute that the result is the program in which the others are zero.
    """
    require_program(program)
    found = find_groups(program)
    plan = plan_transformer_pruning(
        program,
        heads_removed=1 - heads,
        feed_forward_removed=1 - feed_forward,
        criterion=_place,
        multiple_of=multiple_of,
        groups=found,
    )
    return apply_pruning(program, plan, proof=proof, groups=found)


def _place(group: Group, rows: Rows) -> Tensor:
    return torch.arange(group.size, 0, -1)
