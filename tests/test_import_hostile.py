"""Damaged model files, imported whole: an error of ours or a program, whatever a byte says."""

import numpy as np
import onnx
import pytest

from paddle_models import linear_pir, linear_program, linear_tensors, write
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.paddle.importer import import_paddle
from slimgraph.program.program import Program
from test_onnx_read_hostile import damaged, twisted
from test_paddle_read_hostile import mutations


def detector():
    """Convolution, batch norm, resizing by computed sizes, a reshape for one sample, and non-maximum suppression."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(6, 2, 3, 3)).astype(np.float32),
        **{name: rng.uniform(0.5, 1, 6).astype(np.float32) for name in ("scale", "shift", "mean", "var")},
        "flat": np.array([1, -1, 6], np.int64),
        "zero": np.array(0, np.int64),
        "four": np.array([4], np.int64),
        "two": np.array([2, 2], np.int64),
        "most": np.array([3], np.int64),
    }
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["b"]),
        node("Clip", ["b"], ["r"]),
        node("Shape", ["r"], ["shape"], end=2),
        node("Shape", ["x"], ["size"], start=2),
        node("Concat", ["shape", "size"], ["sizes"], axis=0),
        node("Resize", ["r", "", "", "sizes"], ["up"], mode="linear"),
        node("Transpose", ["up"], ["t"], perm=[0, 2, 3, 1]),
        node("Reshape", ["t", "flat"], ["rows"]),
        node("Split", ["rows", "split"], ["boxes", "scores"], axis=2),
        node("Transpose", ["scores"], ["s"], perm=[0, 2, 1]),
        node("NonMaxSuppression", ["boxes", "s", "most"], ["kept"]),
    ]
    arrays["split"] = np.array([4, 2], np.int64)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "detector",
        [value("x", onnx.TensorProto.FLOAT, [1, 2, 8, 8])],
        [value("kept", onnx.TensorProto.INT64, ["n", 3])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def outcome(load, path):
    """Whether a file became a program; the one error is harmless, every other ends the test."""
    try:
        program = load(path)
    except ModelImportError:
        return False
    assert isinstance(program, Program)
    return True


def survivors(path, change, seeds):
    content = detector().SerializeToString()
    assert import_onnx(_written(path, content)).tail is not None
    return sum(outcome(import_onnx, _written(path, change(content, seed))) for seed in seeds)


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("change", [damaged, twisted])
def test_a_damaged_onnx_file_is_refused_or_harmless(change, tmp_path):
    assert 0 < survivors(tmp_path / "model.onnx", change, range(25)) < 25


@pytest.mark.slow
@pytest.mark.parametrize("change", [damaged, twisted])
def test_many_damaged_onnx_files_are_refused_or_harmless(change, tmp_path):
    survivors(tmp_path / "model.onnx", change, range(1000, 2500))


@pytest.mark.parametrize(("name", "build"), [("inference.pdmodel", linear_program), ("inference.json", linear_pir)])
def test_a_damaged_paddle_model_is_refused_or_harmless(name, build, tmp_path):
    assert paddle_survivors(tmp_path, name, build, 40) < 40


@pytest.mark.slow
@pytest.mark.parametrize(("name", "build"), [("inference.pdmodel", linear_program), ("inference.json", linear_pir)])
def test_many_damaged_paddle_models_are_refused_or_harmless(name, build, tmp_path):
    paddle_survivors(tmp_path, name, build, 1500)


def paddle_survivors(folder, name, build, count):
    write(folder, build(), linear_tensors())
    path = folder / name
    content = path.read_bytes()
    assert outcome(import_paddle, folder)
    return sum(outcome(import_paddle, _written(path, change).parent) for change in mutations(content, count, seed=5))
