"""Operators of ONNX Runtime (domain com.microsoft): what its optimizer fuses, and what exporters write for it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.onnx import (
    contrib_attention,
    contrib_quantized,
    convolution,
    indexing,
    normalization,
    sampling,
    shape,
)
from slimgraph.importers.onnx.contrib_embedding import embed_layer_norm
from slimgraph.importers.steps import Call, Operator

_STANDARD = 21
"""Version of the standard operators that some of these equal."""


def _activated(call: Call, x: Tensor, numbers: tuple[float, ...]) -> Tensor:
    """x after the function that is fused behind an operator; the numbers are its parameters, in ONNX's order."""
    name = call.text("activation", "")
    functions: dict[str, Callable[..., Tensor]] = {
        "": lambda: x,
        "Relu": lambda: torch.relu(x),
        "Tanh": lambda: torch.tanh(x),
        "Sigmoid": lambda: torch.sigmoid(x),
        "Softplus": lambda: F.softplus(x),
        "Softsign": lambda: F.softsign(x),
        "HardSwish": lambda: F.hardswish(x),
        "Gelu": lambda: F.gelu(x),
        "FastGelu": lambda: F.gelu(x, approximate="tanh"),
        "LeakyRelu": lambda alpha=0.01: F.leaky_relu(x, alpha),
        "Elu": lambda alpha=1.0: F.elu(x, alpha),
        "ThresholdedRelu": lambda alpha=1.0: F.threshold(x, alpha, 0.0),
        "Clip": lambda low, high: F.relu6(x) if (low, high) == (0.0, 6.0) else torch.clamp(x, low, high),
        "HardSigmoid": lambda alpha=0.2, beta=0.5: (
            F.hardsigmoid(x) if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5 else torch.clamp(x * alpha + beta, 0.0, 1.0)
        ),
    }
    if name not in functions:
        raise call.error(f"its activation is {name!r}; known are {', '.join(filter(None, functions))}")
    return functions[name](*numbers)


def _parameters(call: Call) -> tuple[float, ...]:
    """Of an activation, one attribute for each."""
    found = (call.attribute(f"activation_{name}") for name in ("alpha", "beta", "gamma"))
    return tuple(float(number) for number in found if number is not None)


