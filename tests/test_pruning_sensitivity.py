"""The metric of a program without a part of one group: the numbers, their file, and how it is gone on with."""

import json
import pickle
import sys

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError, DataError, UnknownNameError
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.program.fingerprint import fingerprint
from slimgraph.program.replay import replay_variants
from slimgraph.pruning.allocate import count_removed, lowest
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.measure_sensitivity import measure_sensitivity
from slimgraph.pruning.prune import plan_pruning
from slimgraph.pruning.sensitivity import Ladder, ratios_by, relative_loss
from slimgraph.pruning.sensitivity_file import (
    load_sensitivity,
    merge_sensitivities,
    require_finished,
    save_sensitivity,
)
from slimgraph.pruning.variants import made_quick, quick_inputs, variant_without
from slimgraph.training.evaluate import evaluate


class Net(nn.Module):
    """Batch norms, a residual, depthwise and grouped convolutions, a transposed one, attention and a recurrence."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Hardswish())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Sigmoid(), nn.Conv2d(32, 16, 3, padding=1, groups=4))
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.down = nn.Conv2d(32, 24, 2, stride=2)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.qkv, self.proj = nn.Linear(12, 3 * 24), nn.Linear(24, 12)
        self.lstm = nn.LSTM(12, 10, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x)
        x = self.up(self.down(self.depth(torch.cat([x, x + self.body(x)], dim=1)).relu()).relu())
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16, 24))
        return self.head(self.lstm(x)[0].mean(dim=1))


class Normed(nn.Module):
    """Channels that norms run over, and heads that are one axis with the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.group, self.point = nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 12, 1)
        self.layer, self.rms = nn.LayerNorm(12), nn.RMSNorm(12)
        self.qkv, self.proj, self.head = nn.Linear(12, 3 * 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.point(self.group(self.stem(x)).relu()).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.layer(x)).reshape(-1, 16, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (part.reshape(-1, 16, 8) for part in (q, k, v))
        attended = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).reshape(-1, 3, 16, 8)
        x = x + self.proj(attended.transpose(1, 2).reshape(-1, 16, 24))
        return self.head(self.rms(x).mean(dim=1))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.second = nn.Conv2d(20, 3, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).flatten(1))


def randomized(module, seed):
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
    return module.eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return capture(randomized(Small(), 1), torch.zeros(1, 1, 4, 4))


