"""Cross-layer equalization: the same function, with weight ranges that match from layer to layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from slimgraph.errors import ProgramError
from slimgraph.program.capture import capture
from slimgraph.quantization.channel_links import channel_links
from slimgraph.quantization.channel_ranges import channel_ranges, clip_places
from slimgraph.quantization.equalization import equalize
from slimgraph.quantization.preparation import prepare


class Two(nn.Module):
    def __init__(self, first, second, between=torch.relu):
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Separable(nn.Module):
    """Pointwise, depthwise, pointwise, and a head, with channels of very different sizes."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            activation(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 1),
            activation(),
        )
        self.fc = nn.Linear(12 * 16, 5)
        with torch.no_grad():
            for layer in (self.features[0], self.features[3], self.features[7]):
                layer.weight *= torch.logspace(-2, 2, len(layer.weight)).reshape(-1, 1, 1, 1)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


def prepared(module, shape):
    return prepare(capture(module.eval(), torch.zeros(shape))).eval()


def assert_same_function(program, other, x):
    with torch.no_grad():
        expected, got = program(x), other(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def linears(first, second, bias=(0.0, 0.0)):
    one, two = nn.Linear(2, 2), nn.Linear(2, 1)
    with torch.no_grad():
        one.weight.copy_(torch.tensor(first))
        one.bias.copy_(torch.tensor(bias))
        two.weight.copy_(torch.tensor(second))
    return one, two


def test_both_sides_get_the_geometric_mean_of_their_ranges():
    one, two = linears([[8.0, -4.0], [0.5, 0.25]], [[2.0, 8.0]], bias=(4.0, 1.0))
    program = prepared(Two(one, two), (1, 2))
    equal = equalize(program).state_dict()
    # Channel 0: r₁ = 8, r₂ = 2, so s = √16 / 2 = 2; channel 1: r₁ = ½, r₂ = 8, so s = 2 / 8 = ¼.
    torch.testing.assert_close(equal["first.weight"], torch.tensor([[4.0, -2.0], [2.0, 1.0]]))
    torch.testing.assert_close(equal["first.bias"], torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(equal["second.weight"], torch.tensor([[4.0, 2.0]]))


@pytest.mark.parametrize("first", [[[0.0, 0.0], [3.0, 0.0]], [[2.0, 1.0], [3.0, 0.0]]])
def test_channels_that_are_not_produced_or_not_read_stay_as_they_are(first):
    one, two = linears(first, [[5.0 if first[0][0] == 0 else 0.0, 3.0]], bias=(1.0, 1.0))
    program = prepared(Two(one, two), (1, 2))
    equal = equalize(program)
    assert torch.equal(equal.state_dict()["first.weight"], program.state_dict()["first.weight"])
    assert torch.equal(equal.state_dict()["second.weight"], program.state_dict()["second.weight"])


def test_a_chain_converges_to_equal_ranges_everywhere():
    torch.manual_seed(0)
    program = prepared(Separable(), (1, 3, 8, 8))
    equal = equalize(program)
    x = torch.randn(16, 3, 8, 8)
    assert_same_function(program, equal, x)
    weights = equal.state_dict()
    rows = lambda name: weights[name].abs().flatten(1).amax(1)  # noqa: E731
    columns = lambda name: weights[name].abs().transpose(0, 1).flatten(1).amax(1)  # noqa: E731
    torch.testing.assert_close(rows("features.0.weight"), rows("features.3.weight"), rtol=1e-3, atol=0)
    torch.testing.assert_close(rows("features.3.weight"), columns("features.7.weight"), rtol=1e-3, atol=0)
    by_channel = weights["fc.weight"].abs().reshape(5, 12, 16).amax((0, 2))
    torch.testing.assert_close(rows("features.7.weight"), by_channel, rtol=1e-3, atol=0)
    assert equal.history[-1].step == "equalize"
    assert equal.history[-1].result["links"] == 3
    assert equal.history[-1].result["sweeps"] < 30


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_small_and_transposed_layers_compute_the_same(channels, transposed):
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    program = prepared(Two(kind(2, channels, 3), kind(channels, 2, 2)), (1, 2, 6, 6))
    equal = equalize(program)
    assert not torch.equal(equal.state_dict()["first.weight"], program.state_dict()["first.weight"])
    assert_same_function(program, equal, torch.randn(4, 2, 6, 6))


def test_the_program_that_is_given_stays_as_it_is():
    program = prepared(Separable(), (1, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    equalize(program)
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict().items())


# ReLU6


def test_channels_that_a_relu6_may_cut_stay_as_they_are():
    program = prepared(Separable(nn.ReLU6), (1, 3, 8, 8))
    equal = equalize(program)
    assert all(torch.equal(equal.state_dict()[name], tensor) for name, tensor in program.state_dict().items())


def test_channels_that_stay_below_the_limit_move_as_far_as_it_allows():
    one, two = linears([[6.0, 0.0], [0.01, 0.0]], [[0.01, 6.0]])
    program = prepared(Two(one, two, functional.relu6), (1, 2))
    x = torch.linspace(-1, 2, 31).reshape(-1, 1).repeat(1, 2)
    ranges = channel_ranges(program, clip_places(channel_links(program)), [x])
    equal = equalize(program, ranges=ranges)
    # Channel 0 reaches 12 and is cut. Channel 1 reaches 0.02; equal ranges would bring it to 0.49, which is below 6.
    assert equal.state_dict()["first.weight"][:, 0].tolist() == pytest.approx([6.0, 0.06**0.5])
    assert_same_function(program, equal, x)
    wide = channel_ranges(program, clip_places(channel_links(program)), [x, torch.full((1, 2), 300.0)])
    nearly = equalize(program, ranges=wide)  # reaches 3 now, so that it can only double
    assert nearly.state_dict()["first.weight"][:, 0].tolist() == pytest.approx([6.0, 0.02])
    assert_same_function(program, nearly, torch.full((1, 2), 300.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad):
    program = prepared(Separable(), (1, 3, 8, 8))
    program.state_dict()["features.3.weight"].view(-1)[0] = bad
    with pytest.raises(ProgramError, match=r"'features\.3\.weight' has NaN or infinite weights"):
        equalize(program)
