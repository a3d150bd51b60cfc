"""Paddle models as programs: judged by Paddle's own outputs, and by ONNX twins of real models."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from models.shared_data import shared
from paddle_models import linear_pir, linear_program, linear_tensors, write
from paddle_steps import Builder, Known, Stored, array
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.graph import Value
from slimgraph.importers.paddle.importer import import_paddle, program_of
from slimgraph.importers.paddle.operators import coverage
from slimgraph.importers.paddle.read import read_model
from slimgraph.program.archive import load_program, save_program

GOLDEN = ("mobilenet_v1_025", pytest.param("shufflenet_v2_x0_25", marks=pytest.mark.slow), "transformer")
CLASSIFIER = "ch_ppocr_mobile_v2.0_cls_infer"
DETECTOR = "ch_PP-OCRv3_det_infer"
MOBILENET_V3 = "MobileNetV3_small_x0_35_3class"


def golden(name, generation):
    folder = shared(f"models/paddle_golden/{name}_{generation}")
    with np.load(folder / "golden.npz") as arrays:
        return folder, dict(arrays)


def run(program, *inputs):
    with torch.no_grad():
        return program(*(torch.from_numpy(x) for x in inputs)).numpy()


def close(found, wanted, share):
    """Equal up to a share of the largest value."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


