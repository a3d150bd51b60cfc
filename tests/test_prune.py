"""Pruning in one call, and what goes along: statistics, the user's module, the optimizer."""

import pytest
import torch
from torch import nn

import slimgraph
from slimgraph.errors import ConfigError, DataError, ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.count import count
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.batch_norm import reestimate_batch_norm
from slimgraph.pruning.module import apply_to_module, apply_to_state_dict
from slimgraph.pruning.prune import plan_pruning, prune


class Attention(nn.Module):
    def __init__(self, width=24, heads=3):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.PReLU(32))
        self.grouped = nn.Conv2d(32, 48, 1, groups=4)
        self.up = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.attention, self.norm = Attention(), nn.LayerNorm(24)
        self.lstm = nn.LSTM(24, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.up(self.grouped(self.depth(self.stem(x))).relu()).flatten(2).transpose(1, 2)
        return self.head(self.lstm(x + self.attention(self.norm(x)))[0].mean(dim=1))


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    net = Net().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
    return net


@pytest.fixture(scope="module")
def program(module):
    return capture(module, torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("norm_axes", [False, True])
def test_half_of_the_flops_go_in_one_call(program, allocation, norm_axes):
    pruned = slimgraph.prune(program, flops_removed=0.5, allocation=allocation, norm_axes=norm_axes, multiple_of=4)
    assert 0.2 < count(pruned).macs / count(program).macs <= 0.5
    assert pruned(torch.randn(3, 3, 4, 4)).shape == (3, 5)
    assert pruned.state_dict()["grouped.weight"].shape[0] % 4 == 0


@pytest.mark.parametrize("criterion", ["l1_norm", "geometry_median", "random", "taylor"])
def test_any_criterion_decides(program, criterion):
    data = [torch.randn(4, 3, 4, 4)] if criterion == "taylor" else None
    pruned = prune(program, flops_removed=0.4, criterion=criterion, data=data, multiple_of=1)
    assert count(pruned).macs <= 0.6 * count(program).macs


def test_parameters_can_be_what_counts(program):
    plan = plan_pruning(program, flops_removed=0.5, by="parameters")
    left = count(apply_pruning(program, plan)).parameters / count(program).parameters
    assert left <= 0.5
    assert plan.reached == pytest.approx(1 - left)


def test_wrong_requests_say_what_is_wanted(program, module):
    with pytest.raises(ConfigError, match="one of the two"):
        plan_pruning(program)
    with pytest.raises(ConfigError, match="one of the two"):
        plan_pruning(program, ratios={})
    with pytest.raises(ConfigError, match="one of the two"):
        plan_pruning(program, flops_removed=0.5, ratios={"stem": 0.5})
    with pytest.raises(UnknownNameError, match="stem"):
        prune(program, skip=["stm"])
    with pytest.raises(ConfigError, match="at most"):
        prune(program, flops_removed=0.999)
    with pytest.raises(ProgramError, match="Capture a module first"):
        prune(module)


def test_statistics_are_those_of_the_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    program = capture(net, torch.zeros(1, 1, 3, 3))
    batches = [torch.randn(16, 1, 3, 3) * 3 + 1 for _ in range(3)]
    found = reestimate_batch_norm(program, batches).state_dict()
    # By PyTorch's own cumulative average, in training mode.
    for norm in (net[1], net[3]):
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    for batch in batches:
        net(batch)
    for name, wanted in net.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(found[name], wanted)
    assert torch.equal(program.state_dict()["1.running_mean"], torch.zeros(2))


def test_statistics_need_norms_and_data(program):
    with pytest.raises(DataError, match="no batch"):
        reestimate_batch_norm(program, [])
    with pytest.raises(ProgramError, match="no batch norm"):
        reestimate_batch_norm(capture(nn.Linear(2, 2).eval(), torch.zeros(1, 2)), [torch.zeros(1, 2)])


def test_pruning_recalibrates_on_request(program):
    pruned = prune(program, flops_removed=0.3, recalibrate=[torch.randn(8, 3, 4, 4)])
    assert [entry.step for entry in pruned.history[-2:]] == ["prune", "reestimate_batch_norm"]


@pytest.mark.parametrize("norm_axes", [False, True])
def test_the_users_module_follows_and_computes_the_same(module, program, norm_axes):
    plan = plan_pruning(program, flops_removed=0.6, norm_axes=norm_axes, criterion="random", floor=0.3)
    pruned, smaller = apply_pruning(program, plan), apply_to_module(module, plan)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(smaller(x), pruned(x), rtol=1e-4, atol=1e-5)
    assert smaller.depth[0].groups == smaller.depth[0].in_channels == smaller.stem[0].out_channels < 32
    assert smaller.attention.qkv.out_features == 3 * smaller.attention.num_heads * smaller.attention.head_dim < 72
    assert smaller.lstm.hidden_size == smaller.head.in_features
    assert smaller.up.in_channels == smaller.grouped.out_channels
    assert module.stem[0].out_channels == 32  # the one that was given stays as it is
    smaller.train()(x).sum().backward()


def test_a_state_dict_follows(module, program):
    plan = plan_pruning(program, flops_removed=0.4)
    found = apply_to_state_dict(module.state_dict(), plan)
    wanted = apply_to_module(module, plan).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_plan_for_something_else_is_refused(module, program):
    plan = plan_pruning(program, flops_removed=0.4)
    with pytest.raises(ConfigError, match="captured from"):
        apply_to_module(nn.Sequential(nn.Linear(2, 2)), plan)
    with pytest.raises(ConfigError, match="captured from"):
        apply_to_state_dict(apply_to_state_dict(module.state_dict(), plan), plan)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True)],
    ids=["SGD", "AdamW"],
)
def test_the_optimizer_goes_on_with_what_it_knows_of_what_is_left(program, make):
    trained = program.copy()
    optimizer = make([{"params": list(trained.parameters()), "weight_decay": 0.01}])
    for _ in range(2):
        optimizer.zero_grad()
        trained(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    plan = plan_pruning(trained, flops_removed=0.5)
    pruned, moved = apply_pruning(trained, plan, optimizer=optimizer)
    assert moved.param_groups[0]["weight_decay"] == 0.01
    old, new = dict(trained.named_parameters()), dict(pruned.named_parameters())
    kept = list(plan.kept["stem.0.weight"][0])
    for key, value in optimizer.state[old["stem.0.weight"]].items():
        after = moved.state[new["stem.0.weight"]][key]
        assert torch.equal(after, value[kept] if value.dim() else value)
    pruned(torch.randn(4, 3, 4, 4)).square().sum().backward()
    moved.step()
    assert len(optimizer.state) == len(old)


def test_an_optimizer_of_something_else_is_refused(program):
    plan = plan_pruning(program, flops_removed=0.3)
    with pytest.raises(ConfigError, match="not the program's"):
        apply_pruning(program, plan, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters()))
