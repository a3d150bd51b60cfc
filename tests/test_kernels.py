"""Integer kernels are counted in what ONNX Runtime runs; and what it fuses is as docs/onnxruntime.md says."""

import dataclasses
import platform

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from onnx_models import Graph, float_conv, integer_conv
from slimgraph.deploy.kernels import FLOAT_KERNELS, INTEGER_KERNELS, FloatLayer, count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelLoadError
from slimgraph.program.capture import capture
from slimgraph.quantization.post_training import quantize

IMAGE = ("batch", 16, 8, 8)


def test_a_quantized_convolution_is_counted_as_an_integer_one():
    count = count_kernels(integer_conv())
    assert (count.convolutions_integer, count.convolutions_float, count.matmuls_integer) == (1, 0, 0)
    assert (count.quantize_nodes, count.dequantize_nodes, count.float_layers) == (1, 1, ())


def test_a_float_convolution_is_counted_as_such_and_named():
    count = count_kernels(float_conv())
    assert (count.convolutions_integer, count.convolutions_float) == (0, 1)
    assert count.float_layers == (FloatLayer(name="stem", kernel="Conv"),)


def test_a_path_is_counted_like_its_content(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(integer_conv())
    assert count_kernels(path) == count_kernels(integer_conv())
    assert list(tmp_path.iterdir()) == [path]  # what ONNX Runtime writes goes elsewhere, and away


def test_the_count_reads_as_a_sentence_and_can_become_json():
    count = count_kernels(integer_conv())
    assert str(count) == (
        "1 of 1 convolutions and 0 of 0 matrix products run in integers; 1 QuantizeLinear and 1 DequantizeLinear remain"
    )
    assert dataclasses.asdict(count)["kernels"]["QLinearConv"] == 1


def test_what_is_not_a_model_cannot_be_counted():
    with pytest.raises(ModelLoadError):
        count_kernels(b"nothing")


def test_no_kernel_is_integer_and_float():
    assert not set(INTEGER_KERNELS) & set(FLOAT_KERNELS)


def _float_weight(graph, *shape):
    return graph.constant(graph.random.normal(size=shape).astype(np.float32))


def _two_convolutions(graph):  # NCHWc layout, an Add fused into the second
    x = graph.input(*IMAGE)
    y = graph.op("Relu", graph.op("Conv", x, _float_weight(graph, 16, 16, 3, 3), pads=[1] * 4, name="first"))
    z = graph.op("Conv", y, _float_weight(graph, 16, 16, 3, 3), pads=[1] * 4, name="second")
    return graph.op("Relu", graph.op("Add", z, y))


def _with_batch_norm(graph):
    x = graph.op("Conv", graph.input(*IMAGE), _float_weight(graph, 16, 16, 1, 1), name="first")
    return graph.op("BatchNormalization", x, *(graph.constant(np.full(16, 2, np.float32)) for _ in range(4)))


def _linear_3d(graph):  # fixed axes: becomes Reshape, Gemm, Reshape
    x = graph.op("MatMul", graph.input(2, 4, 8), _float_weight(graph, 8, 8), name="first")
    return graph.op("Add", x, _float_weight(graph, 8))


def _scaled_attention(graph):  # becomes FusedMatMul
    x = graph.input("batch", 4, 8)
    scores = graph.op("MatMul", x, graph.op("Transpose", x, perm=[0, 2, 1]), name="first")
    return graph.op("Mul", scores, graph.constant(np.float32(0.25)))


def _left_in_float(graph):  # no quantizer behind it
    return graph.op("Relu", graph.conv(graph.q(graph.input(*IMAGE)), name="first"))


@pytest.mark.parametrize(("build", "names"), [
    (_two_convolutions, ["first", "second"]),
    (_with_batch_norm, ["first"]),
    (_linear_3d, ["first"]),
    (_scaled_attention, ["first"]),
    (_left_in_float, ["first"]),
])  # fmt: skip
def test_float_layers_have_the_names_of_the_file_whatever_they_were_fused_with(build, names):
    graph = Graph()
    assert [layer.name for layer in count_kernels(graph.bytes(build(graph))).float_layers] == names


def test_kernels_inside_branches_are_counted():
    inner = Graph()
    content = inner.model(inner.op("Conv", "x", _float_weight(inner, 16, 16, 3, 3), name="inside")).graph
    outer = Graph()
    outer.input(*IMAGE)
    outer.input(name="condition", dtype=TensorProto.BOOL)
    outer.nodes.append(helper.make_node("If", ["condition"], ["y"], then_branch=content, else_branch=content))
    assert count_kernels(outer.bytes("y")).convolutions_float == 2


# What ONNX Runtime 1.32 fuses on x86: the rows marked ✓ in docs/onnxruntime.md -------------------------------------

on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the table was made on x86")

FLOAT_OUTSIDE = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape"}
"""Borders and changes of layout, which come with every one of these models."""


def _image(graph, scale=0.05, zero_point=None, name="x"):
    return graph.q(graph.input(*IMAGE, name=name), scale, zero_point)


def _clip(graph, x, low=0, high=6):
    return graph.op("Clip", x, graph.constant(np.float32(low)), graph.constant(np.float32(high)))


def _conv_on_per_channel_input(graph):
    grid = graph.constant(np.full(16, 0.05, np.float32)), graph.constant(np.full(16, 128, np.uint8))
    codes = graph.op("QuantizeLinear", graph.input(*IMAGE), *grid, axis=1)
    return graph.q(graph.conv(graph.op("DequantizeLinear", codes, *grid, axis=1), groups=16))


def _conv_transpose(graph):
    weight, _ = graph.weight(16, 16, 2, 2, axis=1)
    return graph.q(graph.op("ConvTranspose", _image(graph), weight, kernel_shape=[2, 2], strides=[2, 2]))


def _pads(graph, x):
    return graph.op("Pad", x, graph.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))


