"""Attention spelled out: the same function, with places for quantizers inside."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.captured import captured
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import export_onnx
from slimgraph.program.capture import capture
from slimgraph.program.cast import cast
from slimgraph.program.check import check
from slimgraph.program.spell_attention import spell_out_attention


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **self.options)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn_drop = nn.Dropout(0.5)

    def forward(self, query, key, value):
        p = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, scale=2.0)


def tensors(*lengths, heads=4):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator) for length in lengths)


QUERY, KEY, VALUE = tensors(5, 7, 7)
ALLOWED = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0], [0] * 7, [1] * 7, [0, 1, 0, 1, 0, 1, 0]]).bool()
BIAS = torch.linspace(-1, 1, 70, dtype=torch.float64).reshape(2, 1, 5, 7).masked_fill(~ALLOWED, -math.inf)

CASES = {
    "plain": ((QUERY, KEY, VALUE), {}),
    "another scale": ((QUERY, KEY, VALUE), {"scale": 0.3}),
    "causal": ((QUERY, KEY, VALUE), {"is_causal": True}),
    "a mask of booleans, one row of it empty": ((QUERY, KEY, VALUE, ALLOWED), {}),
    "a mask of numbers, one row of it empty": ((QUERY, KEY, VALUE, BIAS), {}),
    "grouped queries": ((QUERY, KEY[:, :2], VALUE[:, :2]), {"enable_gqa": True}),
}


def free_lengths(inputs):
    axes = {"query": {2: "length"}, "key": {2: "width"}, "value": {2: "width"}}
    if len(inputs) > 3:
        axes["mask"] = {inputs[3].dim() - 2: "length", inputs[3].dim() - 1: "width"}
    return axes


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_equal_scores_give_the_mean_of_the_values():
    program = spell_out_attention(
        capture(Attention(), (torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)))
    )
    value = torch.tensor([[[[1.0, 0, 0, 0], [2, 0, 0, 0], [6, 0, 0, 0]]]])
    got = program(torch.zeros(1, 1, 2, 4), torch.randn(1, 1, 3, 4), value)
    torch.testing.assert_close(got, torch.tensor([[[[3.0, 0, 0, 0]] * 2]]))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_spelled_attention_computes_what_the_operator_computes(case, free):
    inputs, options = CASES[case]
    program = capture(Attention(**options), inputs, dynamic=free_lengths(inputs) if free else None)
    spelled = spell_out_attention(program)
    check(spelled)
    assert not any("scaled_dot_product" in operator for operator in operators(spelled))
    torch.testing.assert_close(spelled(*inputs), program(*inputs), rtol=0, atol=1e-14)  # sums reorder in float64


@pytest.mark.parametrize("case", ["causal", "a mask of booleans, one row of it empty", "grouped queries"])
def test_spelled_attention_is_exported_as_it_is(case, tmp_path):
    inputs, options = CASES[case]
    spelled = cast(spell_out_attention(capture(Attention(**options), inputs)), torch.float32)
    export_onnx(spelled, tmp_path / "model.onnx")
    found = check_export(spelled, tmp_path / "model.onnx", inputs)
    assert found.output_error < 1e-5


def test_the_last_product_has_the_operator_s_name_and_the_steps_are_named_after_it():
    program = captured("TransformerBlock")
    spelled = spell_out_attention(program)
    name = "attention/scaled_dot_product_attention_0"
    assert {f"{name}/scores", f"{name}/scaled", f"{name}/probabilities", name} <= spelled.values.keys()
    assert set(program.values) <= set(spelled.values)
    assert spelled.layers == program.layers
    assert spelled.history[-1].parameters == {"operators": 1}
    assert any("scaled_dot_product" in operator for operator in operators(program))  # the original is as it was


def test_dropout_within_attention_drops_in_training_only():
    spelled = spell_out_attention(capture(Dropping(), tensors(5, 7, 7)))
    assert any("dropout" in operator for operator in operators(spelled))
    inputs = tensors(5, 7, 7)
    spelled.eval()
    expected = F.scaled_dot_product_attention(*inputs, scale=2.0)
    torch.testing.assert_close(spelled(*inputs), expected, rtol=0, atol=1e-14)
    spelled.train()
    assert not torch.allclose(spelled(*inputs), expected)


def test_a_program_without_attention_stays_what_it_is():
    program = captured("ConvChain")
    assert operators(spell_out_attention(program)) == operators(program)


@pytest.mark.parametrize("leading", [(), (3, 2)])
def test_attention_with_no_axis_of_heads_or_one_more_is_exported(leading, tmp_path):
    inputs = tuple(torch.randn(2, *leading, 5, 8) for _ in range(3))
    program = capture(Attention(), inputs)
    export_onnx(program, tmp_path / "model.onnx")
    assert check_export(program, tmp_path / "model.onnx", inputs).output_error < 1e-5
