"""Smoothing: the same function, with outlying channels of activations moved into weights."""

import pytest
import torch
from torch import nn

from slimgraph.errors import CalibrationError, ConfigError
from slimgraph.program.capture import capture
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.smoothing import smooth

WIDTH = 8


class Block(nn.Module):
    """Norm, three linear layers that share their input, a product of two of them, and a way around."""

    def __init__(self, outlier=1.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.norm.weight[3] = outlier

    def forward(self, x):
        y = self.norm(x)
        attention = torch.softmax(self.q(y) @ self.k(y).transpose(-1, -2), -1)
        return x + self.out(attention @ self.v(y))


def prepared(module, shape, target="onnxruntime"):
    torch.manual_seed(0)
    program = prepare(capture(module.eval(), torch.zeros(shape)), target=target).eval()
    return program, plan_quantization(program, target=target)


def assert_same_function(program, other, x):
    with torch.no_grad():
        expected, got = program(x), other(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_each_channel_is_divided_by_what_the_paper_says():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[16.0, 0.0], [0.0, 1.0]]))
        module[2].weight.copy_(torch.tensor([[1.0, -4.0]]))
    program, plan = prepared(module, (1, 2))
    x = torch.tensor([[1.0, 1.0], [-5.0, 0.5]])
    smoothed = smooth(program, plan, [x], alpha=0.5)
    # Activations reach 16 and 1, weights 1 and 4: s = √16/√1 = 4 and √1/√4 = ½, divided by their geometric mean √2.
    factors = torch.tensor([4.0, 0.5]) / 2**0.5
    torch.testing.assert_close(smoothed.state_dict()["0.weight"], torch.diag(torch.tensor([16.0, 1.0]) / factors))
    torch.testing.assert_close(smoothed.state_dict()["2.weight"], torch.tensor([[1.0, -4.0]]) * factors)
    assert_same_function(program, smoothed, x)
    all_in = smooth(program, plan, [x], alpha=1.0).state_dict()["2.weight"].abs()
    assert (all_in[0, 0] / all_in[0, 1]).item() == pytest.approx(16 * 1 / (1 * 4))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_outlier_behind_a_norm_is_smoothed_for_all_its_readers_together(target):
    program, plan = prepared(Block(outlier=60.0), (1, 5, WIDTH), target)
    x = torch.randn(32, 5, WIDTH)
    smoothed = smooth(program, plan, [x])
    assert_same_function(program, smoothed, torch.randn(16, 5, WIDTH))
    chosen = smoothed.history[-1].result["alpha"]
    assert set(chosen) == {"norm", "v"}
    assert chosen["norm"] is not None
    gain = smoothed.state_dict()["norm.weight"]
    assert gain.max() / gain.median() < 20  # it was 60


def test_a_link_that_gains_nothing_is_left_alone():
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4))
        # Channel 0 is read with large weights that are on their grid: only moving it would round them.
        module[2].weight.copy_(torch.tensor([127.0, 1.0, 1.0, 1.0]).diag())
    program, plan = prepared(module, (1, 4), "simulate")
    x = torch.randint(-127, 128, (64, 4)) / 127.0
    x[0] = 1.0
    smoothed = smooth(program, plan, [x])
    assert smoothed.history[-1].result["alpha"] == {"0": None}
    assert all(torch.equal(smoothed.state_dict()[name], tensor) for name, tensor in program.state_dict().items())


def test_channels_without_activations_or_weights_stay_as_they_are():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight[0] = 0.0
        module[0].bias[0] = -1.0  # never positive
        module[2].weight[:, 1] = 0.0  # never read
    program, plan = prepared(module, (1, 3))
    smoothed = smooth(program, plan, [torch.randn(32, 3)], alpha=0.7)
    for name in ("0.weight", "0.bias"):
        assert torch.equal(smoothed.state_dict()[name][:2], program.state_dict()[name][:2])
    assert not torch.equal(smoothed.state_dict()["0.weight"][2:], program.state_dict()["0.weight"][2:])
    assert_same_function(program, smoothed, torch.randn(16, 3))


def test_layers_that_stay_float_are_not_smoothed_for():
    program, _ = prepared(Block(outlier=60.0), (1, 5, WIDTH))
    plan = plan_quantization(program, skip=["q", "k", "v", "out"], operators=["linear"])
    smoothed = smooth(program, plan, [torch.randn(4, 5, WIDTH)])
    assert all(torch.equal(smoothed.state_dict()[name], tensor) for name, tensor in program.state_dict().items())


def test_batches_of_different_sizes_are_smoothed_over():
    program, plan = prepared(Block(outlier=60.0), (1, 5, WIDTH))
    x = torch.randn(40, 5, WIDTH)
    whole, cut = smooth(program, plan, [x]), smooth(program, plan, [x[:3], x[3:4], x[4:40]])
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], tensor)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, (), (0.5, 2.0)])
def test_strengths_outside_of_0_to_1_are_refused(alpha):
    program, plan = prepared(Block(), (1, 5, WIDTH))
    with pytest.raises(ConfigError, match="alpha is"):
        smooth(program, plan, [torch.randn(4, 5, WIDTH)], alpha=alpha)


def test_data_that_cannot_be_used_are_named():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    program, plan = prepared(module, (1, 3))
    with pytest.raises(CalibrationError, match="has no batch"):
        smooth(program, plan, [])
    program.state_dict()["0.weight"][0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="'1' holds NaN or an infinity in calibration batch 0") as caught:
        smooth(program, plan, [torch.ones(4, 3)])
    assert "executing" not in str(caught.value)
