"""`slimgraph groups` and `slimgraph prune`."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from cli_runs import model_file, run, write_npz
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.program.count import count


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Conv2d(32, 48, 3, padding=1)
        self.head = nn.Linear(48, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).relu().mean((2, 3)))


@pytest.fixture
def wide(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "wide.pt2"
    save(capture(Wide().eval(), torch.zeros(1, 1, 8, 8)), path)
    return path


def test_groups_are_told_for_people_and_as_json():
    found = json.loads(run("groups", model_file("net.pt2"), "--json").stdout)
    (group,) = found["groups"]
    assert (group["name"], group["size"]) == ("conv.weight:0", 4)
    assert group["makers"] == ["conv"]
    assert found["unknown"] == {}
    assert "conv.weight:0" in run("groups", model_file("net.pt2")).stdout


def test_prune_writes_the_program_the_file_the_plan_and_the_report(wide, tmp_path):
    data = write_npz(tmp_path / "some.npz", x=np.random.default_rng(0).random((16, 1, 8, 8), dtype=np.float32))
    out = tmp_path / "out"
    options = ("--flops-removed", "0.45", "--allocation", "uniform", "--skip", "body", "--data", data, "--json")
    result = run("prune", wide, "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.pt2", "plan.json", "report.json"]
    pruned = load(out / "model.pt2")
    assert count(pruned).macs == found["after"]["macs"] <= 0.55 * found["before"]["macs"]
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    assert shapes["body.weight"] == (48, 16, 3, 3)
    assert [entry.step for entry in pruned.history[-2:]] == ["prune", "reestimate_batch_norm"]
    report = json.loads((out / "report.json").read_text())
    assert report["groups"] == {"stem.0.weight:0": {"before": 32, "after": 16}}
    assert report["latency"]["speedup"] > 0
    assert found["flops_removed"] == report["flops_removed"] >= 0.45


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 48), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        q, k, v = self.qkv(x).reshape(-1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 16)
        x = self.norm(x + self.out(attended))
        return self.last(self.norm(x + self.down(self.up(x).relu()))).mean(dim=1)


def test_heads_and_neurons_of_a_transformer_go_by_the_part(tmp_path):
    model, out = tmp_path / "attending.pt2", tmp_path / "out"
    save(capture(Attending().eval(), torch.zeros(2, 5, 3)), model)
    data = write_npz(tmp_path / "some.npz", x=np.random.default_rng(0).random((16, 5, 3), dtype=np.float32))
    options = ("--heads-removed", "0.5", "--feed-forward-removed", "0.25", "--out", out)
    result = run("prune", model, *options, "--data", data)
    assert result.exit_code == 0, result.stderr
    shapes = {name: tuple(tensor.shape) for name, tensor in load(out / "model.pt2").state_dict().items()}
    assert (shapes["out.weight"], shapes["down.weight"]) == ((8, 8), (8, 24))
    clash = run("prune", model, *options, "--flops-removed", "0.5")
    assert clash.exit_code == 2
    assert "leave out --flops-removed" in clash.stderr
    assert "reads gradients" in run("prune", model, *options[:4], "--out", tmp_path / "other").stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--flops-removed", "1.5"), "between 0 and 1"),
        (("--flops-removed", "0.99"), "at most"),
        (("--skip", "stm"), "stem"),
        (("--criterion", "l3_norm"), "l1_norm"),
        (("--criterion", "taylor"), "data"),
        (("--allocation", "globl"), "global"),
    ],
)
def test_wrong_requests_end_with_a_sentence_and_write_nothing(wide, tmp_path, options, said):
    result = run("prune", wide, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