CONVOLUTIONS = {
    "int32 bias": (lambda g: g.q(g.conv(_image(g))), "QLinearConv"),
    "no bias": (lambda g: g.q(g.conv(_image(g), bias=False)), "QLinearConv"),
    "depthwise": (lambda g: g.q(g.conv(_image(g), groups=16)), "QLinearConv"),
    "grouped": (lambda g: g.q(g.conv(_image(g), groups=4)), "QLinearConv"),
    "no Q on its output": (lambda g: g.conv(_image(g)), "Conv"),
    "Relu, lowest code is zero": (lambda g: g.q(g.op("Relu", g.conv(_image(g))), zero_point=0), "QLinearConv"),
    "Relu, middle code is zero": (lambda g: g.q(g.op("Relu", g.conv(_image(g)))), "FusedConv"),
    "Clip to 6 by its range": (lambda g: g.q(_clip(g, g.conv(_image(g))), 6 / 255, 0), "QLinearConv"),
    "Clip to 6, range to 7": (lambda g: g.q(_clip(g, g.conv(_image(g))), 7 / 255, 0), "FusedConv"),
    "Sigmoid, unquantized between": (lambda g: g.q(g.op("Sigmoid", g.conv(_image(g)))), "FusedConv"),
    "Sigmoid, quantized between": (
        lambda g: g.q(g.op("Sigmoid", g.q(g.conv(_image(g)))), 1 / 255, 0), "QLinearConv QLinearSigmoid",
    ),
    "Tanh, quantized between": (lambda g: g.q(g.op("Tanh", g.q(g.conv(_image(g))))), "QLinearConv Tanh"),
    "bias on another grid": (lambda g: g.q(g.conv(_image(g), bias_factor=2)), "Conv"),
    "input per channel": (_conv_on_per_channel_input, "Conv"),
    "Pad without Q/DQ behind it": (lambda g: g.q(g.conv(_pads(g, _image(g)))), "QLinearConv"),
    "transposed": (_conv_transpose, "ConvTranspose"),
}  # fmt: skip


def _pair(kind, second_scale=0.1):
    def build(graph):
        return graph.q(graph.op(kind, _image(graph), _image(graph, second_scale, name="y")))

    return build


def _with_constant(kind, constant):
    return lambda graph: graph.q(graph.op(kind, _image(graph), constant(graph)))


def _kept(kind, *more, scale=0.05, zero_point=None, **attributes):
    def build(graph):
        return graph.q(graph.op(kind, _image(graph), *map(graph.constant, more), **attributes), scale, zero_point)

    return build


def _resize(mode):
    sizes = np.array([1, 1, 2, 2], np.float32)
    return lambda graph: graph.q(graph.op("Resize", _image(graph), "", graph.constant(sizes), mode=mode))


def _concat(graph):
    return graph.q(graph.op("Concat", _image(graph), _image(graph, 0.1, name="y"), axis=1))


def _flatten_then_gemm(graph):
    weight, scale = graph.weight(4, 1024)
    return graph.op("Gemm", graph.op("Flatten", _image(graph)), weight, graph.bias(scale), transB=1)


