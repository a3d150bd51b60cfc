"""Batches cut into parts: nothing but speed and memory may depend on where they are cut."""

import pytest
import torch
from torch import nn

import slimgraph.program.parts as parts
from models.toys import TwoInputs, make
from slimgraph.deploy.compare import compare
from slimgraph.program.capture import capture
from slimgraph.program.parts import in_parts
from slimgraph.quantization.post_training import quantize


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one or two samples even for small networks."""
    monkeypatch.setattr(parts, "_LARGEST_VALUE_BYTES", 2**14)


def test_the_largest_value_decides_how_many_samples_go_at_once(monkeypatch):
    program = capture(nn.Linear(4, 16), torch.rand(2, 4))  # 16 floats a sample: 64 bytes
    monkeypatch.setattr(parts, "_LARGEST_VALUE_BYTES", 3 * 64)
    assert [len(part["input"]) for part in in_parts(program, {"input": torch.rand(7, 4)})] == [3, 3, 1]
    monkeypatch.setattr(parts, "_LARGEST_VALUE_BYTES", 1)
    assert [len(part["input"]) for part in in_parts(program, {"input": torch.rand(2, 4)})] == [1, 1]


def test_parts_joined_are_the_batch():
    program = capture(make("TwoInputs"), TwoInputs.example(2))
    batch = {spec.name: torch.rand(5, *spec.shape[1:]) for spec in program.signature.inputs}
    found = list(in_parts(program, batch))
    for name, tensor in batch.items():
        assert torch.equal(torch.cat([part[name] for part in found]), tensor)


def test_neither_calibration_nor_bias_correction_depends_on_the_parts(small_parts, monkeypatch):
    torch.manual_seed(0)
    program = capture(make("ConvChain"), torch.rand(2, 3, 16, 16))
    batches = [torch.randn(7, 3, 16, 16) for _ in range(3)]
    in_small = quantize(program, calibration=batches, target="simulate")
    assert len(list(in_parts(program, {"x": batches[0]}))) > 1
    monkeypatch.undo()
    whole = quantize(program, calibration=batches, target="simulate")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(in_small.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert whole.history == in_small.history


def test_a_comparison_does_not_depend_on_the_parts(small_parts, monkeypatch):
    program = capture(make("ConvChain"), torch.rand(2, 3, 16, 16))
    batches = [torch.randn(7, 3, 16, 16)]
    compressed = quantize(program, calibration=batches, target="simulate")
    in_small = compare(program, compressed, batches)
    monkeypatch.undo()
    whole = compare(program, compressed, batches)
    assert in_small.samples == whole.samples == 7
    for name, expected in whole.snr_db.items():
        assert in_small.snr_db[name] == pytest.approx(expected, abs=0.1)
