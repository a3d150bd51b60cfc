"""Small networks, each with one way in which axes hang together; what is to come out is in test_pruning_topologies.py.

A network is a function of its layers and inputs. `NAME.make()` builds it with random weights, `NAME.inputs` are an
example of two samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.randomize import randomize


@dataclass(frozen=True, kw_only=True)
class Topology:
    forward: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    layers: dict[str, Callable[[], Any]]

    def make(self) -> nn.Module:
        return randomize(Network(self), lambda network: network(*self.inputs))


class Network(nn.Module):
    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        for name, make in topology.layers.items():
            if isinstance(made := make(), Tensor) and not isinstance(made, nn.Parameter):
                self.register_buffer(name, made)
            else:
                setattr(self, name, made)

    def forward(self, *inputs: Tensor) -> Any:
        return self.topology.forward(self, *inputs)


class Shelf(nn.Module):
    """Several networks side by side, of which one capture takes less time than one of each."""

    def __init__(self, topologies: dict[str, Topology]) -> None:
        super().__init__()
        self.inputs = tuple({id(x): x for topology in topologies.values() for x in topology.inputs}.values())
        places = {id(x): place for place, x in enumerate(self.inputs)}
        self.reads = {name: [places[id(x)] for x in topology.inputs] for name, topology in topologies.items()}
        for name, topology in topologies.items():
            self.add_module(name, topology.make())

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [output for name in self.reads for output in self.made_by(name, inputs)]

    def made_by(self, name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        made = getattr(self, name)(*(inputs[place] for place in self.reads[name]))
        return made if isinstance(made, tuple) else (made,)

    def by_name(self, outputs: list[Tensor]) -> dict[str, list[Tensor]]:
        """What each network made, of the outputs of all."""
        values = iter(outputs)
        return {name: [next(values) for _ in self.made_by(name, self.inputs)] for name in self.reads}


def network(*inputs: Tensor, **layers: Callable[[], Any]) -> Callable[[Callable[..., Any]], Topology]:
    return lambda forward: Topology(forward=forward, inputs=inputs, layers=layers)


def floats(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


image, tokens, words = floats(3, 4, 4), floats(4, 3), torch.tensor([[1, 4, 0], [2, 3, 4]])
relu = F.relu


def conv(inputs, outputs, kernel=1, **options):
    return partial(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2, **options)


def up(inputs, outputs, **options):
    return partial(nn.ConvTranspose2d, inputs, outputs, 2, stride=2, **options)


def linear(inputs, outputs, **options):
    return partial(nn.Linear, inputs, outputs, **options)


def layer(kind, *arguments, **options):
    return partial(kind, *arguments, **options)


def parameter(*shape):
    return lambda: nn.Parameter(torch.zeros(shape))


# Chains


@network(image, first=conv(3, 8), norm=layer(nn.BatchNorm2d, 8), second=conv(8, 5, 3, bias=False), last=conv(5, 2))
def chain(net, x):
    return net.last(net.second(relu(net.norm(net.first(x)))).sigmoid())


@network(tokens, first=linear(3, 6), second=linear(6, 5, bias=False), last=linear(5, 2))
def linear_chain(net, x):
    return net.last(F.gelu(net.second(F.silu(net.first(x)))))


@network(image, stem=conv(3, 6), a=conv(6, 2), b=conv(6, 3))
def fork(net, x):
    x = relu(net.stem(x))
    return net.a(x), net.b(x)


@network(
    floats(3, 6),
    stem=layer(nn.Conv1d, 3, 6, 3),
    norm=layer(nn.BatchNorm1d, 6),
    depth=layer(nn.Conv1d, 6, 6, 3, groups=6),
    last=layer(nn.Conv1d, 6, 2, 1),
)
def signal(net, x):
    return net.last(F.max_pool1d(net.depth(relu(net.norm(net.stem(x)))), 2))


@network(
    floats(2, 4, 4, 4),
    stem=layer(nn.Conv3d, 2, 6, 3),
    norm=layer(nn.BatchNorm3d, 6),
    depth=layer(nn.Conv3d, 6, 6, 1, groups=6),
    last=layer(nn.Conv3d, 6, 2, 1),
)
def volume(net, x):
    return net.last(net.depth(F.avg_pool3d(relu(net.norm(net.stem(x))), 2)))


# Additions and products of branches


@network(image, stem=conv(3, 8), first=conv(8, 6, 3), second=conv(6, 8), head=conv(8, 2))
def residual(net, x):
    x = net.stem(x)
    return net.head(x + net.second(relu(net.first(x))))


@network(image, stem=conv(3, 6), a=conv(6, 4), b=conv(4, 6), c=conv(6, 5), d=conv(5, 6), head=conv(6, 2))
def two_residuals(net, x):
    x = net.stem(x)
    x = relu(x + net.b(relu(net.a(x))))
    y = net.d(relu(net.c(x)))
    y += x
    return net.head(relu(y))


@network(
    image, stem=conv(3, 4), body=conv(4, 6, 3), shortcut=conv(4, 6), norm=layer(nn.BatchNorm2d, 6), head=conv(6, 2)
)
def projected_shortcut(net, x):
    x = relu(net.stem(x))
    return net.head(relu(net.body(x) + net.norm(net.shortcut(x))))


@network(tokens, value=linear(3, 6), gate=linear(3, 6), head=linear(6, 2))
def gate(net, x):
    return net.head(net.value(x) * net.gate(x).sigmoid())


@network(tokens, both=linear(3, 6), head=linear(3, 2))
def gated_linear_unit(net, x):
    return net.head(F.glu(net.both(x)))


@network(image, stem=conv(3, 6), down=conv(6, 3), up=conv(3, 6), head=conv(6, 2))
def squeeze_excite(net, x):
    x = net.stem(x)
    return net.head(x * net.up(relu(net.down(x.mean((2, 3), keepdim=True)))).sigmoid())


@network(image, stem=conv(3, 6), down=linear(6, 3), up=linear(3, 6), head=conv(6, 2))
def squeeze_excite_of_linears(net, x):
    x = net.stem(x)
    weights = net.up(relu(net.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))).sigmoid()
    return net.head(x * weights.view(-1, 6, 1, 1).expand(-1, 6, 4, 4))


@network(tokens, a=linear(3, 4), b=linear(3, 4), head=linear(4, 2))
def stack(net, x):
    return net.head(torch.stack([net.a(x), net.b(x)], dim=1).sum(1))


@network(image, a=conv(3, 4), b=conv(3, 5), head=linear(20, 2))
def bilinear_pool(net, x):
    a, b = net.a(x).flatten(2), net.b(x).flatten(2)
    return net.head((a @ b.transpose(1, 2)).flatten(1))


# Concatenations and cuts


@network(image, a=conv(3, 4), b=conv(4, 6), c=conv(10, 2))
def concatenation(net, x):
    x = net.a(x)
    return net.c(torch.cat([x, net.b(x)], dim=1))


@network(image, stem=conv(3, 4), a=conv(4, 3), b=conv(7, 2), norm=layer(nn.BatchNorm2d, 9), head=conv(9, 2))
def dense_block(net, x):
    x = net.stem(x)
    x = torch.cat([x, net.a(relu(x))], dim=1)
    x = torch.cat([x, net.b(relu(x))], dim=1)
    return net.head(relu(net.norm(x)))


@network(image, a=conv(3, 3), b=conv(3, 5), c=conv(3, 8), head=conv(8, 2))
def addition_to_a_concatenation(net, x):
    return net.head(torch.cat([net.a(x), net.b(x)], dim=1) + net.c(x))


@network(image, a=conv(3, 3), b=conv(3, 5), c=conv(3, 4), d=conv(3, 4), head=conv(8, 2))
def two_concatenations_added(net, x):
    return net.head(torch.cat([net.a(x), net.b(x)], dim=1) + torch.cat([net.c(x), net.d(x)], dim=1))


@network(image, stem=conv(3, 4), head=conv(8, 2))
def concatenation_with_itself(net, x):
    x = net.stem(x)
    return net.head(torch.cat([x, -x], dim=1))


@network(image, stem=conv(3, 8), a=conv(4, 2), b=conv(4, 2))
def chunks(net, x):
    a, b = relu(net.stem(x)).chunk(2, dim=1)
    return net.a(a) + net.b(b)


@network(image, stem=conv(3, 8), a=conv(3, 2), b=conv(5, 2))
def split_in_sizes(net, x):
    a, b = net.stem(x).split([3, 5], dim=1)
    return net.a(a) + net.b(b)


@network(image, stem=conv(3, 8), a=conv(3, 2), b=conv(5, 2))
def slices(net, x):
    x = net.stem(x)
    return net.a(x[:, :3]) + net.b(x[:, 3:])


@network(image, stem=conv(3, 8), a=conv(5, 2), b=conv(5, 2))
def slices_that_overlap(net, x):
    x = net.stem(x)
    return net.a(x[:, :5]) + net.b(x[:, 3:])


@network(image, stem=conv(3, 8), a=conv(3, 2), b=conv(5, 2))
def slices_from_behind(net, x):
    x = net.stem(x)
    return net.a(x[:, -3:]) + net.b(x.narrow(1, 0, 5))


@network(image, stem=conv(3, 8), a=conv(2, 2), b=conv(2, 2), head=conv(8, 2))
def cascade(net, x):
    first, second, third, fourth = torch.split(net.stem(x), 2, dim=1)
    second = net.a(second)
    third = net.b(third + second)
    return net.head(torch.cat([first, second, third, fourth], dim=1))


@network(image, stem=conv(3, 7), head=conv(7, 2))
def parts_in_another_order(net, x):
    a, b = net.stem(x).split([3, 4], dim=1)
    return net.head(torch.cat([b, a], dim=1))


@network(image, stem=conv(3, 8), part=conv(3, 3, 3), head=conv(8, 2))
def partial_convolution(net, x):
    a, b = net.stem(x).split([3, 5], dim=1)
    return net.head(torch.cat([net.part(a), b], dim=1))


@network(image, stem=conv(3, 4), cheap=conv(4, 4, 3, groups=4), head=conv(8, 2))
def ghost(net, x):
    x = net.stem(x)
    return net.head(torch.cat([x, net.cheap(x)], dim=1))


@network(image, stem=conv(3, 8), head=conv(3, 2))
def channels_that_nobody_reads(net, x):
    return net.head(net.stem(x)[:, :3])


@network(image, stem=conv(3, 4), head=conv(6, 2))
def concatenation_with_zeros(net, x):
    return net.head(torch.cat([net.stem(x), torch.zeros(x.shape[0], 2, 4, 4, dtype=x.dtype)], dim=1))


# Convolutions in groups


@network(image, stem=conv(3, 8), grouped=conv(8, 12, 3, groups=4), head=conv(12, 2))
def grouped(net, x):
    return net.head(relu(net.grouped(relu(net.stem(x)))))


@network(image, stem=conv(3, 8), first=conv(8, 8, groups=2), second=conv(8, 4, groups=2), head=conv(4, 2))
def grouped_twice(net, x):
    return net.head(net.second(relu(net.first(net.stem(x)))))


@network(image, stem=conv(3, 8), first=conv(8, 8, groups=2), second=conv(8, 8, groups=4), head=conv(8, 2))
def grouped_finer(net, x):
    return net.head(net.second(relu(net.first(net.stem(x)))))


@network(image, stem=conv(3, 6), depth=conv(6, 6, 3, groups=6), norm=layer(nn.BatchNorm2d, 6), head=conv(6, 2))
def depthwise(net, x):
    return net.head(F.relu6(net.norm(net.depth(net.stem(x)))))


@network(image, stem=conv(3, 4), depth=conv(4, 8, 3, groups=4), head=conv(8, 2))
def depthwise_twofold(net, x):
    return net.head(F.hardswish(net.depth(net.stem(x))))


@network(image, stem=conv(3, 6), wide=conv(6, 8), depth=conv(8, 8, 3, groups=8), narrow=conv(8, 6), head=conv(6, 2))
def inverted_residual(net, x):
    x = net.stem(x)
    return net.head(x + net.narrow(F.relu6(net.depth(F.relu6(net.wide(x))))))


@network(image, stem=conv(3, 6), up=up(6, 4), head=conv(4, 2))
def transposed(net, x):
    return net.head(relu(net.up(relu(net.stem(x)))))


@network(image, stem=conv(3, 8), up=up(8, 6, groups=2), head=conv(6, 2))
def transposed_grouped(net, x):
    return net.head(relu(net.up(relu(net.stem(x)))))


@network(image, stem=conv(3, 4), up=up(4, 4, groups=4), head=conv(4, 2))
def transposed_depthwise(net, x):
    return net.head(relu(net.up(relu(net.stem(x)))))


@network(
    floats(3, 5),
    stem=layer(nn.Conv1d, 3, 4, 1),
    up=layer(nn.ConvTranspose1d, 4, 5, 2),
    head=layer(nn.Conv1d, 5, 2, 1),
)
def transposed_signal(net, x):
    return net.head(relu(net.up(relu(net.stem(x)))))


# Reshapes


@network(floats(3, 3, 3), stem=conv(3, 4), hidden=linear(36, 5), head=linear(5, 2))
def flatten(net, x):
    return net.head(relu(net.hidden(relu(net.stem(x)).flatten(1))))


@network(image, stem=conv(3, 4), norm=layer(nn.BatchNorm2d, 4), head=linear(16, 2))
def flatten_behind_a_pool(net, x):
    return net.head(F.max_pool2d(relu(net.norm(net.stem(x))), 2).view(-1, 16))


@network(floats(3, 2, 2), a=conv(3, 3), b=conv(3, 2), head=linear(20, 2))
def flatten_of_a_concatenation(net, x):
    return net.head(torch.cat([net.a(x), net.b(x)], dim=1).flatten(1))


@network(floats(3, 2, 2), stem=conv(3, 4), norm=layer(nn.BatchNorm1d, 16), head=linear(16, 2))
def norm_of_flat_features(net, x):
    return net.head(net.norm(net.stem(x).flatten(1)))


def _shuffled(x, groups):
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(x.shape)


@network(image, stem=conv(3, 8), first=conv(8, 8, groups=2), second=conv(8, 6, groups=2), head=conv(6, 2))
def channel_shuffle(net, x):
    return net.head(relu(net.second(_shuffled(relu(net.first(net.stem(x))), 2))))


@network(image, stem=conv(3, 8), first=conv(8, 8, groups=2), second=conv(8, 6, groups=2), head=conv(6, 2))
def channel_shuffle_by_name(net, x):
    return net.head(relu(net.second(F.channel_shuffle(relu(net.first(net.stem(x))), 2))))


@network(image, stem=conv(3, 8), right=conv(4, 4), head=conv(8, 2))
def shuffle_unit(net, x):
    left, right = net.stem(x).chunk(2, dim=1)
    return net.head(_shuffled(torch.cat([left, net.right(right)], dim=1), 2))


@network(image, stem=conv(3, 16), head=conv(4, 2))
def pixel_shuffle(net, x):
    return net.head(F.pixel_shuffle(net.stem(x), 2))


@network(image, stem=conv(3, 16), head=conv(4, 2))
def pixel_shuffle_of_views(net, x):
    x = net.stem(x).view(-1, 4, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3)
    return net.head(x.reshape(-1, 4, 8, 8))


@network(image, stem=conv(3, 4), head=conv(16, 2))
def pixel_unshuffle(net, x):
    return net.head(F.pixel_unshuffle(net.stem(x), 2))


@network(image, stem=conv(3, 5), mix=linear(5, 5), head=conv(5, 2))
def windows(net, x):
    x = net.stem(x).permute(0, 2, 3, 1)
    y = x.reshape(-1, 2, 2, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 5)
    y = y + net.mix(y)
    y = y.view(-1, 2, 2, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 5)
    return net.head((x + y).permute(0, 3, 1, 2))


@network(image, stem=linear(3, 5), merge=linear(20, 4, bias=False), head=linear(4, 2))
def patch_merging(net, x):
    x = net.stem(x.permute(0, 2, 3, 1))
    corners = [x[:, row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
    return net.head(net.merge(torch.cat(corners, -1).view(-1, 4, 20)))


@network(tokens, stem=linear(3, 5), there=linear(4, 7), back=linear(7, 4), head=linear(5, 2))
def mixer(net, x):
    x = net.stem(x)
    return net.head(x + net.back(F.gelu(net.there(x.transpose(1, 2)))).transpose(1, 2))


@network(image, stem=conv(3, 8), head=conv(4, 2))
def maxout(net, x):
    return net.head(net.stem(x).unflatten(1, (4, 2)).amax(2))


@network(image, stem=conv(3, 3), head=conv(6, 2))
def repeat(net, x):
    return net.head(net.stem(x).repeat(1, 2, 1, 1))


@network(image, stem=conv(3, 3), head=conv(6, 2))
def repeat_interleave(net, x):
    return net.head(net.stem(x).repeat_interleave(2, dim=1))


@network(image, stem=conv(3, 4), deep=conv(4, 5, 3), skip=conv(4, 6), head=conv(11, 2))
def interpolate(net, x):
    x = relu(net.stem(x))
    deep = F.interpolate(net.deep(F.avg_pool2d(x, 2)), size=(4, 4), mode="bilinear")
    return net.head(torch.cat([deep, net.skip(x)], dim=1))


# Norms, slopes, scales


@network(image, stem=conv(3, 6), norm=layer(nn.BatchNorm2d, 6, affine=False), head=conv(6, 2))
def batch_norm_without_scale(net, x):
    return net.head(net.norm(net.stem(x)))


@network(floats(5), stem=linear(5, 6), norm=layer(nn.BatchNorm1d, 6), head=linear(6, 2))
def batch_norm_of_vectors(net, x):
    return net.head(relu(net.norm(net.stem(x))))


@network(image, stem=conv(3, 6), norm=layer(nn.InstanceNorm2d, 6, affine=True), head=conv(6, 2))
def instance_norm(net, x):
    return net.head(relu(net.norm(net.stem(x))))


@network(image, stem=conv(3, 8), norm=layer(nn.GroupNorm, 2, 8), head=conv(8, 2))
def group_norm(net, x):
    return net.head(relu(net.norm(net.stem(x))))


@network(tokens, stem=linear(3, 6), norm=layer(nn.LayerNorm, 6), wide=linear(6, 5), head=linear(5, 2))
def layer_norm(net, x):
    return net.head(F.gelu(net.wide(net.norm(net.stem(x)))))


@network(image, stem=conv(3, 6), norm=layer(nn.LayerNorm, 6), head=conv(6, 2))
def layer_norm_of_pictures(net, x):
    return net.head(net.norm(net.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@network(image, stem=conv(3, 6), norm=layer(nn.LayerNorm, [6, 4, 4]), head=conv(6, 2))
def layer_norm_of_everything(net, x):
    return net.head(net.norm(net.stem(x)))


@network(tokens, stem=linear(3, 6), norm=layer(nn.RMSNorm, 6), head=linear(6, 2))
def rms_norm(net, x):
    return net.head(net.norm(net.stem(x)))


@network(image, stem=conv(3, 6), slope=layer(nn.PReLU, 6), body=conv(6, 5), one=layer(nn.PReLU), head=conv(5, 2))
def prelu(net, x):
    return net.head(net.one(net.body(net.slope(net.stem(x)))))


@network(
    image, stem=conv(3, 6), body=conv(6, 6, 3), scale=parameter(6, 1, 1), shift=parameter(1, 6, 1, 1), head=conv(6, 2)
)
def layer_scale(net, x):
    x = net.stem(x) + net.shift
    return net.head(x + net.scale * net.body(x))


@network(image, stem=conv(3, 6), mean=lambda: torch.linspace(-1, 1, 6).view(1, 6, 1, 1), head=conv(6, 2))
def broadcast_constants(net, x):
    return net.head((net.stem(x) - net.mean) / torch.tensor(0.5) * torch.ones(6, 1, 1))


@network(image, stem=conv(3, 6), head=conv(6, 2))
def pictures_moved_by_padding(net, x):
    return net.head(F.pad(net.stem(x), (-1, 1, -1, 1)))


@network(image, stem=conv(3, 6), head=conv(6, 2))
def windows_that_are_cropped(net, x):
    windows = F.pad(net.stem(x), (0, 2, 0, 2)).reshape(-1, 6, 2, 3, 2, 3)
    return net.head(relu(windows).reshape(-1, 6, 6, 6)[:, :, :4, :4])


@network(image, stem=conv(3, 8), head=conv(4, 2))
def every_second_channel(net, x):
    return net.head(net.stem(x)[:, 1::2])


@network(tokens, stem=linear(3, 6), mix=layer(nn.Conv1d, 4, 1, 1), head=linear(6, 2))
def convolution_across_tokens(net, x):
    return net.head(relu(net.mix(net.stem(x)).squeeze(1)))


@network(image, stem=conv(3, 5), weight=parameter(4, 5, 1, 1), head=conv(4, 2))
def standardized_weight(net, x):
    weight = F.batch_norm(net.weight.reshape(1, 4, -1), None, None, training=True).reshape(net.weight.shape)
    return net.head(relu(F.conv2d(net.stem(x), weight)))


# Embeddings and recurrent layers


@network(words, table=layer(nn.Embedding, 5, 6), hidden=linear(6, 4), head=linear(4, 2))
def embedding(net, x):
    return net.head(relu(net.hidden(net.table(x))))


@network(words, table=layer(nn.Embedding, 5, 6), body=linear(6, 6))
def embedding_tied_to_the_head(net, x):
    x = net.table(x)
    return F.linear(x + net.body(x), net.table.weight)


@network(words, table=layer(nn.Embedding, 5, 6), places=layer(nn.Embedding, 8, 6), head=linear(6, 2))
def embedding_of_positions(net, x):
    return net.head(net.table(x) + net.places(torch.arange(x.shape[1])))


@network(tokens, stem=linear(3, 5), rnn=layer(nn.LSTM, 5, 4, batch_first=True), head=linear(4, 2))
def lstm(net, x):
    return net.head(net.rnn(net.stem(x))[0])


@network(tokens, first=linear(3, 4), cell=linear(3, 4), rnn=layer(nn.LSTM, 3, 4, batch_first=True), head=linear(4, 2))
def lstm_from_computed_states(net, x):
    mean = x.mean(1)
    states = net.first(mean).tanh().unsqueeze(0), net.cell(mean).unsqueeze(0)
    return net.head(net.rnn(x, states)[0])


@network(tokens, stem=linear(3, 5), rnn=layer(nn.GRU, 5, 4, batch_first=True), head=linear(4, 2))
def gru(net, x):
    return net.head(net.rnn(net.stem(x))[0][:, -1])


@network(
    tokens,
    stem=linear(3, 5),
    rnn=layer(nn.LSTM, 5, 3, batch_first=True, bidirectional=True, bias=False),
    head=linear(6, 2),
)
def lstm_in_two_directions(net, x):
    return net.head(net.rnn(net.stem(x))[0])


@network(tokens, rnn=layer(nn.GRU, 3, 4, num_layers=2, batch_first=True), head=linear(4, 2))
def gru_of_two_layers(net, x):
    return net.head(net.rnn(x)[0])


# Attention: 2 heads of 3, unless it says otherwise


def _heads(x, width=3):
    return x.view(x.shape[0], -1, x.shape[2] // width, width).transpose(1, 2)


def _joined(x):
    return x.transpose(1, 2).flatten(2)


def _attention(q, k, v, bias=0.0):
    return ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


_apart = {"q": linear(6, 6), "k": linear(6, 6), "v": linear(6, 6), "out": linear(6, 2)}


@network(tokens, stem=linear(3, 6), **_apart)
def attention(net, x):
    x = net.stem(x)
    return net.out(_joined(F.scaled_dot_product_attention(*(_heads(each(x)) for each in (net.q, net.k, net.v)))))


@network(tokens, stem=linear(3, 6), **_apart)
def attention_of_products(net, x):
    x = net.stem(x)
    return net.out(_joined(_attention(_heads(net.q(x)), _heads(net.k(x)), _heads(net.v(x)))))


@network(tokens, stem=linear(3, 6), **_apart)
def attention_of_einsums(net, x):
    x = net.stem(x)
    q, k, v = (each(x).view(-1, 4, 2, 3) for each in (net.q, net.k, net.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return net.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(-1, 4, 6))


@network(tokens, stem=linear(3, 6), qkv=linear(6, 18), out=linear(6, 2))
def attention_fused(net, x):
    q, k, v = net.qkv(net.stem(x)).reshape(-1, 4, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return net.out(_joined(F.scaled_dot_product_attention(q, k, v)))


@network(tokens, stem=linear(3, 6), qkv=linear(6, 18), out=linear(6, 2))
def attention_fused_by_heads(net, x):
    q, k, v = net.qkv(net.stem(x)).view(-1, 4, 2, 9).transpose(1, 2).split(3, dim=-1)
    return net.out(_joined(_attention(q, k, v)))


@network(tokens, stem=linear(3, 6), qkv=linear(6, 18, bias=False), out=linear(6, 2))
def attention_cut_in_three(net, x):
    q, k, v = (_heads(part) for part in net.qkv(net.stem(x)).chunk(3, dim=-1))
    return net.out(_joined(_attention(q, k, v)))


@network(tokens, stem=linear(3, 6), q=linear(6, 6), k=linear(6, 3), v=linear(6, 3), out=linear(6, 2))
def multi_query(net, x):
    x = net.stem(x)
    return net.out(_joined(_attention(_heads(net.q(x)), net.k(x).unsqueeze(1), net.v(x).unsqueeze(1))))


@network(tokens, stem=linear(3, 6), q=linear(6, 6), k=linear(6, 3), v=linear(6, 3), out=linear(6, 2))
def multi_query_by_broadcast(net, x):
    x = net.stem(x)
    k, v = net.k(x).unsqueeze(1), net.v(x).unsqueeze(1)
    return net.out(_joined(F.scaled_dot_product_attention(_heads(net.q(x)), k, v)))


def _rotated(x, net):
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * net.cos + turned * net.sin


@network(
    tokens,
    stem=linear(3, 6),
    q=linear(6, 8),
    k=linear(6, 8),
    v=linear(6, 6),
    cos=lambda: torch.linspace(1, -1, 16).view(4, 4),
    sin=lambda: torch.linspace(-1, 1, 16).view(4, 4),
    out=linear(6, 2),
)
def rotary_pairs(net, x):
    x = net.stem(x)
    q, k = (_rotated(_heads(each(x), 4), net) for each in (net.q, net.k))
    return net.out(_joined(F.scaled_dot_product_attention(q, k, _heads(net.v(x)))))


# 4 heads of queries and 2 of keys, of 2
_grouped = {"q": linear(6, 8), "k": linear(6, 4), "v": linear(6, 4), "out": linear(8, 2)}


@network(tokens, stem=linear(3, 6), **_grouped)
def grouped_query(net, x):
    x = net.stem(x)
    k, v = (_heads(each(x), 2).unsqueeze(2).expand(-1, 2, 2, 4, 2).reshape(-1, 4, 4, 2) for each in (net.k, net.v))
    return net.out(_joined(F.scaled_dot_product_attention(_heads(net.q(x), 2), k, v)))


@network(tokens, stem=linear(3, 6), **_grouped)
def grouped_query_of_products(net, x):
    x = net.stem(x)
    k, v = (_heads(each(x), 2).repeat_interleave(2, dim=1) for each in (net.k, net.v))
    return net.out(_joined(_attention(_heads(net.q(x), 2), k, v)))


@network(tokens, stem=linear(3, 6), **_grouped)
def grouped_query_by_flag(net, x):
    x = net.stem(x)
    q, k, v = (_heads(each(x), 2) for each in (net.q, net.k, net.v))
    return net.out(_joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def _distances():
    place = torch.arange(4)
    return place[:, None] - place[None, :] + 3


@network(tokens, table=parameter(7, 2), distances=_distances, stem=linear(3, 6), **_apart)
def relative_positions(net, x):
    x = net.stem(x)
    bias = net.table[net.distances.view(-1)].view(4, 4, 2).permute(2, 0, 1).unsqueeze(0)
    return net.out(_joined(_attention(_heads(net.q(x)), _heads(net.k(x)), _heads(net.v(x)), bias)))


@network(tokens, table=parameter(7, 2), distances=_distances, stem=linear(3, 6), **_apart)
def relative_positions_as_mask(net, x):
    x = net.stem(x)
    bias = net.table[net.distances].permute(2, 0, 1)
    q, k, v = (_heads(each(x)) for each in (net.q, net.k, net.v))
    return net.out(_joined(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


@network(tokens, later=lambda: torch.ones(4, 4, dtype=torch.bool).triu(1), stem=linear(3, 6), **_apart)
def causal_attention(net, x):
    x = net.stem(x)
    q, k, v = (_heads(each(x)) for each in (net.q, net.k, net.v))
    return net.out(_joined((q @ k.mT).masked_fill(net.later, -math.inf).softmax(-1) @ v))


@network(
    tokens,
    floats(5, 4),
    stem=linear(3, 6),
    other=linear(4, 5),
    q=linear(6, 6),
    k=linear(5, 6),
    v=linear(5, 6),
    out=linear(6, 2),
)
def cross_attention(net, x, memory):
    x, memory = net.stem(x), net.other(memory)
    q, k, v = _heads(net.q(x)), _heads(net.k(memory)), _heads(net.v(memory))
    return net.out(_joined(F.scaled_dot_product_attention(q, k, v)))


@network(tokens, stem=linear(3, 6), mha=layer(nn.MultiheadAttention, 6, 2, batch_first=True), head=linear(6, 2))
def multihead_attention(net, x):
    x = net.stem(x)
    return net.head(net.mha(x, x, x, need_weights=False)[0])


@network(tokens, stem=linear(3, 6), mix=linear(2, 2, bias=False), **_apart)
def talking_heads(net, x):
    x = net.stem(x)
    q, k, v = (_heads(each(x)) for each in (net.q, net.k, net.v))
    weights = net.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
    return net.out(_joined(weights @ v))


@network(tokens, slopes=lambda: -0.5 * torch.arange(1.0, 9.0).view(2, 1, 4), stem=linear(3, 6), **_apart)
def bias_by_distance(net, x):
    x = net.stem(x)
    return net.out(_joined(_attention(_heads(net.q(x)), _heads(net.k(x)), _heads(net.v(x)), net.slopes)))


def _turned(x, angles):
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


@network(
    tokens,
    angles=lambda: torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.1])).repeat(1, 2),
    stem=linear(3, 6),
    **{each: linear(6, 8) for each in "qkv"},
    out=linear(8, 2),
)
def rotary_positions(net, x):
    x = net.stem(x)
    q, k, v = (_heads(each(x), 4) for each in (net.q, net.k, net.v))
    return net.out(_joined(F.scaled_dot_product_attention(_turned(q, net.angles), _turned(k, net.angles), v)))


@network(tokens, stem=linear(3, 6), **_apart)
def attention_between_channels(net, x):
    x = net.stem(x)
    q, k, v = (_heads(each(x)).mT for each in (net.q, net.k, net.v))
    return net.out(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


@network(
    image,
    patches=layer(nn.Conv2d, 3, 6, 2, stride=2),
    token=parameter(1, 1, 6),
    places=parameter(1, 5, 6),
    **{**_apart, "out": linear(6, 6)},
    head=linear(6, 2),
)
def vision_transformer(net, x):
    x = net.patches(x).flatten(2).transpose(1, 2)
    x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], dim=1) + net.places
    q, k, v = (_heads(each(x)) for each in (net.q, net.k, net.v))
    x = x + net.out(_joined(F.scaled_dot_product_attention(q, k, v)))
    return net.head(x[:, 0])


# Weights that are used twice


@network(tokens, stem=linear(3, 6), shared=linear(6, 6), head=linear(6, 2))
def layer_used_twice(net, x):
    return net.head(net.shared(relu(net.shared(net.stem(x)))))


@network(image, a=conv(3, 6), b=conv(3, 6, 3), head=conv(6, 2))
def head_used_twice(net, x):
    return net.head(net.a(x)), net.head(relu(net.b(x)))


@network(tokens, stem=linear(3, 6), narrow=linear(6, 4, bias=False), head=linear(6, 2))
def weight_used_both_ways(net, x):
    narrow = relu(net.narrow(net.stem(x)))
    return net.head(F.linear(narrow, net.narrow.weight.t()))


@network(tokens, stem=linear(3, 6), weight=parameter(6, 5), bias=parameter(5), head=linear(5, 2))
def weight_with_its_outputs_last(net, x):
    x = torch.addmm(net.bias, net.stem(x).view(-1, 6), net.weight)
    return net.head(F.gelu(x).view(-1, 4, 5))


@network(tokens, stem=linear(3, 6), weight=parameter(5, 6), gain=parameter(5, 1), head=linear(5, 2))
def weight_norm(net, x):
    weight = net.gain * net.weight / (net.weight.norm(dim=1, keepdim=True) + 1e-6)
    return net.head(F.linear(net.stem(x), weight))


# A part of a value that is written into: with it, whatever stands beside it is captured in smaller operators


@network(image, stem=conv(3, 6), head=conv(6, 2))
def filled_constant(net, x):
    x = net.stem(x)
    mask = torch.zeros_like(x)
    mask[:, :, 1:3] = 1.0
    mask[:, :, 2:].zero_()
    return net.head(x * mask)


# Nothing of these can go


@network(image, stem=conv(3, 8), head=conv(3, 2))
def steps(net, x):
    return net.head(net.stem(x)[:, ::3])


@network(image, stem=conv(3, 6), head=conv(6, 2))
def shuffle_without_common_refinement(net, x):
    x = net.stem(x)
    return net.head(x + _shuffled(x, 3))


@network(image, stem=conv(3, 6), head=conv(6, 2))
def hidden_output(net, x):
    x = net.stem(x)
    return net.head(x), relu(x)


@network(image, body=conv(3, 3), head=conv(3, 2))
def added_input(net, x):
    return net.head(x + net.body(x))


@network(image, stem=conv(3, 6), head=conv(6, 2))
def softmax_of_channels(net, x):
    return net.head(net.stem(x).softmax(1))


@network(image, stem=conv(3, 6))
def mean_of_channels(net, x):
    return net.stem(x).mean(1)


@network(tokens, stem=linear(3, 6), head=linear(6, 2))
def normalized_vectors(net, x):
    return net.head(F.normalize(net.stem(x), dim=-1))


@network(image, stem=conv(3, 4), body=conv(3, 7), head=conv(7, 2))
def padded_channels(net, x):
    return net.head(F.pad(net.stem(x), (0, 0, 0, 0, 1, 2)) + net.body(x))


@network(image, stem=conv(3, 4), head=conv(6, 2))
def channels_beside_ones(net, x):
    return net.head(F.pad(net.stem(x), (0, 0, 0, 0, 1, 1), value=1.0))


@network(tokens, stem=linear(3, 6), head=linear(6, 2))
def sums_along(net, x):
    return net.head(net.stem(x).cumsum(-1))


@network(tokens, stem=linear(3, 6), head=linear(6, 2))
def rolled_channels(net, x):
    return net.head(net.stem(x).roll(1, dims=-1))


@network(tokens, stem=linear(3, 6), head=linear(6, 2))
def numbers_by_place(net, x):
    return net.head(net.stem(x) * torch.arange(6))


@network(tokens, stem=linear(3, 6), order=lambda: torch.tensor([3, 1, 2, 0, 5, 4]), head=linear(6, 2))
def channels_by_index(net, x):
    return net.head(net.stem(x)[..., net.order])
