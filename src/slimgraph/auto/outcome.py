"""Measure what compression did to the answers of a model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from slimgraph.deploy.runtime import OnnxModel
from slimgraph.program.signature import Signature
from slimgraph.report.facts import MetricResult
from slimgraph.training.data import Batch, DataSource
from slimgraph.training.evaluate import agreement, evaluate, paired_difference
from slimgraph.training.metrics import METRICS

Progress = Callable[[str, int, int | None], None]
"""Told what is going on, how many samples of it are done, and of how many; None: that is not known."""

CLOSENESS_DROP = 0.2
"""Of closeness: 14 dB are left. The sound int8 models of docs/benchmarks.md have 15 dB and more, the broken ones 7."""

_SHOWN = {"top1": "top-1", "top5": "top-5"}


Model = Callable[..., Any]


def in_form_of(signature: Signature, model: OnnxModel) -> Model:
    """The model as a function that returns what a program of that signature returns: a metric of the user reads it."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        if signature.output_form == "dict":
            return outputs
        ordered = tuple(outputs[spec.name] for spec in signature.outputs)
        return ordered[0] if signature.output_form == "tensor" else ordered

    return answer


def counted(data: DataSource, progress: Progress, stage: str) -> Iterator[Batch]:
    """The batches of `data`; the progress is told how many samples were read."""
    done = 0
    progress(stage, done, data.samples)
    for batch in data:
        yield batch
        done += len(batch)
        progress(stage, done, data.samples)


def is_measured(metric: str, data: DataSource) -> bool:
    """Whether the metric can be computed on the data: one of ours needs labels, one of the user's may do without."""
    return data.has_labels or metric not in METRICS


def measure_metric(
    original: Model,
    compressed: Model,
    data: DataSource,
    *,
    metric: str,
    max_drop: float | None,
    seed: int,
    progress: Progress,
) -> MetricResult:
    """The metric of both models, with the 95 % interval of its change where it is one number for each sample.

    Raises:
        DataError, ConfigError: as `evaluate`.
    """
    before = evaluate(original, counted(data, progress, "Evaluating the original"), metric=metric)
    after = evaluate(compressed, counted(data, progress, "Evaluating the compressed model"), metric=metric)
    interval = None
    if before.correct is not None and after.correct is not None:
        paired = paired_difference(before.correct, after.correct, seed=seed)
        interval = (paired.low, paired.high)
    return MetricResult(
        name=_SHOWN.get(metric, metric),
        kind="accuracy",
        before=before.value,
        after=after.value,
        samples=after.samples,
        max_drop=max_drop,
        unit="fraction" if metric in METRICS else "plain",
        change_interval=interval,
    )


def measure_agreement(
    original: Model, compressed: Model, data: Iterable[Batch], *, max_drop: float | None, seed: int
) -> MetricResult:
    """On how many samples both models choose the same class.

    Where their outputs are no scores of classes, how close the worst output is to the original's. It says nothing about
    how good either answer is, and cannot be held to the few points that answers are: `CLOSENESS_DROP` may be lost, or
    `max_drop` where that is more.

    Raises:
        DataError: as `agreement`.
    """
    found = agreement(compressed, original, data)
    if found.same is None:
        return MetricResult(
            name="closeness to the original's output",
            kind="closeness",
            before=1.0,
            after=found.value,
            samples=found.samples,
            max_drop=None if max_drop is None else max(max_drop, CLOSENESS_DROP),
        )
    interval = paired_difference(found.same.new_ones(found.same.shape), found.same, seed=seed)
    return MetricResult(
        name="agreement",
        kind="agreement",
        before=1.0,
        after=found.value,
        samples=found.samples,
        max_drop=max_drop,
        change_interval=(interval.low, interval.high),
    )
