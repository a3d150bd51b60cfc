"""ONNX Runtime's own operators (domain com.microsoft), and the models that it writes, against ONNX Runtime itself."""

import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.onnx.read import parse_model
from slimgraph.importers.onnx.table import steps_of
from slimgraph.importers.steps import Interpreted
from slimgraph.program.check import check
from slimgraph.program.qdq import is_quantized

MICROSOFT = "com.microsoft"


def rand(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def ints(*shape, low=0, high=256, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def f(value):
    return np.array(value, np.float32)


def u(value, dtype=np.uint8):
    return np.array(value, dtype)


def model_of(kind, inputs, outputs, attributes, *, domain=MICROSOFT, given=1):
    """One operator; its first `given` inputs are the model's, the others constants, and None is left out."""
    names = ["" if array is None else f"in{index}" for index, array in enumerate(inputs)]
    results = [f"out{index}" if wanted else "" for index, wanted in enumerate(outputs)]
    node = helper.make_node(kind, names, results, name="node", domain=domain, **attributes)

    def spec(name, array):
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    pairs = [(name, array) for name, array in zip(names, inputs, strict=True) if name]
    graph = helper.make_graph(
        [node],
        "g",
        [spec(name, array) for name, array in pairs[:given]],
        [helper.make_empty_tensor_value_info(name) for name in results if name],
        [numpy_helper.from_array(array, name) for name, array in pairs[given:]],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), dict(pairs[:given])


def session(model):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def imported(model, inputs):
    """Outputs of the operator, computed while importing."""
    graph = parse_model(model, folder=None).graph
    module = Interpreted(
        steps_of(graph, {"": 17, MICROSOFT: 1}),
        [value.name for value in graph.inputs],
        [value.name for value in graph.outputs],
        graph.tensors,
    )
    with torch.no_grad():
        return [value.numpy() for value in module(*(torch.from_numpy(inputs[v.name]) for v in graph.inputs)).values()]


def assert_same(found, expected, quanta=1):
    """Floats to 1e-5; codes to one quantum, since ONNX Runtime rounds at other places."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= quanta


def judge(kind, inputs, outputs=(1,), *, domain=MICROSOFT, given=1, **attributes):
    model, fed = model_of(kind, inputs, outputs, attributes, domain=domain, given=given)
    for found, expected in zip(imported(model, fed), session(model.SerializeToString()).run(None, fed), strict=True):
        assert_same(found, expected)


IMAGE, KERNEL = rand(2, 4, 9, 8), rand(6, 4, 3, 3, seed=1)


@pytest.mark.parametrize(
    ("activation", "numbers"),
    [
        ("Relu", []),
        ("Tanh", []),
        ("Sigmoid", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [0.0, 6.0]),
        ("Clip", [-1.0, 0.5]),
        ("HardSigmoid", [0.3, 0.4]),
    ],
)
def test_convolutions_with_an_activation(activation, numbers):
    parameters = {"activation_params": numbers} if numbers else {}
    judge("FusedConv", [IMAGE, KERNEL, rand(6)], activation=activation, pads=[1, 1, 1, 1], **parameters)


def test_convolutions_with_a_sum_inside_add_before_they_activate():
    judge("FusedConv", [IMAGE, KERNEL, rand(6), rand(2, 6, 7, 6, seed=3)], activation="Relu")


A, B = rand(2, 3, 4, 5), rand(2, 3, 5, 6, seed=1)


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"),
    [
        ("FusedGemm", [rand(4, 5), rand(5, 6), rand(6)], {"activation": "LeakyRelu", "activation_alpha": 0.1}),
        ("FusedGemm", [rand(4, 5), rand(6, 5), rand(4, 6)], {"activation": "Relu", "transB": 1, "beta": 0.5}),
        ("FusedMatMul", [A, B], {"alpha": 0.3}),
        ("FusedMatMul", [A, rand(2, 3, 6, 5)], {"transB": 1, "alpha": 0.3}),
        ("FusedMatMul", [rand(2, 3, 5, 4), B], {"transA": 1}),
        ("FusedMatMul", [rand(4, 2, 3, 5), B], {"transBatchA": 1}),
        ("FusedMatMul", [rand(5, 2, 3, 4), B], {"transBatchA": 1, "transA": 1}),
        ("FusedMatMul", [A, rand(6, 2, 3, 5)], {"transBatchB": 1, "transB": 1}),
        ("TransposeMatMul", [A, B], {"alpha": 0.3}),
        ("Gelu", [A], {}),
        ("BiasGelu", [A, rand(5)], {}),
        ("FastGelu", [A], {}),
        ("FastGelu", [A, rand(5)], {}),
        ("QuickGelu", [A], {"alpha": 1.5}),
        ("QuickGelu", [A], {}),
        ("Inverse", [rand(3, 4, 4)], {}),
        ("ExpandDims", [A, u(1, np.int32)], {}),
        ("Trilu", [A], {"upper": 0}),
        ("Trilu", [A, u(1, np.int64)], {}),
        ("GatherND", [A, np.array([[0, 1], [1, 2]], np.int64)], {}),
        ("GridSample", [IMAGE, rand(2, 5, 6, 2, scale=0.7)], {"align_corners": 1}),
        ("Pad", [A, np.array([0, 1, 2, 0, 1, 0, 0, 3], np.int64), f(0.5)], {"mode": "constant"}),
    ],
)  # fmt: skip
def test_products_activations_and_movements(kind, inputs, attributes):
    judge(kind, inputs, **attributes)


X, SKIP, SCALE, SHIFT = rand(2, 7, 16), rand(2, 7, 16, seed=1), rand(16, seed=2) + 1, rand(16, seed=3)


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "attributes"),
    [
        ("SkipLayerNormalization", [X, SKIP, SCALE, SHIFT], [1], {"epsilon": 1e-5}),
        ("SkipLayerNormalization", [X, SKIP, SCALE, SHIFT, rand(16, seed=4)], [1, 0, 0, 1], {"epsilon": 1e-5}),
        ("SkipLayerNormalization", [X, SKIP[:1], SCALE], [1], {"epsilon": 1e-3}),
        ("SkipSimplifiedLayerNormalization", [X, SKIP, SCALE], [1, 0, 0, 1], {"epsilon": 1e-5}),
        ("SkipSimplifiedLayerNormalization", [X, SKIP, SCALE, rand(16, seed=4)], [1], {"epsilon": 1e-5}),
    ],
)
def test_norms_of_sums(kind, inputs, outputs, attributes):
    judge(kind, inputs, outputs, **attributes)


def test_the_norm_by_root_mean_square_stands_in_onnxs_own_domain():
    judge("SimplifiedLayerNormalization", [X, SCALE], domain="", epsilon=1e-5)


TABLES = [rand(11, 16), rand(9, 16, seed=1), rand(2, 16, seed=2), SCALE, SHIFT]
WORDS, SEGMENTS = ints(2, 7, high=11, dtype=np.int32), ints(2, 7, high=2, dtype=np.int32)
LEFT = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]], np.int32)


@pytest.mark.parametrize(
    "inputs",
    [
        [WORDS, SEGMENTS, *TABLES, LEFT],
        [WORDS, SEGMENTS, *TABLES],
        [WORDS, None, TABLES[0], TABLES[1], None, SCALE, SHIFT, LEFT, ints(2, 7, high=9, dtype=np.int32)],
    ],
)
def test_embeddings_of_a_bert(inputs):
    judge("EmbedLayerNormalization", inputs, [1, 1, 1], epsilon=1e-5)


def test_group_norm_is_pytorchs_with_the_channels_last():
    x = rand(2, 5, 6, 8)
    model, fed = model_of("GroupNorm", [x, SCALE[:8], SHIFT[:8]], [1], {"groups": 4, "activation": 1, "epsilon": 1e-5})
    scale, shift = torch.from_numpy(SCALE[:8]), torch.from_numpy(SHIFT[:8])
    expected = nn.functional.group_norm(torch.from_numpy(x).permute(0, 3, 1, 2), 4, scale, shift, 1e-5)
    assert_same(imported(model, fed)[0], nn.functional.silu(expected).permute(0, 2, 3, 1).numpy())
    skip = rand(2, 8)
    inputs = [x, SCALE[:8], SHIFT[:8], skip]
    model, fed = model_of("SkipGroupNorm", inputs, [1, 1], {"groups": 4, "activation": 0})
    total = x + skip[:, None, None, :]
    expected = nn.functional.group_norm(torch.from_numpy(total).permute(0, 3, 1, 2), 4, scale, shift, 1e-5)
    found = imported(model, fed)
    assert_same(found[0], expected.permute(0, 2, 3, 1).numpy())
    assert_same(found[1], total)


def test_half_the_channels_gate_the_other_half():
    x, bias = rand(2, 5, 16), rand(16)
    model, fed = model_of("BiasSplitGelu", [x, bias], [1], {})
    left, right = torch.from_numpy(x + bias).chunk(2, -1)
    assert_same(imported(model, fed)[0], (left * nn.functional.gelu(right)).numpy())
    skip = rand(2, 5, 16, seed=5)
    model, fed = model_of("BiasAdd", [x, bias, skip], [1], {})
    assert_same(imported(model, fed)[0], x + bias + skip)


def test_the_softmax_of_a_sum_broadcasts_as_it_says():
    x, bias = rand(4, 3, 5), rand(3, 5)
    model, fed = model_of("BiasSoftmax", [x, bias], [1], {"axis": 2, "is_inner_broadcast": 0})
    assert_same(imported(model, fed)[0], torch.softmax(torch.from_numpy(x + bias), -1).numpy())


def test_fourier_transforms_there_and_back():
    x = rand(2, 3, 16)
    model, fed = model_of("Rfft", [x], [1], {"signal_ndim": 1, "onesided": 1, "normalized": 0})
    (spectrum,) = imported(model, fed)
    expected = np.fft.rfft(x)
    assert_same(spectrum, np.stack([expected.real, expected.imag], -1).astype(np.float32))
    model, fed = model_of("Irfft", [spectrum], [1], {"signal_ndim": 1, "onesided": 1, "normalized": 0})
    assert_same(imported(model, fed)[0], x)


# Attention

WEIGHT, BIAS = rand(16, 48, seed=4, scale=0.3), rand(48, seed=5)


@pytest.mark.parametrize(
    ("mask", "past", "added", "attributes"),
    [
        (None, None, None, {}),
        (None, None, None, {"unidirectional": 1, "scale": 0.2}),
        (LEFT, None, None, {}),
        (LEFT, None, None, {"unidirectional": 1}),
        (np.array([5, 2], np.int32), None, None, {}),
        (np.array([5, 6, 1, 2], np.int32), None, None, {}),
        (np.tril(np.ones((2, 7, 7), np.int32)), None, None, {}),
        (None, None, rand(1, 4, 7, 7), {}),
        (LEFT, None, rand(2, 4, 7, 7), {"mask_filter_value": -3.0}),
        (None, rand(2, 2, 4, 3, 4), None, {"unidirectional": 1}),
    ],
)
def test_attention_with_its_projection(mask, past, added, attributes):
    inputs = [X, WEIGHT, BIAS, mask, past, added]
    outputs = [1] if past is None else [1, 1]
    judge("Attention", inputs, outputs, num_heads=4, **attributes)


def test_attention_whose_values_are_wider():
    weight, bias = rand(16, 56, seed=4, scale=0.3), rand(56, seed=5)
    judge("Attention", [X, weight, bias], num_heads=4, qkv_hidden_sizes=[16, 16, 24])


Q, K, V = rand(2, 7, 16), rand(2, 5, 16, seed=1), rand(2, 5, 24, seed=2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes"),
    [
        ([Q, K, V], [1], {}),
        ([Q, K, V, rand(56)], [1, 1, 1], {"scale": 0.3}),
        ([Q, K, V, None, np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int32)], [1], {}),
        ([Q, K, V, None, None, rand(2, 4, 7, 5)], [1], {}),
        ([Q, rand(2, 4, 5, 4), rand(2, 4, 5, 4, seed=1)], [1], {}),
        ([Q, Q, X], [1], {"unidirectional": 1}),
        ([Q, Q, X, None, None, None, rand(2, 4, 3, 4), rand(2, 4, 3, 4, seed=9)], [1, 1, 1], {"unidirectional": 1}),
    ],
)
def test_attention_of_many_heads(inputs, outputs, attributes):
    judge("MultiHeadAttention", inputs, outputs, num_heads=4, **attributes)


def test_packed_heads_are_those_of_separate_tensors():
    q, k, v = (rand(2, 7, 4, 6, seed=seed) for seed in range(3))
    separate = [x.reshape(2, 7, 24) for x in (q, k, v)]
    forms = [separate, [np.stack([q, k, v], 3)], [separate[0], np.stack([k, v], 3)]]
    results = []
    for inputs in forms:
        model, fed = model_of("MultiHeadAttention", inputs, [1], {"num_heads": 4})
        results.append(imported(model, fed)[0])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


COS, SIN = np.cos(rand(20, 4)), np.sin(rand(20, 4))
LENGTHS, LONGEST = np.array([6, 6], np.int32), u(7, np.int32)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        ([rand(2, 7, 32), rand(2, 7, 16), rand(2, 7, 16)], {}),
        ([rand(2, 7, 64)], {}),
        ([rand(2, 7, 64)], {"local_window_size": 3, "scale": 0.3}),
        ([rand(2, 7, 128)], {"do_rotary": 1}),
        ([rand(2, 7, 128)], {"do_rotary": 1, "rotary_interleaved": 1}),
    ],
)
def test_attention_of_grouped_queries_to_a_whole_sequence(inputs, attributes):
    inputs = [*inputs, *[None] * (5 - len(inputs)), LENGTHS, LONGEST]
    if attributes.get("do_rotary"):
        inputs += [np.cos(rand(20, 8)), np.sin(rand(20, 8))]
    judge("GroupQueryAttention", inputs, [1, 1, 1], num_heads=4, kv_num_heads=2, **attributes)


def test_a_cache_of_keys_and_values_is_refused_with_what_to_do():
    cache = rand(2, 2, 3, 8)
    model, fed = model_of(
        "GroupQueryAttention", [rand(2, 1, 64), None, None, cache, cache, LENGTHS, LONGEST], [1, 1, 1],
        {"num_heads": 4, "kv_num_heads": 2},
    )  # fmt: skip
    with pytest.raises(ModelImportError, match=r"GroupQueryAttention.*'node'.*cache.*without past"):
        imported(model, fed)


@pytest.mark.parametrize(
    ("x", "positions", "attributes"),
    [
        (rand(2, 7, 24), ints(2, 7, high=20, dtype=np.int64), {}),
        (rand(2, 7, 24), np.array([3], np.int64), {"interleaved": 1}),
        (rand(2, 3, 7, 8), np.array([0], np.int64), {}),
        (rand(2, 3, 7, 12), ints(2, 7, high=20, dtype=np.int64), {"rotary_embedding_dim": 8, "num_heads": 3}),
    ],
)
def test_rotary_positions(x, positions, attributes):
    judge("RotaryEmbedding", [x, positions, COS, SIN], **attributes)


# Quantized operators

CODES = ints(2, 4, 8, 8)
SMALL = ints(8, 5, dtype=np.int8)
ON = [f(0.02), u(120)]
TO = [f(0.03), u(131)]


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"),
    [
        ("QLinearAdd", [CODES, *ON, ints(4, 1, 1, seed=1), f(0.01), u(7), *TO], {}),
        ("QLinearMul", [CODES, *ON, ints(2, 4, 8, 8, seed=1), f(0.01), u(7), *TO], {}),
        ("QLinearSigmoid", [CODES, *ON, f(1 / 256), u(0)], {}),
        ("QLinearLeakyRelu", [CODES, *ON, *TO], {"alpha": 0.2}),
        ("QLinearSoftmax", [CODES, *ON, f(1 / 256), u(0)], {"axis": -1, "opset": 13}),
        ("QLinearSoftmax", [CODES, *ON, f(1 / 256), u(0)], {"axis": 2, "opset": 11}),
        ("QLinearGlobalAveragePool", [CODES, *ON, *TO], {}),
        ("QLinearGlobalAveragePool", [CODES, *ON, *TO], {"channels_last": 1}),
        ("QLinearAveragePool", [CODES, *ON, *TO], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("QLinearAveragePool", [CODES, *ON, *TO], {"kernel_shape": [2, 2], "strides": [2, 2], "channels_last": 1}),
        ("QLinearConcat", [*TO, CODES, *ON, CODES, f(0.05), u(3)], {"axis": 1}),
        ("QGemm", [ints(3, 8), *ON, SMALL, f(0.01), u(3, np.int8), None, *TO], {}),
        ("QGemm", [ints(3, 8), *ON, ints(5, 8), f(0.01), u(100), ints(5, dtype=np.int32)], {"transB": 1}),
        ("MatMulIntegerToFloat", [ints(3, 8), ints(8, 5), f(0.02), f(0.01), u(120), u(100), rand(5)], {}),
        ("MatMulIntegerToFloat", [ints(3, 8), ints(8, 5, dtype=np.int8), f(0.02), np.abs(rand(5)), u(120)], {}),
        ("DynamicQuantizeMatMul", [rand(2, 3, 8), SMALL, np.abs(rand(5)), SMALL[0], rand(5)], {}),
        ("QuantizeLinear", [rand(2, 4), f(0.1), u(3, np.uint16)], {}),
        ("DequantizeLinear", [ints(2, 4, dtype=np.int16, high=30000), f(0.1), u(3, np.int16)], {}),
        ("QLinearConv", [ints(2, 8, 9, 4), *ON, ints(6, 4, 3, 3), f(0.01), u(128), *TO, ints(6, dtype=np.int32)],
                        {"channels_last": 1, "pads": [1, 1, 1, 1]}),
        ("NhwcMaxPool", [ints(2, 8, 9, 4)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ],
)  # fmt: skip
def test_quantized_operators(kind, inputs, attributes):
    judge(kind, inputs, **attributes)


def test_quantized_choice():
    choice = ints(2, 4, high=2).astype(bool)
    judge("QLinearWhere", [choice, ints(2, 4), *ON, ints(2, 4, seed=1), f(0.01), u(7), *TO])


def test_quantized_attention():
    x, weight = ints(2, 7, 16), ints(16, 48, dtype=np.int8)
    for scale, zeros in ((f(0.01), u(0, np.int8)), (np.abs(rand(48, scale=0.01)), ints(48, high=1, dtype=np.int8))):
        inputs = [x, weight, rand(48), f(0.02), scale, np.array([5, 2], np.int32), u(120), zeros]
        judge("QAttention", inputs, num_heads=4)


def test_quantized_embeddings():
    tables = [ints(11, 16), ints(9, 16), ints(2, 16), ints(16), ints(16)]
    scales, zeros = [f(0.01 * k) for k in range(1, 6)], [u(10 * k) for k in range(1, 6)]
    judge("QEmbedLayerNormalization", [WORDS, SEGMENTS, *tables, LEFT, *scales, *zeros], [1, 1], epsilon=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["none", "codes", "floats"])
@pytest.mark.parametrize("inputs", [64, 40])
def test_weights_of_few_bits_in_blocks(bits, zeros, inputs):
    if (bits, zeros) == (8, "floats"):
        pytest.skip("ONNX Runtime does not compute it")
    outputs, block = 6, 16
    blocks = -(-inputs // block)
    packed, scales = ints(outputs, blocks, block * bits // 8), np.abs(rand(outputs, blocks))
    codes = {
        "none": None,
        "codes": ints(outputs, -(-blocks * bits // 8), seed=2),
        "floats": rand(outputs, blocks, seed=2) + 2 ** (bits - 1),
    }[zeros]
    attributes = {"N": outputs, "K": inputs, "bits": bits, "block_size": block}
    judge("MatMulNBits", [rand(3, inputs, scale=0.1), packed, scales, codes, None, rand(outputs)], **attributes)


# Whole models


def file_of(model, tmp_path, batch=False):
    if batch:
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def judge_file(path, inputs, tmp_path, tolerance=1e-5):
    """The program of a file: valid, with a free batch, and like ONNX Runtime, also after it was written again."""
    program = import_onnx(path)
    check(program)
    assert program.signature.inputs[0].shape[0] == "batch", program.history
    runtime = session(str(path))
    for samples in (1, 2, 7):
        fed = {name: make(samples) for name, make in inputs.items()}
        expected = runtime.run(None, fed)
        with torch.no_grad():
            found = program(**{name: torch.from_numpy(array) for name, array in fed.items()})
        found = list(found.values()) if isinstance(found, dict) else [found]
        for got, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(got.numpy(), wanted, rtol=tolerance, atol=tolerance)
    export_onnx(program, tmp_path / "back.onnx")
    for got, wanted in zip(session(str(tmp_path / "back.onnx")).run(None, fed), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)
    return program


def test_lengths_of_samples_that_come_as_a_second_input(tmp_path):
    model, _ = model_of("Attention", [X, np.array([5, 2], np.int32), WEIGHT, BIAS], [1], {"num_heads": 4}, given=2)
    del model.graph.node[0].input[:]
    model.graph.node[0].input.extend(["in0", "in2", "in3", "in1"])
    inputs = {"in0": lambda n: rand(n, 7, 16, seed=n), "in1": lambda n: ints(n, low=1, high=8, dtype=np.int32, seed=n)}
    judge_file(file_of(model, tmp_path, batch=True), inputs, tmp_path)


def test_few_bits_stay_integers_in_the_program(tmp_path):
    packed, scales = ints(6, 4, 8), np.abs(rand(6, 4))
    attributes = {"N": 6, "K": 64, "bits": 4, "block_size": 16}
    model, _ = model_of("MatMulNBits", [rand(2, 64), packed, scales, ints(6, 2)], [1], attributes)
    program = judge_file(file_of(model, tmp_path, batch=True), {"in0": lambda n: rand(n, 64, seed=n)}, tmp_path, 1e-4)
    assert is_quantized(program.graph)
    stored = program.state_dict()["in1"]
    first = packed.reshape(-1)[0]
    assert stored.dtype == torch.uint8
    assert stored.shape == (24, 16)
    assert stored[0, :2].tolist() == [first & 15, first >> 4]


def test_gradients_reach_the_parameters_of_fused_operators(tmp_path):
    model, _ = model_of("Attention", [X, WEIGHT, BIAS, None], [1], {"num_heads": 4})
    program = judge_file(file_of(model, tmp_path, batch=True), {"in0": lambda n: rand(n, 7, 16, seed=n)}, tmp_path)
    program.train()
    program(torch.from_numpy(X)).square().sum().backward()
    assert {name for name, p in program.named_parameters() if p.grad is not None} == {"in1", "in2"}
    assert any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        y = self.first(x).relu()
        y = (y + self.second(y)).relu()
        return self.last(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)).relu()


class Encoder(nn.Module):
    """One layer of a BERT, its attention spelled out."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.words, self.places = nn.Embedding(11, width), nn.Embedding(9, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow, self.heads = nn.Linear(width, 32), nn.Linear(32, width), heads

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, ids, mask):
        x = self.norms[0](self.words(ids) + self.places(torch.arange(ids.shape[1])))
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-1, -2) / 2.0 + (1.0 - mask[:, None, None, :].float()) * -10000.0
        y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(x.shape)
        x = self.norms[1](self.out(y) + x)
        return self.norms[2](self.narrow(nn.functional.gelu(self.wide(x))) + x)


