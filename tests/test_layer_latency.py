"""How long each layer takes in ONNX Runtime: to which layer a kernel's time is booked."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgraph.deploy.layer_latency import measure_layer_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ConfigError, DataError
from slimgraph.program.capture import capture
from slimgraph.quantization.post_training import quantize


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.depthwise(F.relu(self.norm(self.stem(x))))
        return self.head(F.hardswish(self.pointwise(self.pool(F.relu6(x)))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.twice = nn.Linear(16, 16)

    def forward(self, x):
        return self.twice(self.twice(self.layer(x)) + x)


@pytest.mark.parametrize(
    ("module", "shape", "layers"),
    [
        (Convolutions(), (1, 3, 12, 12), {"stem", "depthwise", "pointwise", "head"}),
        (
            Attention(),
            (1, 6, 16),
            {
                "layer.self_attn/linear_0",
                "layer.self_attn/scaled_dot_product_attention_0",
                "layer.self_attn/linear_1",
                "layer.linear1",
                "layer.linear2",
                "twice",
                "twice:2",
            },
        ),
    ],
)
def test_layers_have_the_names_of_the_program_in_float_and_in_integers(module, shape, layers, tmp_path):
    torch.manual_seed(0)
    program = capture(module.eval(), torch.zeros(shape))
    for each in (program, quantize(program, calibration=[torch.randn(8, *shape[1:])])):
        export_onnx(each, tmp_path / "model.onnx")
        found = measure_layer_latency(tmp_path / "model.onnx", torch.zeros(shape), warmup=1, repeats=3)
        assert found.layers_us.keys() == layers
        assert min(*found.layers_us.values(), found.others_us) >= 0
        assert found.total_us == pytest.approx(sum(found.layers_us.values()) + found.others_us)
        assert found.repeats == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_cannot_be_measured_is_said(tmp_path):
    export_onnx(capture(nn.Linear(4, 2), torch.zeros(1, 4)), tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="repeats is 0"):
        measure_layer_latency(tmp_path / "model.onnx", torch.zeros(1, 4), repeats=0)
    with pytest.raises(DataError):
        measure_layer_latency(tmp_path / "model.onnx", torch.zeros(1, 5))
