"""How much of each group goes when the loss is to be the same everywhere, at once and in steps."""

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.capture import capture
from slimgraph.program.count import count
from slimgraph.pruning.allocate import allocate
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.cost import Costs
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.in_steps import prune_in_steps
from slimgraph.pruning.latency import MeasuredLatency
from slimgraph.pruning.measure_sensitivity import measure_sensitivity
from slimgraph.pruning.prune import plan_pruning, prune
from slimgraph.pruning.sensitive import ratios_by_cubic, ratios_by_loss, step_ratio
from slimgraph.pruning.sensitivity_file import load_sensitivity

POINTS = {0.1: 0.0, 0.2: 0.05, 0.3: 0.2}


@pytest.mark.parametrize(
    ("level", "ratio"),
    [
        (0.125, 0.25),  # half way from 0.05 to 0.2
        (0.05, 0.2),
        (0.01, 0.12),
        (0.0, 0.1),
        (-0.01, 0.0),  # nothing is known below the first point
        (0.2, 0.3),
        (9.0, 0.3),  # nor behind the last
    ],
)
def test_ratios_lie_between_the_points_that_were_measured(level, ratio):
    assert ratios_by_loss({"conv": POINTS}, level) == {"conv": pytest.approx(ratio)}


def test_of_a_curve_that_falls_again_the_largest_ratio_within_the_level_counts():
    assert ratios_by_loss({"conv": {0.1: 0.3, 0.2: 0.01, 0.4: 0.21}}, 0.11) == {"conv": pytest.approx(0.3)}


@pytest.mark.parametrize(
    ("points", "level", "ratio"),
    [
        ({0.2: 0.04, 0.4: 0.16, 0.6: 0.36, 0.8: 0.64}, 0.25, 0.5),  # r² = 1/4
        ({0.2: 0.008, 0.4: 0.064, 0.6: 0.216, 0.8: 0.512}, 0.027, 0.3),  # r³
        ({0.2: 0.008, 0.4: 0.064, 0.6: 0.216, 0.8: 0.512}, 0.9, 0.8),  # no further than was measured
        ({0.2: 0.1, 0.4: 0.2, 0.6: 0.3, 0.8: 0.4}, 0.05, 0.1),
        ({0.2: 0.0, 0.4: 0.0, 0.6: 0.0}, 0.1, 0.6),  # no root: nothing is ever lost
        ({0.2: -0.1, 0.4: -0.2}, 0.0, 0.4),  # better without
    ],
)
def test_ratios_lie_on_a_cubic_through_the_points(points, level, ratio):
    assert ratios_by_cubic({"conv": points}, level)["conv"] == pytest.approx(ratio, abs=1e-9)


def test_the_first_of_three_roots_counts():
    # (r − 0.2)(r − 0.5)(r − 0.8) + 0.08 is 0 at 0, and 0.08 at three places.
    points = {r: (r - 0.2) * (r - 0.5) * (r - 0.8) + 0.08 for r in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)}
    assert ratios_by_cubic({"conv": points}, 0.08)["conv"] == pytest.approx(0.2)


def test_a_step_is_the_part_of_what_is_left():
    assert step_ratio(0.5, 3) == pytest.approx(0.2063, abs=5e-5)
    assert 1 - (1 - step_ratio(0.7, 4)) ** 4 == pytest.approx(0.7)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)]
    return capture(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 48, 48))


def test_latency_is_that_of_the_program_that_was_made_beside_the_whole_one(wide):
    groups = find_groups(wide)
    latency = MeasuredLatency(groups)
    assert latency({}) == latency({group.name: group.size for group in groups.groups}) == 1.0
    kept = {group.name: 8 for group in groups.groups}
    assert latency(kept) == latency(kept) < 0.6  # an eighth of most channels; measured once


@pytest.mark.slow
def test_latency_is_reduced_by_what_was_wanted(wide):
    plan = plan_pruning(wide, flops_removed=0.3, by="latency", allocation="uniform", multiple_of=8)
    assert all(0 < len(group.removed) < 60 for group in plan.groups)


def test_a_cost_that_is_none_is_answered_with_those_that_are(wide):
    with pytest.raises(ConfigError, match="no cost 'time'"):
        plan_pruning(wide, flops_removed=0.3, by="time")


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 20, 1), nn.Conv2d(20, 20, 1), nn.Conv2d(20, 20, 1)
        self.head = nn.Linear(20 * 16, 4)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().flatten(1))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Chain().eval(), torch.zeros(1, 1, 4, 4))


