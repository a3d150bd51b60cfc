"""`slimgraph evaluate`: how good a model's answers are."""

from slimgraph.cli.command import Answer, command
from slimgraph.cli.given import ModelOptions, look
from slimgraph.cli.options import Data, Metric, ModelArgument
from slimgraph.cli.samples import SampleOptions, open_samples


@command
def evaluate(
    model: ModelArgument,
    data: Data,
    samples: SampleOptions,
    given: ModelOptions,
    metric: Metric = "top1",
) -> Answer:
    """Measure how good MODEL's answers are on labelled data."""
    look([model], given, data=[data], callables=[metric])
    from slimgraph.auto.outcome import counted
    from slimgraph.cli.models import open_model
    from slimgraph.progress import ProgressBar
    from slimgraph.report.words import number, percent
    from slimgraph.training.evaluate import evaluate as evaluate_model
    from slimgraph.training.metrics import METRICS, find_metric

    find_metric(metric)
    with ProgressBar() as progress:
        progress(f"Opening {model}")
        opened = open_model(model, given)
        batches = open_samples(data, opened.signature, samples)
        result = evaluate_model(opened, counted(batches, progress, "Evaluating"), metric=metric)
    value = percent(result.value) if metric in METRICS else number(result.value, 6)
    return Answer(
        data={"model": model, "data": data, "metric": result.metric, "value": result.value, "samples": result.samples},
        shown=(f"{result.metric} of {model} on {data}: {value} ({result.samples:,} samples)",),
    )
