"""Weights alone in integers: grids, files of 4 bits, kernels, and the way back."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ConfigError, ProgramError, UnknownNameError
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.program.count import count
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.quantization.apply import apply_quantization, rounded_weight, weight_grid, weight_scale
from slimgraph.quantization.plan import plan_from_json
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.reach import best_reach, with_best_reach
from slimgraph.quantization.sensitivity import measure_sensitivity
from slimgraph.quantization.weight_only import plan_weights, quantize_weights


class Text(nn.Module):
    """A table with an output that is tied to it, a stored matrix, a linear layer of rank two, and a convolution."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Parameter(torch.randn(96, 64) / 10)
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.tied = nn.Linear(64, 50, bias=False)
        self.tied.weight = self.table.weight
        self.head = nn.Linear(64, 10)

    def forward(self, tokens):
        x = torch.relu(self.up(self.table(tokens))) @ self.down
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.tied(x), self.head(x.mean(1))


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return capture(Text().eval(), torch.randint(0, 50, (2, 7)))


TOKENS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(1))


def outputs(program, tokens=TOKENS):
    with torch.no_grad():
        found = program(tokens)
    return list(found.values()) if isinstance(found, dict) else list(found)


def distance(found, wanted):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


# Grids


def test_each_group_of_a_row_has_a_scale_of_its_own():
    weight = torch.tensor([[7.0, -3.4, 0.7, 0.34], [14.0, 2.0, -0.14, 0.0]])
    scheme = IntScheme(bits=4, axis=0, group=2)
    scale, zero_point = weight_grid(weight, scheme)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.1], [2.0, 0.02]]))
    codes = quantize(weight, scale, zero_point, scheme)
    assert codes.tolist() == [[7, -3, 7, 3], [7, 1, -7, 0]]
    back = dequantize(codes, scale, zero_point, scheme)
    torch.testing.assert_close(back, torch.tensor([[7.0, -3.0, 0.7, 0.3], [14.0, 2.0, -0.14, 0.0]]))


def test_groups_lie_along_the_axis_that_is_not_kept():
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    columns, rows = IntScheme(bits=4, axis=1, group=16), IntScheme(bits=4, axis=0, group=16)
    assert weight_scale(weight, columns).shape == (5, 4)
    assert torch.equal(rounded_weight(weight, columns), rounded_weight(weight.T, rows).T)


def test_asymmetric_grids_cover_what_is_there():
    weight = torch.tensor([[0.0, 1.0, 2.0, 15.0]])  # sixteen codes in steps of one
    scheme = IntScheme(bits=4, symmetric=False, axis=0)
    torch.testing.assert_close(rounded_weight(weight, scheme), weight)
    assert weight_grid(weight, scheme)[1].tolist() == [-8]


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 4)])
def test_groups_that_do_not_divide_a_matrix_are_refused(shape):
    with pytest.raises(ConfigError, match="Groups of 4 do not divide"):
        weight_scale(torch.randn(shape), IntScheme(axis=0, group=4))


@pytest.mark.parametrize("arguments", [{"group": 1, "axis": 0}, {"group": 32}])
def test_groups_without_elements_or_axis_are_refused(arguments):
    with pytest.raises(ConfigError, match="group is"):
        IntScheme(**arguments)


def test_the_best_reach_of_groups_is_that_of_their_rows():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    reach = best_reach(weight, IntScheme(bits=3, axis=0, group=16))
    assert reach == best_reach(weight.reshape(16, 16), IntScheme(bits=3, axis=0))


# Plans


def test_a_plan_names_tables_matrices_and_filters_and_reads_back(text):
    plan = plan_weights(prepare(text), bits=4, group=32)
    found = {w.value: (w.weight, w.scheme.bits, w.scheme.axis, w.scheme.group) for w in plan.weights}
    assert found == {
        "table": ("table.weight", 4, 0, 32),
        "up": ("up.weight", 4, 0, 32),
        "matmul_0": ("down", 4, 1, 32),
        "mix": ("mix.weight", 8, 0, None),  # nothing runs convolutions with fewer
        "tied": ("tied.weight", 4, 0, 32),
        "head": ("head.weight", 4, 0, 32),
    }
    assert plan_from_json(plan.to_json()) == plan
    assert "int4 per 32" in plan.table()


