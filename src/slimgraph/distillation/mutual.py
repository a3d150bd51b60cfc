"""Several students that learn from each other while they learn from the labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.distillation.losses import kl
from slimgraph.errors import ConfigError
from slimgraph.program.program import HistoryEntry, Program, require_program
from slimgraph.training.batch import Batch
from slimgraph.training.loop import fit
from slimgraph.training.losses import Loss, find_loss


class MutualLoss(nn.Module):
    """The label losses of a student and its peers, and the divergence of each from all others.

    The peers are trained as part of the loss. Each sees the others' answers as constants, so one step for all is a step
    for each.
    """

    def __init__(self, peers: Sequence[Program], label_loss: Loss, temperature: float) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)
        self._label_loss, self._temperature = label_loss, temperature

    def forward(self, outputs: Any, batch: Batch) -> Tensor:
        """The sum over all students, each with the mean of its divergences."""
        answers = [outputs, *(peer(**batch.inputs) for peer in self.peers)]
        scores = [_scores(answer) for answer in answers]
        parts = [self._label_loss(answer, batch) for answer in answers]
        for own in scores:
            others = [kl(own, other.detach(), temperature=self._temperature) for other in scores if other is not own]
            parts.append(torch.stack(others).mean())
        return torch.stack(parts).sum()


def distill_mutually(
    students: Sequence[Program],
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    label_loss: str | Loss = "cross_entropy",
    temperature: float = 1.0,
    **options: Any,
) -> list[Program]:
    """Copies of the students that were trained together, each also towards the answers of the others.

    Args:
        students: two or more that take the same inputs and tell the same classes apart; of one kind, they should begin
            with different weights.
        data: labelled batches, as `fit` takes them.
        label_loss: as for `fit`.
        temperature: of the answers that are compared.
        options: `epochs` or `steps`, `optimizer`, `schedule`, `clip`, `accumulate`, `mixed_precision`, `hooks`, `seed`
            and `progress`, as for `fit`.
    Raises:
        ConfigError: there are fewer than two, or their outputs differ.
        DataError, TrainingError, UnknownNameError: as `fit` raises them.
    Source: Zhang et al., "Deep mutual learning", CVPR 2018, arXiv 1706.00384, equation 7.
    """
    if len(students) < 2:
        raise ConfigError(f"{len(students)} student has nobody to learn from; give at least two.")
    for student in students:
        require_program(student)
    shapes = [[spec.shape for spec in student.signature.outputs] for student in students]
    different = next((number for number, shape in enumerate(shapes) if shape != shapes[0]), None)
    if different is not None:
        raise ConfigError(
            f"Students learn from each other's outputs, but those of student 0 have shapes {shapes[0]}, and of student "
            f"{different} {shapes[different]}."
        )
    peers = [student.copy().train() for student in students[1:]]
    loss = MutualLoss(peers, find_loss(label_loss), temperature)
    first = fit(students[0], data, loss=loss, keep_best=False, **options).program
    entry = HistoryEntry(step="distill_mutually", parameters={"students": len(students)})
    trained = [
        peer.to(student.device).train(student.training) for peer, student in zip(peers, students[1:], strict=True)
    ]
    return [program.with_history(entry) for program in (first, *trained)]


def _scores(outputs: Any) -> Tensor:
    """The only output, or the one named logits."""
    if isinstance(outputs, Tensor):
        return outputs
    named: Mapping[str, Tensor] = outputs if isinstance(outputs, Mapping) else dict(enumerate(outputs))  # type: ignore[arg-type]
    if "logits" in named:
        return named["logits"]
    if len(named) != 1:
        raise ConfigError(f"The students have {len(named)} outputs, and none is named logits.")
    return next(iter(named.values()))
