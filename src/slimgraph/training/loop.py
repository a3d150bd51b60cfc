"""Train a program: one loop, with hooks at fixed places."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from slimgraph.errors import ConfigError, DataError, TrainingError
from slimgraph.program.program import HistoryEntry, Json, Program, require_program
from slimgraph.program.watch import run_with_values
from slimgraph.training.batch import Batch
from slimgraph.training.data import DataSource
from slimgraph.training.evaluate import Evaluation
from slimgraph.training.losses import Loss, find_loss
from slimgraph.training.not_finite import first_not_finite
from slimgraph.training.optim import (
    Groups,
    OptimizerSpec,
    ScheduleSpec,
    make_optimizer,
    make_schedule,
    trained_parameters,
)
from slimgraph.training.processes import MixedPrecision, one_process
from slimgraph.training.state import State, state_of
from slimgraph.training.stream import stream_batches

Evaluate: TypeAlias = Callable[[Program], float | Evaluation]
"""How good a program is; higher is better."""


@dataclass(slots=True, kw_only=True)
class Run:
    """A training that is going on, as hooks see it."""

    program: Program
    """The one that is trained: hooks may copy it, export the copy, and change what is no tensor of it."""
    optimizer: Optimizer
    schedule: Any
    total_steps: int | None
    """Steps of the whole run; None where the data do not tell how many batches they have."""
    step: int = 0
    """Steps that were taken."""
    epoch: int = 0
    """Epochs that were ended."""
    loss: float = math.nan
    """Of the last step."""
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """Step and value of each evaluation."""
    best: State | None = None
    stop: bool = False
    """A hook that sets it ends the training with this step."""


class Hook:
    """What is called at fixed places of `fit`. Override what is needed; the rest does nothing."""

    def begin(self, run: Run) -> None:
        """Before the first step, and before the first evaluation."""

    def epoch_begin(self, run: Run) -> None:
        """Before the first batch of an epoch is read."""

    def step_begin(self, run: Run) -> None:
        """Before each step."""

    def step_end(self, run: Run) -> None:
        """After each step: the parameters, the learning rate, `run.step` and `run.loss` are new."""

    def evaluated(self, run: Run) -> None:
        """After each evaluation: `run.evaluations` ends with it, and `run.best` is the best state so far."""

    def epoch_end(self, run: Run) -> None:
        """After the last step of an epoch, and after its evaluation."""

    def end(self, run: Run) -> None:
        """After the last step; the program has its last state, not yet its best one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a training has come to."""

    program: Program
    """In the best state, or in the last one where nothing was evaluated."""
    step: int
    """Steps after which it had that state."""
    value: float | None
    """What the evaluation gave for it; None where nothing was evaluated."""
    losses: tuple[float, ...]
    """One for each step."""
    evaluations: tuple[tuple[int, float], ...]
    """Step and value of each; the first is of step 0."""


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
        seed: of PyTorch's random numbers while this runs; those of the caller go on as if it had not. Evaluations draw
            from others than training does.
        progress: called after each step as a `ProgressBar` is: with a stage, the steps, and how many there will be.
    Raises:
        DataError: a batch does not fit the program, or there is none.
        ConfigError, UnknownNameError: an option cannot be used.
        TrainingError: the loss or the gradient became NaN or infinite; the message names the step and the first layer
            with such a value, and the error's `fitted` is the best so far.
    """
    require_program(program)
    require_length(epochs, steps)
    _require_options(clip, accumulate, evaluate, evaluate_every, best_path)
    loss_of = find_loss(loss)
    read = stream_batches(data if callable(data) else lambda: data, "The training data", program.signature)
    batches = read()
    first = next(batches, None)
    if first is None:
        raise DataError("The training data have no batch. An iterator that was read before is empty.")
    batches = chain([first], batches)
    if epochs is not None and (length := _length(data, first)) is not None:
        steps = math.ceil(length / accumulate) * epochs

    with one_process(mixed_precision) as accelerator:
        loop = _Loop(accelerator, loss_of, evaluate, hooks, clip, keep_best, best_path, seed)
        run = loop.prepare(program, optimizer, groups, schedule, steps)

        def over() -> bool:
            return run.stop or (run.step >= (steps or 0) if epochs is None else run.epoch >= epochs)

        with loop.interruption_told(), loop.randomness(seed):
            loop.call("begin")
            loop.judge()  # the state before the first step is the first candidate
            while not over():
                loop.call("epoch_begin")
                begun = run.step
                while not over() and (group := tuple(islice(batches, accumulate))):
                    loop.call("step_begin")
                    loop.step(group)
                    loop.call("step_end")
                    if progress is not None:
                        progress("Training", run.step, run.total_steps)
                    if evaluate_every is not None and run.step % evaluate_every == 0:
                        loop.judge()
                if run.step == begun:
                    raise DataError(f"The training data have no batch in epoch {run.epoch + 1}, unlike before.")
                run.epoch += 1
                if evaluate_every is None:
                    loop.judge()
                loop.call("epoch_end")
                batches = read()
            if run.evaluations and run.evaluations[-1][0] != run.step:
                loop.judge()
            loop.call("end")
        return _fitted(run, program, loop.losses, _told(loss, optimizer, schedule, seed))


