"""Gradual magnitude pruning: the part that is zero grows while a program trains."""

from dataclasses import dataclass

from slimgraph.errors import ConfigError, TrainingError
from slimgraph.pruning.unstructured import UnstructuredPruning
from slimgraph.training.loop import Hook, Run
from slimgraph.training.masks import HeldMasks, Masks

_PART = 0.45
"""Of a training whose phases are not told: the part in which the ratio grows, and the part after it."""

_SHORTEST_PART = 30
_MANY, _LONG = 100, 1000
"""Changes in a part of more iterations than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GMPConfig:
    """When the ratio of gradual magnitude pruning changes.

    Two of `pruning_iterations`, `pruning_steps` and `prune_steps` say the third: iterations = changes × iterations
    between changes. Iterations are steps of the optimizer. Defaults are those of PaddleSlim's automatic compression.
    """

    prune_steps: int | None = None
    """Iterations from one change of the ratio to the next."""
    pruning_steps: int | None = None
    """How often the ratio changes. Otherwise 100 times in more than 1000 iterations, and once in fewer."""
    initial_ratio: float = 0.15
    """The first ratio that is not zero."""
    stable_iterations: int = 0
    """Iterations before it, in which nothing is pruned."""
    pruning_iterations: int | None = None
    """Iterations in which the ratio grows. Otherwise 45 % of the training, at least 30."""
    tunning_iterations: int | None = None
    """Iterations at the end that the ratio has to stay where it is; those that the training has in any case
    otherwise."""
    resume_iteration: int = -1
    """Iterations that were done before this training, of a schedule that goes on; -1 and 0 are none."""

    def __post_init__(self) -> None:
        for name in ("prune_steps", "pruning_steps", "pruning_iterations"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; give at least 1.")
        for name, least in (("stable_iterations", 0), ("tunning_iterations", 0), ("resume_iteration", -1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ConfigError(f"{name} is {number}; give at least {least}.")
        if not 0 <= self.initial_ratio < 1:
            raise ConfigError(f"initial_ratio is {self.initial_ratio}; give a part of the weights, from 0 to below 1.")
        iterations, changes, between = self.pruning_iterations, self.pruning_steps, self.prune_steps
        if iterations is not None and changes is not None and iterations < changes:
            raise ConfigError(f"pruning_steps is {changes}, more than the {iterations} pruning_iterations.")
        if iterations is not None and between is not None and iterations < between:
            raise ConfigError(f"prune_steps is {between}, more than the {iterations} pruning_iterations.")
        if iterations is not None and changes is not None and between is not None and iterations // changes != between:
            raise ConfigError(
                f"{changes} changes (pruning_steps) in {iterations} iterations are {iterations // changes} apart, and "
                f"prune_steps is {between}. Give two of the three."
            )

    def resolved(self, total: int | None) -> "Schedule":
        """The schedule of a training with that many iterations in all, those included that were done before.

        Raises:
            ConfigError: the length is needed and not known, or the ratio would not be reached.
        """
        iterations, changes, between = self.pruning_iterations, self.pruning_steps, self.prune_steps
        if iterations is None and changes is not None and between is not None:
            iterations = changes * between
        if iterations is None:
            if total is None:
                raise ConfigError(
                    "The length of the training is not known, so nothing says when the ratio is to be reached. Give "
                    "pruning_iterations, or steps= instead of epochs=."
                )
            iterations = max(int(_PART * total), _SHORTEST_PART)
        if between is None:
            changes = changes or (_MANY if iterations > _LONG else 1)
            between = iterations // changes
        changes = changes or iterations // between
        schedule = Schedule(
            initial_ratio=self.initial_ratio, stable_iterations=self.stable_iterations, changes=changes, between=between
        )
        after = self.tunning_iterations or 1
        if total is not None and schedule.reached_at + after > total:
            raise ConfigError(
                f"The ratio is reached after {schedule.reached_at} iterations, and {after} are to follow, but the "
                f"training has {total}. Train longer, or give fewer pruning_iterations."
            )
        return schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The ratio by iteration."""

    initial_ratio: float
    stable_iterations: int
    changes: int
    between: int
    """Iterations from one change to the next."""

    @property
    def reached_at(self) -> int:
        """The first iteration with the whole ratio."""
        return self.stable_iterations + self.changes * self.between

    def ratio(self, iteration: int, target: float) -> float:
        """The ratio in an iteration, counted from 0: cubic from the initial one to the target.

        r_i = r_first + (r_target − r_first) · (1 + (i/S − 1)³) for the i-th of S changes, counted from 0.

        Source: Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, as PaddleSlim has it.

        >>> schedule = Schedule(initial_ratio=0.15, stable_iterations=5, changes=4, between=10)
        >>> [round(schedule.ratio(i, 0.75), 4) for i in (4, 5, 14, 15, 25, 35, 45, 99)]
        [0.0, 0.15, 0.15, 0.4969, 0.675, 0.7406, 0.75, 0.75]
        """
        if iteration < self.stable_iterations:
            return 0.0
        change = (iteration - self.stable_iterations) // self.between
        if change >= self.changes:
            return target
        return self.initial_ratio + (target - self.initial_ratio) * (1 + (change / self.changes - 1) ** 3)


class GMPUnstructuredPruner(Hook):
    """Prunes the program that `fit` trains more and more, to a ratio, and keeps what is zero at zero.

    Evaluations before the whole ratio is reached do not count for the best state: it is one with the ratio, or, where
    nothing is evaluated after that, the last one.

    Args:
        pruning: with a ratio, the one at the end.
        config: None is the schedule of PaddleSlim's automatic compression for the length of the training.
    """

    def __init__(self, pruning: UnstructuredPruning, config: GMPConfig | None = None) -> None:
        config = config or GMPConfig()
        if pruning.ratio is None:
            raise ConfigError("Gradual pruning goes to a ratio; with a threshold there is nothing to grow.")
        if config.initial_ratio > pruning.ratio:
            raise ConfigError(
                f"initial_ratio is {config.initial_ratio}, above the ratio {pruning.ratio} at the end. Weights that "
                "are zero stay zero."
            )
        self.pruning, self.config, self._target = pruning, config, pruning.ratio

    def begin(self, run: Run) -> None:
        """Settle the schedule; one that goes on begins where it was."""
        self._done = max(self.config.resume_iteration, 0)
        total = None if run.total_steps is None else run.total_steps + self._done
        self._schedule = self.config.resolved(total)
        self._weights = self.pruning.chosen(run.program)
        self._ratio = 0.0
        self._held = HeldMasks(run.optimizer, run.program, Masks({}))
        if self._done:
            self.step_begin(run)

    def step_begin(self, run: Run) -> None:
        """Prune more, where the schedule says so."""
        ratio = self._schedule.ratio(run.step + self._done, self._target)
        if ratio != self._ratio:
            self._ratio = ratio
            self._held.replace(self.pruning.masks(self._weights, ratio))

    def evaluated(self, run: Run) -> None:
        """Forget a state that is not as sparse as it should be."""
        if self._ratio < self._target:
            run.best = None

    def end(self, run: Run) -> None:
        """Let go."""
        self._held.release()
        if self._ratio < self._target:
            raise TrainingError(
                f"The training ended after {run.step} steps with {self._ratio:.1%} of the weights at zero; the ratio "
                f"{self._target:.1%} is reached in iteration {self._schedule.reached_at}. Train longer, or give fewer "
                "pruning_iterations."
            )