def optimized(module, example, names, tmp_path, level):
    """What ONNX Runtime makes of a network, in a file, and which of its own operators are in it."""
    torch.manual_seed(0)
    plain, path = tmp_path / "plain.onnx", tmp_path / "optimized.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter's, about itself
        torch.onnx.export(
            module.eval(), example, str(plain), dynamo=False, opset_version=14, input_names=names,
            output_names=["y"], dynamic_axes={name: {0: "batch"} for name in names},
        )  # fmt: skip
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    return path, {node.op_type for node in onnx.load(path).graph.node if node.domain == MICROSOFT}


EXTENDED = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


def test_networks_of_images_that_onnx_runtime_optimized(tmp_path):
    path, used = optimized(Images(), (torch.randn(2, 3, 8, 8),), ["x"], tmp_path, EXTENDED)
    assert {"FusedConv", "FusedGemm"} <= used
    judge_file(path, {"x": lambda n: rand(n, 3, 8, 8, seed=n)}, tmp_path)


@pytest.mark.parametrize("level", [EXTENDED, ort.GraphOptimizationLevel.ORT_ENABLE_ALL])
def test_encoders_that_onnx_runtime_optimized(tmp_path, level):
    example = (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64))
    path, used = optimized(Encoder(), example, ["ids", "mask"], tmp_path, level)
    assert "SkipLayerNormalization" in used
    inputs = {
        "ids": lambda n: ints(n, 7, high=11, dtype=np.int64, seed=n),
        "mask": lambda n: np.sort(ints(n, 7, high=2, dtype=np.int64, seed=n))[:, ::-1].copy() | (np.arange(7) == 0),
    }
    judge_file(path, inputs, tmp_path)


