"""Follow channels through operators that do not mix them."""

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.quantization.operators import rectified_range

aten = torch.ops.aten

NO_CHANNEL = -1
"""Stands where a tensor holds nothing of a link: a padding of zeros, or what comes from somewhere else."""


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, tuple, list))


def _number(size: Any) -> Any:
    """A size with the number of the example in place of a symbol."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def sizes_of(node: fx.Node) -> list[int]:
    """Of the value that a node computes, for the example."""
    return [_number(size) for size in node.meta["val"].shape]


# What channels go through. Each rule takes the node, which argument has the channels, and a tensor with the channel's
# number at every element of it; it gives such a tensor for the result, or None where channels mix.

Rule = Callable[[fx.Node, Tensor], Any]


def _same(node: fx.Node, labels: Tensor) -> Tensor:
    return labels


def uniform(labels: Tensor, axes: Sequence[int]) -> Tensor | None:
    """The labels with one element along `axes`, along which they must not differ."""
    axes = [axis for axis in axes if labels.shape[axis] != 1]
    if not axes:
        return labels
    # What was only repeated need not be looked at.
    thin = labels[tuple(slice(1) if stride == 0 else slice(None) for stride in labels.stride())]
    top = thin.amax(axes, keepdim=True)
    if not bool(((thin == top) | (thin == NO_CHANNEL)).all()):
        return None
    shape = [1 if axis in axes else size for axis, size in enumerate(labels.shape)]
    return top.expand(shape)


def _spread(node: fx.Node, labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.expand(sizes_of(node))


def _windows(axes: int) -> Rule:
    """Pools and resizing look at the last `axes` axes of each channel."""

    def rule(node: fx.Node, labels: Tensor) -> Tensor | None:
        return _spread(node, uniform(labels, range(labels.dim() - axes, labels.dim())))

    return rule


def _mean(node: fx.Node, labels: Tensor) -> Tensor | None:
    given = edit.arguments(node)
    axes = [axis % labels.dim() for axis in given["dim"] or range(labels.dim())]
    thin = uniform(labels, axes)
    if thin is None or given["keepdim"]:
        return thin
    return thin.squeeze(tuple(axes)) if axes else thin


def _pad(node: fx.Node, labels: Tensor) -> Tensor | None:
    given = edit.arguments(node)
    if given.get("mode", "constant") != "constant" or given["value"]:
        return None
    padding = [_number(size) for size in given["pad"]]
    result: Tensor = aten.constant_pad_nd(labels, padding, NO_CHANNEL)
    return result


def _clamped(node: fx.Node, labels: Tensor) -> Tensor | None:
    return labels if rectified_range(node) is not None else None


def _scaled(node: fx.Node, labels: Tensor) -> Tensor | None:
    return _spread(node, labels) if labels.dim() == len(sizes_of(node)) else None


def _attended(node: fx.Node, labels: Tensor) -> Tensor | None:
    """Values that attention averages over axis -2; also the second factor of any product of matrices."""
    if labels.dim() < 2 or edit.arguments(node).get("enable_gqa"):
        return None
    return _spread(node, uniform(labels, [labels.dim() - 2]))


def _moved(node: fx.Node, labels: Any) -> Any:
    """Runs what only moves elements about on the labels themselves."""
    args = fx.map_arg(node.args, lambda other: _number(other.meta["val"]) if not _is_tensor(other) else labels)
    kwargs = fx.map_arg(node.kwargs, lambda other: _number(other.meta["val"]))
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return labels.reshape(args[1])  # the labels may be laid out in another way than the value
    return node.target(*args, **kwargs)  # type: ignore[operator]


RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.relu.default: _clamped,
        aten.relu6.default: _clamped,
        aten.hardtanh.default: _clamped,
        aten.clamp.default: _clamped,
        aten.clamp_min.default: _clamped,
        aten.leaky_relu.default: _same,
        aten.abs.default: _same,
        aten.neg.default: _same,
        aten.dropout.default: _same,
        aten.clone.default: _same,
        aten.contiguous.default: _same,
        aten.detach.default: _same,
        aten.mul.Tensor: _scaled,
        aten.mul.Scalar: _scaled,
        aten.div.Tensor: _scaled,
        aten.div.Scalar: _scaled,
        aten.max_pool1d.default: _windows(1),
        aten.max_pool2d.default: _windows(2),
        aten.max_pool3d.default: _windows(3),
        aten.avg_pool1d.default: _windows(1),
        aten.avg_pool2d.default: _windows(2),
        aten.avg_pool3d.default: _windows(3),
        aten.adaptive_avg_pool1d.default: _windows(1),
        aten.adaptive_avg_pool2d.default: _windows(2),
        aten.adaptive_avg_pool3d.default: _windows(3),
        aten.upsample_nearest1d.vec: _windows(1),
        aten.upsample_nearest2d.vec: _windows(2),
        aten.upsample_nearest3d.vec: _windows(3),
        aten.upsample_bilinear2d.vec: _windows(2),
        aten.upsample_bicubic2d.vec: _windows(2),
        aten.mean.dim: _mean,
        aten.sum.dim_IntList: _mean,
        aten.amax.default: _mean,
        aten.pad.default: _pad,
        aten.constant_pad_nd.default: _pad,
        aten.scaled_dot_product_attention.default: _attended,
        aten.matmul.default: _attended,
        aten.bmm.default: _attended,
        **dict.fromkeys(
            (
                aten.view.default,
                aten.reshape.default,
                aten._unsafe_view.default,
                aten.flatten.using_ints,
                aten.unflatten.int,
                aten.squeeze.default,
                aten.squeeze.dim,
                aten.squeeze.dims,
                aten.unsqueeze.default,
                aten.transpose.int,
                aten.permute.default,
                aten.movedim.int,
                aten.t.default,
                aten.slice.Tensor,
                aten.select.int,
                aten.narrow.default,
                aten.split.Tensor,
                aten.split_with_sizes.default,
                aten.chunk.default,
                aten.unbind.int,
                aten.expand.default,
                aten.repeat_interleave.self_int,
                aten.roll.default,
                aten.flip.default,
                aten.channel_shuffle.default,
                aten.pixel_shuffle.default,
                aten.pixel_unshuffle.default,
                operator.getitem,
            ),
            _moved,
        ),
    }
)

# Where the channels have to come in, for operators of several tensors; the first argument elsewhere.
ENTRANCE: Mapping[Any, tuple[int, ...]] = MappingProxyType(
    {
        aten.mul.Tensor: (0, 1),
        aten.scaled_dot_product_attention.default: (2,),
        aten.matmul.default: (1,),
        aten.bmm.default: (1,),
    }
)

MOVES = frozenset(target for target, rule in RULES.items() if rule is _moved)
"""Operators that only move elements about."""
