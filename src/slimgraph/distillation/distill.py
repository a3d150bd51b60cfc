"""Train a program to compute what other networks compute."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from slimgraph.distillation.cache import CachedTeacher
from slimgraph.distillation.joined import Ask, JoinedLoss, Pair
from slimgraph.distillation.teacher import Teacher
from slimgraph.errors import ConfigError
from slimgraph.program.program import HistoryEntry, Program, require_program
from slimgraph.training.data import open_data
from slimgraph.training.judge import Judge, TrainingData, judging
from slimgraph.training.loop import Hook, fit, require_length
from slimgraph.training.losses import Loss, find_loss
from slimgraph.training.metrics import Metric
from slimgraph.training.optim import OptimizerSpec, ScheduleSpec
from slimgraph.training.processes import MixedPrecision

LEARNING_RATE = 1e-3
"""What AdamW trains a network with that is to change its features, not only to recover from a change."""


def distill(
    student: Program,
    teacher: Program | nn.Module | Sequence[Program | nn.Module],
    data: str | Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    pairs: Sequence[Pair] = (),
    label_loss: str | Loss | None = None,
    label_weight: float = 1.0,
    epochs: int | None = None,
    steps: int | None = None,
    optimizer: OptimizerSpec = ("AdamW", {"lr": LEARNING_RATE}),
    schedule: ScheduleSpec | None = ("cosine", {"warmup": 0.05}),
    evaluate: str | Iterable[Any] | Judge | None = None,
    metric: str | Metric = "top1",
    evaluate_every: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    mixed_precision: MixedPrecision = "no",
    hooks: Sequence[Hook] = (),
    best_path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Program:
    """A copy of the student that was trained to compute what its teachers compute.

    The given programs stay as they are. What is given back is the best state of all that were evaluated, the one at the
    beginning included, so it is never worse than the student.

    Args:
        student: a program that can be trained.
        teacher: one, or several, each a program or a module that takes the student's inputs.
        data: batches, as `fit` takes them, or a specification of them (`open_data`). Labels are not needed.
        pairs: what of the student is compared with what of a teacher, and how. None compares the outputs in order:
            scores of classes by `kl`, everything else by `l2`.
        label_loss: a loss against the labels to go with it, as for `fit`; None takes none.
        label_weight: of that loss.
        epochs, steps, optimizer, schedule: as for `fit`.
        evaluate: labelled batches, or a specification of them, for `metric`; or a function from the program to a
            number, higher being better. None evaluates by the loss over the first 1024 samples of `data`.
        evaluate_every: steps from one evaluation to the next; None evaluates at the end of each epoch.
        cache: a file for the teachers' answers, so that each sample is asked for only once: `CachedTeacher`.
        clip, accumulate, mixed_precision, hooks, best_path, seed, progress: as for `fit`.
    Raises:
        ConfigError: shapes of the student and a teacher do not fit, or an option cannot be used.
        UnknownNameError: there is no such value, loss, metric or optimizer.
        DataError: the data cannot be used.
        TrainingError: the loss became NaN or infinite; the error's `fitted` is the best so far.
    """
    require_program(student)
    require_length(epochs, steps)
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    if not teachers:
        raise ConfigError("There is no teacher; give at least one program or module.")
    if isinstance(data, str):
        data = open_data(data, student.signature, seed=seed)
    given = TrainingData(student, data)
    pairs = list(pairs) or [pair for number, each in enumerate(teachers) for pair in _outputs(student, each, number)]
    asks: list[Ask] = []
    for number, each in enumerate(teachers):
        wanted = [name for pair in pairs if pair.teacher_number == number for name in pair.teachers]
        asked = Teacher(each, wanted)
        asks.append(asked if cache is None else CachedTeacher(asked, cache))
    loss = JoinedLoss(
        student,
        asks,
        pairs,
        given.first.inputs,
        label_loss=None if label_loss is None else find_loss(label_loss),
        label_weight=label_weight,
    )
    judged_by, judge = judging(given, evaluate, metric, loss)
    fitted = fit(
        student,
        data,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        epochs=epochs,
        steps=steps,
        evaluate=judge,
        evaluate_every=evaluate_every,
        clip=clip,
        accumulate=accumulate,
        mixed_precision=mixed_precision,
        hooks=hooks,
        best_path=best_path,
        seed=seed,
        progress=progress,
    )
    entry = HistoryEntry(
        step="distill",
        parameters={"pairs": [pair.title for pair in pairs], "judged_by": judged_by},
        result={"started": fitted.evaluations[0][1], "best": fitted.value, "best_step": fitted.step},
    )
    return fitted.program.with_history(entry)


def _outputs(student: Program, teacher: Program | nn.Module, number: int) -> list[Pair]:
    """Every output of the student with that of the teacher in its place."""
    own = [spec.name for spec in student.signature.outputs]
    theirs = _output_names(teacher, own)
    if len(own) != len(theirs):
        raise ConfigError(
            f"The student has {len(own)} outputs ({', '.join(own)}), the teacher {len(theirs)} ({', '.join(theirs)}). "
            "Give `pairs`."
        )
    return [
        Pair(student=name, teacher=wanted, loss="kl" if _of_classes(student, name) else "l2", teacher_number=number)
        for name, wanted in zip(own, theirs, strict=True)
    ]


def _output_names(teacher: Program | nn.Module, own: Sequence[str]) -> list[str]:
    if isinstance(teacher, Program):
        return [spec.name for spec in teacher.signature.outputs]
    return ["output"] if len(own) == 1 else [f"output_{number}" for number in range(len(own))]


def _of_classes(student: Program, name: str) -> bool:
    """Whether an output tells classes apart: (N, classes), and the only one or named logits."""
    spec = next(spec for spec in student.signature.outputs if spec.name == name)
    return len(spec.shape) == 2 and (len(student.signature.outputs) == 1 or name == "logits")