@pytest.fixture(scope="module")
def data(program):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(64, 1, 4, 4, generator=generator) for _ in range(2)]
    return [(x, program(x).argmax(dim=1)) for x in inputs]


@pytest.mark.parametrize("rule", ["interpolate", "cubic"])
def test_more_goes_where_less_is_lost(program, rule):
    groups = find_groups(program)
    scores = score_groups(program, groups)
    steep, flat = {0.25: 0.2, 0.5: 0.5, 0.75: 0.9}, {0.25: 0.02, 0.5: 0.05, 0.75: 0.3}
    losses = {"a.weight:0": flat, "b.weight:0": steep, "c.weight:0": flat}
    found = allocate(groups, scores, Costs(groups).macs, 0.6, strategy="sensitive", losses=losses, rule=rule)
    ratios = {name: len(gone) / 20 for name, gone in found.removed.items()}
    assert 0.6 <= found.reached < 0.7
    assert ratios["a.weight:0"] > ratios.get("b.weight:0", 0.0) + 0.2


def test_a_group_without_points_stays_whole_and_the_bound_is_told(program):
    groups = find_groups(program)
    scores = score_groups(program, groups)
    losses = {"a.weight:0": {0.25: 0.02, 0.5: 0.05}}
    found = allocate(groups, scores, Costs(groups).macs, 0.1, strategy="sensitive", losses=losses)
    assert [*found.removed] == ["a.weight:0"]
    with pytest.raises(ConfigError, match="at most 50%"):
        allocate(groups, scores, Costs(groups).macs, 0.5, strategy="sensitive", losses=losses)


def test_sensitivities_that_were_measured_decide(program, data, tmp_path):
    file = tmp_path / "s.json"
    sensitivity = measure_sensitivity(program, data, file=file, stop_loss=None)
    plan = plan_pruning(program, flops_removed=0.4, allocation="sensitive", sensitivity=file)
    assert plan == plan_pruning(program, flops_removed=0.4, allocation="sensitive", sensitivity=sensitivity)
    pruned = apply_pruning(program, plan)
    assert 0.5 < count(pruned).macs / count(program).macs <= 0.6
    assert (
        count(prune(program, allocation="sensitive", sensitivity=file, multiple_of=1)).macs <= 0.5 * count(program).macs
    )


def test_sensitivities_of_something_else_are_refused(program, data, tmp_path):
    found = measure_sensitivity(program, data, ratios=[0.5])
    with pytest.raises(ConfigError, match="criterion l2_norm, but l1_norm is to choose"):
        plan_pruning(program, flops_removed=0.1, allocation="sensitive", sensitivity=found, criterion="l1_norm")
    with pytest.raises(ConfigError, match="needs sensitivities"):
        plan_pruning(program, flops_removed=0.1, allocation="sensitive")
    with pytest.raises(ConfigError, match="has no use for sensitivities"):
        plan_pruning(program, flops_removed=0.1, sensitivity=found)
    torch.manual_seed(1)
    other = capture(Chain().eval(), torch.zeros(1, 1, 4, 4))
    with pytest.raises(DataError, match="other weights"):
        plan_pruning(other, flops_removed=0.1, allocation="sensitive", sensitivity=found)


def test_steps_remove_together_what_was_wanted_and_are_repaired_in_between(program, data, tmp_path):
    trained = []

    def train(pruned):
        trained.append(count(pruned).macs / count(program).macs)
        return pruned

    file = tmp_path / "s.json"
    found = prune_in_steps(program, data, num_steps=3, eval_rate=0.5, train=train, file=file)
    assert len(trained) == 3
    for step, left in enumerate(trained, start=1):
        wanted = (1 - step_ratio(0.5, 3)) ** step
        assert wanted - 0.08 < left <= wanted
    assert count(found).macs == trained[-1] * count(program).macs
    assert load_sensitivity(tmp_path / "s.step3.json").samples < 90
    assert [*load_sensitivity(file).ladders["a.weight:0"].metrics] == [0.2, 0.4, 0.6, 0.8]
    with pytest.raises(ConfigError, match="num_steps is 0"):
        prune_in_steps(program, data, num_steps=0)
    with pytest.raises(ConfigError, match="flops_removed is 2"):
        prune_in_steps(program, data, flops_removed=2)
