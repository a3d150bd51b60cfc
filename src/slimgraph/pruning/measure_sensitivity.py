"""Measure how sensitive a program is to the loss of each of its groups."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.fingerprint import fingerprint
from slimgraph.program.program import Program, require_program
from slimgraph.program.signature import Signature
from slimgraph.pruning.allocate import matching, without
from slimgraph.pruning.batches import batches_of
from slimgraph.pruning.criteria import Criterion, score_groups
from slimgraph.pruning.groups import Group, Groups, find_groups
from slimgraph.pruning.sensitivity import RATIOS, Ladder, Running, Sensitivity, name_of
from slimgraph.pruning.sensitivity_file import load_sensitivity, require_program_of, save_sensitivity
from slimgraph.pruning.sensitivity_pass import Pending, first_hopeless, measured
from slimgraph.pruning.sensitivity_ray import measured_on_ray
from slimgraph.training.batch import Batch
from slimgraph.training.metrics import Metric, find_metric

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Told what is going on, how many samples of it are done, and of how many; None: that is not known."""

_READ_DATA = ("taylor", "fisher")


def measure_sensitivity(
    program: Program,
    data: str | Iterable[Any],
    *,
    ratios: Sequence[float] = RATIOS,
    layers: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    norm_axes: bool = False,
    criterion: str | Criterion = "l2_norm",
    metric: str | Metric = "top1",
    stop_loss: float | None = 0.5,
    eval_rate: float | None = None,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Sensitivity:
    """The metric of the program without a part of one group, for each group and ratio.

    All points are measured in one pass: what stands before the first reader of a group is computed once for every batch
    and shared by all points behind it. Nothing is trained, and statistics of batch norms stay.

    Args:
        data: what `open_data` takes, or batches, which can be iterated more than once.
        ratios: the parts of a group that go, in (0, 1).
        layers: layers, parameters or patterns (`matching`) whose groups are measured; None measures all.
        skip: those that are left out.
        norm_axes: also channels that a layer or group norm runs over; its statistics are then those of the rest.
        criterion: which indices of a group go first, as `score_groups` has it; some read `data`.
        metric: as `evaluate` has it; higher is better.
        stop_loss: a ladder ends at the ratio at which more than this part of the metric is lost: larger ones are
            hopeless. It takes 100 samples to give one up. None measures all of them.
        eval_rate: the part of the samples that is used, always the same; None uses all.
        seed: of that choice, and of a criterion that draws.
        file: where the table is kept, written after every batch; a measurement that was interrupted goes on from there,
            and points that it has are not measured again.
        workers: processes of a Ray cluster that share the groups (`slimgraph[ray]`), with the same numbers; the samples
            are then held in memory, and the file is written when a share is done. None measures in this process.
    Raises:
        ConfigError: a ratio or part out of range, or the file was measured with something else.
        UnknownNameError: no such layer, criterion or metric.
        DataError: the data do not fit, or the file is of another model or damaged.
        ProgramError: the program is none, or has nothing that the criterion can judge.
    """
    require_program(program)
    wanted = _checked(ratios)
    if eval_rate is not None and not 0 < eval_rate <= 1:
        raise ConfigError(f"eval_rate is {eval_rate}; give the part of the samples to use, in (0, 1].")
    score = find_metric(metric) if isinstance(metric, str) else metric
    groups = find_groups(program, norm_axes=norm_axes)
    chosen = dataclasses.replace(groups, groups=_chosen(groups, layers, skip))
    scores = score_groups(program, chosen, criterion, data=data if criterion in _READ_DATA else None, seed=seed)
    about = Sensitivity(
        fingerprint=fingerprint(program),
        criterion=name_of(criterion),
        metric=name_of(metric),
        data=_first_hash(_batches(data, program.signature, eval_rate, seed), eval_rate, seed),
        samples=0,
        baseline=0.0,
    )
    known = about if file is None or not Path(file).exists() else _continued(load_sensitivity(file), about, program)
    pending = {group.name: _pending(known, group.name, wanted, stop_loss) for group in chosen.groups}
    pending = {name: several for name, several in pending.items() if several}
    if not pending:
        return dataclasses.replace(known, running=None)
    batches = _batches(data, program.signature, eval_rate, seed)
    if workers is not None:
        shares = measured_on_ray(
            program, pending, scores, [*batches], score, stop_loss, workers=workers, norm_axes=norm_axes
        )
        for share in shares:
            known = _with_points(known, share, groups)
            pending = {name: several for name, several in pending.items() if name not in share.sums}
            if file is not None:
                save_sensitivity(dataclasses.replace(known, running=Running.of(pending) if pending else None), file)
            progress(f"Measuring sensitivity, {len(pending)} groups to go", 0, None)
        return known
    running = _resumed(known.running, pending)
    for reached in measured(program, pending, scores, batches, score, running, stop_loss, norm_axes=norm_axes):
        running = reached
        if file is not None:
            save_sensitivity(dataclasses.replace(known, running=running), file)
        progress("Measuring sensitivity", running.samples, None)
    found = _with_points(known, running, groups)
    if file is not None:
        save_sensitivity(found, file)
    return found


# What is asked for


def _checked(ratios: Sequence[float]) -> tuple[float, ...]:
    wrong = [ratio for ratio in ratios if not 0 < ratio < 1]
    if wrong or not ratios:
        raise ConfigError(f"The ratios are {[*ratios]}; give parts of a group that go, each between 0 and 1.")
    return tuple(sorted({round(ratio, 6) for ratio in ratios}))


def _chosen(groups: Groups, layers: Sequence[str] | None, skip: Sequence[str]) -> tuple[Group, ...]:
    free = without(groups, skip)
    if layers is not None:
        asked = {group.name for pattern in layers for group in matching(groups, pattern)}
        free = tuple(group for group in free if group.name in asked)
    if not free:
        raise ConfigError("There is no group to measure: nothing of these layers can be pruned, or all is skipped.")
    return free


def _pending(known: Sensitivity, group: str, wanted: Sequence[float], stop_loss: float | None) -> list[float]:
    """The ratios that were not measured yet, up to where the ladder ended."""
    found = known.ladders[group].metrics if group in known.ladders else {}
    end = first_hopeless(known.baseline, found, stop_loss)
    return [ratio for ratio in wanted if ratio not in found and ratio < end]


def _continued(known: Sensitivity, about: Sensitivity, program: Program) -> Sensitivity:
    require_program_of(known, program)
    for what in ("criterion", "metric", "data"):
        if getattr(known, what) != getattr(about, what):
            raise ConfigError(
                f"The file has sensitivities with the {what} {getattr(known, what)!r}, but now it is "
                f"{getattr(about, what)!r}. Measure alike, or into another file."
            )
    return known


def _resumed(running: Running | None, pending: Pending) -> Running:
    """The measurement that is under way, where it is of these points; else a new one."""
    fresh = Running.of(pending)
    if running is None or running.sums.keys() != fresh.sums.keys():
        return fresh
    same = all(
        [*running.sums[name]] == several[: len(running.sums[name])] and running.sums[name]
        for name, several in pending.items()
    )
    return running if same else fresh


# The samples


def _batches(data: str | Iterable[Any], signature: Signature, eval_rate: float | None, seed: int) -> Iterator[Batch]:
    """The samples that are used; of a program with a fixed batch, whole batches."""
    generator = torch.Generator().manual_seed(seed)
    none = True
    for batch in batches_of(data, signature):
        if eval_rate is not None:
            drawn = torch.rand(len(batch) if signature.batched else 1, generator=generator) < eval_rate
            if not bool(drawn.any()):
                continue
            batch = _some(batch, drawn, signature) if signature.batched else batch
        none = False
        yield batch
    if none:
        raise DataError(f"Of these data no sample is left at an eval_rate of {eval_rate}. Give a larger one, or more.")


def _some(batch: Batch, drawn: torch.Tensor, signature: Signature) -> Batch:
    inputs = {name: x[drawn] if name in signature.batched else x for name, x in batch.inputs.items()}
    return Batch(inputs, None if batch.labels is None else batch.labels[drawn])


def _first_hash(batches: Iterator[Batch], eval_rate: float | None, seed: int) -> str:
    """Tells data from other data, nearly always: by the first batch, and how samples are chosen."""
    first = next(batches)
    found = hashlib.sha256(repr((eval_rate, None if eval_rate is None else seed)).encode())
    for tensor in (*first.inputs.values(), *(() if first.labels is None else (first.labels,))):
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


# The table


def _with_points(known: Sensitivity, running: Running, groups: Groups) -> Sensitivity:
    """The table with the points of a finished pass, in the order of the program."""
    baseline = running.baseline / running.samples
    if known.samples and (known.samples, known.baseline) != (running.samples, baseline):
        raise ConfigError(
            f"The file has a baseline of {known.baseline} on {known.samples} samples, but now it is {baseline} on "
            f"{running.samples}: these are other data. Measure on the same, or into another file."
        )
    ladders = {}
    for group in groups.groups:
        metrics = dict(known.ladders[group.name].metrics) if group.name in known.ladders else {}
        metrics |= {ratio: total / running.samples for ratio, total in running.sums.get(group.name, {}).items()}
        if metrics:
            ladders[group.name] = Ladder(group=group.name, size=group.size, metrics=dict(sorted(metrics.items())))
    return dataclasses.replace(known, samples=running.samples, baseline=baseline, ladders=ladders, running=None)
