"""Channels that can be made smaller where they are produced and larger where they are read."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import toys
from models.captured import captured
from slimgraph.program.capture import capture
from slimgraph.quantization.channel_links import channel_links
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.rescale import rescale


def links_of(module, *inputs):
    program = prepare(capture(module.eval(), inputs)).eval()
    return program, channel_links(program)


def described(links):
    return {link.producer: tuple(reader.layer for reader in link.readers) for link in links}


def rescaled_at_random(program, links):
    """Any factors at all must leave the function as it was: that is what a link promises."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for link in links:
        random = torch.exp(2 * torch.randn(link.channels, generator=generator, dtype=torch.float64))
        factors[link.producer] = torch.where(link.unclipped, random, 1.0)
    return rescale(program, links, factors)


def assert_same_function(program, other, *inputs):
    expected, got = program.copy().double()(*inputs), other.copy().double()(*inputs)
    expected, got = (x if isinstance(x, torch.Tensor) else next(iter(x)) for x in (expected, got))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


class Wrapped(nn.Module):
    """Two layers of a kind around a function."""

    def __init__(self, first, between, second):
        super().__init__()
        self.first, self.between, self.second = first, between, second

    def forward(self, x):
        return self.second(self.between(self.first(x)))


PICTURE = (2, 3, 8, 8)
BETWEEN = {
    "nothing": (lambda x: x, 6),
    "relu": (torch.relu, 6),
    "leaky": (lambda x: functional.leaky_relu(x, 0.2), 6),
    "clamp": (lambda x: x.clamp(min=0), 6),
    "negative half": (lambda x: -0.5 * x / 3.0, 6),
    "max pool": (lambda x: functional.max_pool2d(x, 3, stride=2, padding=1), 6),
    "average pool": (lambda x: functional.avg_pool2d(x, 2, padding=1), 6),
    "resized": (lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"), 6),
    "zero padding": (lambda x: functional.pad(x, (1, 2, 0, 1)), 6),
    "padded channels": (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1)), 8),
    "shuffled": (lambda x: functional.channel_shuffle(x, 3), 6),
    "chunks": (lambda x: torch.cat([x.chunk(2, 1)[1], torch.relu(x[:, :3])], 1), 6),
    "gated": (lambda x: x * torch.sigmoid(x.flatten(1).mean(1)[:, None, None, None].detach()), 6),
    "constant gain": (lambda x: x * torch.full((1, 1, 1, 1), 0.3), 6),
    "twice": (lambda x: torch.cat([x, torch.relu(x)], 1), 12),
}


@pytest.mark.parametrize(
    ("name", "second"),
    [(name, "dense") for name in BETWEEN]
    + [("padded channels", second) for second in ("grouped", "transposed", "grouped transposed")],
)
def test_channels_go_through_what_is_homogeneous_in_each(name, second):
    between, channels = BETWEEN[name]
    layers = {
        "dense": lambda: nn.Conv2d(channels, 4, 3, padding=1),
        "grouped": lambda: nn.Conv2d(channels, 4, 3, padding=1, groups=2),
        "transposed": lambda: nn.ConvTranspose2d(channels, 4, 3, stride=2),
        "grouped transposed": lambda: nn.ConvTranspose2d(channels, 4, 3, stride=2, groups=2, bias=False),
    }
    module = Wrapped(nn.Conv2d(3, 6, 3, padding=1), between, layers[second]())
    program, links = links_of(module, torch.randn(PICTURE))
    data = torch.randn(3, *PICTURE[1:], dtype=torch.float64)
    if name == "gated":  # the gate is made of the channels themselves
        assert links == ()
        return
    assert described(links) == {"first": ("second",)}
    assert links[0].free.all()
    other = rescaled_at_random(program, links)
    assert not torch.equal(other.state_dict()["first.weight"], program.state_dict()["first.weight"])
    assert_same_function(program, other, data)


@pytest.mark.parametrize("first", ["transposed", "grouped transposed", "depthwise", "norm", "linear"])
def test_channels_come_from_every_kind_of_layer(first):
    layers = {
        "transposed": lambda: nn.ConvTranspose2d(3, 6, 3),
        "grouped transposed": lambda: nn.ConvTranspose2d(3, 6, 3, groups=3),
        "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
        "norm": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.BatchNorm2d(6)),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 6 * 16), nn.Unflatten(1, (6, 4, 4))),
    }
    program, links = links_of(Wrapped(layers[first](), torch.relu, nn.Conv2d(6, 2, 3)), torch.randn(PICTURE))
    if first == "linear":  # the 16 features of a channel cannot have factors of their own
        assert links == ()
        return
    assert [reader.layer for link in links for reader in link.readers] == ["second"]
    data = torch.randn(PICTURE, dtype=torch.float64)
    assert_same_function(program, rescaled_at_random(program, links), data)


