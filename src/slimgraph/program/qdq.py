"""The standard operators by which a program says where it is quantized."""

import torch
import torch.ao.quantization.fx._decomposed  # registers them
from torch import fx

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default

DEQUANTIZE_GROUPS = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
"""Of a matrix whose rows have one scale for each group of so many elements."""

MEASURE = torch.ops.quantized_decomposed.choose_qparams.tensor
"""Scale and zero point of the grid that covers a tensor, and zero, taken when the program runs."""

QUANTIZE_MEASURED = torch.ops.quantized_decomposed.quantize_per_tensor.tensor
DEQUANTIZE_MEASURED = torch.ops.quantized_decomposed.dequantize_per_tensor.tensor

_ALL = (QUANTIZE, DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS, QUANTIZE_MEASURED, DEQUANTIZE_MEASURED)


def is_quantized(graph: fx.Graph) -> bool:
    """Whether any value or weight of the graph is held in integers by these operators."""
    return any(node.target in _ALL for node in graph.nodes)
