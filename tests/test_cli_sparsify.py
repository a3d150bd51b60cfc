"""`slimgraph sparsify`."""

import json

import pytest
import torch
from torch import nn

from cli_runs import run
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.pruning.asp import check_two_four
from slimgraph.pruning.zeros import count_zeros


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(72, 4))
    path = tmp_path / "net.pt2"
    save(capture(net.eval(), torch.zeros(1, 3, 5, 5)), path)
    return path


def test_a_ratio_of_the_weights_becomes_zero(model, tmp_path):
    out = tmp_path / "out"
    result = run(
        "sparsify", model, "--ratio", "0.5", "--local", "--block", "1x4", "--skip", "0", "--out", out, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.pt2", "report.json"]
    report = json.loads((out / "report.json").read_text())
    assert {weight["name"]: weight["sparsity"] for weight in report["weights"]} == {
        "0.weight": 0.0,
        "2.weight": 0.5,
        "4.weight": 0.5,
    }
    assert report["dense"] == json.loads(result.stdout)["dense"] == {"0.weight": "is skipped"}
    assert count_zeros(load(out / "model.pt2")).sparsity == count_zeros(load(out / "model.onnx")).sparsity
    assert json.loads(result.stdout)["zeros"]["sparsity"] == report["sparsity"]


def test_two_of_four_is_told_layer_by_layer(model, tmp_path):
    result = run("sparsify", model, "--two-four", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "0.weight stays dense: it sums over 3, which is no multiple of 4." in result.stdout
    assert check_two_four(load(tmp_path / "out" / "model.pt2")).sparse == ("2.weight", "4.weight")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "one of the two"),
        (("--ratio", "1.5"), "between 0 and 1"),
        (("--ratio", "0.5", "--threshold", "0.1"), "one of the two"),
        (("--ratio", "0.5", "--two-four"), "two-four"),
        (("--ratio", "0.5", "--block", "4"), "as 1x4"),
        (("--ratio", "0.5", "--block", "0x4"), "as 1x4"),
        (("--ratio", "0.5", "--skip", "haed"), "selects no weight"),
        (("--threshold", "1e9"), "the largest is"),
    ],
)
def test_wrong_requests_end_with_a_sentence_and_write_nothing(model, tmp_path, options, said):
    result = run("sparsify", model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