def test_a_matrix_that_groups_do_not_divide_has_a_scale_an_output(text):
    schemes = {w.value: w.scheme for w in plan_weights(prepare(text), bits=4, group=64).weights}
    assert (schemes["up"].group, schemes["matmul_0"].group) == (64, None)  # 64 and 96 inputs


def test_operators_tables_and_layers_can_be_left_out(text):
    plan = plan_weights(prepare(text), operators=["mul"], embeddings=False, skip=["head"])
    assert [w.value for w in plan.weights] == ["up", "matmul_0", "tied"]
    assert plan.kept_float == {
        "table": "it is not among the operators that are quantized here",
        "mix": "it is not among the operators that are quantized here",
        "head": "it was asked to",
    }


def test_layers_that_have_no_integer_form_are_named():
    program = capture(nn.LSTM(8, 8, batch_first=True).eval(), torch.randn(2, 3, 8))
    plan = plan_weights(program)
    assert plan.weights == ()
    assert list(plan.kept_float.values()) == ["no operator of its kind has integer weights"]
    with pytest.raises(ProgramError, match="no weight to quantize"):
        quantize_weights(program)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 9}, ConfigError, "bits is 9"),
        ({"bits": 1}, ConfigError, "bits is 1"),
        ({"bits": "4"}, ConfigError, "bits is '4'"),
        ({"group": 48}, ConfigError, "group is 48"),
        ({"operators": ["linaer"]}, UnknownNameError, "linear"),
        ({"skip": ["nothing"]}, UnknownNameError, "nothing"),
    ],
)
def test_what_no_file_can_hold_is_refused(text, arguments, error, message):
    with pytest.raises(error, match=message):
        quantize_weights(text, **arguments)


