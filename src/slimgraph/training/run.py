"""A training that is going on, what hooks may do in it, and what it comes to."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch.optim import Optimizer

from slimgraph.program.program import Program
from slimgraph.training.evaluate import Evaluation
from slimgraph.training.state import State

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
    batch: int = 0
    """Batches of this epoch that were read."""


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

    def state(self) -> Any:
        """What a checkpoint should hold of this hook: dictionaries, lists, tensors, numbers and texts."""
        return None

    def resume(self, run: Run, state: Any) -> None:
        """Go on from a checkpoint: called after `begin`, with what `state` gave, when `run` is as it was then."""


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
