"""Bits of layers under a budget."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimgraph.errors import ConfigError
from slimgraph.program.capture import capture
from slimgraph.quantization.calibration import choose_ranges, collect_statistics
from slimgraph.quantization.mixed_bits import FLOAT, Budget, LayerTimes, budget_of, choose_bits, plan_bits
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.sensitivity import QuantizerSensitivity, Sensitivity, measure_sensitivity

LAYERS = ("a", "b", "c", "d")
WIDTHS = {"a": (4, 6), "b": (6, 8), "c": (8, 10), "d": (10, 3)}


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (inputs, outputs) in WIDTHS.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, x):
        return self.d(F.tanh(self.c(F.tanh(self.b(F.tanh(self.a(x)))))))


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    program = prepare(capture(Chain().eval(), torch.zeros(1, 4)))
    batches = [torch.randn(32, 4)]
    plan = plan_quantization(program)
    return program, choose_ranges(plan, collect_statistics(program, plan.range_owners, batches)), batches


def sensitivity_of(plan, weight_noise, value_noise):
    rows = [
        QuantizerSensitivity(kind=kind, name=name, bits=bits, noise=noise, divergence=None)
        for kind, found in (("weight", weight_noise), ("activation", value_noise))
        for (name, bits), noise in found.items()
    ]
    return Sensitivity(rows=tuple(rows), samples=1)


MACS = {name: inputs * outputs for name, (inputs, outputs) in WIDTHS.items()}
noises = st.lists(st.floats(0, 1), min_size=24, max_size=24)


@settings(max_examples=30, deadline=None)
@given(noises, st.floats(0.01, 0.3))
def test_no_assignment_within_the_budget_brings_less_noise(chain, drawn, ratio):
    program, plan, _ = chain
    inputs = {weight.value: weight.input for weight in plan.weights}
    assert len(set(inputs.values())) == 4
    numbers = iter(drawn)
    weight_noise = {(name, bits): next(numbers) for name in LAYERS for bits in (2, 4, 8)}
    value_noise = {(value, bits): next(numbers) for value in inputs.values() for bits in (2, 4, 8)}

    def cost(weights, values):
        bops = sum(MACS[name] * b * a for name, b, a in zip(LAYERS, weights, values, strict=True))
        return bops / (sum(MACS.values()) * 32**2)

    def noise(weights, values):
        pairs = zip(LAYERS, weights, values, strict=True)
        return sum(weight_noise[name, b] + value_noise[inputs[name], a] for name, b, a in pairs)

    every = [(w, v) for w in product((2, 4, 8), repeat=4) for v in product((2, 4, 8), repeat=4)]
    within = [choice for choice in every if cost(*choice) <= ratio]
    choices = {"weight_bits": (2, 4, 8), "activation_bits": (2, 4, 8)}
    sensitivity = sensitivity_of(plan, weight_noise, value_noise)
    budget = Budget(kind="bops", ratio=ratio)
    if not within:
        with pytest.raises(ConfigError, match="cannot be met"):
            choose_bits(program, plan, sensitivity, budget, **choices)
        return
    found = choose_bits(program, plan, sensitivity, budget, **choices)
    weights = [found.weights[name] for name in LAYERS]
    values = [found.activations[inputs[name]] for name in LAYERS]
    assert found.cost == pytest.approx(cost(weights, values))
    assert found.cost <= ratio + 1e-9
    assert found.noise == pytest.approx(noise(weights, values), abs=1e-9)
    assert found.noise == pytest.approx(min(noise(*choice) for choice in within), abs=1e-6)


def test_a_budget_of_size_counts_bytes_as_they_are_stored(chain):
    program, plan, batches = chain
    sensitivity = measure_sensitivity(program, plan, batches, weight_bits=(4,))
    # Bytes: 182 weights of four in float. In codes: half a byte or one each, and five for the scale of each channel.
    whole, scales = 4 * sum(MACS.values()), 5 * 27
    assert (whole, scales) == (728, 135)
    least, most = (91 + scales) / whole, (182 + scales) / whole
    for ratio, bits in ((least, 4), (most, 8)):
        found = choose_bits(program, plan, sensitivity, budget_of(f"size={ratio}"), weight_bits=(4, 8))
        assert set(found.weights.values()) == {bits}
        assert found.cost == pytest.approx(ratio)
    with pytest.raises(ConfigError, match=rf"size=0.3 cannot be met: with bits 4, 8 .* {least:.4g} and {most:.4g}"):
        choose_bits(program, plan, sensitivity, budget_of("size=0.3"), weight_bits=(4, 8))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.two(F.tanh(self.one(F.tanh(self.one(x)))))


def test_a_weight_of_several_layers_is_paid_for_once():
    program, batches = prepare(capture(Tied().eval(), torch.zeros(1, 4))), [torch.randn(8, 4)]
    plan = plan_quantization(program)
    plan = choose_ranges(plan, collect_statistics(program, plan.range_owners, batches))
    sensitivity = measure_sensitivity(program, plan, batches)
    # 16 bytes of codes and four scales of five bytes, for each of two weights of 64 bytes.
    found = choose_bits(program, plan, sensitivity, budget_of("size=1"), weight_bits=(plan.weights[0].scheme.bits,))
    assert found.cost == pytest.approx(72 / 128)


def test_a_budget_of_latency_leaves_the_noisiest_layers_for_their_time_in_float(chain):
    program, plan, _ = chain
    own = {(found.value, found.scheme.bits): 0.0 for found in plan.activations}
    noise = sensitivity_of(plan, {(name, 8): 1.0 + index for index, name in enumerate(LAYERS)}, own)
    times = LayerTimes(
        floating_us=dict.fromkeys(LAYERS, 10.0),
        integer_us=dict.fromkeys(LAYERS, 4.0),
        others_us=2.0,
        floating_total_us=40.0,
    )
    choices = {"weight_bits": (8, FLOAT), "times": times}
    assert choose_bits(program, plan, noise, budget_of("latency=0.45"), **choices).spared == ()
    found = choose_bits(program, plan, noise, budget_of("latency=0.75"), **choices)
    assert found.spared == ("c", "d")
    assert found.cost == pytest.approx((2 + 4 + 4 + 10 + 10) / 40)
    assert "float" in found.table()
    with pytest.raises(ConfigError, match="needs the times"):
        choose_bits(program, plan, noise, budget_of("latency=0.7"), weight_bits=(8,))


def test_the_noise_of_more_widths_comes_from_one_pass_and_falls_with_the_bits(chain):
    program, plan, batches = chain
    found = measure_sensitivity(program, plan, batches, weight_bits=(4, 6), activation_bits=(4,))
    for name in LAYERS:
        assert [row.bits for row in found.rows if row.name == name and row.kind == "weight"] == [4, 6, 8]
    alone = measure_sensitivity(program, plan, batches)
    assert found.noise == pytest.approx(alone.noise)
    assert found.noise_at.keys() >= {("activation", "x", 4), ("activation", "x", 8)}


def test_a_plan_takes_the_bits(chain):
    program, plan, batches = chain
    sensitivity = measure_sensitivity(program, plan, batches, weight_bits=(4,), activation_bits=(4,))
    tight = plan_bits(program, plan, sensitivity, budget_of("bops=0.02"), activation_bits=(4, 8))
    assert {weight.scheme.bits for weight in tight.weights} <= {4, 8}
    assert {found.scheme.bits for found in tight.activations} <= {4, 8}
    assert tight != plan
    assert plan_bits(program, plan, sensitivity, budget_of("bops=1"), activation_bits=(4, 8)) == plan
    with pytest.raises(ConfigError, match="another plan"):
        plan_bits(program, plan, sensitivity, budget_of("bops=1"), weight_bits=(8, FLOAT))
    with pytest.raises(ConfigError, match="lack the weight 'a' with 3 bits"):
        plan_bits(program, plan, sensitivity, budget_of("bops=1"), weight_bits=(3, 8))
    with pytest.raises(ConfigError, match=r"lack the activation 'x' with 3 bits.*activation_bits=\[3, 8\]"):
        plan_bits(program, plan, sensitivity, budget_of("bops=1"), activation_bits=(3, 8))


@pytest.mark.parametrize("text", ["size", "size=", "size=a", "weight=0.5", "size=0", "size=2", "size=nan", "=0.3"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ConfigError, match="budget is"):
        budget_of(text)
