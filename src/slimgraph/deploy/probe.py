"""Small ONNX models by which a machine shows what integer kernels are worth on it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from slimgraph.deploy.runtime import OnnxModel

Probe = Literal["convolution", "matmul"]

# Large enough that arithmetic outweighs the call, small enough for a few milliseconds.
_INPUT_SHAPE: Mapping[Probe, tuple[int, ...]] = MappingProxyType(
    {"convolution": (1, 64, 28, 28), "matmul": (1, 128, 256)}
)
_WEIGHT_SHAPE: Mapping[Probe, tuple[int, ...]] = MappingProxyType({"convolution": (64, 64, 3, 3), "matmul": (256, 256)})
_WEIGHT_AXIS: Mapping[Probe, int] = MappingProxyType({"convolution": 0, "matmul": 1})
_DEPTH = 3
_SCALE = 0.05


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def quantized(self, x: str) -> str:
        grid = self.constant(np.float32(_SCALE)), self.constant(np.uint8(0))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *grid), *grid)

    def model(self, shape: tuple[int, ...], output: str) -> bytes:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "probe", [x], [y], self.constants)
        content: bytes = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
        ).SerializeToString()
        return content


def probe_model(kind: Probe, *, integer: bool) -> bytes:
    """A chain of three convolutions, or matrix products, each with a ReLU: in float, or in Q/DQ form.

    The Q/DQ form has uint8 activations and int8 weights with one scale for each output channel. The numbers mean
    nothing.
    """
    shape, axis = _WEIGHT_SHAPE[kind], _WEIGHT_AXIS[kind]
    codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    scale = np.full(shape[axis], 0.01, np.float32)
    build = _Builder()
    x = build.quantized("x") if integer else "x"
    for _ in range(_DEPTH):
        if integer:
            weight = build.op("DequantizeLinear", build.constant(codes), build.constant(scale), axis=axis)
        else:
            weight = build.constant(codes * scale[0])
        x = build.op("MatMul", x, weight) if kind == "matmul" else build.op("Conv", x, weight, pads=[1, 1, 1, 1])
        x = build.op("Relu", x)
        x = build.quantized(x) if integer else x
    return build.model(_INPUT_SHAPE[kind], x)


def products_saturate() -> bool:
    """Whether ONNX Runtime's uint8 × int8 products overflow on this processor, so that weights must keep to 7 bits.

    Measured: the largest codes are multiplied and summed, and the result is compared with the right one.
    """
    depth = 64
    build = _Builder()
    codes = build.op("Cast", "x", to=TensorProto.UINT8)
    product = build.op("MatMulInteger", codes, build.constant(np.full((depth, 16), 127, np.int8)))
    content = build.model((1, depth), build.op("Cast", product, to=TensorProto.FLOAT))
    (sums,) = OnnxModel.open(content, threads=1)(np.full((1, depth), 255, np.float32)).values()
    return bool((sums != depth * 255 * 127).any())