def runtime(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


# Both generations, from small files


@pytest.mark.parametrize(("model", "kinds"), [(linear_program(), "elementwise_add"), (linear_pir(), "add")])
def test_a_small_model_has_the_names_of_the_file(tmp_path, model, kinds):
    tensors = linear_tensors()
    program = import_paddle(write(tmp_path, model, tensors))
    weight, bias = tensors["linear_0.w_0"], tensors["linear_0.b_0"]
    for samples in (1, 3, 7):
        x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
        torch.testing.assert_close(program(x), torch.relu(x @ weight + bias))
    parameters = dict(program.graph_module.named_parameters())
    assert sorted(parameters) == ["linear_0.b_0", "linear_0.w_0"]
    assert program.signature.inputs[0].shape == ("batch", 4)
    assert "linear_0" in program.layers
    entry = program.history[0]
    assert entry.step == "import_paddle"
    assert entry.parameters["generation"] == ("pir" if kinds == "add" else "program")


def free(*shape):
    return Value(name="x", dtype=torch.float32, shape=shape)


def traced(builder, *outputs):
    return program_of(builder.model(outputs), input_shapes={})


def test_shapes_that_are_computed_leave_the_first_axis_free():
    """x.reshape([x.shape[0], -1, 2]) as each generation writes it."""
    x = array(5, 6)
    old = Builder("program")
    old.inputs["x"] = free(None, 6)
    old.add("shape", {"Input": ("x",)}, (), {"Out": ("s",)}, (), {})
    first = {"axes": (0,), "starts": (0,), "ends": (1,), "decrease_axis": (0,)}
    old.add("slice", {"Input": ("s",)}, (), {"Out": ("n",)}, (), first)
    rest = [old.constant(Known([-1])), old.constant(Known([2]))]
    old.add("reshape2", {"X": ("x",), "ShapeTensor": ("n", *rest)}, (), {"Out": ("y",)}, (), {"shape": (-1, -1, 2)})
    new = Builder("pir")
    new.inputs["x"] = free(None, 6)
    new.add("shape64", {}, (("x",),), {}, (("s",),), {})
    ends = tuple((new.constant(Known([at])),) for at in (0, 1))
    new.add("slice", {}, (("s",), *ends), {}, (("n",),), {"axes": (0,), "decrease_axis": (0,)})
    parts = [new.constant(Known(size)) for size in (-1, 2)]
    new.add("stack", {}, (("n", *parts),), {}, (("shape",),), {"axis": 0})
    new.add("reshape", {}, (("x",), ("shape",)), {}, (("y",),), {})
    for program in (traced(old, "y"), traced(new, "y")):
        assert program.signature.inputs[0].shape == ("batch", 6)
        for samples in (1, 3, 5):
            np.testing.assert_array_equal(run(program, x[:samples]), x[:samples].reshape(samples, 3, 2))


@pytest.mark.parametrize(
    ("kind", "aligned", "align_mode"),
    [("nearest_interp_v2", False, 1), ("nearest_interp_v2", True, 1), ("bilinear_interp_v2", False, 1)],
)
def test_interpolation_leaves_heights_and_widths_free(kind, aligned, align_mode):
    builder = Builder("program")
    builder.inputs["x"] = free(None, 3, None, None)
    attributes = {"scale": (2.0, 2.0), "align_corners": aligned, "align_mode": align_mode, "out_h": -1, "out_w": -1}
    builder.add(kind, {"X": ("x",)}, (), {"Out": ("y",)}, (), attributes)
    program = traced(builder, "y")
    x = array(2, 3, 5, 7)
    assert program.signature.inputs[0].shape == ("batch", 3, "input_axis2", "input_axis3")
    fixed = Builder("program")
    names = fixed.names(x)
    fixed.add(kind, {"X": names}, (), {"Out": ("y",)}, (), attributes)
    close(run(program, x), fixed.run(["y"])[0], 1e-6)


def test_a_recurrent_layer_of_samples_first_is_that_of_pytorch():
    builder = Builder("program")
    builder.inputs["x"] = free(None, 6, 4)
    lstm = torch.nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    weights = dict(lstm.named_parameters())
    order = [
        f"{kind}_{part}_l0{way}" for kind in ("weight", "bias") for way in ("", "_reverse") for part in ("ih", "hh")
    ]
    builder.tensors.update({f"lstm_0.w_{k}": weights[name].detach() for k, name in enumerate(order)})
    builder.add("transpose2", {"X": ("x",)}, (), {"Out": ("t",)}, (), {"axis": (1, 0, 2)})
    zeros = {"shape": (2, -1, 5), "value": 0.0, "dtype": 5, "input_dim_idx": 0, "output_dim_idx": 1}
    for name in ("h", "c"):
        builder.add("fill_constant_batch_size_like", {"Input": ("x",)}, (), {"Out": (name,)}, (), zeros)
    given = {"Input": ("t",), "PreState": ("h", "c"), "WeightList": tuple(builder.tensors)}
    attributes = {"mode": "LSTM", "num_layers": 1, "is_bidirec": True, "hidden_size": 5}
    builder.add("rnn", given, (), {"Out": ("o",), "State": ("hn", "cn")}, (), attributes)
    builder.add("transpose2", {"X": ("o",)}, (), {"Out": ("y",)}, (), {"axis": (1, 0, 2)})
    program = traced(builder, "y")
    assert torch.ops.aten.lstm.input in {node.target for node in program.graph.nodes}
    assert sorted(name for name, _ in program.graph_module.named_parameters()) == sorted(builder.tensors)
    for samples in (1, 3, 7):
        x = array(samples, 6, 4)
        close(run(program, x), lstm(torch.from_numpy(x))[0].detach().numpy(), 1e-5)


def test_boxes_of_a_detector_follow_the_size_of_the_picture():
    builder = Builder("program")
    builder.inputs["x"] = free(None, 16, None, None)
    builder.inputs["size"] = Value(name="size", dtype=torch.int32, shape=(None, 2))
    attributes = {"anchors": (10, 13, 16, 30), "class_num": 3, "conf_thresh": 0.005, "downsample_ratio": 32}
    outputs = {"Boxes": ("boxes",), "Scores": ("scores",)}
    builder.add("yolo_box", {"X": ("x",), "ImgSize": ("size",)}, (), outputs, (), attributes)
    program = traced(builder, "boxes", "scores")
    for samples, height, width in ((1, 3, 4), (3, 5, 2)):
        sizes = torch.full((samples, 2), 100, dtype=torch.int32)
        found = program(torch.rand(samples, 16, height, width), sizes)
        assert found["boxes"].shape == (samples, 2 * height * width, 4)
        assert found["scores"].shape == (samples, 2 * height * width, 3)


def test_open_axes_can_be_fixed():
    builder = Builder("program")
    builder.inputs["x"] = free(None, 3, None, None)
    builder.add("relu", {"X": ("x",)}, (), {"Out": ("y",)}, (), {})
    program = program_of(builder.model(["y"]), input_shapes={"x": (0, 3, 8, 9)})
    assert program.signature.inputs[0].shape == ("batch", 3, 8, 9)


def test_an_output_that_is_a_parameter_of_another_layer_keeps_its_name():
    builder = Builder("pir")
    builder.inputs["x"] = free(None, 4)
    (scale,) = builder.names(Stored(array(4)))
    builder.add("multiply", {}, (("x",), (scale,)), {}, (("a",),), {})
    builder.add("scale", {}, (("a",),), {}, (("b",),), {"scale": 1.0, "bias": 0.0})
    program = traced(builder, "a", "b")
    assert [spec.name for spec in program.signature.outputs] == ["a", "b"]
    x = torch.rand(2, 4)
    torch.testing.assert_close(program(x)["a"], program(x)["b"])


def convolution(generation, kind, layout="NCHW", axis=1, outputs=("y",)):
    """A convolution of five channels of x, and a bias that is added to them as each generation writes it."""
    last, transposed = layout == "NHWC", kind.endswith("transpose")
    builder = Builder(generation)
    builder.inputs["x"] = free(None, 6, 7, 3) if last else free(None, 3, 6, 7)
    builder.tensors["conv2d_0.w_0"] = torch.from_numpy(array(*((3, 5) if transposed else (5, 3)), 3, 3))
    builder.tensors["conv2d_0.b_0"] = torch.from_numpy(array(5, seed=1))
    given = {"Input": ("x",), "Filter": ("conv2d_0.w_0",)}
    attributes = {"strides": (1, 1), "data_format": layout, "groups": 1, "output_padding": (), "output_size": ()}
    builder.add(kind, given, tuple(given.values()), {"Output": ("c",)}, (("c",),), attributes)
    if generation == "program":
        builder.add("elementwise_add", {"X": ("c",), "Y": ("conv2d_0.b_0",)}, (), {"Out": ("y",)}, (), {"axis": axis})
    else:
        shape = builder.constant(Known([1, 1, 1, -1] if last else [1, -1, 1, 1]))
        builder.add("reshape", {}, (("conv2d_0.b_0",), (shape,)), {}, (("b",),), {})
        builder.add("add", {}, (("c",), ("b",)), {}, (("y",),), {})
    return builder, traced(builder, *outputs)


@pytest.mark.parametrize("generation", ["program", "pir"])
@pytest.mark.parametrize(("layout", "axis"), [("NCHW", 1), ("NHWC", 3)])
@pytest.mark.parametrize("kind", ["conv2d", "conv2d_transpose"])
def test_a_bias_that_is_added_behind_a_convolution_is_its_own(generation, layout, axis, kind):
    builder, program = convolution(generation, kind, layout, axis)
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.aten.add.Tensor not in targets
    assert "y" in program.values
    x = array(2, 3, 6, 7)
    function = torch.conv_transpose2d if kind.endswith("transpose") else torch.conv2d
    wanted = function(torch.from_numpy(x), builder.tensors["conv2d_0.w_0"], builder.tensors["conv2d_0.b_0"]).numpy()
    given = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if layout == "NHWC" else x
    close(run(program, given), np.moveaxis(wanted, 1, -1) if layout == "NHWC" else wanted, 1e-5)


def test_a_convolution_that_is_an_output_itself_keeps_its_bias_behind_it():
    builder, program = convolution("program", "conv2d", outputs=("c", "y"))
    found = program(torch.from_numpy(array(2, 3, 6, 7)))
    torch.testing.assert_close(found["c"] + builder.tensors["conv2d_0.b_0"].reshape(-1, 1, 1), found["y"])


def test_what_is_added_along_another_axis_is_no_bias():
    builder, program = convolution("program", "conv2d", axis=-1)  # the last of its axes has five columns
    x = torch.from_numpy(array(2, 3, 6, 7))
    wanted = torch.conv2d(x, builder.tensors["conv2d_0.w_0"]) + builder.tensors["conv2d_0.b_0"]
    torch.testing.assert_close(program(x), wanted)


def test_an_operator_that_cannot_be_imported_is_named_with_its_layer(tmp_path):
    builder = Builder("program")
    builder.inputs["x"] = free(None, 4)
    builder.add("reluu", {"X": ("x",)}, (), {"Out": ("y",)}, (), {})
    with pytest.raises(ModelImportError, match=r"reluu \(program\) at 'reluu_0'.*Closest: relu"):
        traced(builder, "y")


# One sample that the file fixes


def one_sample(generation, sizes):
    """x (1, 4, 6) → relu → reshape to sizes that are written down → softmax over the last axis."""
    builder = Builder(generation)
    builder.inputs["x"] = free(1, 4, 6)
    builder.add("relu", {"X": ("x",)}, (("x",),), {"Out": ("r",)}, (("r",),), {})
    if generation == "program":
        builder.add("reshape2", {"X": ("r",)}, (), {"Out": ("v",)}, (), {"shape": sizes})
    else:
        builder.add("reshape", {}, (("r",), (builder.constant(Known(list(sizes))),)), {}, (("v",),), {})
    builder.add("softmax", {"X": ("v",)}, (("v",),), {"Out": ("y",)}, (("y",),), {"axis": -1})
    return builder


@pytest.mark.parametrize("generation", ["program", "pir"])
@pytest.mark.parametrize("sizes", [(1, 24), (1, -1), (-1, 24), (1, 2, 12), (1, 0, 2, -1), (8, 3), (-1, 3)])
def test_one_sample_that_a_reshape_fixes_becomes_any_number(generation, sizes):
    program = traced(one_sample(generation, sizes), "y")
    assert program.signature.inputs[0].shape == ("batch", 4, 6)
    rows = torch.zeros(1, 4, 6).reshape([4 if size == 0 else size for size in sizes]).shape
    for samples in (1, 3, 7):
        x = array(samples, 4, 6)
        wanted = torch.softmax(torch.relu(torch.from_numpy(x)).reshape(rows[0] * samples, *rows[1:]), -1)
        np.testing.assert_allclose(run(program, x), wanted, atol=1e-6)


@pytest.mark.parametrize("axes", [(0,), ()])
def test_the_axis_of_the_only_sample_can_be_removed_and_then_stays_the_only_one(axes):
    builder = Builder("program")
    builder.inputs["x"] = free(1, 4, 1)
    builder.add("squeeze2", {"X": ("x",)}, (), {"Out": ("v",)}, (), {"axes": axes})
    builder.add("softmax", {"X": ("v",)}, (), {"Out": ("y",)}, (), {"axis": 0})
    program = traced(builder, "y")
    assert program.signature.inputs[0].shape == (1, 4, 1)
    assert "sample" in program.history[0].parameters["batch_is_fixed_because"]
    x = array(1, 4, 1)
    wanted = torch.softmax(torch.from_numpy(x).reshape((4, 1) if axes else (4,)), 0)
    np.testing.assert_allclose(run(program, x), wanted, atol=1e-6)


# Models that Paddle saved, with its own outputs


@pytest.mark.parametrize("generation", ["pdmodel", "json"])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_model_computes_what_paddle_computes(name, generation):
    folder, arrays = golden(name, generation)
    program = import_paddle(folder)
    for x, y in (("x1", "y1"), ("x3", "y3")):
        close(run(program, arrays[x]), arrays[y], 1e-5)
    seven = np.concatenate([arrays["x3"], arrays["x3"], arrays["x1"]])
    close(run(program, seven), np.concatenate([arrays["y3"], arrays["y3"], arrays["y1"]]), 1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v1_025", pytest.param("transformer", marks=pytest.mark.slow)])
def test_both_generations_become_the_same_program(name):
    (old, _), (new, _) = golden(name, "pdmodel"), golden(name, "json")
    programs = [import_paddle(folder) for folder in (old, new)]
    operators = [[node.target for node in p.graph.nodes if node.op == "call_function"] for p in programs]
    assert operators[0] == operators[1]
    states = [p.graph_module.state_dict() for p in programs]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=0, atol=0)


def test_parameters_keep_the_names_of_paddle_and_statistics_are_buffers():
    folder, _ = golden("mobilenet_v1_025", "pdmodel")
    program, model = import_paddle(folder), read_model(folder)
    parameters = {name for name, _ in program.graph_module.named_parameters()}
    buffers = {name for name, _ in program.graph_module.named_buffers()}
    assert parameters | buffers == set(model.tensors)
    assert {"conv2d_0.w_0", "batch_norm2d_0.w_0", "batch_norm2d_0.b_0"} <= parameters
    assert {"batch_norm2d_0.w_1", "batch_norm2d_0.w_2"} <= buffers
    assert {"conv2d_0", "batch_norm2d_0"} <= set(program.layers)


@pytest.mark.parametrize("name", [pytest.param("mobilenet_v1_025", marks=pytest.mark.slow), "transformer"])
def test_an_imported_model_learns_is_saved_and_exported(name, tmp_path):
    folder, arrays = golden(name, "json")
    program = import_paddle(folder)
    x, y = torch.from_numpy(arrays["x3"]), torch.from_numpy(arrays["y3"])
    save_program(program, tmp_path / "model.pt2")
    torch.testing.assert_close(load_program(tmp_path / "model.pt2")(x), program(x), rtol=0, atol=0)
    export_onnx(program, tmp_path / "model.onnx")
    for samples in (1, 3):
        close(runtime(tmp_path / "model.onnx", arrays[f"x{samples}"]), arrays[f"y{samples}"], 1e-4)
    goal = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-4)
    before = torch.nn.functional.mse_loss(program(x), goal)
    before.backward()
    optimizer.step()
    assert torch.nn.functional.mse_loss(program(x), goal) < before


