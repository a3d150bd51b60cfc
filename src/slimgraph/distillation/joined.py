"""The loss of a student: what its teachers say, at any places of the networks, beside the labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.distillation.losses import WITH_LABELS, DistillationLoss, find_distillation_loss
from slimgraph.errors import ConfigError, UnknownNameError, closest
from slimgraph.program.program import Program
from slimgraph.program.watch import run_with_values
from slimgraph.training.batch import Batch
from slimgraph.training.losses import Loss

Ask = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From the inputs of a batch to the values of a teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Values of the student that should become those of a teacher."""

    student: str | tuple[str, ...]
    """A value or output of the student by name, or as many as the loss compares: two for `fsp`."""
    teacher: str | tuple[str, ...]
    loss: str | DistillationLoss = "l2"
    """A name in `DISTILLATION_LOSSES`, or a function of the student's values and the teacher's."""
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the loss by name."""
    adapter: bool = False
    """Learn a 1×1 convolution, or a linear layer, from the student's channels to the teacher's; it is left behind."""
    teacher_number: int = 0
    """Which of several teachers."""

    @property
    def students(self) -> tuple[str, ...]:
        """The student's values."""
        return (self.student,) if isinstance(self.student, str) else tuple(self.student)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teacher's values."""
        return (self.teacher,) if isinstance(self.teacher, str) else tuple(self.teacher)

    @property
    def title(self) -> str:
        """How logs and messages name it."""
        name = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)
        return f"{name}({', '.join(self.students)} | {', '.join(self.teachers)})"


class JoinedLoss(nn.Module):
    """The weighted sum of what all pairs say, and of the loss against the labels.

    `fit` gives it the values in `taps`, and trains its adapters together with the student. `parts` has what each said
    of the last batch.

    Args:
        student: the program to be trained, as far as names and shapes go.
        ask: one for each teacher.
        pairs: at least one, or a loss against labels.
        example: inputs of a batch, on which both are run once: shapes that do not fit show before the first step.
        label_loss: of the student's outputs and the batch.
    Raises:
        UnknownNameError: a value or loss does not exist.
        ConfigError: shapes do not fit, an option is none of the loss's, or there is no such teacher.
    """

    def __init__(
        self,
        student: Program,
        ask: Sequence[Ask],
        pairs: Sequence[Pair],
        example: Mapping[str, Tensor],
        *,
        label_loss: Loss | None = None,
        label_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pairs, self.parts = tuple(pairs), dict[str, float]()
        self._ask, self._label_loss, self._label_weight = tuple(ask), label_loss, label_weight
        self._losses = [find_distillation_loss(pair.loss) for pair in pairs]
        self._signature = student.signature
        self.taps = _taps(student, pairs)
        for pair in pairs:
            if not 0 <= pair.teacher_number < len(ask):
                raise ConfigError(f"{pair.title}: there is no teacher {pair.teacher_number}, there are {len(ask)}.")
        self.adapters = nn.ModuleDict()
        self._try(student, example)

    def forward(self, outputs: Any, batch: Batch, values: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: of the student.
            values: of the student, those in `taps`; none where all pairs are of outputs.
        """
        known = {**self._signature.named(outputs), **values}
        said = self._said(known, [ask(batch.inputs) for ask in self._ask], batch.labels)
        if self._label_loss is not None:
            said["labels"] = self._label_weight * self._label_loss(outputs, batch)
        self.parts = {name: float(part.detach()) for name, part in said.items()}
        return torch.stack([*said.values()]).sum()

    def _said(
        self, own: Mapping[str, Tensor], asked: Sequence[Mapping[str, Tensor]], labels: Tensor | None
    ) -> dict[str, Tensor]:
        said: dict[str, Tensor] = {}
        for number, (pair, loss) in enumerate(zip(self.pairs, self._losses, strict=True)):
            students = [self._adapted(number, position, own[name]) for position, name in enumerate(pair.students)]
            teachers = [asked[pair.teacher_number][name].detach() for name in pair.teachers]
            options = {**pair.options, **({"labels": labels} if loss in WITH_LABELS else {})}
            try:
                part = loss(*students, *teachers, **options)
            except ConfigError as error:
                raise ConfigError(f"{pair.title}: {error}") from error
            title = pair.title if pair.title not in said else f"{pair.title} {number}"
            said[title] = pair.weight * part
        return said

    def _adapted(self, number: int, position: int, value: Tensor) -> Tensor:
        key = f"{number}_{position}"
        return self.adapters[key](value) if key in self.adapters else value

    def _try(self, student: Program, example: Mapping[str, Tensor]) -> None:
        """Run both once: makes the adapters, and shows shapes and options that do not fit."""
        was_training = student.training
        student.eval()
        try:
            with torch.no_grad():
                outputs, values = run_with_values(student, example, self.taps)
        finally:
            student.train(was_training)
        own, asked = {**self._signature.named(outputs), **values}, [ask(example) for ask in self._ask]
        for number, pair in enumerate(self.pairs):
            for position, (name, wanted) in enumerate(zip(pair.students, pair.teachers, strict=False)):
                if pair.adapter:
                    made = _adapter(own[name], asked[pair.teacher_number][wanted], pair)
                    self.adapters[f"{number}_{position}"] = made
            wanted_count = 4 if pair.loss == "fsp" else 2 if isinstance(pair.loss, str) else None
            if wanted_count is not None and len(pair.students) + len(pair.teachers) != wanted_count:
                raise ConfigError(
                    f"{pair.title}: the loss {pair.loss} compares {wanted_count // 2} values of the student with as "
                    f"many of the teacher, not {len(pair.students)} with {len(pair.teachers)}."
                )
        with torch.no_grad():
            try:
                self._said(own, asked, None)
            except TypeError as error:  # an option that the loss has not got
                raise ConfigError(f"A loss cannot be called: {error}.") from error


def _taps(student: Program, pairs: Sequence[Pair]) -> tuple[str, ...]:
    """The student's values that are no outputs, each once."""
    values, outputs = student.values, [spec.name for spec in student.signature.outputs]
    wanted = dict.fromkeys(name for pair in pairs for name in pair.students)
    for name in wanted:
        if name not in values and name not in outputs:
            raise UnknownNameError(f"The student has no value or output {name!r}. {closest(name, [*values, *outputs])}")
    return tuple(name for name in wanted if name in values)


def _adapter(own: Tensor, wanted: Tensor, pair: Pair) -> nn.Module:
    """From the channels of `own` to those of `wanted`: axis 1 of images and vectors, the last one of sequences."""
    if own.dim() != wanted.dim() or own.dim() not in (2, 3, 4):
        raise ConfigError(
            f"{pair.title}: no adapter leads from the student's shape {list(own.shape)} to the teacher's "
            f"{list(wanted.shape)}; both must have two, three or four axes."
        )
    if own.dim() == 4:
        return nn.Conv2d(own.shape[1], wanted.shape[1], 1, bias=False)
    return nn.Linear(own.shape[-1], wanted.shape[-1], bias=False)
