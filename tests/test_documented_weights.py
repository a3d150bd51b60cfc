"""Weights alone by the documents' options: grids, thresholds, and what they refuse."""

import pytest
import torch
from torch import nn

from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.documented_weights import clipping_threshold, plan_weights_as_documented
from slimgraph.quantization.preparation import prepare


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 4 * 4, 5)
    return prepare(capture(nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)))


def test_the_threshold_is_the_end_of_the_bin_that_completes_the_part_that_is_kept():
    # Magnitudes 1, 2, … 5000 in bins of width one: the last bin has two, 4999 (its lower end) and 5000.
    weight = -torch.arange(1.0, 5001.0)
    assert clipping_threshold(weight, 0.0) == 5000.0
    assert clipping_threshold(weight, 2 / 5000) == 4999.0
    assert clipping_threshold(weight, 0.5) == 2501.0
    assert clipping_threshold(torch.zeros(4), 0.1) == 0.0


def test_the_defaults_quantize_dense_convolutions_and_fully_connected_layers_per_channel(net):
    plan = plan_weights_as_documented(net)
    assert [w.value for w in plan.weights] == ["0", "3"]
    assert {(w.scheme.bits, w.scheme.axis, w.scheme.code_range) for w in plan.weights} == {(8, 0, (-127, 127))}
    assert plan.kept_float == {"1": "it is not among the operators that are quantized here"}


def test_abs_max_has_one_scale_and_clips_by_the_threshold(net):
    plan = plan_weights_as_documented(net, weight_quantize_type="abs_max", threshold_rate=0.01)
    weight = net.state_dict()["3.weight"]
    threshold = clipping_threshold(weight, 0.01)
    assert 0.9 * weight.abs().max() < threshold < weight.abs().max()
    codes = apply_quantization(net, plan).state_dict()["3.weight"]
    expected = (weight.clamp(-threshold, threshold) / (threshold / 127)).round()
    assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("kind", ["abs_max", "channel_wise_abs_max"])
def test_sixteen_bits_are_next_to_nothing_in_error(net, kind, tmp_path):
    quantized = apply_quantization(net, plan_weights_as_documented(net, weight_bits=16, weight_quantize_type=kind))
    assert quantized.state_dict()["3.weight"].dtype == torch.int16
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), net(x), rtol=0, atol=2e-4)
        export_onnx(quantized, tmp_path / "model.onnx")
        found = OnnxModel.open(tmp_path / "model.onnx")({net.signature.inputs[0].name: x})
        torch.testing.assert_close(torch.from_numpy(next(iter(found.values()))), quantized(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_bits": 4}, ConfigError, "give 8 or 16"),
        ({"weight_quantize_type": "absmax"}, ConfigError, "abs_max"),
        ({"threshold_rate": 1.5, "weight_quantize_type": "abs_max"}, ConfigError, "threshold_rate"),
        ({"threshold_rate": 1e-6}, ConfigError, "for the weight_quantize_type 'abs_max'"),
        ({"quantizable_op_type": ["conv2"]}, UnknownNameError, "conv2d"),
    ],
)
def test_options_that_the_documents_do_not_know_are_refused(net, options, error, message):
    with pytest.raises(error, match=message):
        plan_weights_as_documented(net, **options)
