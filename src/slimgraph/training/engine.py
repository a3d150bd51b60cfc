"""What a training does at each of its places: make ready, step, judge, write a checkpoint, go on from one."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from slimgraph.errors import ConfigError, TrainingError
from slimgraph.program.fingerprint import fingerprint
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.watch import run_with_values
from slimgraph.training.batch import Batch
from slimgraph.training.checkpoint import Checkpoints
from slimgraph.training.evaluate import Evaluation
from slimgraph.training.losses import Loss
from slimgraph.training.not_finite import first_not_finite
from slimgraph.training.optim import Groups, OptimizerSpec, ScheduleSpec, make_optimizer, make_schedule
from slimgraph.training.randomness import own_randomness, random_state, set_random_state
from slimgraph.training.run import Evaluate, Fitted, Hook, Run
from slimgraph.training.state import State, state_of

_STATE = {
    "training",
    "program",
    "step",
    "epoch",
    "batch",
    "stop",
    "losses",
    "evaluations",
    "model",
    "optimizer",
    "schedule",
    "scaler",
    "hooks",
    "random",
    "epoch_random",
}
"""What a checkpoint holds, beside the best state."""


class _Shell(nn.Module):
    """Accelerate patches the `forward` of what it prepares: of this, so that copies of the program are free of it."""

    def __init__(self, program: Program, loss: Loss) -> None:
        super().__init__()
        self.program = program
        self.loss = loss if isinstance(loss, nn.Module) else None  # here its parameters are trained by all processes
        self.taps: Sequence[str] = getattr(loss, "taps", ())

    def forward(self, **inputs: Tensor) -> tuple[Any, ...]:
        return run_with_values(self.program, inputs, self.taps) if self.taps else (self.program(**inputs),)


class Engine:
    """What `fit` does at each of its places."""

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
        begun: Mapping[str, Any],
    ) -> None:
        self.accelerator, self.loss, self.evaluate, self.hooks = accelerator, loss, evaluate, hooks
        self.clip, self.keep_best, self.best_path, self.seed = clip, keep_best, best_path, seed
        self.losses: list[float] = []
        self.epoch_random = begun
        """The random numbers that the data of this epoch come from, as they were before it."""

    def prepare(
        self,
        program: Program,
        optimizer: OptimizerSpec,
        groups: Callable[[Program], Groups],
        schedule: ScheduleSpec | None,
        steps: int | None,
    ) -> Run:
        """A copy of the program on the device, with all that trains it."""
        self._given = program
        trained = program.copy()
        pairs = zip(_parameters(program), _parameters(trained), strict=True)
        twins: dict[int, Tensor] = {id(old): new for old, new in pairs}
        trained.to(self.accelerator.device).train()
        made = make_optimizer(optimizer, groups(trained), twins)
        self.shell = _Shell(trained, self.loss).to(self.accelerator.device)
        if self.shell.loss is not None and (own := list(self.shell.loss.parameters())):
            made.add_param_group({"params": own})
        # The schedule comes first: where gradients are scaled, Accelerate keeps the method that it has wrapped.
        scheduled = make_schedule(schedule, made, steps)
        self.model, self.stepper = self.accelerator.prepare(self.shell, made)
        self.run = Run(program=trained, optimizer=made, schedule=scheduled, total_steps=steps)
        return self.run

    def call(self, place: str) -> None:
        """Call all hooks at one of their places."""
        for hook in self.hooks:
            getattr(hook, place)(self.run)

    def judge(self) -> None:
        """Evaluate the program, and keep its state if none was better."""
        if self.evaluate is None:
            return
        run = self.run
        with own_randomness(self.seed + 1, self.accelerator.device), torch.no_grad():
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
            loss = _checked(self.loss(outputs, batch, *values))
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

    def write(self, checkpoints: Checkpoints, told: Mapping[str, Json]) -> None:
        """Write a checkpoint of everything that the rest of the training depends on."""
        run, scaler, best = self.run, self.stepper.scaler, self.run.best
        state = {
            "training": dict(told),
            "program": self._begun_with,
            "step": run.step,
            "epoch": run.epoch,
            "batch": run.batch,
            "stop": run.stop,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "evaluations": run.evaluations,
            "model": self.shell.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "schedule": None if run.schedule is None else run.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "hooks": [hook.state() for hook in self.hooks],
            "random": random_state(self.accelerator.device),
            "epoch_random": self.epoch_random,
        }
        told_best = None if best is None else {"step": best.step, "value": best.value, "tensors": best.tensors}
        checkpoints.write(state, step=run.step, best=told_best)

    def resume(
        self, saved: Mapping[str, Any], told: Mapping[str, Json], read: Callable[[], Iterator[Batch]]
    ) -> Iterator[Batch]:
        """Put everything back as it was, and give the batches that were not read yet.

        Raises:
            ConfigError: the checkpoint is of another training.
        """
        run, device = self.run, self.accelerator.device
        self._require_same(saved, told)
        run.step, run.epoch, run.batch, run.stop = saved["step"], saved["epoch"], saved["batch"], saved["stop"]
        run.evaluations[:] = saved["evaluations"]
        self.losses[:] = saved["losses"].tolist()
        self.shell.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        if run.schedule is not None:
            run.schedule.load_state_dict(saved["schedule"])
        if self.stepper.scaler is not None:
            self.stepper.scaler.load_state_dict(saved["scaler"])
        if best := saved.get("best"):
            tensors = {name: tensor.to(device) for name, tensor in best["tensors"].items()}
            run.best = State(step=best["step"], value=best["value"], tensors=tensors)
        for hook, state in zip(self.hooks, saved["hooks"], strict=True):
            hook.resume(run, state)
        self.epoch_random = saved["epoch_random"]
        set_random_state(self.epoch_random)
        batches = read()
        for _ in range(run.batch):
            next(batches, None)
        set_random_state(saved["random"], device)
        return batches

    @cached_property
    def _begun_with(self) -> str:
        return fingerprint(self._given)

    def _require_same(self, saved: Mapping[str, Any], told: Mapping[str, Json]) -> None:
        """Return if a checkpoint is of this training."""
        if missing := _STATE - saved.keys():
            raise ConfigError(f"The checkpoint lacks {', '.join(sorted(missing))}, so it is of another program.")
        for key, value in told.items():
            if value != saved["training"].get(key):
                raise ConfigError(
                    f"The checkpoint is of a training with {key} {saved['training'].get(key)!r}, and this one has "
                    f"{value!r}. Give another folder for its checkpoints."
                )
        if saved["program"] != self._begun_with:
            raise ConfigError(
                "The checkpoint is of a training that began with another program. Give another folder for this one's."
            )
        if len(saved["hooks"]) != len(self.hooks):
            raise ConfigError(
                f"The checkpoint is of a training with {len(saved['hooks'])} hooks, and this one has "
                f"{len(self.hooks)}. Give the same, in the same order."
            )

    @contextmanager
    def interruption_told(self) -> Iterator[None]:
        """Say to whoever interrupts where the best state is."""
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
            error.fitted = fitted(run, run.program, self.losses, {})
        return error


def _parameters(program: Program) -> Iterator[nn.Parameter]:
    return (parameter for _, parameter in program.named_parameters(remove_duplicate=False))


def _checked(given: Any) -> Tensor:
    if not isinstance(given, Tensor) or given.numel() != 1:
        told = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ConfigError(f"The loss returned {told}; it must return a tensor of one number.")
    if not given.requires_grad:
        raise TrainingError(
            "The loss does not depend on any parameter that takes a gradient. Quantized programs have none: train the "
            "float one, or one that `prepare_qat` made."
        )
    return given.reshape(())


def fitted(run: Run, given: Program, losses: Sequence[float], parameters: dict[str, Json]) -> Fitted:
    """What a training has come to; the program is put into its best state, and lies where the given one does."""
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


def told_options(loss: Any, optimizer: Any, schedule: Any, seed: int) -> dict[str, Json]:
    """Options as a history can hold them: names with their arguments, and of objects the class or function."""

    def told(option: Any) -> Json:
        if option is None or isinstance(option, str):
            return option
        if isinstance(option, tuple):
            return json.loads(json.dumps(option, default=str))  # type: ignore[no-any-return]
        return str(getattr(option, "__name__", type(option).__name__))

    return {"loss": told(loss), "optimizer": told(optimizer), "schedule": told(schedule), "seed": seed}
