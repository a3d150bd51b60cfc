"""Measure how good a model's answers are."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.signature import Signature
from slimgraph.training.agreement import Agreement, agreement
from slimgraph.training.answers import answering
from slimgraph.training.batch import Batch
from slimgraph.training.data import open_data
from slimgraph.training.metrics import Metric, find_metric
from slimgraph.training.paired import PairedDifference, paired_difference
from slimgraph.training.stream import as_batch

__all__ = ["Agreement", "Evaluation", "PairedDifference", "agreement", "evaluate", "find_metric", "paired_difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A metric of a model on some data."""

    metric: str
    value: float
    """Mean over the samples."""
    samples: int
    correct: Tensor | None
    """One entry for each sample: right or not (bool), or the float64 number of a metric of the user's; None where that
    metric returns only means."""


def _as_tensor(result: Any, name: str) -> Tensor:
    if not isinstance(result, (Tensor, np.ndarray, np.generic, bool, int, float)):
        raise ConfigError(
            f"The metric {name} returned an object of type {type(result).__name__}; it must return numbers."
        )
    return torch.as_tensor(result).detach().cpu()


def _batches(model: Callable[..., Any], data: str | Iterable[Any]) -> Iterator[Batch]:
    """The data as checked batches; what is a `Batch` already is taken as it is."""
    told = getattr(model, "signature", None)
    signature = told if isinstance(told, Signature) else None
    if isinstance(data, str) and signature is not None:
        data = open_data(data, signature)
    for number, item in enumerate(data):
        if isinstance(item, Batch):
            yield item
        elif signature is None:
            raise DataError(
                f"The data cannot be checked against a {type(model).__name__}, which does not tell what it takes. "
                "Capture it first: slimgraph.capture(module, example_inputs)."
            )
        else:
            yield as_batch(item, signature, f"Batch {number} of the data")


def evaluate(model: Callable[..., Any], data: str | Iterable[Any], *, metric: str | Metric = "top1") -> Evaluation:
    """The metric of `model`, a mean over all samples of `data`, each counted once.

    Args:
        model: a program, a module, an ONNX model, or any function of tensors. A single input is passed by position,
            several by name. It returns tensors or arrays, in a sequence or a mapping if there are several.
        data: for a model with a signature (a program, an ONNX model) what `open_data` takes, as "images/test", or
            batches: pairs of inputs and labels, or mappings by input name with `label`. For any other function the
            batches that `open_data` gave.
        metric: "top1", "top5", "module:callable", or a function of outputs and labels; `Metric` says what it returns.
    Raises:
        UnknownNameError: there is no such metric.
        DataError: there is no batch, one does not fit the model, or the metric does not apply to these outputs and
            labels, or a score is NaN.
        ConfigError: the metric returned something else than one number for each sample, or one for the batch.
    """
    score = find_metric(metric) if isinstance(metric, str) else metric
    name = metric if isinstance(metric, str) else str(getattr(metric, "__name__", metric))
    sizes: list[int] = []
    results: list[Tensor] = []
    with answering(model) as answer:
        for batch in _batches(model, data):
            result = _as_tensor(score(answer(batch), batch.labels), name)
            if result.shape not in ((), (len(batch),)) or (results and result.dim() != results[0].dim()):
                raise ConfigError(
                    f"The metric {name} returned a result of shape {list(result.shape)} for {len(batch)} samples; it "
                    f"must return one number for each sample, or each time one for the batch."
                )
            results.append(result if result.dtype == torch.bool else result.double())
            sizes.append(len(batch))
    if not sizes:
        raise DataError(f"There is no batch to evaluate the metric {name} on.")
    samples = sum(sizes)
    if results[0].dim() == 0:
        total = math.fsum(float(result) * size for result, size in zip(results, sizes, strict=True))
        return Evaluation(metric=name, value=total / samples, samples=samples, correct=None)
    correct = torch.cat(results)
    value = float(correct.sum(dtype=torch.float64)) / samples
    return Evaluation(metric=name, value=value, samples=samples, correct=correct)
