"""Run a quantized program as its float twin runs: a quantizer and its dequantizer in one pass over the tensor."""

from typing import Any

import torch
from torch import fx

from slimgraph.program.qdq import DEQUANTIZE, QUANTIZE


class Merged(fx.Interpreter):
    """Runs a quantized graph with quantizer and dequantizer as one kernel."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of one operator; that of a quantizer is real already."""
        if target is QUANTIZE:
            return torch.fake_quantize_per_tensor_affine(*args[:5])
        if target is DEQUANTIZE and args[0].is_floating_point():
            return args[0]
        return super().call_function(target, args, kwargs)