# Models from the wild, with twins in ONNX


@pytest.mark.parametrize("name", [CLASSIFIER, DETECTOR, MOBILENET_V3])
def test_every_operator_of_the_wild_is_covered(name):
    kinds = coverage(read_model(shared(f"models/paddle/{name}")))
    assert [kind for kind, _, supported in kinds if not supported] == []
    assert sum(count for _, count, _ in kinds) > 100


@pytest.mark.parametrize("shape", [(1, 3, 48, 192), (3, 3, 64, 64), (7, 3, 96, 160)])
def test_a_classifier_of_text_is_its_onnx_twin_at_every_size(shape):
    program = _imported(CLASSIFIER)
    x = array(*shape)
    close(run(program, x), runtime(shared("models/onnx/ppocr_cls.onnx"), x), 1e-5)


_PROGRAMS = {}


def _imported(name):
    if name not in _PROGRAMS:
        _PROGRAMS[name] = import_paddle(shared(f"models/paddle/{name}"))
    return _PROGRAMS[name]


@pytest.mark.slow
def test_a_detector_of_text_is_its_onnx_twin_at_every_size(tmp_path):
    """Judged before its last sigmoid, which is zero almost everywhere."""
    model = read_model(shared(f"models/paddle/{DETECTOR}"))
    logits = next(operator.inputs["X"][0] for operator in model.operators if operator.kind == "sigmoid")
    program = program_of(replace(model, outputs=(model.values[logits],)), input_shapes={})
    twin = onnx.load(shared("models/onnx/ppocrv3_det.onnx"))
    last = next(node for node in twin.graph.node if node.op_type == "Sigmoid")
    del twin.graph.output[:]
    twin.graph.output.append(onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None))
    onnx.save(twin, tmp_path / "twin.onnx")
    assert program.signature.inputs[0].shape == ("batch", 3, "input_axis2", "input_axis3")
    for shape in ((1, 3, 64, 64), (3, 3, 96, 160), (2, 3, 160, 32)):
        x = array(*shape, low=-2, high=2)
        close(run(program, x), runtime(tmp_path / "twin.onnx", x), 1e-5)


@pytest.mark.slow
def test_a_mobile_net_of_the_wild_is_exported_as_it_computes(tmp_path):
    program = _imported(MOBILENET_V3)
    export_onnx(program, tmp_path / "model.onnx")
    for samples in (1, 3):
        x = array(samples, 3, 224, 224)
        close(runtime(tmp_path / "model.onnx", x), run(program, x), 1e-4)
        np.testing.assert_allclose(run(program, x).sum(1), np.ones(samples), rtol=1e-5)
