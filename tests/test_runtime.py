"""An ONNX file as a callable, and what is refused before ONNX Runtime sees it."""

import pickle
import zipfile

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from onnx import TensorProto, helper

from onnx_models import Graph, float_conv, integer_conv, save_with_external_data
from slimgraph.deploy.onnx_file import read_onnx
from slimgraph.deploy.runtime import OnnxModel, RunOptions, create_session
from slimgraph.errors import ConfigError, DataError, ModelLoadError


def scaled(dtype=TensorProto.FLOAT, shape=("batch", 3)):
    """y = x + x, z = -x."""
    graph = Graph()
    x = graph.input(*shape, dtype=dtype)
    y, z = graph.op("Add", x, x), graph.op("Neg", x)
    return graph.bytes(y, z, dtype=dtype)


def affine(value=3.0):
    """y = x + weight, the weight being the only constant."""
    graph = Graph()
    return graph.model(graph.op("Add", graph.input("batch", 4), graph.constant(np.full(4, value, np.float32))))


@pytest.mark.parametrize("give", [
    lambda model, x: model(x),
    lambda model, x: model(torch.from_numpy(x)),
    lambda model, x: model([x]),
    lambda model, x: model({"x": x}),
    lambda model, x: model(x=x),
])  # fmt: skip
def test_inputs_may_be_arrays_tensors_sequences_mappings_or_keywords(give):
    y, z = give(OnnxModel.open(scaled()), np.array([[1, 2, -3]], np.float32)).values()
    assert_array_equal(y, [[2, 4, -6]])
    assert_array_equal(z, [[-1, -2, 3]])


def test_outputs_come_by_name_in_the_order_of_the_file():
    model = OnnxModel.open(scaled())
    assert list(model(np.zeros((1, 3), np.float32))) == [spec.name for spec in model.outputs] == ["add_1", "neg_2"]


def test_signature_tells_names_types_and_free_axes():
    model = OnnxModel.open(scaled())
    assert [str(spec) for spec in model.inputs] == ["x: float32[batch, 3]"]
    assert [str(spec) for spec in model.outputs] == ["add_1: float32[batch, 3]", "neg_2: float32[batch, 3]"]


def test_axes_without_a_name_are_named_after_their_input():
    assert OnnxModel.open(scaled(shape=(None, 3))).inputs[0].shape == ("x:0", 3)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_free_batch_axis_takes_any_size(batch):
    assert OnnxModel.open(scaled())(np.ones((batch, 3), np.float32))["add_1"].shape == (batch, 3)


def halves(dtype):
    """y = x · x, for types in which ONNX Runtime has no arithmetic: cast, multiply, cast back."""
    graph = Graph()
    wide = graph.op("Cast", graph.input("batch", 3, dtype=dtype), to=TensorProto.FLOAT)
    return graph.bytes(graph.op("Cast", graph.op("Mul", wide, wide), to=dtype), dtype=dtype)


@pytest.mark.parametrize(("onnx_type", "dtype", "array_type"), [
    (TensorProto.FLOAT16, torch.float16, np.float16),
    (TensorProto.BFLOAT16, torch.bfloat16, np.float32),  # NumPy has no bfloat16; float32 holds every one exactly
    (TensorProto.DOUBLE, torch.float64, np.float64),
])  # fmt: skip
def test_other_floating_types_go_in_and_come_out(onnx_type, dtype, array_type):
    model = OnnxModel.open(halves(onnx_type))
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    (y,) = model(x).values()
    assert model.inputs[0].dtype == dtype
    assert y.dtype == array_type
    assert_array_equal(y, [[1, 4, 0.25]])


def casting(dtype):
    """Float input and output, computed in another type in between."""
    graph = Graph()
    x = graph.op("Cast", graph.input("batch", 3), to=dtype)
    return graph.bytes(graph.op("Cast", graph.op("Add", x, x), to=TensorProto.FLOAT))


def widened(dtype):
    """An input of that type, computed in float."""
    graph = Graph()
    return graph.bytes(graph.op("Cast", graph.input("batch", 3, dtype=dtype), to=TensorProto.FLOAT))


def weighted(dtype):
    """A constant of that type, and a float input."""
    graph = Graph()
    weight = graph.op("Cast", graph.constant(np.ones(3, dtype)), to=TensorProto.FLOAT)
    return graph.bytes(graph.op("Add", graph.input("batch", 3), weight))


