"""The documents' names of operators, and what they choose in a program."""

import pytest
import torch
from torch import nn

from slimgraph.deploy import targets
from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.quantization import plan_as_documented
from slimgraph.quantization.documented import (
    DOCUMENTED_OPERATORS,
    KINDS,
    QUANT_DEQUANT_PASS_OP_TYPES,
    TENSORRT_OP_TYPES,
    TRANSFORM_PASS_OP_TYPES,
    layers_not_quantized,
    operators_named,
)
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Conv2d(4, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.dense(x).relu()
        x = self.second(self.depthwise(x)) + x
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return prepare(capture(Mixed().eval(), torch.zeros(1, 4, 8, 8)))


def layers(plan):
    return [weight.value for weight in plan.weights]


@pytest.mark.parametrize(
    ("operators", "wanted"),
    [
        (["conv2d"], ["dense", "second"]),
        (["depthwise_conv2d"], ["depthwise"]),
        (["convolution"], ["dense", "depthwise", "second"]),
        (["conv2d", "depthwise_conv2d", "mul"], ["dense", "depthwise", "second", "head"]),
        (["matmul_v2"], ["head"]),
        (["linear"], ["head"]),
        (None, ["dense", "depthwise", "second", "head"]),
    ],
)
def test_operators_choose_the_layers(mixed, operators, wanted):
    assert layers(plan_quantization(mixed, operators=operators)) == wanted


def test_layers_that_were_not_asked_for_say_so(mixed):
    kept = plan_quantization(mixed, operators=["conv2d"]).kept_float
    assert set(kept) == {"depthwise", "head"}
    assert set(kept.values()) == {"it is not among the operators that are quantized here"}


def test_a_sum_is_in_integers_only_where_it_was_asked_for(mixed):
    without = {a.value for a in plan_quantization(mixed, operators=["conv2d", "depthwise_conv2d"]).activations}
    with_sum = plan_quantization(mixed, operators=["conv2d", "depthwise_conv2d", "elementwise_add", "mean"])
    added = {a.value for a in with_sum.activations} - without
    assert any(name.startswith("add") for name in added), added


def test_a_name_that_is_none_is_answered_with_the_closest(mixed):
    with pytest.raises(UnknownNameError, match="conv2d"):
        plan_quantization(mixed, operators=["conv_2d"])


def test_layers_are_left_out_by_a_part_of_their_path(mixed):
    assert layers_not_quantized(mixed, "dep") == ("depthwise",)
    assert layers_not_quantized(mixed, ["skip_quant"]) == ()
    assert layers_not_quantized(mixed, ["head", "second", ""]) == ("second", "head")


def test_weights_can_have_one_scale_each(mixed):
    assert all(w.scheme.axis is None for w in plan_quantization(mixed, weight_per_channel=False).weights)


def test_the_lists_are_those_of_the_documents():
    assert TRANSFORM_PASS_OP_TYPES == ["conv2d", "depthwise_conv2d", "conv2d_transpose", "mul", "matmul", "matmul_v2"]
    assert TENSORRT_OP_TYPES == ["mul", "conv2d", "pool2d", "depthwise_conv2d", "elementwise_add", "leaky_relu"]
    assert {"elementwise_add", "pool2d", "concat", "leaky_relu", "softmax"} < set(QUANT_DEQUANT_PASS_OP_TYPES)
    assert {*TRANSFORM_PASS_OP_TYPES, *QUANT_DEQUANT_PASS_OP_TYPES} == set(DOCUMENTED_OPERATORS)
    assert set(TENSORRT_OP_TYPES) < set(DOCUMENTED_OPERATORS)


def test_every_name_stands_for_kinds_that_targets_know():
    ours = {value for name, value in vars(targets).items() if name.isupper() and isinstance(value, str)}
    assert set(KINDS) == ours
    assert {kind for found in DOCUMENTED_OPERATORS.values() for kind in found.kinds} <= ours
    assert operators_named(["leaky_relu"])[0].kinds == frozenset()


# The documents' options


def test_the_defaults_quantize_layers_with_weights_and_no_sums(mixed):
    plan = plan_as_documented(mixed)
    assert layers(plan) == ["dense", "depthwise", "second", "head"]
    assert not any(a.value.startswith("add") for a in plan.activations if a.everywhere)
    assert all(w.scheme.axis is not None for w in plan.weights)


@pytest.mark.parametrize("kind", ["abs_max", "moving_average_abs_max", "range_abs_max"])
def test_other_weight_types_have_one_scale(mixed, kind):
    assert all(w.scheme.axis is None for w in plan_as_documented(mixed, weight_quantize_type=kind).weights)


def test_full_quantization_takes_whatever_the_target_computes(mixed):
    full = plan_as_documented(mixed, is_full_quantize=True, quantize_op_types=["mul"])
    assert full == plan_quantization(mixed, weight_bits=8, activation_bits=8)


def test_tensorrt_brings_its_own_operators_and_grids(mixed):
    plan = plan_as_documented(mixed, for_tensorrt=True, quantize_op_types=["conv2d"])
    assert plan.target == "tensorrt"
    assert layers(plan) == ["dense", "depthwise", "second", "head"]
    assert all(a.scheme.symmetric for a in plan.activations)


def test_patterns_keep_layers_in_float(mixed):
    assert layers(plan_as_documented(mixed, not_quant_pattern=["dep", "skip_quant"])) == ["dense", "second", "head"]


def test_one_name_needs_no_list_and_what_is_no_name_is_refused(mixed):
    assert layers(plan_as_documented(mixed, quantize_op_types="mul")) == ["head"]
    assert plan_quantization(mixed, skip="dense") == plan_quantization(mixed, skip=["dense"])
    for wrong in (3, [3]):
        with pytest.raises(ConfigError, match="not_quant_pattern is"):
            plan_as_documented(mixed, not_quant_pattern=wrong)


def test_activations_by_abs_max_take_their_range_at_inference(mixed):
    plan = plan_as_documented(mixed, target="simulate", activation_quantize_type="abs_max")
    assert plan.activations
    assert all(a.dynamic for a in plan.activations)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("weight_quantize_type", "channel_abs_max", "channel_wise_abs_max"),
        ("activation_quantize_type", "moving_average", "moving_average_abs_max"),
        ("onnx_format", "yes", "True or False"),
        ("weight_bits", 1, "bits is 1"),
        ("weight_bits", "4", "bits is '4'; give a whole number"),
        ("activation_bits", 4.0, "bits is 4.0; give a whole number"),
        ("activation_bits", 17, "bits is 17"),
    ],
)
def test_values_that_the_documents_do_not_know_are_refused(mixed, option, value, said):
    with pytest.raises(ConfigError, match=said):
        plan_as_documented(mixed, **{option: value})
