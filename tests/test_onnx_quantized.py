"""Quantized ONNX models become quantized programs: the integers of the file, and what ONNX Runtime computes of them."""

import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import nn

from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.program.check import check
from slimgraph.program.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS, QUANTIZE, is_quantized

RNG = np.random.default_rng(0)


def write(path, nodes, inputs, outputs, tensors, *, opset=21, **domains):
    """A model; inputs and outputs are (name, type, shape), tensors (name, array) or tensor protos."""
    stored = [t if isinstance(t, onnx.TensorProto) else numpy_helper.from_array(t[1], t[0]) for t in tensors]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*spec) for spec in inputs],
        [helper.make_tensor_value_info(*spec) for spec in outputs],
        stored,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*item) for item in domains.items())]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def session(path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(program, x):
    with torch.no_grad():
        return program(torch.from_numpy(x)).numpy()


def assert_within_one_quantum(found, expected, quantum=1.0):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() <= quantum * (1 + 1e-3)


def nodes_of(program, target):
    return [node for node in program.graph.nodes if node.target is target]


def test_a_pair_becomes_the_operators_of_the_library_with_plain_numbers(tmp_path):
    path = write(
        tmp_path / "m.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", 4])],
        [("y", TensorProto.FLOAT, ["n", 4])],
        [("s", np.array(0.5, np.float32)), ("z", np.array(3, np.uint8))],
    )
    program = import_onnx(path)
    (quantizer,), (dequantizer,) = nodes_of(program, QUANTIZE), nodes_of(program, DEQUANTIZE)
    assert quantizer.args[1:] == (0.5, 3, 0, 255, torch.uint8)
    assert dequantizer.args[1:] == (0.5, 3, 0, 255, torch.uint8)
    # 1.25 is 2.5 steps: ties go to even. 1e6 and -9 are beyond the codes 255 and 0.
    assert run(program, np.array([[1.25, -0.4, 1e6, -9]], np.float32)).tolist() == [[1.0, -0.5, 126.0, -1.5]]
    check(program)


@pytest.mark.parametrize(
    ("kind", "codes"),
    [("INT4", (-8, 7)), ("UINT4", (0, 15)), ("UINT16", (0, 65535))],
)
def test_codes_have_the_range_of_the_files_type(tmp_path, kind, codes):
    number = TensorProto.DataType.Value(kind)
    path = write(
        tmp_path / "m.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", 64])],
        [("y", TensorProto.FLOAT, ["n", 64])],
        [("s", np.array(0.5, np.float32)), helper.make_tensor("z", number, [], [1])],
    )
    program = import_onnx(path)
    (quantizer,) = nodes_of(program, QUANTIZE)
    assert quantizer.args[3:5] == codes
    x = (RNG.standard_normal((3, 64)) * 20).astype(np.float32)
    assert_within_one_quantum(run(program, x), session(path).run(None, {"x": x})[0], 0.5)
    check(program)


def _dequantized_product(tmp_path, kind, shape, scales, zeros, **attributes):
    """x · DequantizeLinear(w): the weight's codes are random ones of the type."""
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128), "UINT8": (0, 256)}[kind]
    codes = RNG.integers(low, high, shape)
    number = TensorProto.DataType.Value(kind)
    tensors = [
        helper.make_tensor("w", number, shape, codes.flatten().tolist()),
        ("s", (RNG.random(scales) * 0.1 + 0.01).astype(np.float32)),
    ]
    if zeros:
        count = int(np.prod(scales))
        tensors.append(helper.make_tensor("z", number, scales, RNG.integers(low, high, count).tolist()))
    path = write(
        tmp_path / "m.onnx",
        [
            helper.make_node("DequantizeLinear", ["w", "s", "z"] if zeros else ["w", "s"], ["d"], **attributes),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", shape[0]])],
        [("y", TensorProto.FLOAT, ["n", shape[1]])],
        tensors,
    )
    return path, codes


@pytest.mark.parametrize(
    ("kind", "zeros", "scales", "attributes"),
    [
        ("INT4", False, [], {}),
        ("UINT8", True, [48], {"axis": 1}),
        ("INT8", False, [64], {"axis": -2}),
        ("INT4", True, [4, 48], {"axis": 0, "block_size": 16}),
        ("UINT4", True, [64, 3], {"axis": 1, "block_size": 16}),
    ],
)
def test_weights_stay_integers_under_their_name_in_every_granularity(tmp_path, kind, zeros, scales, attributes):
    path, codes = _dequantized_product(tmp_path, kind, [64, 48], scales, zeros, **attributes)
    program = import_onnx(path)
    assert is_quantized(program.graph)
    (target,) = [n for kind in (DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS) for n in nodes_of(program, kind)]
    assert (-8, 7) in (target.args[3:5], target.args[4:6]) or kind != "INT4"
    stored = dict(program.named_buffers())["w"]
    assert stored.dtype == (torch.int8 if kind.startswith("I") else torch.uint8)
    assert np.array_equal(stored.numpy(), codes)
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    expected = session(path).run(None, {"x": x})[0]
    np.testing.assert_allclose(run(program, x), expected, rtol=1e-5, atol=1e-4)
    check(program)
    export_onnx(program, tmp_path / "back.onnx")
    np.testing.assert_allclose(session(tmp_path / "back.onnx").run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-4)
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "back.onnx").graph.initializer}
    assert any(w.size == codes.size and np.array_equal(np.sort(w.astype(int).flatten()), np.sort(codes.flatten()))
               for w in written.values() if w.dtype.name == kind.lower())  # fmt: skip


