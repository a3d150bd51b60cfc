"""Small ONNX models in Q/DQ form, built by hand: the same numbers without PyTorch and without our exporter."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MIDDLE = {np.uint8: 128, np.int8: 0, np.uint16: 32768}


class Graph:
    """Collects nodes; every method returns the name of what it adds."""

    def __init__(self, *, opset=21, activation=np.uint8, seed=0):
        self.activation, self.opset, self.random = activation, opset, np.random.default_rng(seed)
        self.nodes, self.constants, self.inputs, self._count = [], [], [], 0

    def _name(self, kind):
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def constant(self, value):
        name = self._name("constant")
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def input(self, *shape, name="x", dtype=TensorProto.FLOAT):
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def op(self, kind, *inputs, outputs=1, name=None, **attributes):
        names = [self._name(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name or names[0], **attributes))
        return names[0] if outputs == 1 else names

    def q(self, x, scale=0.05, zero_point=None, dtype=None):
        """x, then QuantizeLinear, then DequantizeLinear."""
        dtype = dtype or self.activation
        grid = (
            self.constant(np.float32(scale)),
            self.constant(dtype(MIDDLE[dtype] if zero_point is None else zero_point)),
        )
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *grid), *grid)

    def dq(self, codes, scale=0.05, zero_point=0):
        """A constant of integers behind a DequantizeLinear."""
        codes = np.asarray(codes)
        grid = self.constant(np.float32(scale)), self.constant(codes.dtype.type(zero_point))
        return self.op("DequantizeLinear", self.constant(codes), *grid)

    def weight(self, *shape, axis=0, dtype=np.int8):
        """DequantizeLinear of random int8 (or uint8) weights, one scale for each index of `axis`; and those scales."""
        low = 1 if dtype is np.uint8 else -127
        scale = self.random.uniform(0.005, 0.01, shape[axis]).astype(np.float32)
        zero_point = np.full(shape[axis], MIDDLE[dtype], dtype)
        codes = self.random.integers(low, low + 255, shape).astype(dtype)
        inputs = [self.constant(value) for value in (codes, scale, zero_point)]
        return self.op("DequantizeLinear", *inputs, axis=axis), scale

    def bias(self, weight_scale, input_scale=0.05, factor=1.0):
        """DequantizeLinear of random int32, on the grid input scale × weight scale (× `factor`)."""
        codes = self.random.integers(-1000, 1000, weight_scale.shape).astype(np.int32)
        grid = self.constant(weight_scale * np.float32(input_scale * factor)), self.constant(np.zeros_like(codes))
        return self.op("DequantizeLinear", self.constant(codes), *grid, axis=0)

    def conv(self, x, channels=16, *, kernel=3, groups=1, bias=True, bias_factor=1.0, dtype=np.int8, name=None):
        weight, scale = self.weight(channels, channels // groups, kernel, kernel, dtype=dtype)
        biases = [self.bias(scale, factor=bias_factor)] if bias else []
        return self.op("Conv", x, weight, *biases, pads=[kernel // 2] * 4, group=groups, name=name)

    def model(self, *outputs, dtype=TensorProto.FLOAT):
        shown = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "hand_made", self.inputs, shown, self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def bytes(self, *outputs, **kwargs):
        return self.model(*outputs, **kwargs).SerializeToString()


def float_conv():
    """x: [batch, 16, 8, 8] → Conv 3×3 → Relu, in float."""
    graph = Graph()
    x = graph.input("batch", 16, 8, 8)
    weight = graph.constant(graph.random.normal(size=(16, 16, 3, 3)).astype(np.float32))
    return graph.bytes(graph.op("Relu", graph.op("Conv", x, weight, pads=[1] * 4, name="stem")))


def integer_conv():
    """x: [batch, 16, 8, 8] → Conv 3×3 → Relu, in Q/DQ form: uint8 activations, int8 weights by channel, int32 bias."""
    graph = Graph()
    x = graph.q(graph.input("batch", 16, 8, 8))
    return graph.bytes(graph.q(graph.op("Relu", graph.conv(x, name="stem")), zero_point=0))


def save_with_external_data(model, path, location="weights.bin"):
    onnx.save_model(model, path, save_as_external_data=True, location=location, size_threshold=0)
