"""`slimgraph evaluate`: how good a model's answers are."""

from slimgraph.cli.command import Answer, command
from slimgraph.cli.options import (
    BatchSize,
    Data,
    ImageSize,
    Input,
    Mean,
    Metric,
    ModelArgument,
    Order,
    ResizeSize,
    Std,
    Weights,
    allow_local_modules,
    image_options,
)


@command
def evaluate(
    model: ModelArgument,
    data: Data,
    metric: Metric = "top1",
    batch_size: BatchSize = 32,
    inputs: Input = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    resize_size: ResizeSize = None,
    mean: Mean = "0",
    std: Std = "1",
    order: Order = "RGB",
) -> Answer:
    """Measure how good MODEL's answers are on labelled data."""
    from slimgraph.auto.outcome import counted
    from slimgraph.cli.models import open_model
    from slimgraph.progress import ProgressBar
    from slimgraph.report.words import number, percent
    from slimgraph.training.data import open_data
    from slimgraph.training.evaluate import evaluate as evaluate_model
    from slimgraph.training.metrics import METRICS, find_metric

    allow_local_modules(model, data, metric)
    find_metric(metric)
    image = image_options(image_size, resize_size, mean, std, order)
    with ProgressBar() as progress:
        progress(f"Opening {model}")
        opened = open_model(model, inputs=inputs, weights=weights)
        samples = open_data(data, opened.signature, batch_size=batch_size, image=image)
        result = evaluate_model(opened, counted(samples, progress, "Evaluating"), metric=metric)
    value = percent(result.value) if metric in METRICS else number(result.value, 6)
    return Answer(
        data={"model": model, "data": data, "metric": result.metric, "value": result.value, "samples": result.samples},
        shown=(f"{result.metric} of {model} on {data}: {value} ({result.samples:,} samples)",),
    )