def _fused_conv(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    y = call.by(convolution.OPERATORS["Conv"], x, weight, bias)
    y = y if added is None else y + added
    return _activated(call, y, tuple(call.attribute("activation_params", ())))


def _channels_last_conv(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    planes = None if added is None else added.movedim(-1, 1)
    return _fused_conv(call, x.movedim(-1, 1), weight, bias, planes).movedim(1, -1)


def _channels_last_max_pool(call: Call, x: Tensor) -> Tensor:
    return call.by(convolution.OPERATORS["MaxPool"], x.movedim(-1, 1)).movedim(1, -1)


def _fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    return _activated(call, call.by(convolution.OPERATORS["Gemm"], a, b, c), _parameters(call))


def _turned(call: Call, x: Tensor, side: str) -> Tensor:
    if call.int(f"transBatch{side}", 0):  # rows are the first axis, before those of the samples
        x = x.movedim(0, -2)
    return x.transpose(-2, -1) if call.int(f"trans{side}", 0) and x.dim() > 1 else x


def _fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    product = torch.matmul(_turned(call, a, "A"), _turned(call, b, "B"))
    alpha = call.float("alpha", 1.0)
    return product if alpha == 1.0 else product * alpha


def _fused_matmul_activation(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return _activated(call, _fused_matmul(call, a, b), _parameters(call))


def _gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias)


def _fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    alpha = call.float("alpha", 1.702)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def _bias_split_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    left, right = (x + bias).chunk(2, -1)
    return left * F.gelu(right)


def _bias_add(call: Call, x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return x + bias + skip


def _bias_softmax(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    axis = call.int("axis", 1) % x.dim()
    if not call.int("is_inner_broadcast", 0) and bias.dim() < x.dim():
        bias = bias.reshape((1,) * (x.dim() - bias.dim()) + tuple(bias.shape))
    elif bias.dim() < x.dim():
        raise call.error("its bias is broadcast in the middle, and has fewer axes")
    summed = x + bias
    if axis == x.dim() - 1:
        return torch.softmax(summed, -1)
    return torch.softmax(summed.flatten(axis), -1).unflatten(-1, x.shape[axis:])


def _no_statistics(call: Call) -> None:
    if any(call.reads(name) for name in call.step.outputs[1:3]):
        raise call.error("its mean and deviation are read, which only training does")


def _skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    _no_statistics(call)
    total = x + skip if bias is None else x + skip + bias
    return F.layer_norm(total, scale.shape, scale, shift, call.float("epsilon", 1e-12)), None, None, total


def _skip_rms_norm(call: Call, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    _no_statistics(call)
    total = x + skip if bias is None else x + skip + bias
    return F.rms_norm(total, scale.shape, scale, call.float("epsilon", 1e-12)), None, None, total


def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Any:
    if any(call.reads(name) for name in call.step.outputs[1:]):
        raise call.error("its deviation is read, which only training does")
    return call.by(normalization.OPERATORS["RMSNormalization"], x, scale)


def _group_norm(call: Call, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    last = bool(call.int("channels_last", 1))
    planes = x.movedim(-1, 1) if last else x
    scale, shift = (t if t.dtype == x.dtype else t.to(x.dtype) for t in (scale, shift))
    y = F.group_norm(planes, call.int("groups", 1), scale, shift, call.float("epsilon", 1e-5))
    y = F.silu(y) if call.int("activation", 0) else y
    return y.movedim(1, -1) if last else y


def _skip_group_norm(
    call: Call, x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor, bias: Tensor | None = None
) -> Any:
    last = bool(call.int("channels_last", 1))
    if skip.dim() == 2:
        skip = skip[:, None, None, :] if last else skip[:, :, None, None]
    total = x + skip
    if bias is not None:
        total = total + (bias if last else bias[:, None, None])
    return _group_norm(call, total, scale, shift), total


def _inverse(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.inv(x)


def _expand_dims(call: Call, x: Tensor, axis: Any) -> Tensor:
    return x.unsqueeze(int(axis.number))


def _fourier(call: Call, x: Tensor) -> Tensor:
    if call.int("signal_ndim", 1) != 1:
        raise call.error(f"its signal has {call.int('signal_ndim', 1)} axes; known is one")
    return torch.view_as_real(torch.fft.rfft(x))


def _inverse_fourier(call: Call, x: Tensor) -> Tensor:
    if call.int("signal_ndim", 1) != 1:
        raise call.error(f"its signal has {call.int('signal_ndim', 1)} axes; known is one")
    return torch.fft.irfft(torch.view_as_complex(x.contiguous()))


def _equal_to(operator: Operator) -> Operator:
    """An operator that computes what a standard one does."""

    def run(call: Call, *inputs: Any) -> Any:
        return call.by(operator, *inputs, version=_STANDARD)

    return Operator(run=run, static=operator.static, weights=operator.weights)


_LAYER_NORM = normalization.OPERATORS["LayerNormalization"]
_RMS_NORM = Operator(run=_rms_norm, weights=(1,))
_FUSED_MATMUL = Operator(run=_fused_matmul, weights=(0, 1))

OPERATORS: dict[str, Operator] = {
    **contrib_attention.OPERATORS,
    **contrib_quantized.OPERATORS,
    "FusedConv": Operator(run=_fused_conv, weights=(1, 2)),
    "NhwcConv": Operator(run=_channels_last_conv, weights=(1, 2)),
    "NhwcFusedConv": Operator(run=_channels_last_conv, weights=(1, 2)),
    "NhwcMaxPool": Operator(run=_channels_last_max_pool),
    "FusedGemm": Operator(run=_fused_gemm, weights=(0, 1, 2)),
    "FusedMatMul": _FUSED_MATMUL,
    "TransposeMatMul": _FUSED_MATMUL,
    "FusedMatMulActivation": Operator(run=_fused_matmul_activation, weights=(0, 1)),
    "Gelu": Operator(run=_gelu),
    "BiasGelu": Operator(run=_gelu, weights=(1,)),
    "FastGelu": Operator(run=_fast_gelu, weights=(1,)),
    "QuickGelu": Operator(run=_quick_gelu),
    "BiasSplitGelu": Operator(run=_bias_split_gelu, weights=(1,)),
    "BiasAdd": Operator(run=_bias_add, weights=(1,)),
    "BiasSoftmax": Operator(run=_bias_softmax),
    "LayerNormalization": _LAYER_NORM,
    "SimplifiedLayerNormalization": _RMS_NORM,
    "SkipLayerNormalization": Operator(run=_skip_layer_norm, weights=(1, 2, 3, 4)),
    "SkipSimplifiedLayerNormalization": Operator(run=_skip_rms_norm, weights=(1, 2, 3)),
    "EmbedLayerNormalization": Operator(run=embed_layer_norm, weights=(2, 3, 4, 5, 6)),
    "GroupNorm": Operator(run=_group_norm, weights=(1, 2)),
    "SkipGroupNorm": Operator(run=_skip_group_norm, weights=(1, 2, 4)),
    "Inverse": Operator(run=_inverse),
    "ExpandDims": Operator(run=_expand_dims, static=(1,)),
    "Rfft": Operator(run=_fourier),
    "Irfft": Operator(run=_inverse_fourier),
    "GatherND": _equal_to(indexing.OPERATORS["GatherND"]),
    "Trilu": _equal_to(indexing.OPERATORS["Trilu"]),
    "GridSample": _equal_to(sampling.OPERATORS["GridSample"]),
    "Pad": _equal_to(shape.OPERATORS["Pad"]),
}

STANDARD: dict[str, Operator] = {"SimplifiedLayerNormalization": _RMS_NORM}
"""What ONNX Runtime puts into ONNX's own domain."""
