"""Activations of ONNX."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.steps import Call, Operator


def _plain(function: Callable[[Tensor], Tensor]) -> Operator:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)

    return Operator(run=run)


def _relu(call: Call, x: Tensor) -> Tensor:
    return torch.relu(x)


def _relu_known(call: Call, x: Host) -> Host:
    """In the function that ONNX says Range is, it keeps a number of turns from falling below zero."""
    return Host(
        np.asarray(np.frompyfunc(lambda number: torch.sym_max(number, 0), 1, 1)(x.array), dtype=object), x.dtype
    )


def _flat(function: Callable[[Tensor, int], Tensor]) -> Callable[[Call, Tensor], Tensor]:
    """Before version 13, everything from the axis on was one axis."""

    def run(call: Call, x: Tensor) -> Tensor:
        axis = call.int("axis", -1 if call.version >= 13 else 1)
        if call.version >= 13 or axis in (-1, x.dim() - 1):
            return function(x, axis)
        axis = axis % x.dim()
        return function(x.flatten(axis), axis).unflatten(axis, x.shape[axis:])

    return run


def _hard_max(x: Tensor, axis: int) -> Tensor:
    first = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1.0)


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.float("alpha", 0.01))


def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    rest = slope.shape[1:] if slope.dim() == x.dim() - 1 else slope.shape[2:] if slope.dim() == x.dim() else None
    if slope.numel() == 1 or (rest is not None and all(size == 1 for size in rest) and x.dim() > 1):
        channels = slope.reshape(-1)
        if channels.shape[0] in (1, x.shape[1] if x.dim() > 1 else 1):
            return F.prelu(x, channels)
    return torch.where(x < 0, x * slope, x)


def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.float("alpha", 1.0))


def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.float("alpha", 1.0))


def _selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.float("alpha", 1.6732632423543772), call.float("gamma", 1.0507009873554805)
    if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.0507010) < 1e-5:
        return F.selu(x)
    return gamma * F.elu(x, alpha)


def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return F.threshold(x, call.float("alpha", 1.0), 0.0)


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    alpha, beta = call.float("alpha", 0.2), call.float("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.text("approximate", "none"))


def _shrink(call: Call, x: Tensor) -> Tensor:
    bias, limit = call.float("bias", 0.0), call.float("lambd", 0.5)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, zero))


def _swish(call: Call, x: Tensor) -> Tensor:
    alpha = call.float("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def _dropout(call: Call, x: Tensor, ratio: object = None, training: object = None) -> object:
    p = call.float("ratio", 0.5) if call.version < 12 else 0.5 if ratio is None else float(ratio.number)  # type: ignore[attr-defined]
    mask = torch.ones(x.shape, dtype=torch.bool, device=x.device) if len(call.step.outputs) > 1 else None
    kept = F.dropout(x, p, training=False)
    return kept if mask is None else (kept, mask)


OPERATORS: dict[str, Operator] = {
    "Relu": Operator(run=_relu, host=_relu_known),
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "HardSwish": _plain(F.hardswish),
    "Mish": _plain(F.mish),
    "Softmax": Operator(run=_flat(torch.softmax)),
    "LogSoftmax": Operator(run=_flat(torch.log_softmax)),
    "Hardmax": Operator(run=_flat(_hard_max)),
    "LeakyRelu": Operator(run=_leaky_relu),
    "PRelu": Operator(run=_prelu, weights=(1,)),
    "Elu": Operator(run=_elu),
    "Celu": Operator(run=_celu),
    "Selu": Operator(run=_selu),
    "ThresholdedRelu": Operator(run=_thresholded_relu),
    "HardSigmoid": Operator(run=_hard_sigmoid),
    "Gelu": Operator(run=_gelu),
    "Swish": Operator(run=_swish),
    "Shrink": Operator(run=_shrink),
    "Dropout": Operator(run=_dropout, static=(1, 2)),
}
