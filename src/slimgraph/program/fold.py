"""Fold batch normalization into the convolution or linear layer before it."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, unused
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.value_range import spread_over_weight

aten = torch.ops.aten

OUTPUT_AXIS = {
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
"""Axis of the weight that holds the output channels."""


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


def _takes_norms(program: Program, layer: object, readers: Counter[int]) -> bool:
    if not isinstance(layer, fx.Node) or layer.target not in OUTPUT_AXIS:
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
    for layer, norms in foldable_norms(folded).items():
        for norm in norms:
            affine = _affine(folded, norm)
            assert affine is not None
            _fold(folded, layer, affine, readers)
            norm.replace_all_uses_with(layer)
            names.append(layer_of(norm))
    edit.finish(folded)
    return folded.with_history(HistoryEntry(step="fold_batch_norm", parameters={"layers": len(names)}))


def foldable_norms(program: Program) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The batch norms that `fold_batch_norm` folds, by the convolution or linear layer that takes them, in order."""
    readers = edit.count_readers(program.graph_module)
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    owner: dict[fx.Node, fx.Node] = {}
    for norm in program.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        before = norm.args[0]
        layer = owner.get(before, before)
        if len(before.users) == 1 and _takes_norms(program, layer, readers) and _affine(program, norm) is not None:
            found[layer] = (*found.get(layer, ()), norm)
            owner[norm] = layer
    return found


def norm_gain(program: Program, norm: fx.Node, weight: Tensor, axis: int) -> Tensor:
    """What folding a batch norm multiplies a weight by, in float64, in a shape that broadcasts against the weight."""
    affine = _affine(program, norm)
    assert affine is not None
    return spread_over_weight(affine.scale, weight, axis)


def _fold(program: Program, layer: fx.Node, affine: _Affine, readers: Counter[int]) -> None:
    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    name = str(weight_node.target)
    weight = edit.tensor_named(program.graph_module, name)
    axis = OUTPUT_AXIS[layer.target]  # type: ignore[index]
    new = weight.detach().double() * spread_over_weight(affine.scale, weight, axis)
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
