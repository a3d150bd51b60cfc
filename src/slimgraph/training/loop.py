"""Train a program: one loop, with hooks at fixed places."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.program import Program, require_program
from slimgraph.training.batch import Batch
from slimgraph.training.checkpoint import Checkpoints
from slimgraph.training.data import DataSource
from slimgraph.training.engine import Engine, fitted, told_options
from slimgraph.training.losses import Loss, find_loss
from slimgraph.training.optim import Groups, OptimizerSpec, ScheduleSpec, trained_parameters
from slimgraph.training.processes import MixedPrecision, one_process
from slimgraph.training.randomness import own_randomness, random_state
from slimgraph.training.run import Evaluate, Fitted, Hook, Run
from slimgraph.training.stream import stream_batches

__all__ = ["Evaluate", "Fitted", "Hook", "Run", "fit", "require_length"]


def fit(
    program: Program,
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    loss: str | Loss,
    optimizer: OptimizerSpec,
    epochs: int | None = None,
    steps: int | None = None,
    schedule: ScheduleSpec | None = None,
    groups: Callable[[Program], Groups] = trained_parameters,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    hooks: Sequence[Hook] = (),
    clip: float | None = None,
    accumulate: int = 1,
    mixed_precision: MixedPrecision = "no",
    keep_best: bool = True,
    best_path: str | os.PathLike[str] | None = None,
    checkpoints: str | os.PathLike[str] | Checkpoints | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Fitted:
    """A trained copy of the program, in the best state that it had, which is never worse than the given one.

    The given program stays as it is. In memory are the copy, what the optimizer keeps, and, where something is
    evaluated, one more copy of the tensors. Training runs on the accelerator where there is one; the result lies where
    the program does. Only one process trains.

    Args:
        program: trained in training mode; the result is in the mode that the program is in.
        data: batches, as often as they are iterated: (inputs, labels), mappings by input name with `label`, or `Batch`;
            or a function that returns them anew for each epoch. Each is checked against the program's inputs, the first
            before anything else is done.
        loss: a name in `LOSSES`, or a function of outputs and `Batch`. One with `taps`, names of values of the program,
            is given these as a third argument, by name; one that is a module has its parameters trained as well.
        optimizer: a class of `torch.optim` by name, with arguments; an optimizer of the program's parameters, which is
            copied with its state; or a function of parameter groups.
        epochs: passes over the data. Give this or `steps`.
        steps: updates of the parameters, in as many passes as that takes.
        schedule: of the learning rate, stepped after each step: "cosine", "linear" or "constant", with
            `{"warmup": …}`; a class of `torch.optim.lr_scheduler`; or a function of the optimizer.
        groups: gives the parameter groups of the copy.
        evaluate: given the program in evaluation mode, without gradients; higher is better. It judges the state before
            the first step, too.
        evaluate_every: steps from one evaluation to the next; None evaluates at the end of each epoch. The last state
            is judged in any case.
        hooks: called in their order at each place.
        clip: the largest norm of all gradients together; longer ones are shortened to it.
        accumulate: batches whose gradients make one step, as if they were one batch.
        mixed_precision: "bf16" or "fp16" run what is safe to run in them so; parameters stay as they are.
        keep_best: give the state with the highest evaluation, the earliest of equals; otherwise the last one.
        best_path: a file for that state, as safetensors, replaced whenever there is a better one.
        checkpoints: a folder, or `Checkpoints` of one, from which a training that was interrupted at any moment goes on
            to the same end: call `fit` again as before. Data must be in the same order then, as they are where all that
            shuffles them draws from PyTorch's, NumPy's or Python's random numbers.
        seed: of PyTorch's random numbers while this runs; those of the caller go on as if it had not. Evaluations draw
            from others than training does.
        progress: called after each step as a `ProgressBar` is: with a stage, the steps, and how many there will be.
    Raises:
        DataError: a batch does not fit the program, or there is none.
        ConfigError, UnknownNameError: an option cannot be used.
        OutputError: a checkpoint cannot be written.
        TrainingError: the loss or the gradient became NaN or infinite; the message names the step and the first layer
            with such a value, and the error's `fitted` is the best so far.
    """
    require_program(program)
    require_length(epochs, steps)
    _require_options(clip, accumulate, evaluate, evaluate_every, best_path)
    loss_of = find_loss(loss)
    told = {**told_options(loss, optimizer, schedule, seed), "accumulate": accumulate}
    kept = Checkpoints(checkpoints) if isinstance(checkpoints, (str, os.PathLike)) else checkpoints
    read = stream_batches(data if callable(data) else lambda: data, "The training data", program.signature)
    begun = random_state()
    batches = read()
    first = next(batches, None)
    if first is None:
        raise DataError("The training data have no batch. An iterator that was read before is empty.")
    batches = chain([first], batches)
    if epochs is not None and (length := _length(data, first)) is not None:
        steps = math.ceil(length / accumulate) * epochs

    with one_process(mixed_precision) as accelerator, own_randomness(seed, accelerator.device):
        loop = Engine(accelerator, loss_of, evaluate, hooks, clip, keep_best, best_path, seed, begun)
        run = loop.prepare(program, optimizer, groups, schedule, steps)
        saved = None if kept is None else kept.newest()

        def over() -> bool:
            return run.stop or (run.step >= (steps or 0) if epochs is None else run.epoch >= epochs)

        with loop.interruption_told():
            loop.call("begin")
            if saved is None:
                loop.judge()  # the state before the first step is the first candidate
            else:
                batches = loop.resume(saved, told, read)
            while not over():
                if run.batch == 0:
                    loop.call("epoch_begin")
                while not over() and (group := tuple(islice(batches, accumulate))):
                    run.batch += len(group)
                    loop.call("step_begin")
                    loop.step(group)
                    loop.call("step_end")
                    if progress is not None:
                        progress("Training", run.step, run.total_steps)
                    if evaluate_every is not None and run.step % evaluate_every == 0:
                        loop.judge()
                    if kept is not None and kept.every is not None and run.step % kept.every == 0:
                        loop.write(kept, told)
                if run.batch == 0:
                    raise DataError(f"The training data have no batch in epoch {run.epoch + 1}, unlike before.")
                run.epoch, run.batch = run.epoch + 1, 0
                if evaluate_every is None:
                    loop.judge()
                loop.call("epoch_end")
                loop.epoch_random = random_state()
                if kept is not None and kept.every is None:
                    loop.write(kept, told)
                batches = read()
            if run.evaluations and run.evaluations[-1][0] != run.step:
                loop.judge()
            loop.call("end")
        return fitted(run, program, loop.losses, told)


def require_length(epochs: int | None, steps: int | None) -> None:
    """Return if one of them, and only one, says how long a training is.

    Raises:
        ConfigError: none does, or both do, or it is below zero.
    """
    if (epochs is None) == (steps is None):
        raise ConfigError(f"epochs is {epochs} and steps is {steps}; give one of them, and not the other.")
    if (epochs or 0) < 0 or (steps or 0) < 0:
        raise ConfigError(f"epochs is {epochs} and steps is {steps}; give at least 0.")


def _require_options(
    clip: float | None,
    accumulate: int,
    evaluate: Evaluate | None,
    evaluate_every: int | None,
    best_path: str | os.PathLike[str] | None,
) -> None:
    for name, number in (("accumulate", accumulate), ("evaluate_every", evaluate_every)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}; give at least 1.")
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip is {clip}; give more than 0.")
    if evaluate is None and (evaluate_every is not None or best_path is not None):
        raise ConfigError("evaluate_every and best_path need `evaluate`: nothing says which state is best.")


def _length(data: Any, first: Batch) -> int | None:
    """Batches in an epoch, as far as the data tell."""
    if isinstance(data, DataSource):
        return None if data.samples is None else math.ceil(data.samples / len(first))
    try:
        return len(data) if hasattr(data, "__len__") else None
    except TypeError:  # a loader of a stream
        return None
