"""What each quantizer does by itself."""

import dataclasses

import pytest
import torch
from torch import nn

from slimgraph.errors import CalibrationError, ConfigError, DataError
from slimgraph.program.capture import capture
from slimgraph.program.scheme import dequantize
from slimgraph.program.scheme import quantize as to_codes
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.calibration import choose_ranges, collect_statistics
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.sensitivity import measure_sensitivity


def planned(program, batches, **options):
    prepared = prepare(program)
    plan = plan_quantization(prepared, **options)
    return prepared, choose_ranges(plan, collect_statistics(prepared, plan.range_owners, batches))


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    return capture(layers.eval(), torch.zeros(1, 3, 8, 8))


def test_the_noise_of_a_weight_is_that_of_rounding_it_and_nothing_else(network):
    batches = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    prepared, plan = planned(network, batches)
    found = measure_sensitivity(prepared, plan, batches, samples=24)
    assert found.samples == 24
    x = torch.cat(batches)[:24]
    for weight in plan.weights:
        changed = prepared.copy()
        tensor = changed.state_dict()[weight.weight]
        scale = weight_scale(tensor, weight.scheme)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        tensor.copy_(dequantize(to_codes(tensor, scale, zeros, weight.scheme), scale, zeros, weight.scheme))
        wanted, given = prepared(x).detach().double(), changed(x).detach().double()
        noise = float((given - wanted).square().sum() / wanted.square().sum())
        assert found.noise["weight", weight.value] == pytest.approx(noise, rel=1e-4)
        divergence = nn.functional.kl_div(given.log_softmax(1), wanted.softmax(1), reduction="batchmean")
        row = next(row for row in found.rows if row.kind == "weight" and row.name == weight.value)
        assert row.divergence == pytest.approx(float(divergence), rel=1e-3, abs=1e-9)


def test_every_quantizer_has_a_row_and_the_worst_stands_first(network):
    batches = [torch.randn(16, 3, 8, 8)]
    prepared, plan = planned(network, batches)
    coarse = dataclasses.replace(
        plan,
        weights=tuple(
            dataclasses.replace(w, scheme=dataclasses.replace(w.scheme, bits=2)) if w.value == "2" else w
            for w in plan.weights
        ),
    )
    found = measure_sensitivity(prepared, coarse, batches)
    wanted = {("weight", w.value) for w in plan.weights}
    wanted |= {("activation", a.value) for a in plan.activations if a.range_of == a.value or not a.everywhere}
    assert set(found.noise) == wanted
    assert (found.rows[0].kind, found.rows[0].name, found.rows[0].bits) == ("weight", "2", 2)
    assert [row.noise for row in found.rows] == sorted((row.noise for row in found.rows), reverse=True)
    assert "2     weight        2" in found.table(limit=1)


def test_noises_of_single_quantizers_add_up_to_that_of_all(network):
    batches = [torch.randn(64, 3, 8, 8)]
    prepared, plan = planned(network, batches)
    x = batches[0]
    wanted = prepared(x).detach().double()
    whole = float((apply_quantization(prepared, plan)(x).double() - wanted).square().sum() / wanted.square().sum())
    assert sum(measure_sensitivity(prepared, plan, batches).noise.values()) == pytest.approx(whole, rel=0.3)


def test_a_program_with_two_branches_charges_a_shared_input_once_for_each_reader():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            x = x.tanh()
            return self.left(x), self.right(x) + x.sum(dim=1, keepdim=True)

    torch.manual_seed(0)
    batches = [torch.randn(32, 8)]
    prepared, plan = planned(capture(Parallel().eval(), torch.zeros(1, 8)), batches)
    found = measure_sensitivity(prepared, plan, batches)
    assert {row.kind for row in found.rows} == {"weight", "activation"}
    assert all(row.noise > 0 and row.divergence is None for row in found.rows)


def test_what_cannot_be_measured_is_refused(network):
    prepared = prepare(network)
    with pytest.raises(ConfigError, match="no ranges"):
        measure_sensitivity(prepared, plan_quantization(prepared), [torch.randn(1, 3, 8, 8)])
    prepared, plan = planned(network, [torch.randn(1, 3, 8, 8)])
    with pytest.raises(CalibrationError, match="no batch"):
        measure_sensitivity(prepared, plan, [])
    with pytest.raises(ConfigError, match="samples is 0"):
        measure_sensitivity(prepared, plan, [torch.randn(1, 3, 8, 8)], samples=0)
    with pytest.raises(DataError, match="Calibration batch 1: input"):
        measure_sensitivity(prepared, plan, [torch.randn(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)])
