"""Pruned programs are the masked ones."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slimgraph
from slimgraph.errors import ConfigError, ProgramError
from slimgraph.program.capture import capture
from slimgraph.pruning import prove as proving
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.plan import pruning_plan_from_json
from slimgraph.pruning.trace import Traced


class Block(nn.Module):
    """What pruning meets: residual, concatenation, groups, gates, norms, reshapes, attention and flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.gn = nn.GroupNorm(4, 16)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.branch = nn.Conv2d(16, 8, 1)
        self.join = nn.Conv2d(24, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.position = nn.Parameter(torch.randn(1, 16, 12) * 0.1)
        self.ln = nn.LayerNorm(12)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.expand = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.shuffle = nn.Conv2d(6, 16, 1)
        self.head = nn.Linear(4 * 16 * 16, 10)
        self.last = nn.Linear(10, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.gn(self.grouped(x)).relu()
        y = y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = self.join(torch.cat([x + self.branch(y), y], dim=1))
        x = F.gelu(self.depth(x)) + x
        tokens = x.flatten(2).transpose(1, 2) + self.position
        q, k, v = self.qkv(self.ln(tokens)).reshape(-1, 16, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        tokens = tokens + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = tokens.transpose(1, 2).unflatten(2, (4, 4))
        x = F.pixel_shuffle(self.shuffle(self.expand(x)), 2)
        return self.last(self.head(x.flatten(1)).tanh())


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    module = Block()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
    return capture(module.eval(), torch.randn(1, 3, 4, 4))


def half(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: tuple(sorted(torch.randperm(group.size, generator=generator)[: group.size // 2].tolist()))
        for group in groups.groups
    }


@pytest.mark.parametrize("norm_axes", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_half_of_everything_can_go_and_the_proof_holds(program, seed, norm_axes):
    groups = find_groups(program, norm_axes=norm_axes)
    assert not groups.unknown
    pruned = apply_pruning(program, plan_removal(groups, half(groups, seed), norm_axes=norm_axes), groups=groups)
    assert sum(p.numel() for p in pruned.parameters()) < 0.5 * sum(p.numel() for p in program.parameters())
    for batch in (1, 2, 7):
        assert pruned(torch.randn(batch, 3, 4, 4)).shape == (batch, 3)


def test_every_group_alone_can_go_and_the_proof_holds(program):
    groups = find_groups(program, norm_axes=True)
    for name, removed in half(groups).items():
        apply_pruning(program, plan_removal(groups, {name: removed}, norm_axes=True), groups=groups)


def test_a_pruned_program_is_saved_pruned_again_exported_and_quantized(program, tmp_path):
    groups = find_groups(program)
    pruned = apply_pruning(program, plan_removal(groups, half(groups)))
    slimgraph.save(pruned, tmp_path / "pruned.pt2")
    again = slimgraph.load(tmp_path / "pruned.pt2")
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(again(x), pruned(x))
    assert again.history[-1].step == "prune"
    slimgraph.convert(again, tmp_path / "pruned.onnx")
    second = find_groups(again)
    twice = apply_pruning(again, plan_removal(second, half(second, 1)))
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in pruned.parameters())
    int8 = slimgraph.quantize(twice, calibration=[torch.randn(8, 3, 4, 4)])
    assert int8(x).shape == (5, 3)


def test_the_program_that_was_given_stays_as_it_is(program):
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    groups = find_groups(program)
    apply_pruning(program, plan_removal(groups, half(groups)))
    after = program.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_attention_keeps_the_scale_of_its_old_width(program):
    groups = find_groups(program)
    widths = {g.name: (0, 1) for g in groups.groups if g.name.startswith("qkv.weight") and g.size == 4}
    pruned = apply_pruning(program, plan_removal(groups, widths))
    (node,) = [n for n in pruned.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert node.kwargs["scale"] == pytest.approx(0.5)


def test_a_wrong_account_of_the_axes_is_found(program, monkeypatch):
    groups = find_groups(program)
    plan = plan_removal(groups, {"down.weight:0": (0, 3)})
    other = {**plan.kept, "up.weight": {1: (0, 1)}}  # where 1 and 2 stay
    with pytest.raises(ProgramError, match="differs from the masked one"):
        apply_pruning(program, dataclasses.replace(plan, kept=other))
    monkeypatch.setattr(proving, "TOLERANCE", -1.0)
    with pytest.raises(ProgramError, match=r"down\.weight:0"):
        apply_pruning(program, plan)


def test_a_plan_is_json_and_is_read_back(program):
    groups = find_groups(program)
    plan = plan_removal(groups, half(groups))
    assert pruning_plan_from_json(plan.to_json()) == plan
    with pytest.raises(ConfigError, match="no pruning plan"):
        pruning_plan_from_json(plan.to_json().replace("removed", "remvoed"))


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ({"down.weight:0": tuple(range(4))}, "Leave at least one"),
        ({"down.weight:0": (4,)}, "0 to 3"),
        ({"down.weight:0": (1, 1)}, "Give each once"),
        ({"dwn.weight:0": (1,)}, r"down\.weight:0"),
    ],
)
def test_plans_that_cannot_be_are_refused(program, removed, said):
    with pytest.raises(ConfigError, match=said):
        plan_removal(find_groups(program), removed)


def test_a_plan_for_another_program_is_refused(program):
    groups = find_groups(program)
    plan = plan_removal(groups, half(groups))
    pruned = apply_pruning(program, plan)
    with pytest.raises(ConfigError, match="Apply it to the program that it was made for"):
        apply_pruning(pruned, plan)


def test_operators_without_a_rule_keep_their_axes_and_are_told():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.cdist(self.a(x), self.a(x)) @ self.a(x))

    found = find_groups(capture(Odd().eval(), torch.randn(1, 5, 4)))
    assert isinstance(found.traced, Traced)
    assert found.groups == ()
    assert "cdist" in " ".join(found.unknown.values())
    assert "there is no rule for" in found.table()


class Shuffles(nn.Module):
    """Two units of ShuffleNetV2, with three channels in each half; then a shuffle by stored numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 1), nn.Conv2d(6, 9, 3, padding=1)
        self.depth, self.second, self.head = (
            nn.Conv2d(9, 9, 3, padding=1, groups=9),
            nn.Conv2d(9, 9, 1),
            nn.Linear(18, 2),
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x)], dim=1)
        x = x.unflatten(1, (3, 6)).transpose(1, 2).flatten(1, 2)
        kept, changed = x.chunk(2, dim=1)
        x = self.shuffle(torch.cat([kept, self.second(self.depth(changed))], dim=1))
        return self.head(x.mean((2, 3)))


def test_shuffled_channels_are_chosen_one_by_one_in_what_is_left():
    torch.manual_seed(0)
    program = capture(Shuffles().eval(), torch.randn(1, 3, 4, 4))
    for seed in range(4):
        groups = find_groups(program)
        pruned = apply_pruning(program, plan_removal(groups, half(groups, seed)), groups=groups)
        second = find_groups(pruned)
        assert len(second.groups) >= 2
        twice = apply_pruning(pruned, plan_removal(second, half(second, seed)), groups=second)
        counts = [sum(p.numel() for p in each.parameters()) for each in (program, pruned, twice)]
        assert counts[0] > counts[1] > counts[2]
        assert twice(torch.randn(5, 3, 4, 4)).shape == (5, 2)


class Positions(nn.Module):
    """Tables that are made in the type in which one computes, said or not."""

    def __init__(self):
        super().__init__()
        self.stem, self.place, self.head = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, x):
        table = torch.cat([torch.zeros(5, 1), torch.arange(5, dtype=torch.float32).unsqueeze(1)], dim=1)
        return self.head(self.stem(x) + self.place(table))


def test_the_proof_computes_in_double_what_a_program_makes_of_numbers():
    program = capture(Positions().eval(), torch.randn(1, 5, 3))
    groups = find_groups(program)
    assert [group.size for group in groups.groups] == [6]
    apply_pruning(program, plan_removal(groups, half(groups)), groups=groups)


class Folded(nn.Module):
    """Heads that are folded into the batch, as attention of PyTorch does, with a norm in each."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.norm, self.head = (
            nn.Linear(3, 12),
            nn.Linear(3, 12),
            nn.LayerNorm(3),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        q, k = (f(x).reshape(-1, 5, 4, 3).transpose(1, 2).reshape(-1, 5, 3) for f in (self.query, self.key))
        scores = torch.bmm(self.norm(q), k.transpose(1, 2)).reshape(-1, 4, 5, 5)
        return self.head(scores.permute(0, 2, 3, 1))


def test_heads_that_are_folded_into_the_batch_can_go():
    program = capture(Folded().eval(), torch.randn(1, 5, 3))
    groups = find_groups(program, norm_axes=True)
    assert sorted(group.size for group in groups.groups) == [3, 4]
    pruned = apply_pruning(program, plan_removal(groups, half(groups), norm_axes=True), groups=groups)
    assert pruned(torch.randn(3, 5, 3)).shape == (3, 5, 5, 2)
