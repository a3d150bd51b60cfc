"""Layers that were spared stay float in ONNX Runtime, which quantizes by itself what stands between integers."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.onnx_float_layers import keep_float_layers
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.formats import load
from slimgraph.program.capture import capture
from slimgraph.quantization.post_training import quantize


class Between(nn.Module):
    def __init__(self, middle, last):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3, padding=1), middle, last

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(128, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)).flatten(1))).contiguous())


ALL = slice(None)
CASES = {  # with the weights that read the first channel
    "convolution": (Between(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)), (ALL, 0)),
    "grouped": (Between(nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(16, 4, 1)), (slice(4), 0)),
    "depthwise": (Between(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 4, 1)), 0),
    "transposed": (Between(nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 4, 1)), 0),
    "linear": (Flat(), (ALL, slice(16))),
}


@pytest.fixture(params=CASES)
def spared(request):
    """A program with its middle layer in float, whose largest weights read a channel that is zero.

    In eight bits they would leave no codes for the others.
    """
    module, reading = CASES[request.param]
    torch.manual_seed(0)
    with torch.no_grad():
        module.first.weight[0], module.first.bias[0] = 0.0, -1.0
        module.middle.weight[reading] = 300.0
    x = torch.randn(16, 3, 4, 4)
    return quantize(capture(module.eval(), x[:1]), calibration=[x], skip=["middle"]), x


def test_a_spared_layer_computes_in_float(spared, tmp_path):
    program, x = spared
    export_onnx(program, tmp_path / "model.onnx")
    with torch.no_grad():
        wanted = program(x).numpy()
    found = OnnxModel.open(tmp_path / "model.onnx")(x)["output"]
    step = np.abs(wanted).max() / 255
    assert np.abs(found - wanted).max() <= 1.5 * step  # one code in one of the quantizers, where both round
    kernels = count_kernels(tmp_path / "model.onnx")
    assert [layer.name for layer in kernels.float_layers] == ["middle"]


def test_without_that_form_it_is_rounded(spared, tmp_path, monkeypatch):
    """If this fails, ONNX Runtime no longer does it, and `keep_float_layers` can go."""
    program, x = spared
    monkeypatch.setattr("slimgraph.deploy.onnx.keep_float_layers", lambda model: None)
    export_onnx(program, tmp_path / "model.onnx")
    with torch.no_grad():
        wanted = program(x).numpy()
    found = OnnxModel.open(tmp_path / "model.onnx")(x)["output"]
    assert np.abs(found - wanted).max() > 0.1 * np.abs(wanted).max()


def test_the_file_says_the_same_and_reads_back(spared, tmp_path):
    program, x = spared
    export_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    own = next(node for node in model.graph.node if node.output[0] == "middle/input")
    scales = next(tensor for tensor in model.graph.initializer if tensor.name == own.input[1])
    assert len(set(onnx.numpy_helper.to_array(scales).tolist())) == 1
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "model.onnx")(x), program(x), rtol=1e-4, atol=1e-4)


def test_float_and_wholly_quantized_files_stay_as_they_are(tmp_path):
    module, _ = CASES["convolution"]
    program = capture(module.eval(), torch.zeros(1, 3, 4, 4))
    for each in (program, quantize(program, calibration=[torch.randn(4, 3, 4, 4)])):
        export_onnx(each, tmp_path / "model.onnx")
        model = ir.load(tmp_path / "model.onnx")
        before = len(list(model.graph))
        keep_float_layers(model)
        assert len(list(model.graph)) == before
