"""Training data whose beginning also serves calibration and judgement, and what candidates are judged by."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.program import Program
from slimgraph.program.watch import run_with_values
from slimgraph.training.answers import answering
from slimgraph.training.batch import Batch
from slimgraph.training.evaluate import Evaluation
from slimgraph.training.evaluate import evaluate as evaluate_on
from slimgraph.training.losses import Loss, find_loss, imitate
from slimgraph.training.metrics import Metric
from slimgraph.training.stream import stream_batches

Judge: TypeAlias = Callable[[Program], float | Evaluation]

JUDGED_SAMPLES = 1024
"""Samples of the training data on which candidates are judged where there are no others."""


class TrainingData:
    """Batches for training, which can be read from the beginning as often as wanted.

    Raises:
        DataError: it is an iterator, which cannot, or there is no batch.
    """

    def __init__(self, program: Program, data: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        if isinstance(data, Iterator):
            raise DataError(
                "The training data are an iterator, which can be read only once. Give a list, a loader, or a function "
                "that returns a new iterator each time."
            )
        self._read = stream_batches(data if callable(data) else lambda: data, "The training data", program.signature)
        first = next(self._read(), None)
        if first is None:
            raise DataError("The training data have no batch.")
        self.first = first

    def beginning(self, samples: int) -> Iterator[Batch]:
        """The first samples; the last batch is whole."""
        seen = 0
        for batch in self._read():
            yield batch
            seen += len(batch)
            if seen >= samples:
                return

    def inputs(self, samples: int) -> Iterator[dict[str, Tensor]]:
        """The same without labels."""
        return (batch.inputs for batch in self.beginning(samples))


def usual_loss(program: Program, data: TrainingData) -> Loss:
    """Cross entropy where there are labels of classes, and without labels the imitation of the program.

    Raises:
        ConfigError: the labels are something else.
    """
    labels = data.first.labels
    if labels is None:
        return imitate(program)
    if labels.is_floating_point():
        raise ConfigError(
            "The labels are no numbers of classes, so nothing says which loss is meant. Give `loss`: mse, or a "
            "function of outputs and batch."
        )
    return find_loss("cross_entropy")


def judging(
    data: TrainingData, evaluate: str | Iterable[Any] | Judge | None, metric: str | Metric, loss: Loss
) -> tuple[str, Callable[[Program], float]]:
    """What candidates are judged by, in words and as a function of a program; higher is better.

    Args:
        evaluate: labelled batches, or a specification of them, for `metric`; or a function of the program; None judges
            by the loss over the beginning of the training data.
    """
    if evaluate is None:
        return "loss", lambda program: -_mean_loss(program, data.beginning(JUDGED_SAMPLES), loss)
    if callable(evaluate):
        own = evaluate

        def asked(program: Program) -> float:
            answer = own(program)
            return answer.value if isinstance(answer, Evaluation) else float(answer)

        return _name_of(own), asked
    batches = evaluate
    if isinstance(batches, Iterator):
        raise DataError(
            "The data to evaluate on are an iterator, which can be read only once. Give a list or a loader."
        )
    return _name_of(metric), lambda program: evaluate_on(program, batches, metric=metric).value


def _name_of(metric: Any) -> str:
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", type(metric).__name__))


def _mean_loss(program: Program, batches: Iterable[Batch], loss: Loss) -> float:
    taps: Sequence[str] = getattr(loss, "taps", ())
    total = samples = 0.0
    with answering(program):  # in evaluation mode
        for batch in batches:
            given = batch.to(program.device)
            outputs, values = run_with_values(program, given.inputs, taps)
            total += float(loss(outputs, given, values) if taps else loss(outputs, given)) * len(batch)
            samples += len(batch)
    return total / samples
