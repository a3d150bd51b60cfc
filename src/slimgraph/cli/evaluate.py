"""`slimgraph evaluate`: how good a model's answers are."""

from slimgraph.cli.command import Answer, command
from slimgraph.cli.options import Data, Input, Metric, ModelArgument, Weights, allow_local_modules
from slimgraph.cli.samples import SampleOptions, open_samples


@command
def evaluate(
    model: ModelArgument,
    data: Data,
    samples: SampleOptions,
    metric: Metric = "top1",
    inputs: Input = None,
    weights: Weights = None,
) -> Answer:
    """Measure how good MODEL's answers are on labelled data."""
    from slimgraph.auto.outcome import counted
    from slimgraph.cli.models import open_model
    from slimgraph.progress import ProgressBar
    from slimgraph.report.words import number, percent
    from slimgraph.training.evaluate import evaluate as evaluate_model
    from slimgraph.training.metrics import METRICS, find_metric

    allow_local_modules(model, data, metric)
    find_metric(metric)
    with ProgressBar() as progress:
        progress(f"Opening {model}")
        opened = open_model(model, inputs=inputs, weights=weights)
        batches = open_samples(data, opened.signature, samples)
        result = evaluate_model(opened, counted(batches, progress, "Evaluating"), metric=metric)
    value = percent(result.value) if metric in METRICS else number(result.value, 6)
    return Answer(
        data={"model": model, "data": data, "metric": result.metric, "value": result.value, "samples": result.samples},
        shown=(f"{result.metric} of {model} on {data}: {value} ({result.samples:,} samples)",),
    )
