"""One pass over data for many points of a sensitivity table."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.program import Program
from slimgraph.program.replay import Variant, replay_variants
from slimgraph.pruning.allocate import count_removed, lowest
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.sensitivity import Running, relative_loss
from slimgraph.pruning.variants import made_quick, quick_inputs, variant_without
from slimgraph.training.batch import Batch
from slimgraph.training.metrics import Metric

Pending: TypeAlias = Mapping[str, Sequence[float]]
"""The ratios to measure, ascending, by group."""

_SURE = 100
"""Samples after which a ladder can be given up: a loss that they show is no accident of a few."""


@dataclass(frozen=True, slots=True)
class _Point:
    group: str
    ratios: tuple[float, ...]
    """Several where the group has few indices, so that they mean the same."""
    variant: Variant | None
    """None where nothing goes."""


def measured(
    program: Program,
    pending: Pending,
    scores: Mapping[str, Tensor],
    batches: Iterable[Batch],
    score: Metric,
    running: Running,
    stop_loss: float | None,
    *,
    norm_axes: bool = False,
) -> Iterator[Running]:
    """The sums after each batch that `running` has not got yet.

    Args:
        scores: of the indices of each group; the lowest go first.
        score: the metric.
        stop_loss: the part of the metric behind whose loss a ladder ends; None goes on.
        norm_axes: whether the groups are those that `find_groups` finds with them.
    Raises:
        ConfigError: the metric returned something else than one number for each sample, or one for the batch.
        DataError: the metric is not finite, or does not apply to the answers and labels.
    """
    quick, points = _points(program, pending, scores, norm_axes=norm_axes)
    for number, batch in enumerate(batches):
        if number < running.batches:
            continue
        sums = {name: dict(several) for name, several in running.sums.items()}
        live = [point for point in points if point.ratios[0] in sums[point.group]]
        variants = {index: point.variant for index, point in enumerate(live) if point.variant is not None}
        totals = _totals(quick, [*variants.values()], batch, score)
        baseline = totals.pop()
        found = dict(zip(variants, totals, strict=True))
        for index, point in enumerate(live):
            for ratio in sums[point.group].keys() & set(point.ratios):
                sums[point.group][ratio] += found.get(index, baseline)
        running = Running(
            batches=number + 1,
            samples=running.samples + len(batch),
            baseline=running.baseline + baseline,
            sums=sums,
        )
        if running.samples >= _SURE:
            running = _without_hopeless(running, stop_loss)
        yield running


def first_hopeless(baseline: float, metrics: Mapping[float, float], stop_loss: float | None) -> float:
    """The first ratio at which more than `stop_loss` of the metric is lost; 1 where there is none."""
    if stop_loss is None:
        return 1.0
    lost = [ratio for ratio, metric in metrics.items() if relative_loss(baseline, metric) > stop_loss]
    return min(lost, default=1.0)


def _without_hopeless(running: Running, stop_loss: float | None) -> Running:
    sums = {}
    for name, several in running.sums.items():
        end = first_hopeless(running.baseline, several, stop_loss)
        sums[name] = {ratio: total for ratio, total in several.items() if ratio <= end}
    return dataclasses.replace(running, sums=sums)


def _points(
    program: Program, pending: Pending, scores: Mapping[str, Tensor], *, norm_axes: bool
) -> tuple[Program, list[_Point]]:
    """What to run for each point, and the program that it is a variant of."""
    groups = _groups_of_quick(program, pending, norm_axes=norm_axes)
    points = []
    for name, ratios in pending.items():
        by_count: dict[int, list[float]] = {}
        for ratio in ratios:
            by_count.setdefault(count_removed(groups[name].size, ratio), []).append(ratio)
        for count, several in by_count.items():
            variant = variant_without(groups, name, lowest(scores[name], count)) if count else None
            points.append(_Point(name, tuple(several), variant))
    return groups.traced.program, points


def _groups_of_quick(program: Program, names: Iterable[str], *, norm_axes: bool) -> Groups:
    """The groups of a program that computes the same and runs faster."""
    found = find_groups(made_quick(program), norm_axes=norm_axes)
    if {*names} <= {group.name for group in found.groups}:
        return found
    return find_groups(made_quick(program, fold=False), norm_axes=norm_axes)  # a group was named after a batch norm


def _totals(program: Program, variants: Sequence[Variant], batch: Batch, score: Metric) -> list[float]:
    """The metric of each variant, summed over the samples of a batch, and in the end that of the whole program."""
    totals = [0.0] * (len(variants) + 1)
    with torch.inference_mode():
        for index, outputs in replay_variants(program, quick_inputs(program, batch.inputs), variants):
            answers = program.signature.formed([output.cpu() for output in outputs])
            totals[-1 if index is None else index] = _total(score(answers, batch.labels), len(batch))
    return totals


def _total(result: Any, samples: int) -> float:
    """The sum over the samples of one number for each, or of their mean."""
    found = torch.as_tensor(result)
    if found.shape not in ((), (samples,)):
        raise ConfigError(
            f"The metric returned a result of shape {list(found.shape)} for {samples} samples; it must return one "
            "number for each sample, or each time one for the batch."
        )
    total = float(found.sum(dtype=torch.float64)) if found.dim() else float(found) * samples
    if not math.isfinite(total):
        raise DataError("The metric is NaN or infinite where a part of the program is gone. Give one that is finite.")
    return total
