"""Groups of indices that can be pruned, on small topologies with known answers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimgraph.program.capture import capture
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.slices import owners


def groups_of(module, *shape, **options):
    return find_groups(capture(module.eval(), torch.zeros(1, *shape)), **options)


def members(found, name):
    return {(member.parameter, member.axis) for member in found[name].members}


def sizes(found):
    return {group.name: group.size for group in found.groups}


def test_a_chain_has_a_group_between_every_two_layers():
    found = groups_of(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)), 3, 8, 8
    )
    assert sizes(found) == {"0.weight:0": 8, "3.weight:0": 4}
    norm = {(f"1.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}
    assert members(found, "0.weight:0") == {("0.weight", 0), ("0.bias", 0), ("3.weight", 1)} | norm
    assert found.unknown == {}


def test_layers_of_which_nothing_can_be_pruned_say_why():
    found = groups_of(nn.Sequential(nn.Linear(4, 2)), 4)
    assert found.groups == ()
    assert found.kept == {"0": ("output", "input")}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.second(self.first(x).relu()))


def test_a_residual_ties_what_it_adds():
    found = groups_of(Residual(), 3, 8, 8)
    assert sizes(found) == {"stem.weight:0": 8, "first.weight:0": 6}
    assert {("second.weight", 0), ("head.weight", 1), ("first.weight", 1)} < members(found, "stem.weight:0")


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        x = self.a(x)
        return self.c(torch.cat([x, self.b(x)], dim=1))


def test_a_concatenation_keeps_its_parts_apart():
    found = groups_of(Dense(), 3, 4, 4)
    assert sizes(found) == {"a.weight:0": 4, "b.weight:0": 6}
    assert all(("c.weight", 1) in members(found, name) for name in sizes(found))


def test_a_depthwise_convolution_goes_with_its_channels():
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    assert sizes(groups_of(layers, 3, 8, 8)) == {"0.weight:0": 8}


def test_a_grouped_convolution_has_groups_and_what_is_in_them():
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1, groups=4), nn.Conv2d(16, 2, 1))
    found = groups_of(layers, 3, 8, 8)
    assert sorted(group.size for group in found.groups) == [2, 4, 4]
    assert {group.name.partition("#")[0] for group in found.groups} == {"0.weight:0", "1.weight:0"}


def test_a_linear_layer_behind_a_flatten_reads_blocks():
    found = groups_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5), nn.Linear(5, 2)), 3, 3, 3)
    assert sizes(found) == {"0.weight:0": 4, "2.weight:0": 5}
    assert ("2.weight", 1) in members(found, "0.weight:0")


class Excite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def test_squeeze_and_excite_has_the_channels_and_the_bottleneck():
    assert sizes(groups_of(Excite(), 3, 4, 4)) == {"stem.weight:0": 8, "down.weight:0": 2}


class Attention(nn.Module):
    def __init__(self, fused, spelled):
        super().__init__()
        self.spelled = spelled
        self.qkv = nn.Linear(12, 36) if fused else nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.inner, self.out = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x):
        x = self.inner(x)
        batch, tokens, _ = x.shape
        if isinstance(self.qkv, nn.Linear):
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).reshape(batch, tokens, 3, 4).transpose(1, 2) for layer in self.qkv)
        if self.spelled:
            x = ((q @ k.transpose(-2, -1)) / 2).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(batch, tokens, 12))


@pytest.mark.parametrize("spelled", [True, False])
@pytest.mark.parametrize(("fused", "wanted"), [(True, [3, 4, 12]), (False, [3, 4, 4, 12])])
def test_attention_has_heads_and_their_widths(fused, spelled, wanted):
    found = groups_of(Attention(fused, spelled), 5, 4)
    assert sorted(group.size for group in found.groups) == wanted
    assert found.unknown == {}


def test_a_layer_norm_keeps_its_axis_unless_it_is_asked_for():
    layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2))
    assert sizes(groups_of(layers, 4)) == {"2.weight:0": 6}
    found = groups_of(layers, 4, norm_axes=True)
    assert sizes(found) == {"0.weight:0": 8, "2.weight:0": 6}
    assert found["0.weight:0"].normed
    assert not found["2.weight:0"].normed


def test_a_pixel_shuffle_keeps_blocks_together():
    layers = nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1))
    assert sizes(groups_of(layers, 3, 4, 4)) == {"0.weight:0": 4}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.head = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.lstm(self.first(x))[0])


def test_a_recurrent_layer_has_its_input_and_its_hidden_size():
    found = groups_of(Recurrent(), 7, 3)
    assert sizes(found) == {"first.weight:0": 6, "lstm.weight_ih_l0:0": 5}
    assert ("lstm.weight_hh_l0", 1) in members(found, "lstm.weight_ih_l0:0")


def test_weights_that_are_used_twice_are_one_member():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.shared(self.shared(self.stem(x)).relu()))

    found = groups_of(Tied(), 3)
    assert [group.size for group in found.groups] == [8]
    names = [(m.parameter, m.axis) for m in found.groups[0].members]
    assert len(names) == len(set(names))
    assert {("shared.weight", 0), ("shared.weight", 1)} <= set(names)


class Shuffled(nn.Module):
    """Two units that keep one half of the channels, compute the other, and shuffle them, as in ShuffleNetV2."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1)
        self.second, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 2, 1)

    @staticmethod
    def shuffle(x):
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)

    def forward(self, x):
        x = self.stem(x)
        x = self.shuffle(torch.cat([self.left(x), self.right(x)], dim=1))  # l0 r0 l1 | r1 l2 r2
        kept, changed = x.chunk(2, dim=1)
        return self.head(self.shuffle(torch.cat([kept, self.second(changed)], dim=1)))


