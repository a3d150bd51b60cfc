"""Weights of four bits in half a byte each, computed with by the kernels of int8."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.formats import load
from slimgraph.program.capture import capture
from slimgraph.quantization.post_training import quantize


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    x = torch.randn(8, 3, 8, 8)
    return capture(module.eval(), x[:1]), x


def test_the_file_is_smaller_says_the_same_and_runs_in_integers(network, tmp_path):
    program, x = network
    narrow = quantize(program, calibration=[x], weight_bits=4)
    export_onnx(narrow, tmp_path / "bytes.onnx")
    export_onnx(narrow, tmp_path / "halves.onnx", narrow_codes=True)
    onnx.checker.check_model(onnx.load(tmp_path / "halves.onnx"), full_check=True)
    saved = (tmp_path / "bytes.onnx").stat().st_size - (tmp_path / "halves.onnx").stat().st_size
    weights = 3 * 16 * 9 + 16 * 9 + 2560
    assert weights / 2 - 600 < saved < weights / 2
    bytes_, halves = (OnnxModel.open(tmp_path / name)(x)["output"] for name in ("bytes.onnx", "halves.onnx"))
    np.testing.assert_array_equal(halves, bytes_)
    assert count_kernels(tmp_path / "halves.onnx") == count_kernels(tmp_path / "bytes.onnx")
    assert count_kernels(tmp_path / "halves.onnx").convolutions_integer == 2
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "halves.onnx")(x), narrow(x), rtol=0, atol=2e-2)


def test_wider_codes_stay_bytes(network, tmp_path):
    program, x = network
    export_onnx(quantize(program, calibration=[x], weight_bits=5), tmp_path / "model.onnx", narrow_codes=True)
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.INT4 not in types