HALVES = {"kernel_shape": [2, 2], "strides": [2, 2]}
OTHERS = {
    "Add": (_pair("Add"), "QLinearAdd"),
    "Mul": (_pair("Mul"), "QLinearMul"),
    "Sub": (_pair("Sub"), "Sub"),
    "Div": (_pair("Div"), "Div"),
    "Add of uint8 constant": (_with_constant("Add", lambda g: g.dq(np.ones((16, 1, 1), np.uint8))), "QLinearAdd"),
    "Add of int8 constant": (_with_constant("Add", lambda g: g.dq(np.ones((16, 1, 1), np.int8))), "Add"),
    "Add of float constant": (_with_constant("Add", lambda g: g.constant(np.ones((16, 1, 1), np.float32))), "Add"),
    "Relu of Add": (
        lambda g: g.q(g.op("Relu", g.op("Add", _image(g), _image(g, name="y"))), zero_point=0), "QLinearAdd",
    ),
    "Concat of different scales": (_concat, "QLinearConcat"),
    "MaxPool, equal scales": (_kept("MaxPool", **HALVES), "MaxPool"),
    "AveragePool": (_kept("AveragePool", scale=0.04, **HALVES), "QLinearAveragePool"),
    "GlobalAveragePool": (_kept("GlobalAveragePool", scale=0.04), "QLinearGlobalAveragePool"),
    "ReduceMean": (_kept("ReduceMean", np.array([2, 3])), "ReduceMean"),
    "Sigmoid": (_kept("Sigmoid", scale=1 / 255, zero_point=0), "QLinearSigmoid"),
    "LeakyRelu": (_kept("LeakyRelu"), "QLinearLeakyRelu"),
    "Softmax": (_kept("Softmax", scale=1 / 256, zero_point=0), "QLinearSoftmax"),
    "Tanh": (_kept("Tanh"), "Tanh"),
    "Gelu": (_kept("Gelu"), "Gelu"),
    "Flatten without its own Q/DQ": (_flatten_then_gemm, "Flatten Gemm"),
}  # fmt: skip


def _gemm(graph, bias, *, axes=(4, 64)):
    weight, scale = graph.weight(32, 64)
    biases = {"int32": lambda: [graph.bias(scale)], "float": lambda: [_float_weight(graph, 32)], None: list}[bias]()
    return graph.op("Gemm", graph.q(graph.input(*axes)), weight, *biases, transB=1)


def _matmul(graph, *axes, bias=None):
    weight, _ = graph.weight(64, 32, axis=1)
    product = graph.op("MatMul", graph.q(graph.input(*axes)), weight)
    return product if bias is None else graph.op("Add", product, _float_weight(graph, *bias))


def _transposed_matmul(graph):
    weight, _ = graph.weight(32, 64)
    return graph.op("MatMul", graph.q(graph.input("n", 4, 64)), graph.op("Transpose", weight, perm=[1, 0]))


def _reshaped_gemm(graph):
    weight, scale = graph.weight(32, 64)
    rows = graph.op("Reshape", graph.q(graph.input("n", 4, 64)), graph.constant(np.array([-1, 64])))
    product = graph.op("Gemm", rows, weight, graph.bias(scale), transB=1)
    return graph.op("Reshape", product, graph.constant(np.array([-1, 4, 32])))


def _attention(graph):
    query, key, value = (graph.q(graph.input("n", 3, 8, 16, name=name)) for name in "qkv")
    scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
    return graph.op("MatMul", graph.q(graph.op("Softmax", scores), 1 / 256, 0), value)


def _dynamic(*shape, products=1):
    """Products with one value whose range is taken at inference, in the integer form with bias."""

    def build(graph):
        codes, scale, zero_point = graph.op("DynamicQuantizeLinear", graph.input(*shape), outputs=3)
        results = []
        for _ in range(products):
            weight = graph.constant(graph.random.integers(-127, 128, (64, 32)).astype(np.int8))
            product = graph.op("MatMulInteger", codes, weight, zero_point)
            scales = graph.op("Mul", scale, graph.constant(np.full(32, 0.01, np.float32)))
            scaled = graph.op("Mul", graph.op("Cast", product, to=1), scales)
            results.append(graph.op("Add", scaled, _float_weight(graph, 32)))
        return graph.op("Concat", *results, axis=-1) if products > 1 else results[0]

    return build