NOT_HOMOGENEOUS = {
    "gelu": functional.gelu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "added constant": lambda x: x + 1.0,
    "squared": lambda x: x * x,
    "cut below one": lambda x: x.clamp(min=1.0),
    "padded with ones": lambda x: functional.pad(x, (1, 1, 1, 1), value=1.0),
    "mixed over channels": lambda x: x + x.flip(1),
    "residual": lambda x: x + torch.relu(x),
    "softmax": lambda x: x.softmax(1),
    "channels summed": lambda x: x.mean(1, keepdim=True).expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_channels_end_at_what_is_not(name):
    _, links = links_of(
        Wrapped(nn.Conv2d(3, 6, 3, padding=1), NOT_HOMOGENEOUS[name], nn.Conv2d(6, 4, 3)), torch.randn(PICTURE)
    )
    assert links == ()


def test_a_limit_is_remembered_with_the_channels_that_meet_it():
    _, (link,) = links_of(
        Wrapped(nn.Conv2d(3, 6, 3, padding=1), functional.relu6, nn.Conv2d(6, 4, 3)), torch.randn(PICTURE)
    )
    assert [(clip.top, clip.place.value) for clip in link.clips] == [(6.0, "first")]
    assert link.free.all()
    assert not link.unclipped.any()


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 9, 5)

    def forward(self, x):
        return self.fc(functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1))


def test_a_flattened_channel_is_read_in_a_block():
    program, (link,) = links_of(Flattened(), torch.randn(PICTURE))
    (reader,) = link.readers
    assert reader.place.channels.tolist() == [index // 9 for index in range(54)]
    assert_same_function(program, rescaled_at_random(program, [link]), torch.randn(PICTURE, dtype=torch.float64))


class Attention(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(12, 36)
        else:
            self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 12)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        y = self.norm(x)
        if self.fused:
            q, k, v = self.qkv(y).reshape(-1, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(y).reshape(-1, 5, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 12)
        x = x + self.out(y)
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_lets_the_values_through_but_neither_queries_nor_keys(target, fused):
    program = prepare(capture(Attention(fused).eval(), torch.randn(2, 5, 12)), target=target).eval()
    links = channel_links(program)
    found = described(links)
    value = "qkv" if fused else "v"
    assert found == {
        "norm": ("qkv",) if fused else ("q", "k", "v"),
        value: ("out",),
        "norm2": ("fc1",),
        "fc1": ("fc2",),
    }
    free = next(link.free for link in links if link.producer == value)
    assert free.tolist() == ([False] * 24 if fused else []) + [True] * 12
    assert_same_function(program, rescaled_at_random(program, links), torch.randn(3, 5, 12, dtype=torch.float64))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(4, 12), nn.Linear(6, 4)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


def test_the_open_side_of_a_gated_unit_is_free():
    program, (link,) = links_of(Gate(), torch.randn(2, 4))
    assert link.free.tolist() == [False] * 6 + [True] * 6
    assert_same_function(program, rescaled_at_random(program, [link]), torch.randn(3, 4, dtype=torch.float64))


class RootMeanSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.fc = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


def test_a_gain_that_was_spelled_out_is_a_producer():
    program, (link,) = links_of(RootMeanSquare(), torch.randn(2, 6))
    assert [reader.layer for reader in link.readers] == ["fc"]
    assert_same_function(program, rescaled_at_random(program, [link]), torch.randn(3, 6, dtype=torch.float64))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.relu(self.layer(torch.relu(self.layer(x)))))


class SharedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.relu(self.one(x))
        return self.two(y), y


def test_a_weight_that_is_read_twice_and_what_is_returned_stay_as_they_are():
    assert links_of(Shared(), torch.randn(2, 4))[1] == ()
    assert links_of(Returned(), torch.randn(2, 4))[1] == ()


def test_a_bias_that_is_read_twice_is_split():
    program, links = links_of(SharedBias(), torch.randn(2, 4))
    assert described(links) == {"one": ("two",), "two": ("three",)}
    assert_same_function(program, rescaled_at_random(program, links), torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", toys.TOYS)
def test_the_links_of_every_toy_leave_its_function_as_it_was(name):
    program = prepare(captured(name)).eval()
    inputs = toys.TOYS[name].example(3)
    links = channel_links(program)
    other = rescaled_at_random(program, links)
    with torch.no_grad():
        expected, got = toys.call(program, inputs), toys.call(other, inputs)
    pairs = zip(_tensors(expected), _tensors(got), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-6)


def _tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)