@pytest.mark.parametrize(("source", "optimize", "level"), [
    (scaled(), True, "ENABLE_ALL"),
    (casting(TensorProto.INT32), True, "ENABLE_ALL"),
    (weighted(np.float64), True, "ENABLE_ALL"),
    (scaled(TensorProto.FLOAT16), True, "ENABLE_EXTENDED"),  # at the highest level some crash the process
    (widened(TensorProto.BFLOAT16), True, "ENABLE_EXTENDED"),
    (casting(TensorProto.FLOAT16), True, "ENABLE_EXTENDED"),
    (weighted(np.float16), True, "ENABLE_EXTENDED"),
    (scaled(TensorProto.FLOAT16), "all", "ENABLE_ALL"),  # who asks for it gets it
    (scaled(TensorProto.FLOAT16), False, "DISABLE_ALL"),
])  # fmt: skip
def test_models_that_hold_halves_are_not_optimized_at_the_highest_level(source, optimize, level):
    session = create_session(source, read_onnx(source), RunOptions(optimize=optimize))
    used = session.get_session_options().graph_optimization_level
    assert used.name == f"ORT_{level}"


def test_float32_data_are_rounded_for_a_half_precision_model():
    (y,) = OnnxModel.open(halves(TensorProto.BFLOAT16))(np.array([[1 + 2**-12, 0, 0]], np.float32)).values()
    assert y[0, 0] == 1  # bfloat16 has 8 bits of fraction


def test_tensors_with_gradients_and_transposed_ones_are_taken():
    x = torch.arange(6.0, requires_grad=True).reshape(3, 2).T
    assert_array_equal(OnnxModel.open(scaled())(x)["neg_2"], -x.detach().numpy())


def test_optimizations_and_integer_kernels_can_be_switched_off_and_agree():
    x = np.random.default_rng(0).normal(size=(2, 16, 8, 8)).astype(np.float32)
    results = [
        OnnxModel.open(integer_conv(), **options)(x).popitem()[1]
        for options in ({}, {"optimize": False}, {"optimize": "basic"}, {"integer_kernels": False})
    ]
    for result in results[1:]:
        assert_allclose(result, results[0], atol=0.0501)  # one output quantum: sums of floats reorder


def test_other_threads_are_another_session_of_the_same_model():
    model = OnnxModel.open(scaled(), threads=1)
    assert model.with_threads(1) is model
    two = model.with_threads(2)
    assert two.options.threads == 2
    assert_array_equal(two(np.ones((1, 3), np.float32))["neg_2"], -np.ones((1, 3)))


# Wrong inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("give", "message"), [
    (lambda model: model(y=np.zeros((1, 3), np.float32)), "'y', which the program does not take"),
    (lambda model: model(np.zeros((1, 4), np.float32)), r"float32\[1, 4\]"),
    (lambda model: model(np.zeros((1, 3), np.int64)), "int64"),
    (lambda model: model(), "lacks the input 'x'"),
    (lambda model: model(np.zeros((1, 3)), x=np.zeros((1, 3))), "not both"),
])  # fmt: skip
def test_wrong_inputs_are_data_errors(give, message):
    with pytest.raises(DataError, match=message):
        give(OnnxModel.open(scaled()))


def test_what_fails_while_running_is_one_short_paragraph(capfd):
    graph = Graph()
    x = graph.input("batch", 4)
    model = OnnxModel.open(graph.bytes(graph.op("Reshape", x, graph.constant(np.array([2, 4])))))
    with pytest.raises(DataError, match=r"cannot be run on x\[3, 4\]: .*Reshape") as raised:
        model(np.zeros((3, 4), np.float32))
    text = str(raised.value)
    assert "\n" not in text
    assert ".cc" not in text
    assert "ONNXRuntimeError" not in text
    assert len(text) < 450
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own log would print the same once more


@pytest.mark.parametrize(("options", "message"), [
    ({"threads": -1}, "threads is -1"),
    ({"optimize": "most"}, "optimize is 'most'"),
    ({"provider": "CPUExecutionProvide"}, "Closest: CPUExecutionProvider"),
])  # fmt: skip
def test_wrong_options_are_config_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        OnnxModel.open(scaled(), **options)