class _Shell(nn.Module):
    """Accelerate patches the `forward` of what it prepares: of this, so that copies of the program are free of it."""

    def __init__(self, program: Program, loss: Loss) -> None:
        super().__init__()
        self.program = program
        self.loss = loss if isinstance(loss, nn.Module) else None  # here its parameters are trained by all processes
        self.taps: Sequence[str] = getattr(loss, "taps", ())

    def forward(self, **inputs: Tensor) -> tuple[Any, ...]:
        return run_with_values(self.program, inputs, self.taps) if self.taps else (self.program(**inputs),)


class _Loop:
    """What happens in the places of `fit`."""

    run: Run

    def __init__(
        self,
        accelerator: Accelerator,
        loss: Loss,
        evaluate: Evaluate | None,
        hooks: Sequence[Hook],
        clip: float | None,
        keep_best: bool,
        best_path: str | os.PathLike[str] | None,
        seed: int,
    ) -> None:
        self.accelerator, self.loss, self.evaluate, self.hooks = accelerator, loss, evaluate, hooks
        self.clip, self.keep_best, self.best_path, self.seed = clip, keep_best, best_path, seed
        self.losses: list[float] = []

    def prepare(
        self,
        program: Program,
        optimizer: OptimizerSpec,
        groups: Callable[[Program], Groups],
        schedule: ScheduleSpec | None,
        steps: int | None,
    ) -> Run:
        """A copy of the program on the device, with all that trains it."""
        trained = program.copy()
        pairs = zip(_parameters(program), _parameters(trained), strict=True)
        twins: dict[int, Tensor] = {id(old): new for old, new in pairs}
        trained.to(self.accelerator.device).train()
        made = make_optimizer(optimizer, groups(trained), twins)
        shell = _Shell(trained, self.loss).to(self.accelerator.device)
        if shell.loss is not None and (own := list(shell.loss.parameters())):
            made.add_param_group({"params": own})
        # The schedule comes first: where gradients are scaled, Accelerate keeps the method that it has wrapped.
        scheduled = make_schedule(schedule, made, steps)
        self.model, self.stepper = self.accelerator.prepare(shell, made)
        self.run = Run(program=trained, optimizer=made, schedule=scheduled, total_steps=steps)
        return self.run

    def call(self, place: str) -> None:
        for hook in self.hooks:
            getattr(hook, place)(self.run)

    def judge(self) -> None:
        """Evaluate the program, and keep its state if none was better."""
        if self.evaluate is None:
            return
        run = self.run
        with self.randomness(self.seed + 1), torch.no_grad():
            run.program.eval()
            given = self.evaluate(run.program)
            run.program.train()
        value = given.value if isinstance(given, Evaluation) else float(given)
        run.evaluations.append((run.step, value))
        if self.keep_best and not math.isnan(value) and (run.best is None or value > run.best.value):
            run.best = state_of(run.program, step=run.step, value=value)
            if self.best_path is not None:
                run.best.write(self.best_path)
        if isinstance(run.schedule, ReduceLROnPlateau):
            run.schedule.step(value)
        self.call("evaluated")

    def step(self, group: Sequence[Batch]) -> None:
        """One update of the parameters by some batches."""
        run = self.run
        self.stepper.zero_grad()
        samples, total = sum(map(len, group)), 0.0
        for batch in group:
            batch = batch.to(self.accelerator.device)
            outputs, *values = self.model(**batch.inputs)
            loss = _checked_loss(self.loss(outputs, batch, *values))
            value, share = loss.item(), len(batch) / samples
            if not math.isfinite(value):
                raise self._failure(f"is {value}", batch)
            self.accelerator.backward(loss * share if share < 1 else loss)
            total += value * share
        if self.clip is not None:
            norm = self.accelerator.clip_grad_norm_(run.program.parameters(), self.clip)
            if norm is not None and not math.isfinite(norm) and self.stepper.scaler is None:
                raise self._failure(f"is {total:.4g}, but its gradient is not finite", None)
        self.stepper.step()
        if not (run.schedule is None or isinstance(run.schedule, ReduceLROnPlateau) or self.stepper.step_was_skipped):
            run.schedule.step()
        run.step, run.loss = run.step + 1, total
        self.losses.append(total)

    @contextmanager
    def randomness(self, seed: int) -> Iterator[None]:
        """Random numbers of their own for what is done inside."""
        device = self.accelerator.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(seed)
            yield

    @contextmanager
    def interruption_told(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as interruption:
            if self.best_path is not None and self.run.best is not None:
                interruption.add_note(f"The best state so far, of step {self.run.best.step}, is in {self.best_path}.")
            raise

    def _failure(self, what: str, batch: Batch | None) -> TrainingError:
        run = self.run
        if batch is None:
            gradients = ((name, parameter.grad) for name, parameter in run.program.named_parameters())
            broken = [name for name, given in gradients if given is not None and not bool(given.isfinite().all())]
            where = f"The gradient of {broken[0]!r} is not." if broken else "Its norm exceeds what a number can hold."
        else:
            with self.accelerator.autocast():
                found = first_not_finite(run.program, batch.inputs)
            where = found or "Every value of the program is finite; the loss function made it of them."
        kept = ""
        if run.best is not None:
            place = "" if self.best_path is None else f", and in {self.best_path}"
            kept = f" The best state so far, of step {run.best.step}, is the error's `fitted`{place}."
        rates = ", ".join(f"{group['lr']:.3g}" for group in run.optimizer.param_groups)
        error = TrainingError(
            f"The loss of step {run.step + 1} {what}. {where}{kept} Lower the learning rate (here {rates}), clip "
            "gradients (clip=1.0), or look at this batch."
        )
        if run.best is not None:
            error.fitted = _fitted(run, run.program, self.losses, {})
        return error


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


def _parameters(program: Program) -> Iterator[nn.Parameter]:
    return (parameter for _, parameter in program.named_parameters(remove_duplicate=False))


def _checked_loss(given: Any) -> Tensor:
    if not isinstance(given, Tensor) or given.numel() != 1:
        told = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ConfigError(f"The loss returned {told}; it must return a tensor of one number.")
    if not given.requires_grad:
        raise TrainingError(
            "The loss does not depend on any parameter that takes a gradient. Quantized programs have none: train the "
            "float one, or one that `prepare_qat` made."
        )
    return given.reshape(())


def _fitted(run: Run, given: Program, losses: Sequence[float], parameters: dict[str, Json]) -> Fitted:
    step, value = run.step, run.evaluations[-1][1] if run.evaluations else None
    if run.best is not None:
        run.best.put_into(run.program)
        step, value = run.best.step, run.best.value
    run.optimizer.zero_grad()
    finished = run.program.to(given.device).train(given.training)
    entry = HistoryEntry(
        step="fit", parameters=parameters, result={"steps": run.step, "kept_step": step, "value": value}
    )
    return Fitted(
        program=finished.with_history(entry),
        step=step,
        value=value,
        losses=tuple(losses),
        evaluations=tuple(run.evaluations),
    )


def _told(loss: Any, optimizer: Any, schedule: Any, seed: int) -> dict[str, Json]:
    """Options as a history can hold them: names with their arguments, and of objects the class or function."""

    def told(option: Any) -> Json:
        if option is None or isinstance(option, str):
            return option
        if isinstance(option, tuple):
            return json.loads(json.dumps(option, default=str))  # type: ignore[no-any-return]
        return str(getattr(option, "__name__", type(option).__name__))

    return {"loss": told(loss), "optimizer": told(optimizer), "schedule": told(schedule), "seed": seed}
