"""`slimgraph sensitivity`, and `slimgraph prune` by what it wrote."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from cli_runs import answer, run, write_npz
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.program.count import count


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(1024, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).relu().flatten(1))


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "wide.pt2"
    save(capture(Wide().eval(), torch.zeros(1, 1, 8, 8)), path)
    return path


@pytest.fixture
def data(model, tmp_path):
    x = np.random.default_rng(0).random((120, 1, 8, 8), dtype=np.float32)
    label = load(model)(torch.from_numpy(x)).argmax(dim=1).numpy()
    return write_npz(tmp_path / "data.npz", x=x, label=label)


def test_the_numbers_and_a_page_are_written_and_prune_goes_by_them(model, data, tmp_path):
    out = tmp_path / "found" / "s.json"
    found = answer("sensitivity", model, "--data", data, "--out", out, "--delta-rate", 0.25)
    assert found["baseline"] == 1.0
    assert found["samples"] == 120
    assert [*found["losses"]] == ["stem.0.weight:0", "body.weight:0"]
    assert [*found["losses"]["body.weight:0"]] == ["0.25", "0.5", "0.75"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["s.html", "s.json"]
    page = out.with_suffix(".html").read_text()
    assert "stem.<wbr>0.<wbr>weight:<wbr>0" in page
    assert page.count("<svg") == 1
    assert "25 % gone" in page
    assert "Without 50 % of one group" in page
    assert page.count(" is <code>") == 2  # both curves have a name, and of two none stands out
    assert "stand out" not in page
    pruned = tmp_path / "pruned"
    options = ("--sensitivity", out, "--multiple-of", 1, "--flops-removed", 0.3)
    told = answer("prune", model, "--out", pruned, *options)
    assert 0.3 <= told["flops_removed"] < 0.4
    assert count(load(pruned / "model.pt2")).macs == told["after"]["macs"]


def test_a_table_is_shown(model, data, tmp_path):
    options = ("--layer", "body", "--delta-rate", 0.5, "--criterion", "l1_norm", "--eval-rate", 0.5)
    result = run("sensitivity", model, "--data", data, "--out", tmp_path / "s.json", *options)
    assert result.exit_code == 0, result.stderr
    assert "body.weight:0" in result.stdout
    assert "stem" not in result.stdout
    assert "−50%" in result.stdout
    assert json.loads((tmp_path / "s.json").read_text())["criterion"] == "l1_norm"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--out", "s.data"), "ends in .json"),
        (("--out", "s.json", "--delta-rate", 1.5), "delta_rate is 1.5"),
        (("--out", "s.json", "--layer", "bdy"), "Closest: body"),
        (("--out", "s.json", "--eval-rate", 2), "eval_rate is 2"),
        (("--out", "s.json", "--metric", "top2"), "top1"),
    ],
)
def test_wrong_requests_end_with_a_sentence_and_write_nothing(model, data, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    result = run("sensitivity", model, "--data", data, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert {*tmp_path.iterdir()} == before


def test_sensitivities_of_another_model_and_half_of_a_file_are_refused(model, data, tmp_path):
    out = tmp_path / "s.json"
    answer("sensitivity", model, "--data", data, "--out", out, "--delta-rate", 0.5)
    torch.manual_seed(1)
    other = tmp_path / "other.pt2"
    save(capture(Wide().eval(), torch.zeros(1, 1, 8, 8)), other)
    refused = run("prune", other, "--out", tmp_path / "a", "--sensitivity", out)
    assert refused.exit_code == 2
    assert "other weights" in refused.stderr
    out.write_text(out.read_text()[:200])
    refused = run("prune", model, "--out", tmp_path / "a", "--sensitivity", out)
    assert refused.exit_code == 2
    assert "half of a file" in refused.stderr
    assert not (tmp_path / "a").exists()