# What is not a model ------------------------------------------------------------------------------------------------


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "is not a file"),
    (lambda path: path.write_bytes(b""), "is empty"),
    (lambda path: path.write_bytes(pickle.dumps({"weight": 1})), "Python pickle.*not opened"),
    (lambda path: path.write_bytes(pickle.dumps([1], protocol=2)), "Python pickle"),
    (_zip, r"zip archive, as `torch\.save`"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    (lambda path: path.write_text("<!DOCTYPE html>"), "HTML"),
    (lambda path: path.write_bytes(b"\x18\x00\x00\x00ORTM" + b"\0" * 40), r"\.ort"),
    (lambda path: path.write_bytes(b"not a model at all"), "no ONNX model"),
    (lambda path: path.write_bytes(float_conv()[:-100]), "cut off"),
])  # fmt: skip
def test_what_is_not_an_onnx_file_is_refused_with_what_it_is(tmp_path, write, message):
    path = tmp_path / "model.onnx"
    write(path)
    with pytest.raises(ModelLoadError, match=message) as raised:
        OnnxModel.open(path)
    assert str(path) in str(raised.value)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_load_error_and_nothing_else(content):
    with pytest.raises(ModelLoadError, match="the model in memory"):
        OnnxModel.open(content)


@pytest.mark.parametrize("length", range(0, len(scaled()), 7))
def test_a_truncated_model_is_a_load_error(length):
    with pytest.raises(ModelLoadError):
        OnnxModel.open(scaled()[:length])


def test_unknown_operators_are_named_in_one_paragraph(capfd):
    graph = Graph()
    with pytest.raises(ModelLoadError, match=r"cannot load the model in memory: .*Wobble") as raised:
        OnnxModel.open(graph.bytes(graph.op("Wobble", graph.input(1, 3))))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_inputs_that_are_not_tensors_of_numbers_are_refused():
    graph = Graph()
    text = graph.input("n", name="text", dtype=TensorProto.STRING)
    with pytest.raises(ModelLoadError, match=r"'text' is a tensor\(string\)"):
        OnnxModel.open(graph.bytes(graph.op("StringNormalizer", text), dtype=TensorProto.STRING))


def test_an_input_without_any_shape_is_refused():
    graph = Graph()
    graph.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    with pytest.raises(ModelLoadError, match="'x' has no shape"):
        OnnxModel.open(graph.bytes(graph.op("Neg", "x")))


# Weights in other files ---------------------------------------------------------------------------------------------


def test_weights_beside_the_model_are_read(tmp_path):
    save_with_external_data(affine(), tmp_path / "model.onnx")
    assert_array_equal(OnnxModel.open(tmp_path / "model.onnx")(np.zeros((1, 4), np.float32))["add_2"], [[3] * 4])


def test_a_model_and_its_data_may_both_be_links_into_one_store(tmp_path):
    store, shown = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    shown.mkdir()
    save_with_external_data(affine(), store / "4f2a", location="weights.bin")
    (store / "weights.bin").rename(store / "91bc")
    (shown / "model.onnx").symlink_to("../blobs/4f2a")
    (shown / "weights.bin").symlink_to("../blobs/91bc")
    assert_array_equal(OnnxModel.open(shown / "model.onnx")(np.zeros((1, 4), np.float32))["add_2"], [[3] * 4])


def _moved(model, **entries):
    """The model with its weight said to be elsewhere."""
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize("location", [
    "/etc/passwd", "../secret.bin", "data/../../secret.bin", "link.bin", "C:\\secret.bin", "..\\secret.bin",
])  # fmt: skip
def test_weights_outside_the_models_folder_are_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (folder / "link.bin").symlink_to("../secret.bin")
    onnx.save(_moved(affine(), location=location), folder / "model.onnx")
    with pytest.raises(ModelLoadError, match="outside the model's folder"):
        OnnxModel.open(folder / "model.onnx")


@pytest.mark.parametrize(("entries", "message"), [
    ({"location": "absent.bin"}, "missing"),
    ({"location": "weights.bin", "length": "17"}, "too short"),
    ({"location": "weights.bin", "offset": "8", "length": "16"}, "too short"),
    ({"location": "weights.bin", "offset": "-1"}, "damaged"),
    ({"offset": "0"}, "damaged"),
    ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096", "length": "16"}, "missing"),  # an address, for ONNX Runtime
])  # fmt: skip
def test_damaged_references_to_weights_are_refused(tmp_path, entries, message):
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    onnx.save(_moved(affine(), **entries), tmp_path / "model.onnx")
    with pytest.raises(ModelLoadError, match=message):
        OnnxModel.open(tmp_path / "model.onnx")


def test_a_model_in_memory_cannot_have_weights_in_files():
    with pytest.raises(ModelLoadError, match="Give the path"):
        OnnxModel.open(_moved(affine(), location="weights.bin").SerializeToString())


def test_references_inside_branches_are_checked_too(tmp_path):
    inner = _moved(affine(), location="../secret.bin").graph
    inner.ClearField("input")
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([branch], "branches", [condition, x], [helper.make_empty_tensor_value_info("y")])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ModelLoadError, match="outside the model's folder"):
        OnnxModel.open(tmp_path / "model.onnx")
