"""Normalizations of ONNX files: judged by ONNX Runtime where versions differ, by hand where it has none."""

import numpy as np
import pytest
import torch
from onnx import TensorProto

from onnx_judge import array, import_onnx, one, save, targets

CHANNELS = {"s": array(4, seed=1), "b": array(4, seed=2)}
STATISTICS = CHANNELS | {"mean": array(4, seed=3), "var": array(4, seed=4, low=0.5, high=2)}


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_norm_is_one_operator_whose_scale_is_trained_and_whose_statistics_are_not(tmp_path, opset):
    program = one(tmp_path, "BatchNormalization", constants=STATISTICS, opset=opset, epsilon=1e-3, momentum=0.8)
    assert targets(program) == ["batch_norm.default"]
    assert {name for name, _ in program.named_parameters()} == {"s", "b"}
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert node.args[6] == 0.2  # PyTorch's momentum is what is new, exactly although the file has 24 bits


def test_batch_norm_of_a_file_trains(tmp_path):
    program = one(tmp_path, "BatchNormalization", constants=STATISTICS)
    program.train()
    y = program(torch.from_numpy(array(8, 4, 6, 5, low=2, high=9)))
    assert torch.allclose(
        y.mean((0, 2, 3)), dict(program.named_parameters())["b"], atol=1e-5
    )  # of the batch now, whatever the file says
    assert not torch.equal(dict(program.named_buffers())["mean"], torch.from_numpy(STATISTICS["mean"]))


@pytest.mark.parametrize("x", [("n", 4), ("n", 4, 3), ("n", 4, 2, 3, 2)])
def test_batch_norm_takes_any_number_of_axes(tmp_path, x):
    one(tmp_path, "BatchNormalization", x=x, constants=STATISTICS)


def test_batch_norm_of_old_files_can_have_statistics_for_each_element(tmp_path):
    constants = {name: array(2, 3, seed=seed, low=0.5) for seed, name in enumerate(("s", "b", "mean", "var"))}
    node = ("BatchNormalization", "x s b mean var", "y", {"spatial": 0, "epsilon": 0.0})
    path = save(tmp_path / "m.onnx", [node], x=("n", 2, 3), constants=constants, opset=7, made=TensorProto.FLOAT)
    x = torch.from_numpy(array(5, 2, 3))
    s, b, mean, var = map(torch.from_numpy, constants.values())
    torch.testing.assert_close(import_onnx(path)(x), (x - mean) / var.sqrt() * s + b)


def test_batch_norm_that_was_exported_in_training_normalizes_by_the_batch(tmp_path):
    node = ("BatchNormalization", "x s b mean var", "y second third", {"training_mode": 1, "momentum": 0.75})
    names = ("y", "second")
    path = save(tmp_path / "m.onnx", [node], x=("n", 4, 3), constants=STATISTICS, outputs=names, made=TensorProto.FLOAT)
    x = torch.from_numpy(array(5, 4, 3))
    found = import_onnx(path)(x)
    own = x.mean((0, 2))
    torch.testing.assert_close(found["y"].mean((0, 2)), torch.from_numpy(STATISTICS["b"]))
    torch.testing.assert_close(found["second"], torch.from_numpy(STATISTICS["mean"]) * 0.75 + own * 0.25)


@pytest.mark.parametrize(
    ("kind", "opset", "constants", "attributes", "target"),
    [
        ("InstanceNormalization", 7, CHANNELS, {}, "instance_norm.default"),
        ("InstanceNormalization", 22, CHANNELS, {"epsilon": 0.1}, "instance_norm.default"),
        ("LayerNormalization", 17, {"s": array(5), "b": array(5)}, {}, "layer_norm.default"),
        ("LayerNormalization", 17, {"s": array(6, 5), "b": array(6, 5)}, {"axis": 2}, "layer_norm.default"),
        ("LayerNormalization", 17, {"s": array(1, 5), "b": array(6, 1)}, {"axis": 2}, "layer_norm.default"),
        ("GroupNormalization", 18, {"s": array(2), "b": array(2)}, {"num_groups": 2}, "group_norm.default"),
        ("GroupNormalization", 21, CHANNELS, {"num_groups": 2}, "group_norm.default"),
        ("RMSNormalization", 23, {"s": array(5)}, {}, "rms_norm.default"),
        ("LRN", 7, {}, {"size": 3, "alpha": 0.1, "bias": 2.0}, "avg_pool2d.default"),
        ("LRN", 13, {}, {"size": 5, "alpha": 0.1, "beta": 0.5}, "avg_pool2d.default"),
        ("LpNormalization", 7, {}, {"p": 1, "axis": 1}, "linalg_vector_norm.default"),
        ("LpNormalization", 22, {}, {"p": 2}, "linalg_vector_norm.default"),
        ("MeanVarianceNormalization", 9, {}, {"axes": [1, 2, 3]}, "mean.dim"),
        ("MeanVarianceNormalization", 13, {}, {"axes": [2, 3]}, "mean.dim"),
    ],
)
def test_norms_equal_onnx_runtime_and_are_pytorchs_own(tmp_path, kind, opset, constants, attributes, target):
    program = one(tmp_path, kind, constants=constants, opset=opset, made=TensorProto.FLOAT, **attributes)
    assert target in targets(program)


def test_layer_norm_gives_its_statistics_if_they_are_read(tmp_path):
    one(tmp_path, "LayerNormalization", constants={"s": array(5), "b": array(5)}, outputs=3)


def test_local_response_norm_of_an_even_size_reaches_one_channel_further_behind(tmp_path):
    node = ("LRN", "x", "y", {"size": 2, "alpha": 2.0, "beta": 1.0, "bias": 0.0})
    program = import_onnx(save(tmp_path / "m.onnx", [node], x=("n", 3, 1, 1)))
    y = program(torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1))
    # Channel 0 sees 0 and 1, channel 1 sees 1 and 2, channel 2 itself alone.
    np.testing.assert_allclose(y.flatten(), [1 / 5, 2 / 13, 3 / 9], rtol=1e-6)
