"""Compression with other bits than eight: chosen, stored and told."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cli_runs import run
from slimgraph.auto.pipeline import compress
from slimgraph.auto.widths import Widths, as_widths
from slimgraph.deploy.kernels import count_kernels
from slimgraph.errors import ConfigError, ProgramError
from slimgraph.program.archive import save_program
from slimgraph.program.capture import capture
from slimgraph.quantization.mixed_bits import budget_of

DATA = "digits:train[:64]"


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3)
        self.conv3, self.fc = nn.Conv2d(32, 32, 3), nn.Linear(512, 10)

    def forward(self, image):
        return self.fc(F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(image)))))).flatten(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return capture(Network().eval(), torch.zeros(1, 1, 8, 8))


def bits_of(result):
    return {weight.value: weight.scheme.bits for weight in result.plan.weights}


def test_a_size_between_those_of_four_and_eight_bits_mixes_them(network, tmp_path):
    eight = compress(network, DATA, out=tmp_path / "8", bits=[8])
    options = {"bits": [4, 8], "budget": "size=0.2", "repairs": "bias,reach"}
    mixed = compress(network, DATA, out=tmp_path / "mixed", **options)
    assert set(bits_of(mixed).values()) == {4, 8}
    assert mixed.plan.weight_reach.keys() == {name for name, bits in bits_of(mixed).items() if bits == 4}
    # Apart from names and nodes, which this small network has many of, a fifth of the bytes of the weights is left.
    saved = eight.report.compressed.size_bytes - mixed.report.compressed.size_bytes
    narrow = {"conv2": 16 * 32 * 9, "conv3": 32 * 32 * 9, "fc": 5120, "conv1": 144}
    expected = sum(narrow[name] for name, bits in bits_of(mixed).items() if bits == 4) / 2
    assert 0.85 * expected < saved <= expected
    kernels = count_kernels(tmp_path / "mixed" / "model.onnx")
    assert (kernels.convolutions_integer, kernels.convolutions_float) == (3, 0)
    assert any("Of the choices within size=0.2" in notice.text for notice in mixed.report.notices)
    assert (mixed.report.compressed.label, eight.report.compressed.label) == ("int4/8", "int8")
    schemes = {layer.name: layer.scheme for layer in mixed.report.layers}
    assert schemes["conv3"] == f"int{bits_of(mixed)['conv3']} per channel"


@pytest.mark.slow
def test_what_repairs_narrow_weights_is_tried_unless_it_is_said(network, tmp_path):
    tried = compress(network, DATA, out=tmp_path, bits=[4])
    noise = next(entry.result["noise"] for entry in tried.program.history if entry.step == "choose_repairs")
    assert list(noise)[:2] == ["nothing", "bias"]
    assert list(noise)[-2:] == ["weights", "reach"]
    mixed = compress(network, DATA, out=tmp_path, bits=[4, 8], budget="size=0.2")
    assert "choose_repairs" in [entry.step for entry in mixed.program.history]
    for wide in ({"bits": [8]}, {"bits": [4], "repairs": "none"}):
        steps = [entry.step for entry in compress(network, DATA, out=tmp_path, **wide).program.history]
        assert "choose_repairs" not in steps
        assert ("correct_bias" in steps) == ("repairs" not in wide)


def test_a_budget_of_bit_operations_decides_on_activations_too(network, tmp_path):
    result = compress(
        network, DATA, out=tmp_path, bits=[4, 8], activation_bits=[4, 8], budget="bops=0.035", target="simulate"
    )
    assert {found.scheme.bits for found in result.plan.activations} | set(bits_of(result).values()) == {4, 8}


def test_a_budget_of_latency_goes_by_times_that_were_measured(network, tmp_path):
    with pytest.raises(ProgramError, match="it is in float within latency=100"):  # no noise, and time enough
        compress(network, DATA, out=tmp_path, bits=[8, 32], budget="latency=100")
    result = compress(network, DATA, out=tmp_path, bits=[4, 8], budget="latency=100")
    assert set(bits_of(result).values()) == {8}


def test_what_cannot_be_reached_is_said_with_what_can(network, tmp_path):
    with pytest.raises(ConfigError, match=r"size=0.01 cannot be met: with bits 4, 8 the size is between 0\.1\d+ and"):
        compress(network, DATA, out=tmp_path / "out", bits=[4, 8], budget="size=0.01")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": (4, 8)}, "Give a budget"),
        ({"weights": (4,), "budget": "size=0.2"}, "nothing to decide"),
        ({"budget": "size=0.2"}, "nothing to decide"),
        ({"weights": (1,)}, "bits has 1; give 2 to 16, or 32 for float"),
        ({"weights": ("8",)}, "bits has '8'"),
        ({"weights": (8.5,)}, "bits has 8.5"),
        ({"weights": (32,)}, "float only"),
        ({"activations": (8, 32), "budget": "bops=1"}, "activation_bits has 32"),
    ],
)
def test_bits_that_make_no_choice_are_refused(given, said):
    budget = budget_of(given.pop("budget")) if "budget" in given else None
    with pytest.raises(ConfigError, match=said):
        Widths(**given, budget=budget)


def test_one_number_of_bits_needs_no_list():
    assert (as_widths(4), as_widths([4, 8])) == ((4,), (4, 8))


def test_more_bits_than_kernels_have_are_refused(network, tmp_path):
    with pytest.raises(ConfigError, match=r"weight_bits is 16, but target 'onnxruntime.*8 bits at most|7 bits at most"):
        compress(network, DATA, out=tmp_path, bits=[16])


def test_the_command_takes_bits_and_budget(network, tmp_path):
    save_program(network, tmp_path / "net.pt2")
    given = ["compress", tmp_path / "net.pt2", "--data", DATA, "--out", tmp_path / "out", "--json"]
    done = run(*given, "--bits", "4,8", "--budget", "size=0.2", "--max-drop", "1")
    assert done.exit_code == 0, done.stderr
    assert any("size=0.2" in notice["text"] for notice in json.loads(done.stdout)["notices"])
    for wrong, said in (("4,x", "--bits is '4,x'"), ("4,8", "Give a budget")):
        failed = run(*given, "--bits", wrong)
        assert failed.exit_code == 2
        assert said in failed.stderr
