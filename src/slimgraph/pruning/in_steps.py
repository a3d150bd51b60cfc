"""Prune by sensitivity in several steps, each measured anew, with training in between."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from slimgraph.errors import ConfigError
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.criteria import Criterion
from slimgraph.pruning.measure_sensitivity import measure_sensitivity
from slimgraph.pruning.prune import plan_pruning
from slimgraph.pruning.sensitive import LossRule, step_ratio
from slimgraph.pruning.sensitivity import ratios_by
from slimgraph.training.metrics import Metric


def prune_in_steps(
    program: Program,
    data: str | Iterable[Any],
    *,
    flops_removed: float = 0.5,
    num_steps: int = 1,
    delta_rate: float = 0.2,
    eval_rate: float | None = None,
    criterion: str | Criterion = "l1_norm",
    metric: str | Metric = "top1",
    rule: LossRule = "cubic",
    skip: Sequence[str] = (),
    multiple_of: int = 1,
    train: Callable[[Program], Program] | None = None,
    file: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Program:
    """The program after some steps that each remove the same part of what is left, where that loses the least.

    Args:
        data: labelled batches on which losses are measured, as `measure_sensitivity` takes them.
        flops_removed: the part of the FLOPs that all steps together remove.
        num_steps: each removes 1 − (1 − flops_removed)^(1 / num_steps) of what is there.
        delta_rate: the ladder of ratios that are tried: delta, 2 · delta, … below 1.
        eval_rate: the part of the data that is used in each step; None uses all.
        train: repairs the program after each step; it returns what the next step begins with.
        file: where sensitivities are kept; those of step k > 1 in a file with `.step<k>` before the suffix, so that a
            measurement that was interrupted goes on.
    Raises:
        ConfigError: a number out of range, or a part that cannot be reached.
        DataError: a file is of another program; training that is not the same every time makes it so.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}; give at least 1.")
    if not 0 < flops_removed < 1:
        raise ConfigError(f"flops_removed is {flops_removed}; give a number between 0 and 1.")
    for step in range(1, num_steps + 1):
        sensitivity = measure_sensitivity(
            program,
            data,
            ratios=ratios_by(delta_rate),
            skip=skip,
            criterion=criterion,
            metric=metric,
            stop_loss=None,
            eval_rate=eval_rate,
            seed=seed,
            file=None if file is None else _numbered(Path(file), step),
        )
        plan = plan_pruning(
            program,
            flops_removed=step_ratio(flops_removed, num_steps),
            criterion=criterion,
            allocation="sensitive",
            sensitivity=sensitivity,
            rule=rule,
            skip=skip,
            multiple_of=multiple_of,
            seed=seed,
        )
        program = apply_pruning(program, plan)
        program = program if train is None else train(program)
    return program


def _numbered(file: Path, step: int) -> Path:
    return file if step == 1 else file.with_name(f"{file.stem}.step{step}{file.suffix}")
