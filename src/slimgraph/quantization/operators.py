"""Which ATen operators each kind of operator in a target's table stands for."""

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

import slimgraph.deploy.targets as kinds
import slimgraph.program.edit as edit
from slimgraph.program.program import Program

aten = torch.ops.aten

KIND_OF: Mapping[Any, str] = MappingProxyType(
    {
        aten.conv1d.default: kinds.CONVOLUTION,
        aten.conv2d.default: kinds.CONVOLUTION,
        aten.conv3d.default: kinds.CONVOLUTION,
        aten.conv1d.padding: kinds.CONVOLUTION,
        aten.conv2d.padding: kinds.CONVOLUTION,
        aten.conv3d.padding: kinds.CONVOLUTION,
        aten.conv_transpose1d.default: kinds.TRANSPOSED_CONVOLUTION,
        aten.conv_transpose2d.input: kinds.TRANSPOSED_CONVOLUTION,
        aten.conv_transpose3d.input: kinds.TRANSPOSED_CONVOLUTION,
        aten.linear.default: kinds.LINEAR,
        aten.matmul.default: kinds.MATMUL,
        aten.bmm.default: kinds.MATMUL,
        aten.add.Tensor: kinds.ADD,
        aten.mul.Tensor: kinds.MULTIPLY,
        aten.cat.default: kinds.CONCAT,
        aten.softmax.int: kinds.SOFTMAX,
        aten._softmax.default: kinds.SOFTMAX,
        aten.max_pool2d.default: kinds.MAX_POOL,
        aten.avg_pool2d.default: kinds.AVERAGE_POOL,
        aten.adaptive_avg_pool2d.default: kinds.GLOBAL_AVERAGE_POOL,
        aten.mean.dim: kinds.GLOBAL_AVERAGE_POOL,
        aten.view.default: kinds.RESHAPE,
        aten.reshape.default: kinds.RESHAPE,
        aten.flatten.using_ints: kinds.RESHAPE,
        aten.unflatten.int: kinds.RESHAPE,
        aten.squeeze.dim: kinds.RESHAPE,
        aten.unsqueeze.default: kinds.RESHAPE,
        aten.transpose.int: kinds.RESHAPE,
        aten.permute.default: kinds.RESHAPE,
        aten.contiguous.default: kinds.RESHAPE,
        aten.slice.Tensor: kinds.RESHAPE,
        aten.select.int: kinds.RESHAPE,
        aten.split.Tensor: kinds.RESHAPE,
        aten.split_with_sizes.default: kinds.RESHAPE,
        aten.chunk.default: kinds.RESHAPE,
        operator.getitem: kinds.RESHAPE,
        aten.channel_shuffle.default: kinds.RESHAPE,
        aten.pixel_shuffle.default: kinds.RESHAPE,
        aten.upsample_nearest2d.vec: kinds.RESHAPE,
        aten.pad.default: kinds.RESHAPE,
        aten.constant_pad_nd.default: kinds.RESHAPE,
    }
)

# Functions that a range with its lowest code at zero performs by saturating, and the value above which they cut.
_RECTIFIERS = MappingProxyType({aten.relu.default: None, aten.relu6.default: 6.0})

_MASKS = (
    aten.add.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)
_SCALINGS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)

_PADS = (aten.pad.default, aten.constant_pad_nd.default)

WEIGHT_AXIS: Mapping[str, int] = MappingProxyType(
    {kinds.CONVOLUTION: 0, kinds.TRANSPOSED_CONVOLUTION: 1, kinds.LINEAR: 0}
)
"""The axis of output channels in the weight of each kind."""


_WEIGHT_POSITION = MappingProxyType({aten.embedding.default: 0, aten.addmm.default: 2})


def weight_position(node: fx.Node) -> int:
    """Index of the weight among the arguments of an operator that has one."""
    return _WEIGHT_POSITION.get(node.target, 1)  # type: ignore[call-overload, no-any-return]


