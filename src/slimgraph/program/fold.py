"""Fold batch normalization into the convolution or linear layer before it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, unused
from slimgraph.program.program import HistoryEntry, Program

aten = torch.ops.aten

# Axis of the weight that holds the output channels.
_OUTPUT_AXIS = {
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.padding: 0,
    aten.linear.default: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
}


@dataclass(frozen=True, slots=True)
class _Affine:
    """What an evaluated batch norm does to a channel: x * scale + shift, in float64."""

    scale: Tensor
    shift: Tensor


def _affine(program: Program, norm: fx.Node) -> _Affine | None:
    given = edit.arguments(norm)
    mean = edit.constant_of(program.graph_module, given["running_mean"])
    variance = edit.constant_of(program.graph_module, given["running_var"])
    if mean is None or variance is None or given["training"] is True:
        return None
    scale = (variance.detach().double() + given["eps"]).rsqrt()
    gamma = edit.constant_of(program.graph_module, given["weight"])
    beta = edit.constant_of(program.graph_module, given["bias"])
    scale = scale if gamma is None else scale * gamma.detach().double()
    shift = -mean.detach().double() * scale
    return _Affine(scale, shift if beta is None else shift + beta.detach().double())


def _foldable(program: Program, norm: fx.Node, readers: Counter[int]) -> bool:
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or layer.target not in _OUTPUT_AXIS or len(layer.users) != 1:
        return False
    weight = edit.constant_of(program.graph_module, layer.args[1])
    bias = edit.arguments(layer)["bias"]
    if weight is None or (bias is not None and edit.constant_of(program.graph_module, bias) is None):
        return False  # computed in the graph
    # A batch norm behind a linear layer normalizes axis 1, which is the layer's output axis only for two axes.
    flat = layer.target is not aten.linear.default or layer.meta["val"].dim() == 2
    # A weight that two layers read cannot take the scale of one of them.
    return flat and readers[id(weight)] == 1


def fold_batch_norm(program: Program) -> Program:
    """A program without the batch norms that follow a convolution or linear layer; it evaluates the same.

    The layer's weight and bias take the norm's scale and shift (computed in float64). The values of folded norms
    disappear: the layer's value is now what the norm's was. Training such a program no longer normalizes.
    """
    folded = program.copy()
    readers = edit.count_readers(folded.graph_module)
    names = []
    for norm in list(folded.graph.nodes):
        if norm.target is not aten.batch_norm.default or not _foldable(folded, norm, readers):
            continue
        affine = _affine(folded, norm)
        if affine is None:
            continue
        _fold(folded, norm.args[0], affine, readers)
        norm.replace_all_uses_with(norm.args[0])
        names.append(layer_of(norm))
    edit.finish(folded)
    return folded.with_history(HistoryEntry(step="fold_batch_norm", parameters={"layers": len(names)}))


def _fold(program: Program, layer: fx.Node, affine: _Affine, readers: Counter[int]) -> None:
    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    name = str(weight_node.target)
    weight = edit.tensor_named(program.graph_module, name)
    shape = [1] * weight.dim()
    axis = _OUTPUT_AXIS[layer.target]  # type: ignore[index]
    shape[axis] = -1
    scale = affine.scale
    if axis == 1:  # transposed convolutions hold the output channels of one group in axis 1
        groups = scale.numel() // weight.shape[1]
        by_group = weight.detach().double().reshape(groups, -1, *weight.shape[1:])
        new = (by_group * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    else:
        new = weight.detach().double() * scale.reshape(shape)
    edit.set_tensor(program.graph_module, name, new.to(weight.dtype))
    bias = edit.constant_of(program.graph_module, edit.arguments(layer)["bias"])
    shift = affine.shift if bias is None else affine.shift + bias.detach().double() * affine.scale
    set_bias(program, layer, shift.to(weight.dtype), readers)


def set_bias(program: Program, layer: fx.Node, values: Tensor, readers: Counter[int]) -> None:
    """Give a convolution or linear layer a bias of these values, without touching what any other layer reads.

    Args:
        readers: of `edit.count_readers`, before the edits began.
    """
    node = edit.arguments(layer)["bias"]
    old = edit.constant_of(program.graph_module, node)
    if old is not None and isinstance(node, fx.Node) and readers[id(old)] == 1:
        edit.set_tensor(program.graph_module, str(node.target), values)
        readers[id(edit.tensor_named(program.graph_module, str(node.target)))] = 1
        return
    owner = str(layer.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    name = unused(f"{owner}.bias" if owner else "bias", edit.tensor_names(program.graph_module))
    new = edit.read_tensor(program, name, values, trainable=True, before=layer)
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    layer.args = (*layer.args[:2], new, *layer.args[3:])
