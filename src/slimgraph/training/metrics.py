"""What makes an answer right."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slimgraph.errors import DataError, UnknownNameError, closest
from slimgraph.training.answers import Outputs
from slimgraph.training.callables import import_callable, is_reference

Metric: TypeAlias = Callable[[Any, Tensor | None], Any]
"""Called with outputs and labels of a batch. Returns either one number for each sample, shape (N,), or a plain number,
their mean over the batch; the same kind for each batch. Higher is better."""


def class_scores(outputs: Outputs) -> Tensor | None:
    """The scores (N, classes) among the outputs: the only one, or the one named logits; None if it has another shape.

    Raises:
        DataError: there are several outputs, and none is named logits.
    """
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    else:
        every = (outputs,) if isinstance(outputs, Tensor) else outputs
        named = {f"output_{index}": output for index, output in enumerate(every)}
    if len(named) != 1 and "logits" not in named:
        raise DataError(
            f"The model has {len(named)} outputs ({', '.join(named)}), and none is named logits, so nothing says which "
            f"holds the scores of classes. Give a metric of your own as module:callable."
        )
    scores = named["logits"] if "logits" in named else next(iter(named.values()))
    return scores if scores.is_floating_point() and scores.dim() == 2 and scores.shape[1] > 1 else None


def top_k(outputs: Outputs, labels: Tensor | None, *, k: int) -> Tensor:
    """Whether the label is among the `k` classes with the highest scores, bool (N,).

    Of equal scores the lower class number counts as the higher score, as with argmax.

    Raises:
        DataError: there are no labels, they are no classes, the outputs are no scores of more than `k` classes, or a
            score is NaN.
    """
    name = f"top{k}"
    if labels is None:
        raise DataError(
            f"{name} needs labels, and the data have none. Without labels, models can be compared by agreement."
        )
    scores = class_scores(outputs)
    if scores is None or scores.shape[1] <= k:
        shape = "of another shape" if scores is None else f"of {scores.shape[1]} classes"
        raise DataError(
            f"{name} needs an output (N, classes) with more than {k} classes, and the model's is {shape}. "
            f"Give a metric of your own as module:callable."
        )
    if labels.is_floating_point() or labels.shape != scores.shape[:1]:
        raise DataError(
            f"{name} needs one class number for each of {len(scores)} samples, "
            f"but the labels are {str(labels.dtype).removeprefix('torch.')}{list(labels.shape)}."
        )
    broken = scores.isnan().any(dim=1)
    if broken.any():
        raise DataError(
            f"The model answers NaN to {int(broken.sum())} of {len(scores)} samples of a batch, so that {name} says "
            f"nothing about it. Look for weights that are NaN or infinite, and for values too large for its type."
        )
    classes = scores.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0].item()
        raise DataError(f"A label is {wrong}, but the model's output has {classes} classes: 0 to {classes - 1}.")
    labelled = labels[:, None]
    score = scores.gather(1, labelled)
    lower = torch.arange(classes) < labelled
    better = ((scores > score) | ((scores == score) & lower)).sum(dim=1)
    return better < k


METRICS = MappingProxyType({"top1": partial(top_k, k=1), "top5": partial(top_k, k=5)})
"""The metrics that go by a name."""


def find_metric(name: str) -> Metric:
    """The metric of that name, or the callable that `module:callable` means.

    Raises:
        UnknownNameError: there is none.
    """
    if name in METRICS:
        return METRICS[name]
    if is_reference(name):
        return import_callable(name, what="The metric", error=UnknownNameError)
    raise UnknownNameError(
        f"There is no metric {name!r}. {closest(name, METRICS)} Your own is given as module:callable."
    )