def kind_of(node: fx.Node) -> str | None:
    """Kind of the operator at `node`; None where no target speaks of it."""
    if node.op != "call_function":
        return None
    # Other fillers than zero may lie outside of the range that the padded value brings.
    return None if node.target in _PADS and not _pads_with_zero(node) else KIND_OF.get(node.target)


def _pads_with_zero(node: fx.Node) -> bool:
    given = edit.arguments(node)
    return given.get("mode", "constant") == "constant" and not given["value"]


def rectified_range(node: fx.Node) -> tuple[float, float] | None:
    """The interval to which a ReLU-like operator clips, where it starts at zero; None for everything else."""
    if node.op != "call_function":
        return None
    if node.target in _RECTIFIERS:
        top = _RECTIFIERS[node.target]  # type: ignore[index]
        return (0.0, float("inf") if top is None else top)
    if node.target in (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default):
        given = list(edit.arguments(node).values())[1:]
        low = given[0]
        high = given[1] if len(given) > 1 else None
        if low == 0 and (high is None or isinstance(high, (int, float))):
            return (0.0, float("inf") if high is None else float(high))
    return None


def data_inputs(program: Program, node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator computes on, without weights, constants and sizes."""
    kind = kind_of(node)
    if kind == kinds.CONCAT:
        candidates: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    elif kind in (kinds.ADD, kinds.MULTIPLY, kinds.MATMUL):
        candidates = list(node.args[:2])
    else:
        candidates = [read_through_padding(node)]
    return [n for n in candidates if isinstance(n, fx.Node) and edit.constant_of(program.graph_module, n) is None]


def read_through_padding(node: fx.Node) -> Any:
    """What a convolution reads in front of the zero padding that belongs to it (SAME padding of odd sizes).

    Zero is on every grid, and runtimes merge such a padding into the convolution only if no quantizer stands between.
    """
    source = node.args[0]
    if (
        kind_of(node) == kinds.CONVOLUTION
        and isinstance(source, fx.Node)
        and source.target in _PADS
        and len(source.users) == 1
    ):
        return source.args[0] if _pads_with_zero(source) else source
    return source


def is_depthwise(node: fx.Node) -> bool:
    """Whether a convolution has one group for each of several input channels."""
    if kind_of(node) != kinds.CONVOLUTION:
        return False
    weight: torch.Tensor = node.args[1].meta["val"]  # type: ignore[union-attr]
    return bool(edit.arguments(node)["groups"] > 1 and weight.shape[1] == 1)


def is_fused_attention(node: fx.Node) -> bool:
    """Whether two products of activations, and the softmax between them, are one operator."""
    return node.op == "call_function" and node.target is aten.scaled_dot_product_attention.default


def reads_mask(softmax: fx.Node) -> bool:
    """Whether something is added to, or filled into, what a softmax reads: a mask is infinite, or nearly so."""
    source = softmax.args[0]
    while isinstance(source, fx.Node) and (source.target in _SCALINGS or KIND_OF.get(source.target) == kinds.RESHAPE):
        source = source.args[0]
    return isinstance(source, fx.Node) and source.target in _MASKS


def weight_of(program: Program, node: fx.Node) -> str | None:
    """Qualified name of the weight of a convolution or linear layer; None where it is computed in the graph."""
    if kind_of(node) not in WEIGHT_AXIS or len(node.args) < 2:
        return None
    weight = node.args[1]
    return str(weight.target) if edit.constant_of(program.graph_module, weight) is not None else None  # type: ignore[union-attr]


def pools_whole_images(node: fx.Node) -> bool:
    """Whether a mean or an adaptive pool averages over height and width of a batch of images, and nothing else."""
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return False
    axes: Any = node.args[1] if len(node.args) > 1 else None
    if node.target is aten.adaptive_avg_pool2d.default:
        return list(axes) == [1, 1]
    return node.target is aten.mean.dim and axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]