def _dynamic_between_quantizers(graph):
    codes, scale, zero_point = graph.op("DynamicQuantizeLinear", graph.input("n", 64), outputs=3)
    weight, _ = graph.weight(64, 32, axis=1)
    product = graph.op("MatMul", graph.op("DequantizeLinear", codes, scale, zero_point), weight)
    return graph.op("Add", product, _float_weight(graph, 32))


def _dynamic_convolution(graph):
    codes, scale, zero_point = graph.op("DynamicQuantizeLinear", graph.input(*IMAGE), outputs=3)
    weight = graph.constant(graph.random.integers(-127, 128, (8, 16, 3, 3)).astype(np.int8))
    sums = graph.op("Cast", graph.op("ConvInteger", codes, weight, zero_point), to=1)
    return graph.op("Mul", sums, graph.op("Mul", scale, graph.constant(np.full((8, 1, 1), 0.01, np.float32))))


def _blocks(graph, *shape, axis):
    """DequantizeLinear of 4-bit weights in blocks of 16."""
    codes = graph.constant(graph.random.integers(-8, 8, shape).astype(ml_dtypes.int4))
    sizes = [size // 16 if at == axis else size for at, size in enumerate(shape)]
    scale = graph.constant(graph.random.uniform(0.01, 0.1, sizes).astype(np.float32))
    return graph.op("DequantizeLinear", codes, scale, axis=axis, block_size=16)


def _weights_only(graph):
    weight, _ = graph.weight(64, 32, axis=1)
    return graph.op("MatMul", graph.input("n", 4, 64), weight)


def _weights_in_blocks(graph):
    product = graph.op("MatMul", graph.input("n", 4, 64), _blocks(graph, 64, 32, axis=0))
    return graph.op("Add", product, _float_weight(graph, 32))


def _weights_in_blocks_by_gemm(graph):
    return graph.op("Gemm", graph.input("n", 64), _blocks(graph, 64, 32, axis=0), _float_weight(graph, 32))


def _turned_blocks(graph):
    weight = graph.op("Transpose", _blocks(graph, 32, 64, axis=1), perm=[1, 0])
    return graph.op("MatMul", graph.input("n", 4, 64), weight)


def _turned_by_gemm(graph):
    weight, _ = graph.weight(32, 64)
    return graph.op("Gemm", graph.input("n", 64), weight, transB=1)


def _weights_only_convolution(graph):
    weight, _ = graph.weight(16, 16, 3, 3)
    return graph.op("Conv", graph.input(*IMAGE), weight)


def _row_of_a_dequantized_table(graph):
    weight, _ = graph.weight(32, 16)
    return graph.op("Gather", weight, graph.input("n", dtype=TensorProto.INT64))


MATRIX_PRODUCTS = {
    "Gemm, int32 bias, Q": (lambda g: g.q(_gemm(g, "int32")), "QGemm"),
    "Gemm, float bias, Q": (lambda g: g.q(_gemm(g, "float")), "QGemm"),
    "Gemm, int32 bias": (lambda g: _gemm(g, "int32"), "QGemm"),
    "Gemm, no bias": (lambda g: _gemm(g, None), "QGemm"),
    "Gemm, float bias": (lambda g: _gemm(g, "float"), "Gemm"),
    "Gemm, Relu, Q": (lambda g: g.q(g.op("Relu", _gemm(g, "int32")), zero_point=0), "QGemm"),
    "MatMul 2-D": (lambda g: _matmul(g, "n", 64), "MatMulIntegerToFloat"),
    "MatMul 3-D": (lambda g: _matmul(g, "n", 4, 64), "MatMulIntegerToFloat"),
    "MatMul 3-D, Q": (lambda g: g.q(_matmul(g, "n", 4, 64)), "QLinearMatMul"),
    "MatMul of a transposed weight": (_transposed_matmul, "MatMulIntegerToFloat"),
    "MatMul 2-D, float bias": (lambda g: _matmul(g, 4, 64, bias=(32,)), "Gemm"),
    "MatMul 3-D, float bias, free batch": (lambda g: _matmul(g, "n", 4, 64, bias=(32,)), "MatMulIntegerToFloat Add"),
    "MatMul 3-D, float bias, fixed axes": (lambda g: _matmul(g, 2, 4, 64, bias=(32,)), "Gemm"),
    "MatMul 3-D, bias (1, 1, n), fixed axes": (
        lambda g: _matmul(g, 2, 4, 64, bias=(1, 1, 32)), "MatMulIntegerToFloat Add",
    ),
    "Gemm between Reshapes, int32 bias": (_reshaped_gemm, "QGemm"),
    "two activations": (_attention, "MatMulIntegerToFloat Softmax MatMulIntegerToFloat"),
    "dynamic, free axes": (_dynamic("n", 4, 64), "DynamicQuantizeMatMul"),
    "dynamic, fixed axes": (_dynamic(2, 4, 64), "DynamicQuantizeMatMul"),
    "dynamic, two axes": (_dynamic("n", 64), "DynamicQuantizeMatMul"),
    "dynamic, three readers": (
        _dynamic("n", 4, 64, products=3), "DynamicQuantizeLinear Concat" + 3 * " MatMulIntegerToFloat",
    ),
    "dynamic between quantizers, two axes": (_dynamic_between_quantizers, "DynamicQuantizeLinear Gemm"),
    "dynamic convolution": (_dynamic_convolution, "DynamicQuantizeLinear ConvInteger Cast Mul Mul"),
    "weights only": (_weights_only, "MatMulNBits"),
    "weights in blocks": (_weights_in_blocks, "MatMulNBits"),
    "weights in blocks, Gemm": (_weights_in_blocks_by_gemm, "MatMulNBits"),
    "weights in blocks, transposed": (_turned_blocks, "FusedMatMul"),
    "weights only, transposed by Gemm": (_turned_by_gemm, "Gemm"),
    "weights only, convolution": (_weights_only_convolution, "Conv"),
    "a row of a dequantized table": (_row_of_a_dequantized_table, "Gather"),
}  # fmt: skip


@on_x86
@pytest.mark.parametrize(("build", "expected"), [
    pytest.param(*case, id=name)
    for table in (CONVOLUTIONS, OTHERS, MATRIX_PRODUCTS)
    for name, case in table.items()
])  # fmt: skip
def test_patterns_run_as_the_table_says(build, expected):
    graph = Graph()
    kernels = count_kernels(graph.bytes(build(graph))).kernels
    computing = {name: number for name, number in kernels.items() if name not in FLOAT_OUTSIDE}
    wanted = expected.split()
    assert computing == {name: wanted.count(name) for name in wanted}


MOVES = {
    "Reshape": ([np.array([0, 16, 64])], {}),
    "Flatten": ([], {}),
    "Transpose": ([], {"perm": [0, 2, 3, 1]}),
    "Squeeze": ([np.array([0])], {}),
    "Unsqueeze": ([np.array([0])], {}),
    "Slice": ([np.array([0]), np.array([4]), np.array([1])], {}),
    "Gather": ([np.array([1, 2])], {"axis": 1}),
    "Expand": ([np.array([2, 16, 8, 8])], {}),
    "Tile": ([np.array([1, 2, 1, 1])], {}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "MaxPool": ([], HALVES),
}


@on_x86
@pytest.mark.parametrize("kind", MOVES)
def test_operators_that_move_codes_run_between_one_quantizer_and_one_dequantizer(kind):
    more, attributes = MOVES[kind]
    graph = Graph()
    x = graph.q(graph.input(1, 16, 8, 8))
    count = count_kernels(graph.bytes(graph.q(graph.op(kind, x, *map(graph.constant, more), **attributes))))
    assert (count.quantize_nodes, count.dequantize_nodes) == (1, 1)


@on_x86
@pytest.mark.parametrize(("build", "borders"), [
    (_resize("nearest"), 1),
    (_resize("linear"), 2),
    (_kept("MaxPool", scale=0.04, **HALVES), 2),  # another scale: a requantization in float
], ids=["Resize nearest", "Resize linear", "MaxPool to another scale"])  # fmt: skip
def test_quantizers_that_remain_show_what_ran_in_float(build, borders):
    graph = Graph()
    assert count_kernels(graph.bytes(build(graph))).quantize_nodes == borders


@on_x86
def test_integer_activations_with_a_sign_fail_behind_a_reshape_at_opset_21():
    # When this fails, a newer ONNX Runtime has repaired it, and docs/onnxruntime.md can say so.
    graph = Graph(activation=np.int8)
    with pytest.raises(ModelLoadError, match="output_dtype INT8 does not match"):
        count_kernels(graph.bytes(_reshaped_gemm(graph)))


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_quantized_linear_layers_are_integer_kernels_whatever_the_number_of_axes(axes, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    x = torch.randn((4, 3, 2, 16)[4 - axes :])
    quantized = quantize(capture(module, x[:1]), calibration=[x])
    export_onnx(quantized, tmp_path / "model.onnx")
    count = count_kernels(tmp_path / "model.onnx")
    assert count.kernels["QGemm"] == 2
    assert count.float_layers == ()
