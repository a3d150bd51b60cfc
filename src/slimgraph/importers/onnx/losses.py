"""Losses of ONNX."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.steps import Call, Operator


def _loss(call: Call, log_probabilities: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    reduction = call.text("reduction", "mean")
    return F.nll_loss(
        log_probabilities, target.long(), weight, ignore_index=call.int("ignore_index", -100), reduction=reduction
    )


def _negative_log_likelihood(call: Call, x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return _loss(call, x, target, weight)


def _softmax_cross_entropy(call: Call, x: Tensor, target: Tensor, weight: Tensor | None = None) -> Any:
    log_probabilities = torch.log_softmax(x, 1)
    loss = _loss(call, log_probabilities, target, weight)
    return (loss, log_probabilities) if len(call.step.outputs) > 1 else loss


OPERATORS: dict[str, Operator] = {
    "NegativeLogLikelihoodLoss": Operator(run=_negative_log_likelihood),
    "SoftmaxCrossEntropyLoss": Operator(run=_softmax_cross_entropy),
}