def batches(program, count=4, size=16, seed=0):
    """Labels are what the program answers itself, so that all is right at first."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 1, 4, 4, generator=generator) for _ in range(count)]
    return [(x, program(x).argmax(dim=1)) for x in inputs]


@pytest.mark.parametrize(("net", "norm_axes", "count"), [(Net, False, 6), (Normed, False, 3), (Normed, True, 5)])
def test_a_variant_computes_what_the_pruned_program_computes(net, norm_axes, count):
    torch.manual_seed(0)
    program = capture(randomized(net(), 1), torch.zeros(1, 3, 4, 4))
    groups = find_groups(program, norm_axes=norm_axes)
    quick = made_quick(program)
    found = find_groups(quick, norm_axes=norm_axes)
    x = torch.randn(3, 3, 4, 4)
    removed = {group.name: tuple(range(0, group.size, 2)) for group in groups.groups}
    variants = [variant_without(found, name, gone) for name, gone in removed.items()]
    outputs = dict(replay_variants(quick, quick_inputs(quick, {"x": x}), variants))
    torch.testing.assert_close(outputs[None][0], program(x), rtol=1e-4, atol=1e-5)
    for index, (name, gone) in enumerate(removed.items()):
        plan = plan_removal(groups, {name: gone}, norm_axes=norm_axes)
        pruned = apply_pruning(program, plan, groups=groups, proof=False)
        torch.testing.assert_close(outputs[index][0], pruned(x), rtol=1e-4, atol=1e-5, msg=name)
    assert len(removed) >= count


def test_the_layer_that_makes_the_channels_and_a_depthwise_one_behind_it_are_shared_by_all_points():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    program = capture(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 4, 4))
    variant = variant_without(find_groups(program), "0.weight:0", (1, 2))
    assert variant.start is program.value("4")


def test_points_are_the_metric_of_the_pruned_programs(small):
    data = batches(small)
    found = measure_sensitivity(small, data, stop_loss=None)
    groups = find_groups(small)
    scores = score_groups(small, groups, "l2_norm")
    assert found.baseline == 1.0
    assert found.samples == 64
    assert [*found.ladders] == [group.name for group in groups.groups]
    for name, ladder in found.ladders.items():
        for ratio, metric in ladder.metrics.items():
            gone = lowest(scores[name], count_removed(ladder.size, ratio))
            pruned = apply_pruning(small, plan_removal(groups, {name: gone} if gone else {}))
            assert metric == evaluate(pruned, data).value
    assert [*found.ladders["first.weight:0"].metrics] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert found.losses["first.weight:0"][0.9] == pytest.approx(1 - found.ladders["first.weight:0"].metrics[0.9])


def test_channels_that_a_norm_runs_over_are_measured_and_pruned_by_it():
    torch.manual_seed(0)
    program = capture(randomized(Normed(), 1), torch.zeros(1, 3, 4, 4))
    data = [(x := torch.randn(16, 3, 4, 4), program(x).argmax(dim=1))]
    found = measure_sensitivity(program, data, ratios=[0.25, 0.5], norm_axes=True, stop_loss=None)
    normed = {group.name for group in find_groups(program, norm_axes=True).groups if group.normed}
    assert normed
    assert normed <= found.ladders.keys()
    plan = plan_pruning(program, flops_removed=0.4, allocation="sensitive", sensitivity=found, norm_axes=True)
    assert any(group.name in normed for group in plan.groups)
    assert apply_pruning(program, plan)(torch.randn(2, 3, 4, 4)).shape == (2, 4)


def test_a_mean_over_the_batch_is_a_metric_too(small):
    def closeness(outputs, labels):
        return -float(outputs.square().mean())

    data = batches(small)
    found = measure_sensitivity(small, data, metric=closeness, ratios=[0.5], stop_loss=None)
    assert found.baseline == pytest.approx(evaluate(small, data, metric=closeness).value)
    assert found.metric == "closeness"


def test_only_the_layers_asked_for_are_measured(small):
    data = batches(small, count=1)
    assert [*measure_sensitivity(small, data, layers=["second"], ratios=[0.4]).ladders] == ["second.weight:0"]
    assert [*measure_sensitivity(small, data, skip=["second"], ratios=[0.4]).ladders] == ["first.weight:0"]
    with pytest.raises(UnknownNameError, match="second"):
        measure_sensitivity(small, data, layers=["secnd"])
    with pytest.raises(ConfigError, match="no group"):
        measure_sensitivity(small, data, layers=["head"])


def test_a_ladder_ends_where_too_much_is_lost(small):
    data = batches(small, count=8, size=32)
    whole = measure_sensitivity(small, data, stop_loss=None)
    ended = measure_sensitivity(small, data, stop_loss=0.2)
    for name, ladder in ended.ladders.items():
        full = whole.ladders[name].metrics
        assert all(full[ratio] == metric for ratio, metric in ladder.metrics.items())
        lost = [ratio for ratio, metric in full.items() if metric < 0.8]
        assert max(ladder.metrics) == (min(lost) if lost else 0.9)
    assert sum(len(ladder.metrics) for ladder in ended.ladders.values()) < 18


class Killed(Exception):  # noqa: N818
    pass


class Data(list):
    """Batches that break off at one of them; the first is also read to tell the data."""

    def __init__(self, items, end=None):
        super().__init__(items)
        self.end = end

    def __iter__(self):
        for number, item in enumerate(list.__iter__(self)):
            if number == self.end:
                raise Killed
            yield item


@pytest.mark.parametrize("end", [1, 2, 5])
def test_a_measurement_that_was_killed_goes_on_with_the_same_numbers(small, tmp_path, end, monkeypatch):
    data = batches(small, count=6, size=32)
    wanted = measure_sensitivity(small, data, stop_loss=0.2)
    file = tmp_path / "sensitivity.json"
    with pytest.raises(Killed):
        measure_sensitivity(small, Data(data, end), stop_loss=0.2, file=file)
    half = load_sensitivity(file)
    assert half.running.batches == end
    with pytest.raises(DataError, match=f"interrupted after {32 * end} samples"):
        require_finished(half, small)
    told = []
    found = measure_sensitivity(
        small, data, stop_loss=0.2, file=file, progress=lambda stage, done, total: told.append(done)
    )
    assert found == wanted == load_sensitivity(file)
    assert told[0] == 32 * (end + 1)


def test_points_that_are_there_are_not_measured_again(small, tmp_path, monkeypatch):
    data, file = batches(small), tmp_path / "s.json"
    measure_sensitivity(small, data, ratios=[0.5], file=file, stop_loss=None)
    wanted = measure_sensitivity(small, data, ratios=[0.25, 0.5], stop_loss=None)
    assert measure_sensitivity(small, data, ratios=[0.25, 0.5], file=file, stop_loss=None) == wanted
    monkeypatch.setattr("slimgraph.pruning.measure_sensitivity.measured", None)
    assert measure_sensitivity(small, data, ratios=[0.25], file=file, stop_loss=None) == wanted


def test_a_part_of_the_samples_is_always_the_same_part(small):
    data = batches(small, count=10)
    found = [measure_sensitivity(small, data, ratios=[0.5], eval_rate=0.3, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert 30 < found[0].samples < 66
    assert found[0].data != found[2].data
    with pytest.raises(DataError, match="no sample is left"):
        measure_sensitivity(small, batches(small, count=1, size=1), eval_rate=1e-6)


def test_what_belongs_to_something_else_is_refused(small, tmp_path):
    data, file = batches(small), tmp_path / "s.json"
    measure_sensitivity(small, data, ratios=[0.5], file=file)
    other = small.copy()
    other.state_dict()["head.bias"].add_(1)
    with pytest.raises(DataError, match="same network with other weights"):
        measure_sensitivity(other, data, file=file)
    with pytest.raises(DataError, match="another model"):
        require_finished(load_sensitivity(file), capture(nn.Linear(2, 2).eval(), torch.zeros(1, 2)))
    with pytest.raises(ConfigError, match="criterion 'l2_norm', but now it is 'l1_norm'"):
        measure_sensitivity(small, data, file=file, criterion="l1_norm")
    with pytest.raises(ConfigError, match="data"):
        measure_sensitivity(small, batches(small, seed=5), file=file)
    with pytest.raises(ConfigError, match="other data"):
        measure_sensitivity(small, data[:3], ratios=[0.1], file=file)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_files_are_refused_unread(tmp_path, protocol):
    file = tmp_path / "sensitivities.data"
    file.write_bytes(pickle.dumps({"conv1_weights": {0.1: 0.02}}, protocol))
    with pytest.raises(DataError, match="Python pickle"):
        load_sensitivity(file)


def test_half_a_file_is_refused_and_another_one_too(small, tmp_path):
    file = tmp_path / "s.json"
    measure_sensitivity(small, batches(small, count=1), ratios=[0.5], file=file)
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="half of a file"):
        load_sensitivity(file)
    file.write_text(json.dumps({**json.loads(text), "more": 1}))
    with pytest.raises(DataError, match="more"):
        load_sensitivity(file)
    with pytest.raises(DataError, match="No such file"):
        load_sensitivity(tmp_path / "none.json")


def test_tables_of_parts_are_merged(small, tmp_path):
    data = batches(small)
    first = measure_sensitivity(small, data, layers=["first"], stop_loss=None)
    second = measure_sensitivity(small, data, layers=["second"], ratios=[0.3, 0.6], stop_loss=None)
    rest = measure_sensitivity(small, data, layers=["second"], stop_loss=None)
    merged = merge_sensitivities([first, second, rest])
    assert merged.losses == {
        **first.losses,
        "second.weight:0": {**second.losses["second.weight:0"], **rest.losses["second.weight:0"]},
    }
    save_sensitivity(merged, tmp_path / "m.json")
    assert load_sensitivity(tmp_path / "m.json") == merged
    with pytest.raises(ConfigError, match="samples 48"):
        merge_sensitivities([first, measure_sensitivity(small, data[:3], ratios=[0.1])])
    with pytest.raises(ConfigError, match="at least one"):
        merge_sensitivities([])


def test_two_values_of_one_point_are_refused(small):
    from dataclasses import replace

    found = measure_sensitivity(small, batches(small), ratios=[0.5])
    other = replace(found, ladders={"first.weight:0": Ladder(group="first.weight:0", size=20, metrics={0.5: 7.0})})
    with pytest.raises(ConfigError, match=r"Without 50% of .first\.weight:0"):
        merge_sensitivities([found, other])


def test_a_fingerprint_is_that_of_the_program_wherever_it_lies(small, tmp_path):
    save(small, tmp_path / "small.pt2")
    assert fingerprint(load(tmp_path / "small.pt2")) == fingerprint(small) == fingerprint(small.copy())


@pytest.mark.parametrize(("baseline", "metric", "lost"), [(0.8, 0.6, 0.25), (0.8, 0.9, -0.125), (-2.0, -3.0, 0.5)])
def test_losses_are_parts_of_the_metric(baseline, metric, lost):
    assert relative_loss(baseline, metric) == pytest.approx(lost)


def test_ratios_come_in_even_steps():
    assert ratios_by(0.1) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert ratios_by(0.3) == (0.3, 0.6, 0.9)
    with pytest.raises(ConfigError, match="delta_rate is 0"):
        ratios_by(0)


@pytest.mark.parametrize("ratios", [[], [0.0], [0.5, 1.0]])
def test_ratios_that_are_none_are_refused(small, ratios):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        measure_sensitivity(small, batches(small, count=1), ratios=ratios)


def test_processes_that_share_the_groups_give_the_same_numbers(small, tmp_path):
    pytest.importorskip("ray")
    data, file = batches(small, count=8, size=32), tmp_path / "s.json"
    wanted = measure_sensitivity(small, data, stop_loss=0.2)
    assert measure_sensitivity(small, data, stop_loss=0.2, workers=2, file=file) == wanted == load_sensitivity(file)


def test_without_ray_workers_say_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'slimgraph\[ray\]'"):
        measure_sensitivity(small, batches(small, count=1), workers=2)
