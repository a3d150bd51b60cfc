"""The documents' names of operators, and what they choose in a program."""

import pytest
import torch
from torch import nn

from slimgraph.deploy import targets
from slimgraph.errors import UnknownNameError
from slimgraph.program.capture import capture
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
from slimgraph.quantization.quantize import prepare


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


@pytest.fixture
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
    assert set(kept.values()) == {"it is not among the operators that were asked for"}


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
