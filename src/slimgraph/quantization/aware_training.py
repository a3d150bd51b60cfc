"""Quantization-aware training in one call."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from slimgraph.deploy.targets import Target
from slimgraph.errors import ConfigError
from slimgraph.program.freeze import freeze_ranges_, freeze_statistics_
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.value_range import MOVING_RATE, WINDOW_SIZE
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import calibrate
from slimgraph.quantization.correct_bias import REPAIR_SAMPLES, correct_bias
from slimgraph.quantization.fake_quantizers import PER_CHANNEL, ActivationRange, Pact, WeightRange
from slimgraph.quantization.freezing import freeze
from slimgraph.quantization.post_training import Remembering
from slimgraph.quantization.preparation import prepare_and_plan
from slimgraph.quantization.qat import parameter_groups, prepare_qat
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, range_algorithm
from slimgraph.quantization.reach import NARROW_BITS, with_best_reach
from slimgraph.training.data import open_data
from slimgraph.training.judge import Judge, TrainingData, judging, usual_loss
from slimgraph.training.loop import Hook, Run, fit, require_length
from slimgraph.training.losses import Loss, find_loss
from slimgraph.training.masks import KeepMasks, masks_of_zeros
from slimgraph.training.metrics import Metric
from slimgraph.training.optim import Groups, ScheduleSpec, make_optimizer, make_schedule
from slimgraph.training.processes import MixedPrecision

CALIBRATION_SAMPLES = 256

LEARNING_RATES = {"narrow": 0.01, "wide": 0.001}
"""Of descent with momentum, where weights or activations have few bits and where they have not, as in the source of
learned steps (Esser et al., section 3.1), whose gradients are scaled for it. docs/benchmarks.md has what it reaches."""

ADAPTIVE_LEARNING_RATE = 5e-4
"""Of an optimizer that normalizes gradients: half of what AdamW trains a network from nothing with."""

_PLAIN_DESCENT = ("SGD", "ASGD")
"""Optimizers whose updates grow with the gradients."""

NARROW_ALGORITHM = "mse"
"""Chooses ranges of activations with few bits: the extent of all elements wastes codes on the largest ones."""


class FreezeLate(Hook):
    """Lets ranges and batch norms' statistics stay as they are in the last part of a training.

    Args:
        ranges_at, statistics_at: the part of all steps after which they stay; None never.
    """

    def __init__(self, *, ranges_at: float | None = 0.75, statistics_at: float | None = 0.75) -> None:
        for name, part in (("ranges_at", ranges_at), ("statistics_at", statistics_at)):
            if part is not None and not 0 <= part <= 1:
                raise ConfigError(f"freeze_{name} is {part}; give a part of the training, from 0 to 1, or None.")
        self._ranges_at, self._statistics_at = ranges_at, statistics_at

    def begin(self, run: Run) -> None:
        """Check that the end can be known."""
        if run.total_steps is None and (self._ranges_at, self._statistics_at) != (None, None):
            raise ConfigError(
                "Ranges or statistics are to be frozen at a part of the training, and the data do not tell how many "
                "batches they have. Give steps= instead of epochs=, or None for what should never be frozen."
            )

    def step_begin(self, run: Run) -> None:
        """Freeze what is due."""
        for part, freeze_ in ((self._ranges_at, freeze_ranges_), (self._statistics_at, freeze_statistics_)):
            if part is not None and run.step == math.ceil(part * (run.total_steps or 0)):
                freeze_(run.program)


def train_quantized(
    program: Program,
    data: str | Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    loss: str | Loss | None = None,
    optimizer: str | tuple[str, Mapping[str, Any]] | None = None,
    schedule: ScheduleSpec | None = ("cosine", {"warmup": 0.05}),
    evaluate: str | Iterable[Any] | Judge | None = None,
    metric: str | Metric = "top1",
    evaluate_every: int | None = None,
    calibration: Iterable[Any] | None = None,
    target: str | Target = "onnxruntime",
    algorithm: str | None = None,
    skip: Sequence[str] = (),
    operators: Sequence[str] | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    weight_quantize_type: WeightRange = "lsq",
    activation_quantize_type: ActivationRange | None = None,
    window_size: int = WINDOW_SIZE,
    moving_rate: float = MOVING_RATE,
    pact: Pact | None = None,
    output_scales: bool = False,
    freeze_ranges_at: float | None = 0.75,
    freeze_statistics_at: float | None = 0.75,
    clip: float | None = None,
    accumulate: int = 1,
    mixed_precision: MixedPrecision = "no",
    sparse_model: bool = False,
    hooks: Sequence[Hook] = (),
    best_path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Program:
    """The program quantized as by `quantize`, after training in which it is rounded as it will be.

    Post-training quantization is the first candidate, and where the training begins; each evaluation is of the
    quantized form, as it would be deployed. What is given back is the best of all, so it is never worse than that. The
    last entry of its history tells what both reached.

    Args:
        program: a float program, in the form in which it was trained: batch norms not folded. It stays as it is.
        data: batches for training, as `fit` takes them, or a specification of them (`open_data`); read several times.
            Give them as the float program saw them in training, in another order each time and augmented likewise.
        epochs, steps: how long; a fifth of the original training is plenty.
        loss: as for `fit`. None is cross entropy where there are labels of classes, and where there are no labels the
            imitation of the float program (`imitate`).
        optimizer: a class of `torch.optim`, with arguments. Rates of a tenth to a twentieth of the original training's
            are right. Steps and offsets that are learned are spared its weight decay, and change as much as weights do,
            relative to the size of both (`parameter_groups`). None is SGD with momentum 0.9, at 0.01 where weights or
            activations have few bits, and otherwise at 0.001.
        schedule: as for `fit`.
        evaluate: labelled batches, or a specification of them, for `metric`; or a function from the quantized program
            to a number, higher being better. None judges by the loss over the first 1024 samples of `data`.
        evaluate_every: steps from one evaluation to the next; None evaluates at the end of each epoch.
        calibration: batches of inputs for the first ranges; None takes the first 256 samples of `data`.
        target, skip, operators, weight_bits, activation_bits: as for `quantize`.
        algorithm: as for `quantize`. None is "mse" where activations have few bits, and otherwise the usual one.
        weight_quantize_type, activation_quantize_type, window_size, moving_rate, pact, output_scales: as for `insert`.
            One range for a whole weight also plans so. Activations are of type "lsq" unless something else is said:
            the others follow extremes, away from ranges that were chosen well. With `pact` it is "moving_average".
        freeze_ranges_at, freeze_statistics_at: the part of the training after which ranges, and the statistics of batch
            norms, stay as they are; None never.
        clip, accumulate, mixed_precision, best_path, seed, progress: as for `fit`; the file is of the rounded program.
        sparse_model: let zeros of the weights stay zeros, as in a program that was made sparse.
        hooks: as for `fit`: `freeze(run.program)` gives at any time what `apply_quantization` takes, and training goes
            on.
    Raises:
        CalibrationError, DataError: the data cannot be used.
        UnknownNameError, ConfigError: an option cannot be used.
        ProgramError: the program is none, is quantized already, or has nothing to quantize.
        TrainingError: the loss became NaN or infinite. Its `fitted.program` is the program with fake quantizers as it
            was at the best evaluation so far; `fitted` is None without one. With `frozen = freeze(fitted.program)`,
            `apply_quantization(frozen.program, frozen.plan)` makes integers of it; `fit` trains it on, with a
            smaller learning rate.
    """
    # What is wrong shows before anything slow begins.
    prepared, plan = prepare_and_plan(
        program,
        target,
        skip=skip,
        operators=operators,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_per_channel=weight_quantize_type in PER_CHANNEL,
    )
    coarse = any(activation.scheme.bits <= NARROW_BITS for activation in plan.activations)
    if algorithm is None:
        algorithm = NARROW_ALGORITHM if coarse else DEFAULT_ALGORITHM
    narrow = coarse or any(weight.scheme.bits <= NARROW_BITS for weight in plan.weights)
    usual_rate = LEARNING_RATES["narrow" if narrow else "wide"]
    if optimizer is None:
        optimizer = ("SGD", {"lr": usual_rate, "momentum": 0.9})
    range_algorithm(algorithm)
    require_length(epochs, steps)
    groups = _groups(optimizer, pact, usual_rate)
    make_schedule(schedule, make_optimizer(optimizer, [{"params": [nn.Parameter(torch.zeros(1))]}], {}), steps or 1)
    late = FreezeLate(ranges_at=freeze_ranges_at, statistics_at=freeze_statistics_at)
    kept = [KeepMasks(masks_of_zeros(program))] if sparse_model else []
    if isinstance(data, str):
        data = open_data(data, program.signature, seed=seed)
    given = TrainingData(program, data)
    loss_of = usual_loss(program, given) if loss is None else find_loss(loss)
    judged_by, judge = judging(given, evaluate, metric, loss_of)

    batches = given.inputs(CALIBRATION_SAMPLES) if calibration is None else calibration
    remembered = Remembering(prepared, batches, samples=REPAIR_SAMPLES)
    plan = calibrate(prepared, with_best_reach(prepared, plan), remembered, algorithm)
    repaired = correct_bias(prepared, plan, remembered.batches)
    post_training = apply_quantization(repaired, plan)
    started = judge(post_training)

    fitted = fit(
        prepare_qat(
            program,
            plan,
            repaired=repaired,
            weight_quantize_type=weight_quantize_type,
            activation_quantize_type=activation_quantize_type or ("lsq" if pact is None else "moving_average"),
            window_size=window_size,
            moving_rate=moving_rate,
            pact=pact,
            output_scales=output_scales,
        ),
        data,
        loss=loss_of,
        optimizer=optimizer,
        groups=groups,
        epochs=epochs,
        steps=steps,
        schedule=schedule,
        evaluate=lambda trained: judge(_deployed(trained)),
        evaluate_every=evaluate_every,
        hooks=[late, *kept, *hooks],
        clip=clip,
        accumulate=accumulate,
        mixed_precision=mixed_precision,
        best_path=best_path,
        seed=seed,
        progress=progress,
    )
    reached = math.nan if fitted.value is None else fitted.value
    is_better = reached > started or (math.isnan(started) and not math.isnan(reached))
    best = _deployed(fitted.program) if is_better else post_training
    entry = HistoryEntry(
        step="train_quantized",
        parameters={"judged_by": judged_by},
        result={
            "post_training": started,
            "best": reached if is_better else started,
            "best_step": fitted.step if is_better else 0,
            "steps": len(fitted.losses),
        },
    )
    return best.with_history(entry)


def _deployed(trained: Program) -> Program:
    frozen = freeze(trained)
    return apply_quantization(frozen.program, frozen.plan)


def _groups(
    optimizer: str | tuple[str, Mapping[str, Any]], pact: Pact | None, usual_rate: float
) -> Callable[[Program], Groups]:
    if not isinstance(optimizer, (str, tuple)):
        raise ConfigError(
            "The optimizer of quantization-aware training is a name of torch.optim, with arguments: the parameters "
            "that it trains do not exist yet."
        )
    name, arguments = optimizer if isinstance(optimizer, tuple) and len(optimizer) == 2 else (optimizer, {})
    is_plain = name in _PLAIN_DESCENT
    return partial(
        parameter_groups,
        learning_rate=arguments.get("lr", usual_rate if is_plain else ADAPTIVE_LEARNING_RATE),
        weight_decay=arguments.get("weight_decay", 0.0),
        pact=pact,
        normalized=not is_plain,
    )
