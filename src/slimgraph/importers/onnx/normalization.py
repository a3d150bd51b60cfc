"""Normalizations of ONNX."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.steps import Call, Operator

_EPSILON = 1e-5


def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    if call.version < 9 and not call.int("spatial", 1):  # statistics for each element instead of each channel
        flat = [t.reshape(-1) for t in (scale, bias, mean, var)]
        return _of_channels(call, x.flatten(1), *flat).reshape(x.shape)
    if x.dim() == 1:  # one channel
        return _of_channels(call, x.unsqueeze(1), scale, bias, mean, var).squeeze(1)
    if not _trains(call):
        return _of_channels(call, x, scale, bias, mean, var)
    # The file says that statistics are those of the input, whenever it runs.
    axes = [0, *range(2, x.dim())]
    kept = call.float("momentum", 0.9)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, call.float("epsilon", _EPSILON))
    own_var, own_mean = torch.var_mean(x, axes, correction=0)
    return y, mean * kept + own_mean * (1 - kept), var * kept + own_var * (1 - kept), own_mean, own_var


def _trains(call: Call) -> bool:
    """Before version 14, a second output that is read says so."""
    if call.version >= 14:
        return bool(call.int("training_mode", 0))
    return any(call.reads(name) for name in call.step.outputs[1:])


def _of_channels(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    # ONNX's momentum is what is kept, PyTorch's what is new; the file has it in 24 bits.
    momentum = round(1 - call.float("momentum", 0.9), 7)
    if not (call.stored(3) and call.stored(4)):  # statistics that the model computes: gradients flow through them
        shape = [1, -1] + [1] * (x.dim() - 2)
        factor = scale * torch.rsqrt(var + call.float("epsilon", _EPSILON))
        return (x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)
    mean, var = (t if t.dtype == scale.dtype else t.to(scale.dtype) for t in (mean, var))
    return F.batch_norm(x, mean, var, scale, bias, False, momentum, call.float("epsilon", _EPSILON))


def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.1, call.float("epsilon", _EPSILON))


def _is_shape(tensor: Tensor, sizes: list[Any]) -> bool:
    """Whether a weight has just these sizes; false where one of them is free, which no weight has."""
    return all(isinstance(size, int) for size in sizes) and list(tensor.shape) == sizes


def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis, epsilon = call.int("axis", -1), call.float("epsilon", _EPSILON)
    sizes = list(x.shape[axis:])
    if _is_shape(scale, sizes) and (bias is None or _is_shape(bias, sizes)) and scale.dtype == x.dtype:
        y = F.layer_norm(x, sizes, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, sizes, None, None, epsilon) * scale
        y = y if bias is None else y + bias
    if not any(call.reads(name) for name in call.step.outputs[1:]):
        return y
    wide = x.float() if call.int("stash_type", 1) == 1 else x
    axes = list(range(axis % x.dim(), x.dim()))
    var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(var + epsilon)


def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = call.int("num_groups", 1)
    if call.version < 21:  # one number a group
        each = x.shape[1] // groups
        scale, bias = (t.reshape(-1, 1).expand(groups, each).reshape(-1) for t in (scale, bias))
    return F.group_norm(x, groups, scale, bias, call.float("epsilon", _EPSILON))


def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    sizes, epsilon = list(x.shape[call.int("axis", -1) :]), call.float("epsilon", _EPSILON)
    if _is_shape(scale, sizes) and scale.dtype == x.dtype:
        return F.rms_norm(x, sizes, scale, epsilon)
    # What is broadcast, and what has another type, is multiplied afterwards, and has the type of the scale.
    return F.rms_norm(x, sizes, None, epsilon).to(scale.dtype) * scale


def _local_response_norm(call: Call, x: Tensor) -> Tensor:
    size = call.int("size", 1)
    # Of an even number of channels, one more lies behind than before; PyTorch's own has it before.
    before, after = (size - 1) // 2, size // 2
    squares = F.pad(x.square().flatten(2).unsqueeze(1), (0, 0, before, after))
    mean = F.avg_pool2d(squares, (size, 1), 1).squeeze(1).reshape(x.shape)
    return x / (mean * call.float("alpha", 1e-4) + call.float("bias", 1.0)) ** call.float("beta", 0.75)


def _lp_norm(call: Call, x: Tensor) -> Tensor:
    return F.normalize(x, float(call.int("p", 2)), call.int("axis", -1))


def _mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    axes = call.ints("axes", (0, 2, 3))
    apart = x - x.mean(axes, keepdim=True)
    # The definition of the operator adds its constant outside of the root.
    return apart / (apart.square().mean(axes, keepdim=True).sqrt() + 1e-9)


OPERATORS: dict[str, Operator] = {
    "BatchNormalization": Operator(run=_batch_norm, weights=(1, 2), running=(3, 4)),
    "InstanceNormalization": Operator(run=_instance_norm, weights=(1, 2)),
    "LayerNormalization": Operator(run=_layer_norm, weights=(1, 2)),
    "GroupNormalization": Operator(run=_group_norm, weights=(1, 2)),
    "RMSNormalization": Operator(run=_rms_norm, weights=(1,)),
    "LRN": Operator(run=_local_response_norm),
    "LpNormalization": Operator(run=_lp_norm),
    "MeanVarianceNormalization": Operator(run=_mean_variance_norm),
}
