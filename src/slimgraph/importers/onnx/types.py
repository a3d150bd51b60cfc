"""Element types of ONNX in PyTorch."""

import onnx
import torch

from slimgraph.importers.steps import Call

TORCH_TYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    onnx.TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    onnx.TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    onnx.TensorProto.FLOAT8E8M0: torch.float8_e8m0fnu,
    onnx.TensorProto.INT4: torch.int8,
    onnx.TensorProto.UINT4: torch.uint8,
    onnx.TensorProto.INT2: torch.int8,
    onnx.TensorProto.UINT2: torch.uint8,
}
"""Integers below eight bits are unpacked into eight."""

BITS: dict[str, int] = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
"""Of each integer type that is unpacked."""


def torch_type(call: Call, number: int) -> torch.dtype:
    """The type that an attribute names by its number in the format."""
    if number not in TORCH_TYPES:
        names = {value: name for name, value in onnx.TensorProto.DataType.items()}
        raise call.error(f"PyTorch has no tensors of the type {names.get(number, number)}")
    return TORCH_TYPES[number]
