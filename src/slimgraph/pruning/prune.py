"""Prune a program in one call: groups, scores, what goes, and the smaller program."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from slimgraph.errors import ConfigError, ProgramError, closest
from slimgraph.program.program import Program, require_program
from slimgraph.program.qdq import is_quantized
from slimgraph.pruning.allocate import Strategy, allocate, removed_by_ratios, without
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.batch_norm import reestimate_batch_norm
from slimgraph.pruning.cost import Cost, Costs, Measure
from slimgraph.pruning.criteria import Criterion, score_groups
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.plan import PruningPlan
from slimgraph.pruning.sensitive import Losses, LossRule
from slimgraph.pruning.sensitivity import Sensitivity, name_of
from slimgraph.pruning.sensitivity_file import load_sensitivity, require_finished
from slimgraph.training.losses import Loss

MULTIPLE = 8
"""What the channels that stay are a multiple of: the blocks in which runtimes compute."""


def plan_pruning(
    program: Program,
    *,
    flops_removed: float | None = None,
    ratios: Mapping[str, float] | None = None,
    criterion: str | Criterion = "l2_norm",
    allocation: Strategy = "global",
    by: Measure | Literal["latency"] = "macs",
    data: str | Iterable[Any] | None = None,
    loss: str | Loss | None = None,
    skip: Sequence[str] = (),
    norm_axes: bool = False,
    multiple_of: int = 1,
    floor: float | None = None,
    sensitivity: Sensitivity | str | os.PathLike[str] | None = None,
    rule: LossRule = "interpolate",
    master: bool = False,
    seed: int = 0,
    groups: Groups | None = None,
    threads: int = 1,
) -> PruningPlan:
    """What to remove from a program; the program is only read.

    Args:
        flops_removed: the part of the cost `by` that is to go at least.
        ratios: instead, the part of the indices that goes, by layer, parameter or pattern (`matching`).
        criterion, data, loss, master, seed: as `score_groups` has them.
        allocation, floor: as `allocate` has them.
        sensitivity: for the allocation "sensitive": what `measure_sensitivity` gave, or its file; of this very program,
            measured with the same criterion.
        rule: for it: "interpolate" between the points that were measured, or "cubic", a curve through them.
        by: what `flops_removed` is a part of: "macs" (as FLOPs), "parameters", "memory", the bytes of the weights, or
            "latency" in ONNX Runtime, which is measured some dozen times, at a second or two each.
        skip: layers that keep all their outputs: names, parameters, globs or `re:…`.
        norm_axes: also channels that a layer or group norm runs over.
        multiple_of: what the channels that stay are a multiple of; 1 keeps ratios exactly.
        groups: of this very program, where they are at hand.
        threads: with which latency is measured.
    Raises:
        ConfigError: both or none of `flops_removed` and `ratios`, one that is out of range, or cannot be reached.
        UnknownNameError: no such layer or criterion.
        ProgramError: the program is none, or has nothing that the criterion can judge.
        DataError: the sensitivities are of another program, or not whole.
    """
    require_program(program)
    if (flops_removed is None) == (not ratios):
        raise ConfigError("Give flops_removed, a part of the whole cost, or ratios by layer: one of the two.")
    found = groups if groups is not None else find_groups(program, norm_axes=norm_axes)
    if not found.groups and is_quantized(program.graph):
        raise ProgramError(
            "The program is quantized: its weights are integers, of which no channels can be removed. Prune the float "
            "one, and quantize the result."
        )
    losses = None if sensitivity is None else _losses(sensitivity, program, criterion)
    free = dataclasses.replace(found, groups=without(found, skip))
    scores = score_groups(program, free, criterion, data=data, loss=loss, seed=seed, master=master)
    if ratios:
        removed = removed_by_ratios(found, scores, ratios, skip=skip, multiple_of=multiple_of)
        return plan_removal(found, removed, norm_axes=norm_axes)
    assert flops_removed is not None
    allocated = allocate(
        found,
        scores,
        _cost(found, by, threads),
        flops_removed,
        strategy=allocation,
        skip=skip,
        multiple_of=multiple_of,
        floor=floor,
        losses=losses,
        rule=rule,
        called=_CALLED[by],
    )
    plan = plan_removal(found, allocated.removed, norm_axes=norm_axes)
    return dataclasses.replace(plan, reached=allocated.reached)


_CALLED = {"macs": "FLOPs", "parameters": "parameters", "memory": "bytes of weights", "latency": "latency"}


def _cost(groups: Groups, by: Measure | Literal["latency"], threads: int) -> Cost:
    if by not in _CALLED:
        raise ConfigError(f"There is no cost {by!r} to reduce. {closest(by, _CALLED)}")
    if by != "latency":
        return Costs(groups).measure(by)
    from slimgraph.pruning.latency import MeasuredLatency  # which needs the runtime

    return MeasuredLatency(groups, threads=threads)


def _losses(sensitivity: Sensitivity | str | os.PathLike[str], program: Program, criterion: str | Criterion) -> Losses:
    found = sensitivity if isinstance(sensitivity, Sensitivity) else load_sensitivity(sensitivity)
    require_finished(found, program)
    name = name_of(criterion)
    if found.criterion != name:
        raise ConfigError(
            f"The sensitivities were measured with the criterion {found.criterion}, but {name} is to choose. What is "
            "lost depends on which indices go: give one criterion for both."
        )
    return found.losses


def prune(
    program: Program,
    *,
    flops_removed: float = 0.5,
    criterion: str | Criterion = "l2_norm",
    allocation: Strategy = "global",
    data: str | Iterable[Any] | None = None,
    loss: str | Loss | None = None,
    skip: Sequence[str] = (),
    norm_axes: bool = False,
    multiple_of: int = MULTIPLE,
    sensitivity: Sensitivity | str | os.PathLike[str] | None = None,
    proof: bool = True,
    recalibrate: str | Iterable[Any] | None = None,
) -> Program:
    """The program without the channels, heads and neurons that matter least; train it a little afterwards.

    Args:
        program: it stays as it is.
        flops_removed: the part of the FLOPs that is to go at least.
        criterion: what matters: "l1_norm", "l2_norm", "geometry_median", "bn_scale", "taylor" (reads `data`, and `loss`
            if it is given), "random", or a function; `slimgraph.pruning.criteria.score_groups` tells more.
        allocation: "global" ranks all channels of the program, "uniform" takes the same part of every layer,
            "sensitive" takes of every layer what costs the same loss, by `sensitivity`.
        data: batches, for "taylor".
        loss: for "taylor": "cross_entropy", …, or a function of outputs and batch.
        skip: layers that keep all their outputs: names, globs or `re:…`.
        norm_axes: also the channels that a layer or group norm runs over, such as the width of a transformer.
        multiple_of: what the channels that stay are a multiple of, as runtimes like it; a layer with no more than that
            stays whole.
        sensitivity: for "sensitive": what `measure_sensitivity` gave, or the file of `slimgraph sensitivity`.
        proof: compute that the result is the program in which the same channels are zero where they are read.
        recalibrate: batches with which the statistics of batch norms are estimated anew.
    Raises:
        ConfigError: a part that is out of range, or cannot be reached; the message says what can.
        UnknownNameError: no such layer or criterion.
        ProgramError: the program is none, or the proof fails.
        DataError: the data do not fit.

    >>> import torch
    >>> from slimgraph.program.capture import capture
    >>> layers = [torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2)]
    >>> program = capture(torch.nn.Sequential(*layers), torch.zeros(1, 4))
    >>> [tuple(tensor.shape) for tensor in prune(program, flops_removed=0.5).parameters()]
    [(32, 4), (32,), (2, 32), (2,)]
    """
    require_program(program)
    groups = find_groups(program, norm_axes=norm_axes)
    plan = plan_pruning(
        program,
        flops_removed=flops_removed,
        criterion=criterion,
        allocation=allocation,
        data=data,
        loss=loss,
        skip=skip,
        norm_axes=norm_axes,
        multiple_of=multiple_of,
        sensitivity=sensitivity,
        groups=groups,
    )
    result = apply_pruning(program, plan, proof=proof, groups=groups)
    return result if recalibrate is None else reestimate_batch_norm(result, recalibrate)