def test_the_layout_of_one_processor_is_refused_with_what_to_do(tmp_path):
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain="com.microsoft.nchwc")
    value = [helper.make_tensor_value_info(name, 1, [1, 8, 4, 4]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft.nchwc", 1)]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=opsets, ir_version=8)
    with pytest.raises(ModelImportError, match=r"one processor.*ORT_ENABLE_EXTENDED"):
        import_onnx(file_of(model, tmp_path))


class Calibration(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": rand(4, 3, 8, 8, seed=seed)} for seed in range(3)])

    def get_next(self):
        return next(self.batches, None)


@pytest.mark.parametrize("activation", [QuantType.QUInt8, QuantType.QInt8])
def test_networks_of_integer_operators_keep_their_integers(tmp_path, activation):
    _, _ = optimized(Images(), (torch.randn(2, 3, 8, 8),), ["x"], tmp_path, EXTENDED)
    path = tmp_path / "q.onnx"
    quantize_static(
        tmp_path / "plain.onnx", path, Calibration(), quant_format=QuantFormat.QOperator, per_channel=True,
        activation_type=activation, weight_type=QuantType.QInt8,
    )  # fmt: skip
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QLinearConv", "QLinearAdd"} <= kinds
    last = onnx.load(path).graph.node[-1]
    assert last.op_type == "DequantizeLinear"
    scale = {t.name: t for t in onnx.load(path).graph.initializer}[last.input[1]]
    program = judge_file(
        path, {"x": lambda n: rand(n, 3, 8, 8, seed=n)}, tmp_path, 2 * numpy_helper.to_array(scale).item()
    )
    stored = program.state_dict()
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith("weight_quantized"):
            assert np.array_equal(stored[tensor.name].numpy(), numpy_helper.to_array(tensor))
