"""How quantized operators that PyTorch's exporter does not know are written in ONNX."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import onnxscript

from slimgraph.program.qdq import DEQUANTIZE_GROUPS, DEQUANTIZE_MEASURED, MEASURE, QUANTIZE_MEASURED

op: Any = onnxscript.opset21  # its annotations do not fit the traced values that it is called with

_FLOAT = 1
"""The number of float32 among ONNX's types."""


def _measure(x: Any, first: int, last: int, smallest_scale: float, dtype: int) -> Any:
    # Its codes are not asked for here: `onnx_dynamic` lets whoever quantizes by these two read them.
    _, scale, zero_point = op.DynamicQuantizeLinear(x)
    return scale, zero_point


def _quantize_measured(x: Any, scale: Any, zero_point: Any, first: int, last: int, dtype: int) -> Any:
    # PyTorch has them as float64 and int64.
    return op.QuantizeLinear(x, op.Cast(scale, to=_FLOAT), op.Cast(zero_point, to=dtype))


def _dequantize_measured(
    codes: Any, scale: Any, zero_point: Any, first: int, last: int, dtype: int, out_dtype: int | None = None
) -> Any:
    return op.DequantizeLinear(codes, op.Cast(scale, to=_FLOAT), op.Cast(zero_point, to=dtype))


def _dequantize_groups(
    codes: Any, scale: Any, zero_point: Any, first: int, last: int, dtype: int, group: int, out_dtype: int
) -> Any:
    zeros = None if zero_point is None else op.Cast(zero_point, to=dtype)
    return op.DequantizeLinear(codes, scale, zeros, axis=1, block_size=group)


TRANSLATIONS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        DEQUANTIZE_GROUPS: _dequantize_groups,
        MEASURE: _measure,
        QUANTIZE_MEASURED: _quantize_measured,
        DEQUANTIZE_MEASURED: _dequantize_measured,
    }
)
