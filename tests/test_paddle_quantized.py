"""Quantized models of Paddle: the integers that Paddle computes, in the library's own quantize–dequantize pairs."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from paddle_steps import Builder, Stored, array, run_pir, run_program
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.graph import Value
from slimgraph.importers.paddle.importer import program_of
from slimgraph.program.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE, is_quantized


def on_grid(x, reach, *, lowest=-127, top=127):
    """The nearest real value that has a code."""
    return (np.clip(np.rint(x / reach * top), lowest, top) * reach / top).astype(np.float32)


MOVING = "fake_quantize_dequantize_moving_average_abs_max"


@pytest.mark.parametrize(("rounding", "lowest"), [({}, -127), ({"round_type": 1}, -127), ({"round_type": 0}, -128)])
def test_values_are_rounded_to_a_known_range(rounding, lowest):
    x = array(3, 4, low=-3, high=3)
    x[0, 0] = -2.016  # 128 steps
    given = {"X": x, "InScale": Stored(np.float32([2.0]))}
    wanted = on_grid(x, 2.0, lowest=lowest)
    found = run_program(MOVING, given, bit_length=8, is_test=True, **rounding)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    found = run_pir(MOVING, x, Stored(np.float32([2.0])), None, None, bit_length=8, is_test=True, **rounding)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_range_that_still_moves_is_refused():
    with pytest.raises(ModelImportError, match="follows what it sees"):
        run_program(MOVING, {"X": array(2), "InScale": Stored(np.float32([1]))}, bit_length=8, is_test=False)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_by_the_reach_of_their_channels(axis, bits):
    weight, top = array(3, 4, 2, 2), 2 ** (bits - 1) - 1
    reach = np.abs(weight).max(tuple(i for i in range(4) if i != axis), keepdims=True)
    kind = "fake_channel_wise_quantize_dequantize_abs_max"
    for stored in (Stored(weight), weight):  # a parameter, or what another operator makes
        found, reaches = run_program(
            kind, {"X": stored}, {"Out": 1, "OutScale": 1}, bit_length=bits, quant_axis=axis, round_type=1
        )
        np.testing.assert_allclose(found, on_grid(weight, reach, lowest=-top, top=top), atol=1e-6)
        np.testing.assert_allclose(reaches, reach.reshape(-1), rtol=1e-6)
    found = run_pir("fake_quantize_dequantize_abs_max", Stored(weight), bit_length=bits)
    np.testing.assert_allclose(found, on_grid(weight, np.abs(weight).max(), lowest=-top, top=top), atol=1e-6)


def test_codes_of_old_files_are_numbers_that_an_operator_computes_with():
    x, weight = array(2, 3, low=-3, high=3), np.float32([[10, -127], [3, 4], [-5, 6]])
    for kind in ("fake_quantize_range_abs_max", "fake_quantize_moving_average_abs_max"):
        builder = Builder("program")
        (x_name,), (w_name,) = builder.names(x), builder.names(Stored(weight))
        (reach,), (weight_reach,) = builder.names(Stored(np.float32([2.0]))), builder.names(Stored(np.float32([0.5])))
        outputs = {"Out": ("q",), "OutScale": ("s",)}
        builder.add(kind, {"X": (x_name,), "InScale": (reach,)}, (), outputs, (), {"bit_length": 8, "is_test": True})
        builder.add("matmul_v2", {"X": ("q",), "Y": (w_name,)}, (), {"Out": ("y",)}, (), {})
        scales = {"X": ("y",), "Scale": (weight_reach,)}
        builder.add("fake_dequantize_max_abs", scales, (), {"Out": ("z",)}, (), {"max_range": 127 * 127 / 2.0})
        (found,) = builder.run(["z"])
        np.testing.assert_allclose(found, on_grid(x, 2.0) @ (weight * np.float32(0.5 / 127)), rtol=1e-5, atol=1e-5)


def test_codes_that_are_only_dequantized_again_are_integers():
    x = array(2, 3, low=-3, high=3)
    builder = Builder("program")
    (x_name,), (reach,) = builder.names(x), builder.names(Stored(np.float32([2.0])))
    given = {"X": (x_name,), "InScale": (reach,)}
    outputs = {"Out": ("q",), "OutScale": ("s",)}
    attributes = {"bit_length": 8, "is_test": True}
    builder.add("fake_quantize_range_abs_max", given, (), outputs, (), attributes)
    scales = {"X": ("q",), "Scale": (reach,)}
    builder.add("fake_dequantize_max_abs", scales, (), {"Out": ("y",)}, (), {"max_range": 127.0})
    assert builder.run(["q"])[0].dtype == np.int8
    np.testing.assert_allclose(builder.run(["y"])[0], on_grid(x, 2.0), atol=1e-6)


def test_a_range_of_what_the_model_sees():
    x = array(2, 3, low=-3, high=3)
    codes, reach = run_program("fake_quantize_abs_max", {"X": x}, {"Out": 1, "OutScale": 1}, bit_length=8)
    np.testing.assert_allclose(codes, np.rint(x / np.abs(x).max() * 127), atol=1e-5)
    np.testing.assert_allclose(reach, [np.abs(x).max()], rtol=1e-6)
    codes, reach = run_program("fake_channel_wise_quantize_abs_max", {"X": x}, {"Out": 1, "OutScale": 1}, quant_axis=1)
    np.testing.assert_allclose(codes, np.rint(x / np.abs(x).max(0) * 127), atol=1e-5)
    found = run_program(
        "fake_channel_wise_dequantize_max_abs", {"X": codes, "Scales": [reach]}, quant_bits=(8,), quant_axis=1
    )
    np.testing.assert_allclose(found, codes * np.abs(x).max(0) / 127, rtol=1e-5)
    both = {"X": codes, "Scales": [reach, np.float32([3.0])]}
    found = run_program("fake_channel_wise_dequantize_max_abs", both, quant_bits=(8, 8), x_num_col_dims=1)
    np.testing.assert_allclose(found, codes * np.abs(x).max(0) / 127 * 3 / 127, rtol=1e-5)


def test_an_observer_leaves_its_input_as_it_is():
    x = array(2, 3)
    np.testing.assert_array_equal(run_program("moving_average_abs_max_scale", {"X": x}), x)
    scale = [Stored(np.float32([1])), Stored(np.float32([0]))]
    np.testing.assert_array_equal(run_pir("quantize_linear", x, *scale, only_observer=True), x)


# Whole models: a convolution as PaddleSlim writes it for deployment, and as it writes it while training goes on.


def model(generation, form, bias=None):
    """A convolution of a quantized picture by quantized weights, and the real values of both."""
    weight, reach = array(4, 3, 3, 3, seed=1), np.float32([0.5, 0.9, 1.0, 2.0])
    codes = np.clip(np.rint(weight / reach.reshape(-1, 1, 1, 1) * 127), -127, 127)
    builder = Builder(generation)
    builder.inputs["x"] = Value(name="x", dtype=torch.float32, shape=(None, 3, None, None))
    stored = {"x_scale": np.float32([0.8]), "zero": np.float32([0.0]), "zeros": np.zeros(4, np.float32)}
    stored["conv2d_0.w_0@scale"] = reach
    stored["conv2d_0.w_0"] = {"int8": codes.astype(np.int8), "float codes": codes.astype(np.float32)}.get(form, weight)
    linear = {"bit_length": 8, "round_type": 1, "is_test": True, "only_observer": False}

    def add(kind, inputs, output, attributes):
        operands = tuple((name,) for name in inputs.values())
        key = {"conv2d": "Output", MOVING: "Out", "fake_channel_wise_quantize_dequantize_abs_max": "Out"}.get(kind, "Y")
        given = {parameter: (name,) for parameter, name in inputs.items()}
        builder.add(kind, given, operands, {key: (output,)}, ((output,),), attributes)

    if form == "rounded":
        add(MOVING, {"X": "x", "InScale": "x_scale"}, "x_real", {"bit_length": 8, "is_test": True, "round_type": 1})
        kind, attributes = "fake_channel_wise_quantize_dequantize_abs_max", {"bit_length": 8, "quant_axis": 0}
        add(kind, {"X": "conv2d_0.w_0"}, "w_real", attributes)
        real = on_grid(weight, np.abs(weight).max((1, 2, 3), keepdims=True))
        del stored["conv2d_0.w_0@scale"], stored["zero"], stored["zeros"]
    else:
        x_scale = {"Scale": "x_scale", "ZeroPoint": "zero"}
        add("quantize_linear", {"X": "x", **x_scale}, "x_codes", {**linear, "quant_axis": -1})
        add("dequantize_linear", {"X": "x_codes", **x_scale}, "x_real", {**linear, "quant_axis": -1})
        w_scale = {"Scale": "conv2d_0.w_0@scale", "ZeroPoint": "zeros"}
        source = "conv2d_0.w_0"
        if form == "floats":
            add("quantize_linear", {"X": source, **w_scale}, "w_codes", {**linear, "quant_axis": 0})
            source = "w_codes"
        add("dequantize_linear", {"X": source, **w_scale}, "w_real", {**linear, "quant_axis": 0})
        real = (codes * reach.reshape(-1, 1, 1, 1) / 127).astype(np.float32)
    add("conv2d", {"Input": "x_real", "Filter": "w_real"}, "y", {"strides": (1, 1), "paddings": (1, 1)})
    if bias is not None:
        stored["conv2d_0.b_0"], made = bias, {"Out": ("z",)}
        builder.add("elementwise_add", {"X": ("y",), "Y": ("conv2d_0.b_0",)}, (), made, (), {"axis": 1})
    builder.tensors.update({name: torch.from_numpy(value) for name, value in stored.items()})
    return program_of(builder.model(["y" if bias is None else "z"]), input_shapes={}), real


FORMS = [("int8", "program"), ("float codes", "pir"), ("floats", "program"), ("rounded", "pir")]


@pytest.mark.parametrize(("form", "generation"), FORMS)
def test_a_quantized_convolution_keeps_its_integers(form, generation):
    program, weight = model(generation, form)
    assert is_quantized(program.graph)
    assert {QUANTIZE, DEQUANTIZE, DEQUANTIZE_CHANNELS} <= {node.target for node in program.graph.nodes}
    kept = dict(program.graph_module.named_buffers())["conv2d_0.w_0"]
    assert kept.dtype == torch.int8
    assert not list(program.graph_module.parameters())
    for samples in (1, 3):
        x = array(samples, 3, 8, 10, seed=samples)
        wanted = torch.conv2d(torch.from_numpy(on_grid(x, 0.8)), torch.from_numpy(weight), padding=1)
        torch.testing.assert_close(program(torch.from_numpy(x)), wanted, rtol=1e-5, atol=1e-5)


def test_a_quantized_convolution_has_its_bias_in_itself():
    bias = array(4, seed=5)
    program, weight = model("program", "int8", bias)
    x = array(2, 3, 8, 10)
    wanted = torch.conv2d(
        torch.from_numpy(on_grid(x, 0.8)), torch.from_numpy(weight), torch.from_numpy(bias), padding=1
    )
    torch.testing.assert_close(program(torch.from_numpy(x)), wanted, rtol=1e-5, atol=1e-5)
    assert torch.ops.aten.add.Tensor not in {node.target for node in program.graph.nodes}


def test_a_quantized_convolution_is_exported_with_its_integers(tmp_path):
    program, weight = model("program", "int8")
    path, x = tmp_path / "model.onnx", array(3, 3, 8, 10)
    export_onnx(program, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    wanted = torch.conv2d(torch.from_numpy(on_grid(x, 0.8)), torch.from_numpy(weight), padding=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_weight_that_two_operators_read_differently_stays_what_it_is():
    weight = array(4, 3)
    builder = Builder("program")
    (x,) = builder.names(array(2, 4))
    builder.tensors["w"] = torch.from_numpy(weight)
    kind = "fake_quantize_dequantize_abs_max"
    builder.add(kind, {"X": ("w",)}, (), {"Out": ("r",)}, (), {"bit_length": 8})
    builder.add("matmul_v2", {"X": (x,), "Y": ("r",)}, (), {"Out": ("a",)}, (), {})
    builder.add("matmul_v2", {"X": (x,), "Y": ("w",)}, (), {"Out": ("b",)}, (), {})
    a, b = builder.run(["a", "b"])
    given = builder.given[0].numpy()
    np.testing.assert_allclose(a, given @ on_grid(weight, np.abs(weight).max()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(b, given @ weight, rtol=1e-5, atol=1e-6)


# Old files: products of codes in floats, of which the real values come out behind.

ROUNDING = ("fake_quantize_range_abs_max", "fake_quantize_moving_average_abs_max")


class OldModel(Builder):
    """Writes what PaddleSlim 1 and the first 2.x exported: x → codes → product → real values."""

    def stored(self, name, values):
        self.tensors[name] = torch.from_numpy(np.asarray(values))
        return name

    def step(self, kind, inputs, outputs, **attributes):
        named = {key: names if isinstance(names, tuple) else (names,) for key, names in inputs.items()}
        made = {key: (name,) for key, name in outputs.items()}
        operands = tuple(named.values())
        self.add(kind, named, operands, made, tuple(made.values()), attributes)

    def rounded(self, x, kind=ROUNDING[0], reach=0.8):
        scale = self.stored("x.scale", np.float32([reach]))
        self.step(kind, {"X": x, "InScale": scale}, {"Out": "q", "OutScale": "q.scale"}, bit_length=8, is_test=True)
        return "q"

    def back(self, codes, out, most):
        self.step("fake_dequantize_max_abs", {"X": codes, "Scale": "q.scale"}, {"Out": out}, max_range=most)

    def back_by_channel(self, codes, out, scale, axis, scales=("q.scale",)):
        given = {"X": codes, "Iter": (), "Scales": (scale, *scales)}
        if self.generation == "pir":
            given = {"X": codes, "Scales": (scale, *scales), "Iter": ()}
        attributes = {"quant_bits": (8, 8)[: 1 + len(scales)], "quant_axis": 0, "x_num_col_dims": axis}
        self.step("fake_channel_wise_dequantize_max_abs", given, {"Out": out}, **attributes)

    def program(self, *outputs, declared=()):
        self.values = {name: Value(name=name, dtype=torch.float32, shape=shape) for name, shape in declared}
        model = replace(self.model(outputs), values=self.values)
        return program_of(model, input_shapes={})


def integers(program, name):
    found = dict(program.graph_module.named_buffers())[name]
    assert found.dtype == torch.int8
    return found.numpy()


def require_quantized(program):
    """Codes are held in integers; every number that is multiplied is a real value."""
    targets = {node.target for node in program.graph.nodes}
    assert {QUANTIZE, DEQUANTIZE} <= targets
    assert not list(program.graph_module.parameters())
    assert not targets & {torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten._to_copy.default}


CODES, REACH = np.rint(array(4, 3, 3, 3, seed=1) * 127), np.float32([0.5, 0.9, 1.0, 2.0])


def old_convolution(generation, rounding, *, by_channel, stored=np.float32, bias=False):
    builder = OldModel(generation)
    builder.inputs["x"] = Value(name="x", dtype=torch.float32, shape=(None, 3, None, None))
    codes = builder.rounded("x", rounding)
    weight = builder.stored("conv2d_0.w_0", CODES.astype(stored))
    sizes = {"strides": (1, 1), "paddings": (1, 1), "groups": 1, "data_format": "NCHW"}
    builder.step("conv2d", {"Input": codes, "Filter": weight}, {"Output": "c"}, **sizes)
    if by_channel:
        builder.back_by_channel("c", "y", builder.stored("w.scale", REACH), 1)
    else:
        builder.back("c", "y", 127 * 127 / 0.6)
    if bias:
        builder.stored("conv2d_0.b_0", array(4, seed=5))
        builder.step("elementwise_add", {"X": "y", "Y": "conv2d_0.b_0"}, {"Out": "z"}, axis=1)
    return builder


def wanted_convolution(x, *, by_channel, bias=None):
    weight = CODES * (REACH.reshape(-1, 1, 1, 1) if by_channel else np.float32(0.6)) / 127
    weight = torch.from_numpy(weight.astype(np.float32))
    return torch.conv2d(torch.from_numpy(on_grid(x, 0.8)), weight, bias, padding=1)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("generation", "rounding", "stored"), [
    ("program", ROUNDING[0], np.float32),
    ("program", ROUNDING[1], np.int8),
    ("pir", ROUNDING[1], np.float32),
])  # fmt: skip
def test_a_convolution_of_codes_in_floats_keeps_them_as_integers(generation, rounding, stored, by_channel):
    program = old_convolution(generation, rounding, by_channel=by_channel, stored=stored).program("y")
    require_quantized(program)
    np.testing.assert_array_equal(integers(program, "conv2d_0.w_0"), CODES)
    assert "y" in program.values
    for samples in (1, 3):
        x = array(samples, 3, 8, 10, seed=samples, low=-1.5, high=1.5)
        wanted = wanted_convolution(x, by_channel=by_channel)
        torch.testing.assert_close(program(torch.from_numpy(x)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_channel", [False, True])
def test_codes_in_floats_are_exported_as_integers_with_the_scales_of_the_file(by_channel, tmp_path):
    program = old_convolution("program", ROUNDING[0], by_channel=by_channel).program("y")
    export_onnx(program, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kept = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    (weight,) = (each for each in kept.values() if each.dtype == np.int8 and each.ndim == 4)
    np.testing.assert_array_equal(weight, CODES)
    scales = [kept[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert any(np.allclose(scale, 0.8 / 127, rtol=1e-6) for scale in scales)
    own = REACH / 127 if by_channel else np.float32(0.6 / 127)
    assert any(scale.size == own.size and np.allclose(scale.reshape(own.shape), own, rtol=1e-6) for scale in scales)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = array(3, 3, 8, 10, low=-1.5, high=1.5)
    wanted = wanted_convolution(x, by_channel=by_channel)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, rtol=1e-4, atol=1e-4)


def test_an_old_convolution_has_its_bias_in_itself():
    program = old_convolution("program", ROUNDING[0], by_channel=True, bias=True).program("z")
    assert torch.ops.aten.add.Tensor not in {node.target for node in program.graph.nodes}
    x = array(2, 3, 8, 10)
    wanted = wanted_convolution(x, by_channel=True, bias=torch.from_numpy(array(4, seed=5)))
    torch.testing.assert_close(program(torch.from_numpy(x)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("kind", ["mul", "matmul_v2"])
def test_matrices_of_codes_have_a_scale_for_each_column(kind, axis):
    codes = np.rint(array(5, 4, seed=2) * 127)
    builder = OldModel("program")
    shape = (None, 5) if axis == 1 else (None, 6, 5)
    builder.inputs["x"] = Value(name="x", dtype=torch.float32, shape=shape)
    builder.rounded("x")
    weight = builder.stored("fc_0.w_0", codes)
    attributes = {"x_num_col_dims": axis, "y_num_col_dims": 1} if kind == "mul" else {}
    builder.step(kind, {"X": "q", "Y": weight}, {"Out": "c"}, **attributes)
    builder.back_by_channel("c", "y", builder.stored("w.scale", REACH), axis)
    program = builder.program("y", declared=[("c", (*shape[:-1], 4))])
    require_quantized(program)
    x = array(3, *shape[1:], low=-1.5, high=1.5)
    wanted = on_grid(x, 0.8) @ (codes * REACH / 127).astype(np.float32)
    np.testing.assert_allclose(program(torch.from_numpy(x)).detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_channel", [False, True])
def test_weights_that_are_rounded_and_turned_back_in_the_file_become_stored_integers(by_channel):
    """As PaddleSlim writes a model while it is trained."""
    weight = array(4, 3, 3, 3, seed=1)
    reach = np.abs(weight).max((1, 2, 3) if by_channel else None)
    builder = OldModel("program")
    builder.inputs["x"] = Value(name="x", dtype=torch.float32, shape=(None, 3, None, None))
    builder.rounded("x")
    builder.back("q", "x_real", 127.0)
    builder.stored("conv2d_0.w_0", weight)
    kind = "fake_channel_wise_quantize_abs_max" if by_channel else "fake_quantize_abs_max"
    made = {"Out": "w.quantized", "OutScale": "w.scale"}
    builder.step(kind, {"X": "conv2d_0.w_0"}, made, bit_length=8, quant_axis=0)
    if by_channel:
        builder.back_by_channel("w.quantized", "w_real", "w.scale", 1, scales=())
    else:
        given = {"X": "w.quantized", "Scale": "w.scale"}
        builder.step("fake_dequantize_max_abs", given, {"Out": "w_real"}, max_range=127.0)
    sizes = {"strides": (1, 1), "paddings": (1, 1), "groups": 1}
    builder.step("conv2d", {"Input": "x_real", "Filter": "w_real"}, {"Output": "y"}, **sizes)
    program = builder.program("y")
    require_quantized(program)
    spread = reach.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(integers(program, "conv2d_0.w_0"), np.rint(weight / spread * 127))
    x = array(2, 3, 8, 10, low=-1.5, high=1.5)
    real = torch.from_numpy(on_grid(weight, spread).astype(np.float32))
    wanted = torch.conv2d(torch.from_numpy(on_grid(x, 0.8)), real, padding=1)
    torch.testing.assert_close(program(torch.from_numpy(x)), wanted, rtol=1e-5, atol=1e-5)


def test_codes_that_something_else_reads_stay_numbers():
    builder = old_convolution("program", ROUNDING[0], by_channel=False)
    builder.step("relu", {"X": "c"}, {"Out": "r"})
    program = builder.program("y", "r")
    x = array(2, 3, 8, 10, low=-1.5, high=1.5)
    found = program(torch.from_numpy(x))
    torch.testing.assert_close(found["y"], wanted_convolution(x, by_channel=False), rtol=1e-5, atol=1e-5)
    codes = torch.conv2d(torch.from_numpy(on_grid(x, 0.8) / 0.8 * 127), torch.from_numpy(CODES), padding=1)
    torch.testing.assert_close(found["r"], torch.relu(codes), rtol=1e-4, atol=1)


@pytest.mark.parametrize("kind", ["fake_quantize_abs_max", "fake_quantize_dequantize_abs_max"])
def test_a_range_that_follows_the_input_stays_arithmetic(kind):
    """The scale that comes out behind the product is another one for each input."""
    builder = OldModel("program")
    builder.inputs["x"] = Value(name="x", dtype=torch.float32, shape=(None, 5))
    builder.step(kind, {"X": "x"}, {"Out": "q", "OutScale": "q.scale"}, bit_length=8)
    codes = np.rint(array(5, 4, seed=2) * 127)
    builder.step("mul", {"X": "q", "Y": builder.stored("fc_0.w_0", codes.astype(np.int8))}, {"Out": "c"})
    if kind == "fake_quantize_abs_max":
        builder.back("c", "y", 127 * 127 / 0.5)
    else:
        builder.step("scale", {"X": "c"}, {"Out": "y"}, scale=0.5 / 127, bias=0.0)
    x = array(1, 5)
    wanted = on_grid(x, np.abs(x).max()) @ (codes * 0.5 / 127).astype(np.float32)
    program = builder.program("y")
    np.testing.assert_allclose(program(torch.from_numpy(x)).detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attributes", [{"bit_length": 99}, {"bit_length": "?"}])
@pytest.mark.parametrize("kind", ["quantize_linear", "fake_channel_wise_quantize_abs_max"])
def test_damaged_quantization_is_refused(kind, attributes):
    builder = OldModel("program")
    builder.inputs["x"] = Value(name="x", dtype=torch.float32, shape=(None, 4))
    given = {"X": builder.stored("w", array(4, 3)), "Scale": builder.stored("s", np.float32([1, 2, 3, 4]))}
    given = given if kind == "quantize_linear" else {"X": "w"}
    outputs = {"Y": "c"} if kind == "quantize_linear" else {"Out": "c", "OutScale": "r"}
    builder.step(kind, given, outputs, **attributes)
    builder.step("matmul_v2", {"X": "x", "Y": "c"}, {"Out": "y"})
    with pytest.raises(ModelImportError):
        builder.program("y")


@pytest.mark.parametrize(("by_channel", "damage"), [
    (False, {"max_range": "?"}),
    (False, {"max_range": 0.0}),
    (True, {"quant_bits": "?"}),
    (True, {"quant_bits": (99, 1)}),
])  # fmt: skip
def test_damaged_scales_behind_a_product_are_refused(by_channel, damage):
    builder = old_convolution("program", ROUNDING[0], by_channel=by_channel)
    last = builder.operators[-1]
    builder.operators[-1] = replace(last, attributes={**last.attributes, **damage})
    with pytest.raises(ModelImportError):
        builder.program("y")
