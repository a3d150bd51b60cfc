"""Heads and feed-forward neurons: found in every spelling, judged, sorted, cut."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.timm_networks import import_timm
from slimgraph.errors import ConfigError, ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.reorder import reorder
from slimgraph.pruning.transformer import cut_transformer, plan_transformer_pruning, sort_transformer
from slimgraph.pruning.transformer_groups import find_transformer

# T = tokens, C = width between the layers, H = heads, D = width of a head, R = neurons
T, C, H, D, R = 5, 10, 4, 6, 14


def softmax_attention(q, k, v, bias=None):
    scores = q @ k.transpose(-2, -1) / D**0.5
    return (scores if bias is None else scores + bias).softmax(dim=-1) @ v


def einsum_attention(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


def linear_attention(q, k, v):
    return q.relu() @ (k.relu().transpose(-2, -1) @ v)


def channel_attention(q, k, v):
    return ((q.transpose(-2, -1) @ k).softmax(dim=-1) @ v.transpose(-2, -1)).transpose(-2, -1)


def folded_attention(q, k, v):
    q, k, v = (part.reshape(-1, T, D) for part in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).reshape(-1, H, T, D)


def rotated(x):
    angle = torch.arange(T)[:, None] / 10.0 ** torch.arange(D // 2)
    cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)
    return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1) * sin


def pruned_by(program, **options):
    return apply_pruning(program, plan_transformer_pruning(program, **options))


class Attention(nn.Module):
    """Self-attention in one of several spellings; the last layer is `out`, with a column for each head and width."""

    def __init__(self, spelling, keys=H):
        super().__init__()
        self.spelling, self.keys = spelling, keys
        self.out = nn.Linear(H * D, C)
        if spelling in ("fused", "in thirds"):
            self.qkv = nn.Linear(C, 3 * H * D)
        else:
            self.q, self.k, self.v = (nn.Linear(C, heads * D) for heads in (H, keys, keys))
        if spelling == "relative":
            self.table = nn.Parameter(torch.randn(2 * T - 1, H))
            self.register_buffer("distance", torch.arange(T)[:, None] - torch.arange(T) + T - 1)
        if spelling == "talking":
            self.before, self.behind = nn.Linear(H, H), nn.Linear(H, H)
        if spelling == "normed":
            self.norm = nn.RMSNorm(D)

    def forward(self, x, bias=None):
        batch = x.shape[0]
        if self.spelling == "fused":
            q, k, v = self.qkv(x).reshape(batch, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.spelling == "in thirds":
            q, k, v = (part.reshape(batch, T, H, D).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q = self.q(x).reshape(batch, T, H, D).transpose(1, 2)
            k, v = (layer(x).reshape(batch, -1, self.keys, D).transpose(1, 2) for layer in (self.k, self.v))
        return self.out(self.mixed(q, k, v, bias).transpose(1, 2).reshape(batch, T, H * D))

    def mixed(self, q, k, v, bias):
        match self.spelling:
            case "spelled out":
                return softmax_attention(q, k, v)
            case "einsum":
                return einsum_attention(q, k, v)
            case "linear":
                return linear_attention(q, k, v)
            case "channels":
                return channel_attention(q, k, v)
            case "folded":
                return folded_attention(q, k, v)
            case "rotary":
                return F.scaled_dot_product_attention(rotated(q), rotated(k), v)
            case "normed":
                return F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            case "relative":
                return softmax_attention(q, k, v, self.table[self.distance].permute(2, 0, 1))
            case "talking":
                scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(dim=2)
                return self.behind(scores).permute(0, 3, 1, 2) @ v
            case "grouped":
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            case "grouped by hand":
                k, v = (part[:, :, None].expand(-1, -1, H // self.keys, -1, -1).reshape(-1, H, T, D) for part in (k, v))
                return softmax_attention(q, k, v)
            case "one key":
                return softmax_attention(q, k, v)
            case _:
                return F.scaled_dot_product_attention(q, k, v, bias)


class FeedForward(nn.Module):
    """From C to R and back to C; the last layer is `down`, with a column for each neuron."""

    def __init__(self, spelling="plain"):
        super().__init__()
        self.spelling = spelling
        kind = functools.partial(nn.Conv2d, kernel_size=1) if spelling == "convolutions" else nn.Linear
        self.up, self.down = kind(C, 2 * R if spelling == "gated in one" else R), kind(R, C)
        if spelling == "gated":
            self.gate = nn.Linear(C, R, bias=False)
        if spelling == "convolutions":
            self.depthwise = nn.Conv2d(R, R, 3, padding=1, groups=R)

    def forward(self, x):
        match self.spelling:
            case "gated":
                return self.down(F.silu(self.gate(x)) * self.up(x))
            case "gated in one":
                gate, up = self.up(x).chunk(2, dim=-1)
                return self.down(F.gelu(gate) * up)
            case "convolutions":
                x = x.transpose(1, 2).unflatten(2, (T, 1))
                return self.down(self.depthwise(self.up(x)).relu()).flatten(2).transpose(1, 2)
            case _:
                return self.down(F.gelu(self.up(x)))


class Tiny(nn.Module):
    """Blocks of attention and feed-forward layers, between a first and a last layer."""

    def __init__(self, attention="fused", feed_forward="plain", *, keys=H, depth=1, norm=nn.LayerNorm):
        super().__init__()
        self.first, self.last = nn.Linear(3, C), nn.Linear(C, 2)
        self.attention = nn.ModuleList(Attention(attention, keys) for _ in range(depth))
        self.feed_forward = nn.ModuleList(FeedForward(feed_forward) for _ in range(depth))
        self.norms = nn.ModuleList(norm(C) for _ in range(2 * depth))

    def forward(self, x):
        x = self.first(x)
        for number, (attention, feed_forward) in enumerate(zip(self.attention, self.feed_forward, strict=True)):
            x = x + attention(self.norms[2 * number](x))
            x = x + feed_forward(self.norms[2 * number + 1](x))
        return self.last(x).mean(dim=1)


def captured(module, *, seed=0, **options):
    torch.manual_seed(seed)
    return capture(module().eval(), torch.randn(2, T, 3), **options)


def silenced(make, heads, neurons):
    """The module with nothing coming out of some heads and neurons."""

    def made():
        module = make()
        with torch.no_grad():
            for attention in module.attention:
                attention.out.weight.view(C, H, D)[:, heads] = 0
            for feed_forward in module.feed_forward:
                feed_forward.down.weight[:, neurons] = 0
        return module

    return made


def data(count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, T, 3, generator=generator) for _ in range(count)]


def sizes(program):
    found = find_transformer(find_groups(program))
    return [group.size for group in found.heads], [group.size for group in found.feed_forward]


SPELLINGS = (
    *("fused", "in thirds", "separate", "spelled out", "einsum", "linear", "channels", "folded", "rotary", "normed"),
    "relative",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heads_of_every_spelling_of_which_nothing_comes_go_first_and_change_nothing(spelling):
    program = captured(silenced(lambda: Tiny(spelling), [0, 2], []))
    groups = find_groups(program)
    (heads,) = find_transformer(groups).heads
    assert heads.size == H
    scores = score_groups(program, groups, "fisher", data=data())[heads.name]
    assert (scores > 0).tolist() == [False, True, False, True]
    pruned = pruned_by(program, heads_removed=0.5, data=data(), multiple_of=1)
    assert dict(pruned.named_parameters())["attention.0.out.weight"].shape == (C, 2 * D)
    x = torch.randn(3, T, 3)
    torch.testing.assert_close(pruned(x), program(x))


@pytest.mark.parametrize("spelling", ["plain", "gated", "gated in one", "convolutions"])
def test_neurons_of_which_nothing_comes_go_first_and_change_nothing(spelling):
    gone = [1, 3, 4, 5, 9, 12, 13]
    program = captured(silenced(lambda: Tiny("fused", spelling, norm=nn.RMSNorm), [], gone))
    assert sizes(program) == ([H], [R])
    pruned = pruned_by(program, feed_forward_removed=0.5, data=data(), multiple_of=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters()}
    assert shapes["feed_forward.0.down.weight"][:2] == (C, 7)
    assert shapes["feed_forward.0.up.weight"][0] == (14 if spelling == "gated in one" else 7)
    if spelling == "gated":
        assert shapes["feed_forward.0.gate.weight"] == (7, C)
    x = torch.randn(3, T, 3)
    torch.testing.assert_close(pruned(x), program(x))


@pytest.mark.parametrize("spelling", ["grouped", "grouped by hand"])
def test_a_key_goes_with_the_queries_that_share_it(spelling):
    program = captured(silenced(lambda: Tiny(spelling, keys=2), [2, 3], []))
    assert sizes(program)[0] == [2]
    pruned = pruned_by(program, heads_removed=0.5, data=data(), multiple_of=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters()}
    assert [shapes[f"attention.0.{name}.weight"] for name in "qkv"] == [(2 * D, C), (D, C), (D, C)]
    x = torch.randn(3, T, 3)
    torch.testing.assert_close(pruned(x), program(x))


def test_queries_that_all_share_one_key_go_one_by_one():
    program = captured(silenced(lambda: Tiny("one key", keys=1), [1], []))
    pruned = pruned_by(program, heads_removed=0.25, data=data(), multiple_of=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters()}
    assert [shapes[f"attention.0.{name}.weight"] for name in "qkv"] == [(3 * D, C), (D, C), (D, C)]
    x = torch.randn(3, T, 3)
    torch.testing.assert_close(pruned(x), program(x))


def test_heads_that_are_mixed_on_their_way_are_heads_before_and_behind():
    program = captured(lambda: Tiny("talking"))
    assert sizes(program) == ([H, H], [R])
    pruned = pruned_by(program, heads_removed=0.5, data=data(), multiple_of=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.named_parameters()}
    assert shapes["attention.0.before.weight"] == (H, 2)
    assert shapes["attention.0.behind.weight"] == (2, H)


class Cross(nn.Module):
    """Attention to a memory of another width, which has attention and neurons of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, C), nn.Linear(C, 2)
        self.attention = nn.MultiheadAttention(C, 2, kdim=8, vdim=8, batch_first=True)
        self.memory = nn.TransformerEncoderLayer(8, 4, 24, batch_first=True)
        self.up, self.down = nn.Linear(C, R), nn.Linear(R, C)

    def forward(self, x, memory):
        x, memory = self.first(x), self.memory(memory)
        x = x + self.attention(x, memory, memory, need_weights=False)[0]
        return self.last(x + self.down(self.up(x).relu()))


