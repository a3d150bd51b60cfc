"""Compute a quantized program with fewer passes over its values."""

import torch

import slimgraph.program.edit as edit
from slimgraph.program.names import set_names, unused, value_of
from slimgraph.program.program import Program
from slimgraph.program.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE

aten = torch.ops.aten


def merge_quantizers(program: Program) -> Program:
    """The program with each quantizer and its dequantizer as one operator, and weights as the numbers that they mean.

    It answers as `program` does but for ties, where the merged operator multiplies by 1/scale instead of dividing. It
    is made to be evaluated, not to be written.
    """
    merged = program.copy().eval()
    graph_module, taken = merged.graph_module, edit.tensor_names(merged.graph_module)
    for node in list(merged.graph.nodes):
        if node.target not in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
            continue
        stored = [edit.constant_of(graph_module, argument) for argument in node.args]
        if stored[0] is not None:
            given = [argument if tensor is None else tensor for argument, tensor in zip(node.args, stored, strict=True)]
            name = unused(f"{node.args[0].target}_real", taken)
            taken.add(name)
            real = edit.read_tensor(merged, name, node.target(*given), before=node)
            node.replace_all_uses_with(real)
        elif (source := node.args[0]).target is QUANTIZE:
            with merged.graph.inserting_before(node):
                both = merged.graph.call_function(aten.fake_quantize_per_tensor_affine.default, source.args[:5])
            node.replace_all_uses_with(both)
            set_names(both, layer="", value=f"{value_of(node)}/merged")
    return edit.finish(merged)
