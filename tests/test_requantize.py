"""Another quantization of the same program, from the same statistics."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.quantization.merge import merge_quantizers
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize, quantize_again, quantize_with_record
from slimgraph.quantization.preparation import prepare


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.second(self.pool(F.relu6(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Network().eval(), torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def batches():
    return list(torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def done(program, batches):
    prepared = prepare(program)
    return quantize_with_record(prepared, plan_quantization(prepared), batches, histograms=True)


@pytest.mark.parametrize("target", ["onnxruntime", "simulate"])
def test_merged_quantizers_answer_as_quantizer_and_dequantizer_do(program, batches, target):
    quantized = quantize(program, calibration=batches, target=target)
    merged = merge_quantizers(quantized)
    with torch.no_grad():
        given, wanted = merged(batches[0]), quantized(batches[0])
    torch.testing.assert_close(given, wanted, rtol=0, atol=float(wanted.abs().max()) / 255)  # one step: ties
    assert not any("dequantize" in str(node.target) for node in merged.graph.nodes)


def test_another_plan_gives_what_it_gives_from_the_beginning(done, batches):
    prepared = done.prepared
    plan = plan_quantization(prepared, spared={"second": "why not"})
    again = quantize_again(done, plan, iter(()))
    fresh = quantize_with_record(prepared, plan, batches)
    assert again.plan.ranges == fresh.plan.ranges
    torch.testing.assert_close(again.program(batches[0]), fresh.program(batches[0]))
    assert again.plan.kept_float["second"] == "why not"


def test_a_value_that_only_now_has_a_scale_of_its_own_takes_the_one_that_it_had(done):
    again = quantize_again(done, plan_quantization(done.prepared, spared={"first": "so"}), iter(()))
    owner = next(weight.input for weight in again.plan.weights if weight.value == "second")
    assert owner == "pool" not in done.plan.ranges  # which took the scale of what it pools
    assert again.plan.ranges["pool"] == (0.0, done.statistics["relu6_0"].maximum)


def test_what_has_no_statistics_yet_is_observed(done, batches):
    without = quantize_with_record(
        done.prepared, plan_quantization(done.prepared, spared={"head": ""}), batches, histograms=True
    )
    plan = plan_quantization(done.prepared)
    missing = set(plan.range_owners) - without.statistics.keys()
    assert missing
    assert quantize_again(without, plan, batches).plan.ranges == done.plan.ranges


def test_exactly_what_is_named_is_spared_for_the_reason_given(program):
    plan = plan_quantization(prepare(program), skip=["head"], spared={"second": "accuracy", "head": "accuracy"})
    assert plan.kept_float == {"second": "accuracy", "head": "it was asked to"}
    with pytest.raises(UnknownNameError, match=r"sekond.*second"):
        plan_quantization(prepare(program), spared={"sekond": ""})


def test_widths_of_layers_and_of_values_with_all_that_share_their_scale(done):
    plan = done.plan.with_bits({"head": 4}, {"pool": 6})
    assert {weight.value: weight.scheme.bits for weight in plan.weights} == {"first": 8, "second": 8, "head": 4}
    widths = {found.value: found.scheme.bits for found in plan.activations}
    assert {name for name, bits in widths.items() if bits == 6} == {"relu6_0", "pool"}
    assert plan.ranges == done.plan.ranges
    for weights, values in (({"haed": 4}, {}), ({}, {"haed": 4})):
        with pytest.raises(UnknownNameError, match="does not quantize 'haed'"):
            plan.with_bits(weights, values)
    with pytest.raises(ConfigError, match="2 to 16"):
        plan.with_bits({"head": 1})