def test_attention_to_another_sequence_and_pytorchs_own_layers():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, T, 3), "memory": torch.randn(2, 7, 8)}
    program = capture(Cross().eval(), inputs)
    heads, neurons = sizes(program)
    assert (sorted(heads), sorted(neurons)) == ([2, 4], [R, 24])
    pruned = pruned_by(program, heads_removed=0.5, feed_forward_removed=0.5, data=[inputs], multiple_of=1)
    heads, neurons = sizes(pruned)
    assert sorted(neurons) == [R // 2, 12]
    assert heads == [2]  # a single head cannot go


def test_neurons_are_found_beside_attention_with_one_head():
    class One(Tiny):
        def forward(self, x):
            x = self.first(x)
            q, k, v = self.attention[0].qkv(x).chunk(3, dim=-1)
            x = x + self.attention[0].out((q @ k.transpose(1, 2)).softmax(dim=-1) @ v)
            return self.last(x + self.feed_forward[0](x)).mean(dim=1)

    program = captured(lambda: One("in thirds"))
    assert sizes(program) == ([], [R])
    with pytest.raises(ProgramError, match="no attention with several heads"):
        plan_transformer_pruning(program, heads_removed=0.5, data=data())


class Squeezed(Tiny):
    """With a squeeze of the width, which is none of the neurons, and a table of positions made by two layers."""

    def __init__(self):
        super().__init__("separate")
        self.squeeze, self.excite = nn.Linear(C, 4), nn.Linear(4, C)
        self.near, self.far = nn.Linear(1, 9), nn.Linear(9, H)
        self.register_buffer("distance", torch.randn(T, T, 1))

    def forward(self, x):
        bias = self.far(self.near(self.distance).relu()).permute(2, 0, 1)
        x = self.first(x)
        x = x * self.excite(self.squeeze(x.mean(dim=1)).relu()).sigmoid()[:, None]
        x = x + self.attention[0](x, bias)
        return self.last(x + self.feed_forward[0](x)).mean(dim=1)


def test_other_hidden_numbers_are_no_neurons():
    program = captured(Squeezed)
    names = {group.name for group in find_groups(program).groups}
    assert {"squeeze.weight:0", "near.weight:0"} <= names
    assert sizes(program) == ([H], [R])
    table = find_transformer(find_groups(program)).table()
    assert "heads" in table
    assert "feed_forward.0.up" in table


def test_what_is_no_transformer_is_told():
    program = capture(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(2, 3))
    with pytest.raises(ProgramError, match="no attention"):
        plan_transformer_pruning(program, heads_removed=0.5, data=[torch.randn(2, 3)])


@pytest.fixture(scope="module")
def deep():
    return captured(lambda: Tiny(depth=3))


def kept(plan):
    return {group.name: group.size - len(group.removed) for group in plan.groups}


def test_a_global_allocation_takes_from_the_layers_that_matter_least(deep):
    with torch.no_grad():
        program = deep.copy()
        dict(program.named_parameters())["attention.1.out.weight"].mul_(1e-3)
        dict(program.named_parameters())["feed_forward.0.down.weight"].mul_(1e-3)
    plan = plan_transformer_pruning(
        program, heads_removed=0.25, feed_forward_removed=1 / 3, data=data(), allocation="global", multiple_of=1
    )
    # Three heads of twelve, and as many neurons as the first layer has; its floor is a tenth, which is two.
    assert kept(plan)["attention.1.qkv.weight:0"] == 1
    assert kept(plan)["feed_forward.0.up.weight:0"] == 2
    assert sum(len(group.removed) for group in plan.groups) == 3 + 14


def test_layers_can_have_parts_of_their_own_or_be_left_out(deep):
    parts = {"feed_forward.0.up": 0.5, "feed_forward.2.*": 0.25}
    plan = plan_transformer_pruning(deep, feed_forward_removed=parts, criterion="l2_norm", multiple_of=1)
    assert kept(plan) == {"feed_forward.0.up.weight:0": 7, "feed_forward.2.up.weight:0": 10}
    plan = plan_transformer_pruning(deep, heads_removed=0.5, criterion="l2_norm", skip=["attention.1.*"], multiple_of=1)
    assert kept(plan) == {"attention.0.qkv.weight:0": 2, "attention.2.qkv.weight:0": 2}


def test_what_stays_is_a_multiple_where_one_is_wanted(deep):
    plan = plan_transformer_pruning(deep, heads_removed=0.25, feed_forward_removed=0.5, criterion="l2_norm")
    # Heads of six numbers go by fours, so that there are 24; neurons by eights.
    assert set(kept(plan).values()) == {8}


def test_sorted_the_program_computes_the_same_and_the_first_are_the_best(deep):
    ordered = sort_transformer(deep, data=data())
    assert ordered.history[-1].step == "reorder"
    x = torch.randn(3, T, 3)
    torch.testing.assert_close(ordered(x), deep(x))
    groups = find_groups(ordered)
    chosen = find_transformer(groups)
    scores = score_groups(ordered, groups, "fisher", data=data())
    for group in (*chosen.heads, *chosen.feed_forward):
        # Which answers are drawn does not depend on the order.
        assert (scores[group.name].diff() <= 1e-6 * scores[group.name][0]).all()


def test_cutting_the_sorted_program_is_pruning_the_given_one(deep):
    ordered = sort_transformer(deep, data=data())
    x = torch.randn(3, T, 3)
    for heads, neurons in ((0.5, 0.5), (0.75, 1.0), (0.25, 2 / 7)):
        wanted = pruned_by(deep, heads_removed=1 - heads, feed_forward_removed=1 - neurons, data=data(), multiple_of=1)
        found = cut_transformer(ordered, heads=heads, feed_forward=neurons)
        assert {n: p.shape for n, p in found.named_parameters()} == {n: p.shape for n, p in wanted.named_parameters()}
        torch.testing.assert_close(found(x), wanted(x))


def test_an_order_is_one_of_all_indices_of_a_group(deep):
    swapped = reorder(deep, {"feed_forward.0.up.weight:0": [1, 0, *range(2, R)]})
    before, after = (dict(p.named_parameters())["feed_forward.0.up.bias"] for p in (deep, swapped))
    assert after[:2].tolist() == before[:2].flip(0).tolist()
    with pytest.raises(ConfigError, match="each of its indices, 0 to 13, once"):
        reorder(deep, {"feed_forward.0.up.weight:0": [0] * R})
    with pytest.raises(ConfigError, match=r"feed_forward\.0\.up"):
        reorder(deep, {"feed_forward.0.upp.weight:0": [0]})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ConfigError, "Nothing is to be removed"),
        ({"heads_removed": 1.0}, ConfigError, r"in \[0, 1\)"),
        ({"heads_removed": 0.5, "criterion": "fisher"}, ConfigError, "give data="),
        ({"heads_removed": 0.5, "allocation": "globl"}, ConfigError, "global"),
        ({"heads_removed": 0.95, "allocation": "global"}, ConfigError, "at most 75.0%"),
        ({"heads_removed": {"attention.7": 0.5}}, UnknownNameError, "attention"),
        ({"heads_removed": {"attention.0.qkv": 0.5, "attention.0": 0.25}}, ConfigError, "Give one ratio for both"),
    ],
)
def test_wrong_requests_say_what_to_do(deep, options, error, said):
    with pytest.raises(error, match=said):
        plan_transformer_pruning(deep, **{"criterion": "l2_norm", **options})