# Programs and files


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_program_computes_with_weights_on_the_grids_of_its_plan(text, bits, group, symmetric):
    prepared = prepare(text)
    plan = plan_weights(prepared, bits=bits, group=group, symmetric=symmetric)
    plan = with_best_reach(prepared, plan) if symmetric else plan
    torch.manual_seed(0)
    module = Text().eval()  # the one that was captured
    module.tied.weight = nn.Parameter(module.table.weight.detach().clone())
    for w in plan.weights:
        weight = module.get_parameter(w.weight)
        weight.data = rounded_weight(weight.detach(), w.scheme, plan.weight_reach.get(w.value))
    for a, b in zip(outputs(apply_quantization(prepared, plan)), outputs(module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_table_and_the_output_that_is_tied_to_it_share_their_codes(text):
    quantized = quantize_weights(text, bits=4, group=32)
    assert quantized.value("table").args[0] is quantized.value("tied").args[1]
    assert count(quantized).parameters == count(text).parameters


def test_up_to_four_bits_are_stored_in_four_and_the_rest_in_eight(text, tmp_path):
    sizes = {}
    for bits in (3, 4, 5, 8):
        export_onnx(quantize_weights(text, bits=bits, group=32, operators=["linear"]), tmp_path / "model.onnx")
        model = onnx.load(tmp_path / "model.onnx")
        sizes[bits] = {t.name: len(t.raw_data) for t in model.graph.initializer}
        types = {t.name: t.data_type for t in model.graph.initializer}
        assert types["up.weight"] == (onnx.TensorProto.INT4 if bits <= 4 else onnx.TensorProto.INT8)
    assert sizes[3] == sizes[4]
    assert (sizes[4]["up.weight"], sizes[8]["up.weight"]) == (64 * 96 // 2, 64 * 96)
    assert sizes[4]["table.weight_codes"] == 50 * 64 // 2


@pytest.mark.parametrize("arguments", [
    {"bits": 8}, {"bits": 8, "symmetric": False}, {"bits": 8, "group": 16}, {"bits": 4}, {"bits": 4, "group": 32},
    {"bits": 4, "group": 32, "symmetric": False}, {"bits": 2, "group": 64},
], ids=str)  # fmt: skip
def test_onnx_runtime_has_one_kernel_for_each_matrix_and_the_file_is_read_back(text, arguments, tmp_path):
    quantized = quantize_weights(text, **arguments)
    export_onnx(quantized, tmp_path / "model.onnx")
    kernels = count_kernels(tmp_path / "model.onnx").kernels
    assert kernels["MatMulNBits"] == 4
    assert kernels["DequantizeLinear"] == 1  # of the convolution
    assert kernels.get("GatherBlockQuantized", 0) == (0 if arguments["bits"] == 8 and "group" not in arguments else 1)
    check_export(quantized, tmp_path / "model.onnx", TOKENS)
    back = load(tmp_path / "model.onnx")
    for a, b in zip(outputs(back), outputs(quantized), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    export_onnx(back, tmp_path / "again.onnx")
    assert count_kernels(tmp_path / "again.onnx").kernels["MatMulNBits"] == 4


def test_rows_of_a_table_whose_width_no_block_divides_are_looked_up_as_bytes(tmp_path):
    program = capture(nn.Embedding(20, 6).eval(), torch.zeros(2, 3, dtype=torch.long))
    quantized = quantize_weights(program, bits=4)
    export_onnx(quantized, tmp_path / "model.onnx")
    assert count_kernels(tmp_path / "model.onnx").kernels == {"Cast": 1, "Gather": 2, "Mul": 1}
    check_export(quantized, tmp_path / "model.onnx", torch.randint(0, 20, (8, 3)))


def test_archives_hold_the_same_program(text, tmp_path):
    for arguments in ({"bits": 4, "group": 32}, {"bits": 8, "symmetric": False}):
        quantized = quantize_weights(text, **arguments)
        save(quantized, tmp_path / "model.pt2")
        back = load(tmp_path / "model.pt2")
        assert all(torch.equal(a, b) for a, b in zip(outputs(back), outputs(quantized), strict=True))
        assert back.state_dict()["up.weight"].dtype == torch.int8


# Laws


def test_more_bits_and_smaller_groups_come_closer(text):
    wanted = outputs(text)

    def error(**arguments):
        return max(distance(outputs(quantize_weights(text, **arguments)), wanted))

    by_bits = [error(bits=bits, group=32) for bits in (2, 3, 4, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] < 0.02
    assert error(bits=4, group=16) < error(bits=4)
    assert error(bits=3, group=32) < error(bits=3, group=32, clip=False)


def test_the_sensitivity_of_each_weight_is_measured(text):
    prepared = prepare(text)
    rows = measure_sensitivity(prepared, plan_weights(prepared, bits=4, group=32), [TOKENS]).rows
    assert {row.name for row in rows} == {"table", "up", "matmul_0", "mix", "tied", "head"}
    assert all(0 < row.noise < 0.1 for row in rows)


def test_a_channel_of_zeros_stays_zero(text):
    program = text.copy()
    program.state_dict()["up.weight"][3] = 0.0
    weight = quantize_weights(program, bits=4, group=32).state_dict()
    assert not weight["up.weight"][3].any()
    assert np.isfinite(weight["up.weight_scale"].numpy()).all()


def test_with_data_the_answers_come_closer(text):
    torch.manual_seed(4)
    data = torch.randint(0, 50, (64, 7))
    wanted = outputs(text)
    nearest = distance(outputs(quantize_weights(text, bits=3, group=32)), wanted)
    fitted = distance(outputs(quantize_weights(text, bits=3, group=32, calibration=[data])), wanted)
    assert fitted[0] < nearest[0]
    assert fitted[1] < nearest[1]
