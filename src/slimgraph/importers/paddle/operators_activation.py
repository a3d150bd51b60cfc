"""Activations of Paddle, and dropout."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.paddle.row import Row, known, one, weight
from slimgraph.importers.steps import Call


def _plain(pir: str, program: str, function: Callable[[Tensor], Tensor]) -> Row:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)

    return Row(pir=pir, program=program, run=run)


def _relu6(call: Call, x: Tensor) -> Tensor:
    top = call.float("threshold", 6.0)
    return F.relu6(x) if top == 6.0 else torch.clamp(x, 0.0, top)


def _hard_swish(call: Call, x: Tensor) -> Tensor:
    threshold, scale, offset = call.float("threshold", 6.0), call.float("scale", 6.0), call.float("offset", 3.0)
    if (threshold, scale, offset) == (6.0, 6.0, 3.0):
        return F.hardswish(x)
    return x * torch.clamp(x + offset, 0.0, threshold) / scale


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    slope, offset = call.float("slope", 0.2), call.float("offset", 0.5)
    if abs(slope - 1 / 6) < 1e-6 and offset == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * slope + offset, 0.0, 1.0)


def _swish(call: Call, x: Tensor) -> Tensor:
    beta = call.float("beta", 1.0)
    return F.silu(x) if beta == 1.0 else x * torch.sigmoid(beta * x)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh" if call.attribute("approximate", False) else "none")


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.float("negative_slope", 0.02))


def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.float("alpha", 1.0))


def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.float("alpha", 1.0))


def _selu(call: Call, x: Tensor) -> Tensor:
    scale, alpha = call.float("scale", 1.0507009873554805), call.float("alpha", 1.6732632423543772)
    if abs(alpha - 1.6732632) < 1e-6 and abs(scale - 1.0507010) < 1e-6:
        return F.selu(x)
    return scale * F.elu(x, alpha)


def _softplus(call: Call, x: Tensor) -> Tensor:
    return F.softplus(x, call.float("beta", 1.0), call.float("threshold", 20.0))


def _hard_tanh(call: Call, x: Tensor) -> Tensor:
    return F.hardtanh(x, call.float("t_min", 0.0), call.float("t_max", 24.0))


def _hard_shrink(call: Call, x: Tensor) -> Tensor:
    return F.hardshrink(x, call.float("threshold", 0.5))


def _soft_shrink(call: Call, x: Tensor) -> Tensor:
    return F.softshrink(x, call.float("threshold", 0.5))


def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return F.threshold(x, call.float("threshold", 1.0), call.float("value", 0.0))


def _stanh(call: Call, x: Tensor) -> Tensor:
    return call.float("scale_b", 1.7159) * torch.tanh(call.float("scale_a", 0.67) * x)


def _prelu(call: Call, x: Tensor, alpha: Tensor) -> Tensor:
    mode, last = call.text("mode", "all"), call.text("data_format", "NCHW") == "NHWC"
    if mode == "all":
        return F.prelu(x, alpha.reshape(-1))
    if mode == "channel":
        slopes = alpha.reshape(-1)
        if not last and x.dim() > 1:
            return F.prelu(x, slopes)
        return torch.where(x > 0, x, x * slopes)
    if mode != "element":
        raise call.error(f"its mode is {mode!r}; known are all, channel and element")
    return torch.where(x > 0, x, x * alpha.reshape([1, *x.shape[1:]]))


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Callable[[Call, Tensor], Tensor]:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x, call.int("axis", -1))

    return run


def _dropout(call: Call, x: Tensor, seed: object = None, p: Host | None = None) -> Tensor:
    probability = 0.5 if p is None else float(p.number)
    mode = call.text("mode", "downgrade_in_infer")
    if mode == "upscale_in_train":
        return F.dropout(x, probability, training=False)
    if mode != "downgrade_in_infer":
        raise call.error(f"its mode is {mode!r}; known are upscale_in_train and downgrade_in_infer")
    return x * (1.0 - probability)


ROWS: tuple[Row, ...] = (
    _plain("relu", "relu", torch.relu),
    _plain("sigmoid", "sigmoid", torch.sigmoid),
    _plain("tanh", "tanh", torch.tanh),
    _plain("silu", "silu", F.silu),
    _plain("logsigmoid", "logsigmoid", F.logsigmoid),
    _plain("softsign", "softsign", F.softsign),
    _plain("tanh_shrink", "tanh_shrink", F.tanhshrink),
    _plain("mish", "mish", F.mish),
    Row(pir="relu6", program="relu6", run=_relu6),
    Row(pir="hardswish", program="hard_swish", run=_hard_swish),
    Row(pir="hardsigmoid", program="hard_sigmoid", run=_hard_sigmoid),
    Row(pir="swish", program="swish", run=_swish),
    Row(pir="gelu", program="gelu", run=_gelu),
    Row(pir="leaky_relu", program="leaky_relu", attributes={"negative_slope": "alpha"}, run=_leaky_relu),
    Row(pir="elu", program="elu", run=_elu),
    Row(pir="celu", program="celu", run=_celu),
    Row(pir="selu", program="selu", run=_selu),
    Row(pir="softplus", program="softplus", run=_softplus),
    Row(pir="hardtanh", program="brelu", run=_hard_tanh),
    Row(pir="hardshrink", program="hard_shrink", run=_hard_shrink),
    Row(pir="softshrink", program="softshrink", attributes={"threshold": "lambda"}, run=_soft_shrink),
    Row(pir="thresholded_relu", program="thresholded_relu", run=_thresholded_relu),
    Row(pir="stanh", program="stanh", run=_stanh),
    Row(pir="prelu", program="prelu", inputs=(one("X"), weight("Alpha")), run=_prelu),
    Row(pir="softmax", program="softmax", run=_softmax(torch.softmax)),
    Row(pir="log_softmax", program="log_softmax", run=_softmax(torch.log_softmax)),
    Row(
        pir="dropout",
        program="dropout",
        inputs=(one("X"), one("Seed"), known("p")),
        outputs=("Out", "Mask"),
        attributes={"p": "dropout_prob", "mode": "dropout_implementation"},
        run=_dropout,
    ),
)