def test_blocks_that_do_not_divide_the_axis_end_earlier(tmp_path):
    path, _ = _dequantized_product(tmp_path, "INT8", [40, 8], [3, 8], True, axis=0, block_size=16)
    w, s, z = (numpy_helper.to_array(t).astype(np.float32) for t in onnx.load(path).graph.initializer)
    x = RNG.standard_normal((3, 40)).astype(np.float32)
    real = (w - z.repeat(16, 0)[:40]) * s.repeat(16, 0)[:40]
    np.testing.assert_allclose(run(import_onnx(path), x), x @ real, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_float8_is_rounded_to_its_own_numbers(tmp_path, kind):
    path = write(
        tmp_path / "m.onnx",
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", 64])],
        [("y", TensorProto.FLOAT, ["n", 64])],
        [("s", np.array(0.3, np.float32)), helper.make_tensor("z", TensorProto.DataType.Value(kind), [], [0.0])],
    )
    x = (RNG.standard_normal((3, 64)) * np.geomspace(1e-3, 1e6, 64)).astype(np.float32)
    np.testing.assert_array_equal(run(import_onnx(path), x), session(path).run(None, {"x": x})[0])


def test_scales_that_are_computed_from_data_are_computed(tmp_path):
    path = write(
        tmp_path / "m.onnx",
        [
            helper.make_node("Abs", ["x"], ["a"]),
            helper.make_node("ReduceMax", ["a"], ["m"], keepdims=0),
            helper.make_node("Div", ["m", "top"], ["s"]),
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", 16])],
        [("y", TensorProto.FLOAT, ["n", 16])],
        [("top", np.array(127, np.float32)), ("z", np.array(0, np.int8))],
    )
    x = RNG.standard_normal((3, 16)).astype(np.float32)
    expected = session(path).run(None, {"x": x})[0]
    assert_within_one_quantum(run(import_onnx(path), x), expected, np.abs(x).max() / 127)


def _case(name, path):
    """One operator on stored weights, and what fits its input."""
    f, u8, i8, i32 = (lambda *v: np.array(v if len(v) > 1 else v[0], np.float32)), np.uint8, np.int8, np.int32
    weight = RNG.integers(-127, 128, (6, 4, 3, 3)).astype(i8)
    scale6 = (RNG.random(6) * 0.01 + 0.001).astype(np.float32)
    scales = [("xs", f(0.02)), ("xz", np.array(120, u8)), ("ys", f(0.05)), ("yz", np.array(131, u8))]
    image = [("x", TensorProto.UINT8, ["n", 4, 8, 8])]
    match name:
        case "QLinearConv":
            bias = RNG.integers(-2000, 2000, 6).astype(i32)
            tensors = [("w", weight), ("ws", scale6), ("wz", np.zeros(6, i8)), ("b", bias), *scales]
            names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
            node = helper.make_node(name, names, ["y"], pads=[1, 0, 1, 0], strides=[2, 1])
            return write(path, [node], image, [("y", TensorProto.UINT8, None)], tensors, opset=13), (4, 8, 8), 1
        case "ConvInteger":
            tensors = [("w", weight.view(u8)), ("xz", np.array(120, u8)), ("wz", np.array(128, u8))]
            node = helper.make_node(name, ["x", "w", "xz", "wz"], ["y"], pads=[1, 1, 1, 1])
            return write(path, [node], image, [("y", TensorProto.INT32, None)], tensors, opset=10), (4, 8, 8), 0
        case "MatMulInteger":
            zeros = RNG.integers(-20, 20, 12).astype(i8)
            tensors = [("w", RNG.integers(-127, 128, (16, 12)).astype(i8)), ("xz", np.array(120, u8)), ("wz", zeros)]
            node = helper.make_node(name, ["x", "w", "xz", "wz"], ["y"])
            given = [("x", TensorProto.UINT8, ["n", 16])]
            return write(path, [node], given, [("y", TensorProto.INT32, None)], tensors, opset=10), (16,), 0
        case "QLinearMatMul":
            column = (RNG.random(12) * 0.01 + 0.001).astype(np.float32)
            tensors = [("w", RNG.integers(-127, 128, (16, 12)).astype(i8)), ("ws", column), ("wz", np.zeros(12, i8))]
            node = helper.make_node(name, ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])
            given = [("x", TensorProto.UINT8, ["n", 5, 16])]
            return (
                write(path, [node], given, [("y", TensorProto.UINT8, None)], [*tensors, *scales], opset=10),
                (5, 16),
                1,
            )
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul"])
def test_integer_operators_compute_the_integers_of_onnx_runtime(tmp_path, name):
    path, shape, quanta = _case(name, tmp_path / "m.onnx")
    program = import_onnx(path)
    check(program)
    assert is_quantized(program.graph)
    weight = dict(program.named_buffers())["w"]
    assert weight.dtype in (torch.int8, torch.uint8)
    for samples in (1, 2, 7):
        x = RNG.integers(0, 256, (samples, *shape)).astype(np.uint8)
        assert_within_one_quantum(run(program, x), session(path).run(None, {"x": x})[0], quanta)
    export_onnx(program, tmp_path / "back.onnx")
    back = session(tmp_path / "back.onnx").run(None, {"x": x})[0]
    assert_within_one_quantum(back, session(path).run(None, {"x": x})[0], quanta)


def test_an_unknown_grid_for_weights_says_what_is_wrong(tmp_path):
    path = write(
        tmp_path / "m.onnx",
        [helper.make_node("DequantizeLinear", ["x", "s"], ["y"], axis=1)],
        [("x", TensorProto.INT8, ["n", 4])],
        [("y", TensorProto.FLOAT, ["n", 4])],
        [("s", np.ones(3, np.float32))],
    )
    with pytest.raises(ModelImportError, match=r"DequantizeLinear.*'y'.*3 scales.*4"):
        import_onnx(path)


# Models that ONNX Runtime's quantizer writes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=4)
        self.third, self.norm, self.last = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.Linear(32, 10)

    def forward(self, x):
        a = self.first(x).relu()
        y = a + self.norm(self.second(a)).relu()
        y = torch.cat([self.third(y), y * y.sigmoid()], 1)
        y = nn.functional.avg_pool2d(nn.functional.max_pool2d(y, 2), 2)
        return self.last(nn.functional.adaptive_avg_pool2d(y, 1).flatten(1))


class Calibration(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": RNG.standard_normal((4, 3, 16, 16)).astype(np.float32)} for _ in range(3)])

    def get_next(self):
        return next(self.batches, None)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "float.onnx"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter's, about itself
        torch.onnx.export(
            Net().eval(), (torch.randn(2, 3, 16, 16),), str(path), dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    return path


def _integers(path):
    found = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    return [array for array in found if array.dtype.kind in "iu" and array.dtype.itemsize <= 4 and array.size > 1]


def _assert_imports(path, tmp_path, quantum):
    program = import_onnx(path)
    check(program)
    assert is_quantized(program.graph)
    for samples in (1, 2, 7):
        x = RNG.standard_normal((samples, 3, 16, 16)).astype(np.float32)
        assert_within_one_quantum(run(program, x), session(path).run(None, {"x": x})[0], quantum)
    export_onnx(program, tmp_path / "back.onnx")
    assert_within_one_quantum(session(tmp_path / "back.onnx").run(None, {"x": x})[0], run(program, x), quantum)
    written = _integers(tmp_path / "back.onnx")
    for array in _integers(path):
        assert any(array.shape == other.shape and np.array_equal(array, other) for other in written)


@pytest.mark.parametrize(
    ("form", "activation", "weight", "per_channel"),
    [
        (QuantFormat.QDQ, QuantType.QUInt8, QuantType.QInt8, True),
        pytest.param(QuantFormat.QDQ, QuantType.QInt8, QuantType.QInt8, False, marks=pytest.mark.slow),
        pytest.param(QuantFormat.QDQ, QuantType.QUInt16, QuantType.QInt8, True, marks=pytest.mark.slow),
    ],
)
def test_statically_quantized_networks_keep_their_integers_there_and_back(
    tmp_path, float_model, form, activation, weight, per_channel
):
    path = tmp_path / "q.onnx"
    quantize_static(float_model, path, Calibration(), quant_format=form, per_channel=per_channel,
                    activation_type=activation, weight_type=weight)  # fmt: skip
    # Where one value of an inner layer is a tie, the network's outputs differ by a few steps of the last grid.
    scale = {t.name: t for t in onnx.load(path).graph.initializer}["y_scale"]
    _assert_imports(path, tmp_path, 4 * numpy_helper.to_array(scale).item())


def test_dynamically_quantized_networks_keep_their_integers_there_and_back(tmp_path, float_model):
    path = tmp_path / "q.onnx"
    quantize_dynamic(float_model, path, weight_type=QuantType.QUInt8)
    _assert_imports(path, tmp_path, 2e-2)
