"""Which indices go: by ratios, to a part of the cost, in multiples, and never all."""

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.count import count
from slimgraph.pruning.allocate import allocate, count_removed, lowest, matching, removed_by_ratios, steps
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.cost import Costs
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import plan_removal


class Net(nn.Module):
    """A residual, a grouped convolution, a concatenation, attention and a recurrence."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1, groups=4))
        self.down = nn.Conv2d(32, 24, 2, stride=2)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.qkv, self.proj = nn.Linear(12, 3 * 24), nn.Linear(24, 12)
        self.lstm = nn.LSTM(12, 10, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        x = self.up(self.down(torch.cat([x, x + self.body(x)], dim=1)).relu())
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, 24))
        return self.head(self.lstm(x)[0].mean(dim=1))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), torch.zeros(1, 3, 4, 4))


@pytest.fixture(scope="module")
def groups(program):
    return find_groups(program)


@pytest.fixture(scope="module")
def scores(program, groups):
    return score_groups(program, groups, "l2_norm")


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_program_that_is_made(program, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    removed = {
        g.name: tuple(range(int(torch.randint(1, g.size, (), generator=generator))))
        for g in groups.groups
        if g.size > 1
    }
    costs, kept = Costs(groups), {name: groups[name].size - len(gone) for name, gone in removed.items()}
    made = count(apply_pruning(program, plan_removal(groups, removed), groups=groups))
    assert costs.macs(kept) == made.macs
    assert costs.parameters(kept) == made.parameters
    assert costs.memory(kept) == made.weight_bytes
    assert costs.macs({}) == count(program).macs


@pytest.mark.parametrize(
    ("size", "ratio", "multiple", "floor", "removed"),
    [
        (10, 0.5, 1, 0, 5),
        (10, 0.26, 1, 0, 3),
        (4, 1.0, 1, 0, 3),  # never all
        (1, 0.9, 1, 0, 0),
        (64, 0.3, 8, 0, 16),  # 45 stay, 48 is the nearest
        (64, 1.0, 8, 0, 56),
        (12, 0.5, 8, 0, 4),
        (8, 0.9, 8, 0, 0),
        (6, 0.9, 8, 0, 0),
        (100, 1.0, 1, 0.1, 90),
    ],
)
def test_counts_of_what_goes(size, ratio, multiple, floor, removed):
    assert count_removed(size, ratio, multiple, floor) == removed


def test_the_lowest_scores_go_and_of_equal_ones_the_first():
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 2) == (1, 3)
    assert lowest(torch.ones(5), 2) == (0, 1)


@pytest.mark.parametrize("strategy", ["global", "uniform"])
@pytest.mark.parametrize("measure", ["macs", "parameters", "memory"])
@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8])
def test_at_least_the_wanted_part_goes_and_hardly_more(program, groups, scores, strategy, measure, wanted):
    found = allocate(groups, scores, Costs(groups).measure(measure), wanted, strategy=strategy)
    assert wanted <= found.reached < wanted + 0.12  # one of three heads is much
    made = count(apply_pruning(program, plan_removal(groups, found.removed), groups=groups, proof=False))
    total = count(program)
    attribute = {"memory": "weight_bytes"}.get(measure, measure)
    assert 1 - getattr(made, attribute) / getattr(total, attribute) == pytest.approx(found.reached)


def test_uniform_takes_one_ratio_of_every_group(groups, scores):
    found = allocate(groups, scores, Costs(groups).macs, 0.5, strategy="uniform")
    ratios = {g.name: len(found.removed.get(g.name, ())) / g.size for g in groups.groups if g.size >= 10}
    assert max(ratios.values()) - min(ratios.values()) < 0.1


def test_global_takes_where_scores_are_low(groups, scores):
    lean = "down.weight:0"
    lowered = {**scores, lean: scores[lean] * 1e-3}
    found = allocate(groups, lowered, Costs(groups).macs, 0.1)
    assert sum(map(len, found.removed.values())) == len(found.removed[lean]) > 5
    found = allocate(groups, lowered, Costs(groups).macs, 0.4, floor=0.25)
    assert len(found.removed[lean]) == 18  # to the floor of a quarter of 24


def test_channels_that_stay_are_a_multiple_and_heads_go_one_by_one(groups, scores):
    found = allocate(groups, scores, Costs(groups).macs, 0.4, multiple_of=4)
    program = groups.traced.program
    pruned = apply_pruning(program, plan_removal(groups, found.removed), groups=groups)
    assert pruned.state_dict()["stem.weight"].shape[0] % 4 == 0
    assert pruned.state_dict()["down.weight"].shape[0] % 4 == 0
    by_size = {g.size: steps(groups, g, 8) for g in groups.groups if g.place == "qkv.weight:0"}
    assert by_size == {3: 1, 8: 8}


def test_layers_that_are_skipped_keep_what_they_make(program, groups, scores):
    found = allocate(groups, scores, Costs(groups).macs, 0.4, skip=["down", "lst?"])
    pruned = apply_pruning(program, plan_removal(groups, found.removed), groups=groups)
    assert pruned.state_dict()["down.weight"].shape[0] == 24
    assert pruned.state_dict()["down.weight"].shape[1] < 32
    assert pruned.state_dict()["lstm.weight_hh_l0"].shape == (40, 10)


def test_what_cannot_be_reached_says_what_can(groups, scores):
    with pytest.raises(ConfigError, match=r"at most [\d.]+% can be: .*'stem', 'body', 'down' protect") as caught:
        allocate(groups, scores, Costs(groups).macs, 0.9, skip=["stem", "body", "down"])
    most = float(str(caught.value).partition("at most ")[2].partition("%")[0]) / 100
    skip = ["stem", "body", "down"]
    assert allocate(groups, scores, Costs(groups).macs, most - 0.001, skip=skip).reached >= most - 0.001


@pytest.mark.parametrize("wanted", [0.0, 1.0, -0.5, 50])
def test_parts_that_are_none_are_refused(groups, scores, wanted):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        allocate(groups, scores, Costs(groups).macs, wanted)


def test_ratios_by_pattern(groups, scores):
    found = removed_by_ratios(groups, scores, {"stem": 0.25, "down.weight": 0.5, "re:body\\.2": 0.25})
    assert {name: len(gone) / groups[name].size for name, gone in found.items() if groups[name].size > 3} == {
        name: 0.5 if name.startswith("down") else 0.25 for name in found if groups[name].size > 3
    }
    assert found["down.weight:0"] == lowest(scores["down.weight:0"], 12)


def test_ratios_that_contradict_each_other_name_the_group():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    program = capture(Sum().eval(), torch.zeros(1, 3))
    groups = find_groups(program)
    scores = score_groups(program, groups)
    with pytest.raises(ConfigError, match=r"'a' wants the ratio 0.5 and 'b' wants 0.25.*one group"):
        removed_by_ratios(groups, scores, {"a": 0.5, "b": 0.25})
    assert len(removed_by_ratios(groups, scores, {"a": 0.5, "b": 0.5})["a.weight:0"]) == 4
    assert matching(groups, "c") == ()  # it makes the output, which stays
    with pytest.raises(ConfigError, match=r"'c' has the ratio 0\.5, but what it makes stays whole: output"):
        removed_by_ratios(groups, scores, {"c": 0.5})
    assert groups.fixed == {"c": ("output",)}
    with pytest.raises(ConfigError, match="'a' protect it"):
        removed_by_ratios(groups, scores, {"a": 0.5}, skip="a")  # a single pattern needs no list
    with pytest.raises(ConfigError, match="multiple_of is 0"):
        removed_by_ratios(groups, scores, {"a": 0.5}, multiple_of=0)
    with pytest.raises(UnknownNameError, match="selects no group"):
        removed_by_ratios(groups, scores, {"d": 0.5})
    with pytest.raises(ConfigError, match=r"in \[0, 1\)"):
        removed_by_ratios(groups, scores, {"a": 1.0})
