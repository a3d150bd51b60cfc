"""Norms that take their statistics from the indices that stay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from slimgraph.pruning.rules_layers import is_of_input

aten = torch.ops.aten

_NORMS = (
    *(aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default),
    *(aten.batch_norm.default, aten.instance_norm.default),
)


def takes_statistics(node: fx.Node) -> bool:
    """Whether an operator is a norm that takes its statistics from its input, where an index of zeros would count."""
    return node.op == "call_function" and node.target in _NORMS and is_of_input(node)


def norm_of_kept(target: Any, given: Mapping[str, Any], stays: Mapping[int, Tensor]) -> Tensor:
    """The norm of the kept indices, put back in their places; at the others stand zeros.

    Args:
        target: the operator.
        given: the values of its arguments by name.
        stays: which indices stay, by axis of the input; axes that stay whole may be left out.
    """
    x: Tensor = given["input"]
    places = {axis: keep.nonzero().flatten().to(x.device) for axis, keep in stays.items()}
    small = _taken(x, places)
    new = _norm(target, small, given, stays, places)
    for axis, indices in places.items():
        shape = [*new.shape]
        shape[axis] = x.shape[axis]
        new = new.new_zeros(shape).index_copy_(axis, indices, new)
    return new


def _norm(
    target: Any, small: Tensor, given: Mapping[str, Any], stays: Mapping[int, Tensor], places: Mapping[int, Tensor]
) -> Tensor:
    eps = given["eps"]
    if target in (aten.layer_norm.default, aten.rms_norm.default):
        count = len(given["normalized_shape"])
        last = {axis - small.dim() + count: indices for axis, indices in places.items() if axis >= small.dim() - count}
        weight, bias = (_taken(given.get(name), last) for name in ("weight", "bias"))
        shape = list(small.shape[-count:])
        if target is aten.rms_norm.default:
            return F.rms_norm(small, shape, weight, eps)
        return F.layer_norm(small, shape, weight, bias, eps)
    weight, bias = (_taken(given.get(name), {0: places[1]} if 1 in places else {}) for name in ("weight", "bias"))
    if target is aten.group_norm.default:
        groups = given["num_groups"]
        if 1 in stays:
            groups = int(stays[1].reshape(groups, -1).any(dim=1).sum())
        return F.group_norm(small, groups, weight, bias, eps)
    if target is aten.batch_norm.default:
        return F.batch_norm(small, None, None, weight, bias, training=True, eps=eps)
    return F.instance_norm(small, weight=weight, bias=bias, eps=eps)


def _taken(tensor: Any, places: Mapping[int, Tensor]) -> Any:
    """The part of a tensor at some indices of some axes; None of None."""
    for axis, indices in places.items() if tensor is not None else ():
        tensor = tensor.index_select(axis, indices)
    return tensor