def test_channels_that_are_shuffled_go_where_their_order_takes_them():
    found = groups_of(Shuffled(), 3, 4, 4)
    assert sizes(found) == {
        "stem.weight:0": 6,
        "left.weight:0": 2,  # 0 and 1 are kept by the second unit, 2 it reads: alone, and so it stays
        "right.weight:0": 2,  # 1 and 2 it reads
        "second.weight:0": 3,
    }
    assert members(found, "left.weight:0") == {("left.weight", 0), ("left.bias", 0), ("head.weight", 1)}
    assert members(found, "right.weight:0") == {("right.weight", 0), ("right.bias", 0), ("second.weight", 1)}
    axes = {(str(node.target)): found.traced.of(node) for node in found.traced.axes if node.op == "get_attr"}
    for name, axis, wanted in [("left", 0, [0, 1, -1]), ("right", 0, [-1, 0, 1]), ("second", 1, [0, -1, 1])]:
        group = "left.weight:0" if name == "left" else "right.weight:0"
        assert owners(axes[f"{name}.weight"][axis], found.atoms[group]).tolist() == wanted
    assert owners(axes["head.weight"][1], found.atoms["left.weight:0"]).tolist() == [0, -1, -1, -1, 1, -1]


def test_channels_that_a_grouped_convolution_makes_are_shuffled_as_factors():
    layers = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(8, 2, 1))
    assert sorted(group.size for group in groups_of(layers, 3, 4, 4).groups) == [2, 3, 4]


class Standardized(nn.Module):
    """Convolutions of weights that are normalized over all that makes an output, as in NFNet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.gain = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3), nn.Parameter(torch.ones(6))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        weight = self.second.weight
        normed = F.batch_norm(weight.reshape(1, 6, -1), None, None, weight=self.gain * 0.3, training=True)
        return self.head(F.conv2d(self.first(x), normed.reshape_as(weight), self.second.bias))


def test_the_inputs_of_a_standardized_weight_are_an_axis_that_a_norm_runs_over():
    assert sizes(groups_of(Standardized(), 3, 8, 8)) == {"second.weight:0": 6}
    found = groups_of(Standardized(), 3, 8, 8, norm_axes=True)
    assert sizes(found) == {"first.weight:0": 4, "second.weight:0": 6}
    assert members(found, "second.weight:0") > {("gain", 0), ("second.bias", 0)}
    removed = {"first.weight:0": (1,), "second.weight:0": (0, 5)}
    apply_pruning(found.traced.program, plan_removal(found, removed, norm_axes=True), groups=found)  # proves it


class Mixed(nn.Module):
    """Queries, keys and values of four heads behind one another, one index of each kind in each head."""

    def __init__(self):
        super().__init__()
        self.qkv, self.other, self.head = nn.Linear(5, 24), nn.Linear(24, 24), nn.Linear(16, 2)

    def forward(self, x):
        x = self.qkv(x)
        x = torch.cat([x, self.other(x)], dim=-1).unflatten(-1, (8, 6))
        q, k, v = x.chunk(3, dim=-1)
        return self.head(((q @ k.transpose(-2, -1)).relu() @ v).flatten(-2))


def test_a_factor_that_is_cut_into_single_indices_stays_whole():
    found = groups_of(Mixed(), 5, 5)
    assert found.unknown == {}
    removed = {group.name: (0,) for group in found.groups}
    apply_pruning(found.traced.program, plan_removal(found, removed), groups=found)


class Windows(nn.Module):
    """Windows around each pixel, weighed and added up again, as outlook attention does; then windows as a last axis."""

    def __init__(self):
        super().__init__()
        self.value, self.weigh, self.mix, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Linear(9, 9),
            nn.Conv2d(6, 4, 1),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        x = self.value(x)
        columns = F.unfold(x, 3, padding=1).unflatten(1, (6, 9))
        columns = self.weigh(columns.transpose(2, 3)).transpose(2, 3).flatten(1, 2)
        x = self.mix(F.fold(columns, (4, 4), 3, padding=1))
        return self.head(x.unfold(2, 2, 2).unfold(3, 2, 2).amax((2, 3, 4, 5)))


def test_windows_are_an_inner_factor_that_stays():
    found = groups_of(Windows(), 3, 4, 4)
    assert found.unknown == {}
    assert sizes(found) == {"value.weight:0": 6, "mix.weight:0": 4}
    removed = {"value.weight:0": (1, 4), "mix.weight:0": (0,)}
    apply_pruning(found.traced.program, plan_removal(found, removed), groups=found)


class InPlace(nn.Module):
    """A part that is written over in place, and one index."""

    def __init__(self):
        super().__init__()
        self.stem, self.other, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        x, other = self.stem(x), self.other(x)
        x[:, 1:] += other[:, 1:]
        x[:, 0] = other[:, 0]
        return self.head(x)


def test_what_is_written_in_place_is_tied_to_where_it_goes():
    found = groups_of(InPlace(), 5, 3)
    assert found.unknown == {}
    assert sizes(found) == {"stem.weight:0": 6}
    assert ("other.weight", 0) in members(found, "stem.weight:0")
    apply_pruning(found.traced.program, plan_removal(found, {"stem.weight:0": (1, 2)}), groups=found)


def test_powers_of_a_number_go_element_by_element():
    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(2.0 ** self.stem(x))

    found = groups_of(Powers(), 3)
    assert (found.unknown, sizes(found)) == ({}, {"stem.weight:0": 6})