@pytest.mark.slow
def test_vit_and_swin_lose_half_of_their_heads_and_neurons():
    timm = import_timm()
    for name, heads, size in (("vit_tiny_patch16_224", [3] * 12, 64), ("swin_tiny_patch4_window7_224", None, 224)):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, img_size=size, num_classes=10).eval()
        x = torch.randn(2, 3, size, size)
        program = capture(model, x)
        found, neurons = sizes(program)
        assert len(found) == len(neurons) == 12
        assert heads is None or found == heads
        pruned = pruned_by(program, heads_removed=0.5, feed_forward_removed=0.5, data=[x], allocation="global")
        assert sum(p.numel() for p in pruned.parameters()) < 0.7 * sum(p.numel() for p in program.parameters())


@pytest.mark.slow
def test_bert_loses_half_of_its_heads_and_neurons():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes_of = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=100, max_position_embeddings=64, **sizes_of)

    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertForSequenceClassification(config)

        def forward(self, ids):
            return self.bert(ids).logits

    ids = torch.randint(0, 100, (4, 10))
    program = capture(Bert().eval(), ids)
    assert sizes(program) == ([4, 4], [64, 64])
    labels = torch.tensor([0, 1, 1, 0])
    for batch, loss in ((ids, None), ((ids, labels), "cross_entropy")):
        pruned = pruned_by(program, heads_removed=0.5, feed_forward_removed=0.5, data=[batch], loss=loss)
        assert sizes(pruned) == ([2, 2], [32, 32])
