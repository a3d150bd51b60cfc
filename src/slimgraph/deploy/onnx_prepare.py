"""Rewrite a program into the forms that ONNX runtimes have integer kernels for; values stay the same."""

import re

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import Program
from slimgraph.program.qdq import DEQUANTIZE, QUANTIZE
from slimgraph.program.simplify import remove_dropout
from slimgraph.program.spell_attention import spell_out_attention

aten = torch.ops.aten

_INVENTED = re.compile(r"val_\d+")


def prepare_for_onnx(program: Program) -> Program:
    """A program that computes the same in operators which the exporter turns into what runtimes fuse.

    Batch norms are folded here and not by the exporter, which does it in float32 and leaves the weights in that type
    beside half-precision inputs: a file that no runtime loads (onnxscript 0.7).
    """
    prepared = remove_dropout(fold_batch_norm(program))
    attentions = prepared.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    if not all(map(_has_one_batch_axis, attentions)):
        prepared = spell_out_attention(prepared, keep=_has_one_batch_axis)
    for node in list(prepared.graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.target is aten.scaled_dot_product_attention.default:
            _contiguous(node)
        elif node.target is aten.linear.default:
            _flat_linear(node)
        elif node.target is QUANTIZE:
            _clip_to_codes(node)
    _keep_off_invented_names(prepared)
    return edit.finish(prepared)


def _has_one_batch_axis(attention: fx.Node) -> bool:
    """Whether attention is of (batch, heads, positions, width): the exporter knows no other (PyTorch 2.13)."""
    return bool(attention.meta["val"].dim() == 4)


def _contiguous(node: fx.Node) -> None:
    """Say that attention's result lies in order, which costs nothing in ONNX.

    The exporter takes attention apart, and the parts leave their result in another order than the whole, on which a
    view behind it was decided: "Cannot view a tensor" (PyTorch 2.13).
    """
    with node.graph.inserting_after(node):
        ordered = node.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    node.replace_all_uses_with(ordered, delete_user_cb=lambda user: user is not ordered)
    set_names(ordered, layer=layer_of(node), value=value_of(node))
    set_names(node, layer=layer_of(node), value=f"{value_of(node)}/unordered")


def _keep_off_invented_names(program: Program) -> None:
    """Give other names to tensors that are called as the exporter calls its own: those of a file that it wrote before.

    Two initializers of one name end in an error while it optimizes (onnxscript 0.7).
    """
    taken = edit.tensor_names(program.graph_module)
    for node in list(program.graph.nodes):
        tensor = edit.constant_of(program.graph_module, node)
        if tensor is None or not _INVENTED.fullmatch(str(node.target)):
            continue
        name = unused(f"stored_{node.target}", taken)
        edit.put(program.graph_module, name, tensor)
        taken.add(name)
        node.target = name


def _flat_linear(node: fx.Node) -> None:
    """A quantized linear layer on more than two axes as Reshape, Gemm, Reshape.

    ONNX Runtime has one integer kernel for Gemm with its bias; MatMul and Add would be an integer product and a float
    addition, or nothing integer at all when every axis is fixed (docs/onnxruntime.md).
    """
    source = node.args[0]
    value = node.meta.get("val")
    if not isinstance(source, fx.Node) or source.target is not DEQUANTIZE or value is None or value.dim() <= 2:
        return
    if (
        source.args[-1] is torch.int8
    ):  # ONNX Runtime 1.32 cannot load these with a Reshape in front (docs/onnxruntime.md)
        return
    graph = node.graph
    name, layer = value_of(node), layer_of(node)
    with graph.inserting_before(node):
        leading = [graph.call_function(aten.sym_size.int, (source, axis)) for axis in range(value.dim() - 1)]
        flatten = aten.flatten.using_ints, (source, 0, value.dim() - 2)
        flat = next((user for user in source.users if (user.target, user.args) == flatten), None)
        if flat is None:  # the first of those that read the value
            flat = graph.call_function(*flatten)
            set_names(flat, layer=layer, value=f"{name}/flat")
        product = graph.call_function(aten.linear.default, (flat, *node.args[1:]))
        result = graph.call_function(aten.view.default, (product, [*leading, int(value.shape[-1])]))
    set_names(product, layer=layer, value=f"{name}/product")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    set_names(result, layer=layer, value=name)


def _clip_to_codes(node: fx.Node) -> None:
    """Clip in front of a quantizer that uses fewer codes than its type has: QuantizeLinear knows the type only."""
    source, scale, zero_point, first, last, dtype = node.args
    info = torch.iinfo(dtype)  # type: ignore[arg-type]
    if (first, last) == (info.min, info.max):
        return
    low, high = ((bound - zero_point) * scale for bound in (first, last))  # type: ignore[operator]
    with node.graph.inserting_before(node):
        clipped = node.graph.call_function(aten.clamp.default, (source, low, high))
    set_names(clipped, layer=layer_of(node), value=f"{value_of(node)}/clipped")
    node.update_arg(0, clipped)
