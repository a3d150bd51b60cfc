"""Ranges taken at inference: grids, files, agreement with ONNX Runtime, and its integer kernels."""

import pytest
import torch
from torch import nn

from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, ProgramError
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.dynamic import quantize_dynamic
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import plan_from_json
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.sensitivity import measure_sensitivity


def one_linear(*weight):
    layer = nn.Linear(len(weight), 1, bias=False)
    layer.weight.data = torch.tensor([weight])
    return capture(layer.eval(), torch.zeros(1, len(weight)))


class Mixed(nn.Module):
    """Attention-like: three layers read one value, of rank three; and one of rank two at the end."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=bias) for bias in (True, False, True))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        mixed = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x)
        return self.head(torch.relu(mixed).mean(1))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.dilated = nn.Conv2d(8, 6, 3, dilation=2)
        self.row = nn.Conv1d(6, 4, 3, padding="same")

    def forward(self, x):
        x = self.dilated(torch.relu(self.depthwise(nn.functional.pad(self.stem(x), (0, 1, 0, 1)))))
        return self.row(x.flatten(2)).mean(2)


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return capture(Mixed().eval(), torch.randn(2, 7, 16))


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(0)
    return capture(Convolutions().eval(), torch.randn(2, 3, 16, 16))


def test_a_value_is_rounded_on_the_grid_that_covers_it_and_zero():
    # weight 1 is exact. From -1 to 4 in 255 steps of 1/51, zero point 51: 0.51 is 26.01 steps.
    program = quantize_dynamic(one_linear(1.0))
    rounded = program(torch.tensor([[-1.0], [4.0], [0.51]]))
    torch.testing.assert_close(rounded, torch.tensor([[-1.0], [4.0], [26 / 51]]))
    # The same number beside others: from 0 to 0.51, of which it is the end.
    torch.testing.assert_close(program(torch.tensor([[0.51], [0.0]])), torch.tensor([[0.51], [0.0]]))


def test_symmetric_grids_end_at_the_largest_magnitude():
    # From -127 to 127 in steps of 127/127.
    program = quantize_dynamic(one_linear(1.0), target="simulate")
    rounded = program(torch.tensor([[-127.0], [3.4], [2.5]]))
    torch.testing.assert_close(rounded, torch.tensor([[-127.0], [3.0], [2.0]]))  # ties go to even


@pytest.mark.parametrize("target", ["onnxruntime", "simulate"])
def test_zeros_stay_zeros(target):
    assert torch.equal(quantize_dynamic(one_linear(1.0, 2.0), target=target)(torch.zeros(3, 2)), torch.zeros(3, 1))


@pytest.mark.parametrize("bits", [2, 4, 12])
def test_the_simulation_has_the_bits_that_were_asked_for(bits):
    x = torch.randn(64, 1)
    rounded = quantize_dynamic(one_linear(1.0), target="simulate", activation_bits=bits)(x)
    top = x.abs().max() / (2 ** (bits - 1) - 1)
    assert len((rounded / top).round().unique()) <= 2**bits
    torch.testing.assert_close(rounded, (x / top).round() * top)


def test_samples_of_a_batch_share_one_grid(mixed):
    torch.manual_seed(1)
    program, x = quantize_dynamic(mixed), torch.randn(4, 7, 16)
    alone, beside = program(x[:1]), program(torch.cat([x[:1], 50 * x[1:]]))[:1]
    assert (alone - mixed(x[:1])).abs().max() < 0.2 * (beside - mixed(x[:1])).abs().max()


def test_a_plan_says_that_ranges_are_taken_at_inference_and_needs_none(mixed):
    plan = plan_quantization(prepare(mixed), dynamic=True)
    assert [a.dynamic for a in plan.activations] == [True, True]
    assert plan.range_owners == ()
    assert [w.input for w in plan.weights] == ["x", "x", "x", plan.activations[1].value]
    assert plan_from_json(plan.to_json()) == plan
    assert len(measure_sensitivity(prepare(mixed), plan, [torch.randn(4, 7, 16)]).rows) == 4 + 2


def test_layers_compute_what_the_schemes_say(mixed):
    torch.manual_seed(2)
    x = torch.randn(4, 7, 16)
    plan = plan_quantization(prepare(mixed), dynamic=True)
    grid = IntScheme(signed=False, symmetric=False)
    steps = grid.parameters(*x.aminmax())
    weight = mixed.state_dict()["q.weight"]
    scale = weight_scale(weight, plan.weights[0].scheme)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    rounded = dequantize(quantize(weight, scale, zeros, plan.weights[0].scheme), scale, zeros, plan.weights[0].scheme)
    expected = nn.functional.linear(dequantize(quantize(x, *steps, grid), *steps, grid), rounded)
    quantized = apply_quantization(prepare(mixed), plan)
    found = []
    node = quantized.value("q")
    hook = torch.fx.Interpreter(quantized.graph_module)
    hook.run_node = lambda n, run=hook.run_node: found.append((n, run(n))) or found[-1][1]
    hook.run(x)
    values = dict(found)
    torch.testing.assert_close(values[node], expected + mixed.state_dict()["q.bias"])


def test_onnx_runtime_fuses_every_linear_layer_into_an_integer_kernel(mixed, tmp_path):
    torch.manual_seed(3)
    program = quantize_dynamic(mixed)
    export_onnx(program, tmp_path / "model.onnx")
    count = count_kernels(tmp_path / "model.onnx")
    assert count.matmuls_integer == 4
    assert count.kernels["DynamicQuantizeMatMul"] == 1  # the head; q, k, v share what they read
    assert count.kernels["MatMulIntegerToFloat"] == 3
    assert count.kernels["DynamicQuantizeLinear"] == 1
    assert "DequantizeLinear" not in count.kernels
    check_export(program, tmp_path / "model.onnx", torch.randn(8, 7, 16))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_linear_layer_with_its_bias_is_one_kernel_whether_axes_are_free_or_not(fixed, tmp_path):
    torch.manual_seed(4)
    program = capture(nn.Linear(8, 4).eval(), torch.randn(2, 8), dynamic={} if not fixed else None)
    export_onnx(quantize_dynamic(program), tmp_path / "model.onnx")
    assert count_kernels(tmp_path / "model.onnx").kernels == {"DynamicQuantizeMatMul": 1}


def test_convolutions_run_in_integers_where_they_are_asked_for(convolutions, tmp_path):
    torch.manual_seed(5)
    program = quantize_dynamic(convolutions, operators=["convolution"])
    export_onnx(program, tmp_path / "model.onnx")
    count = count_kernels(tmp_path / "model.onnx")
    assert (count.convolutions_integer, count.convolutions_float) == (4, 0)
    x = torch.randn(3, 3, 16, 16)
    found = OnnxModel.open(tmp_path / "model.onnx")({"x": x})["output"]
    torch.testing.assert_close(torch.from_numpy(found), program(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("operators", [["linear"], None])
@pytest.mark.parametrize("target", ["onnxruntime", "simulate"])
def test_files_are_read_back_as_what_was_written(mixed, tmp_path, target, operators):
    torch.manual_seed(6)
    program, x = quantize_dynamic(mixed, target=target, operators=operators), torch.randn(3, 7, 16)
    back = program
    for name in ("model.pt2", "model.onnx", "again.onnx"):
        save(back, tmp_path / name)
        back = load(tmp_path / name)
        torch.testing.assert_close(back(x), program(x), rtol=0, atol=1e-6)


def test_the_products_of_two_activations_take_ranges_in_the_simulation(mixed):
    plan = plan_quantization(prepare(mixed, target="simulate"), target="simulate", dynamic=True)
    assert {reader for readers in plan.consumers.values() for reader in readers} >= {"matmul_0", "matmul_1"}


def test_layers_that_are_left_out_read_the_float_value(mixed):
    program = quantize_dynamic(mixed, skip=["v"])
    assert program.state_dict()["v.weight"].dtype is torch.float32
    assert program.value("v").args[0].op == "placeholder"


def test_targets_that_measure_no_ranges_say_which_do(mixed):
    with pytest.raises(ConfigError, match=r"tensorrt.*one of onnxruntime"):
        quantize_dynamic(mixed, target="tensorrt")


def test_other_widths_than_eight_are_refused_where_the_operator_has_none(mixed):
    with pytest.raises(ConfigError, match="DynamicQuantizeLinear, which has 8 bits"):
        quantize_dynamic(mixed, activation_bits=4)


def test_a_program_without_such_layers_is_refused(convolutions):
    with pytest.raises(ProgramError, match="nothing to quantize"):
        quantize_dynamic(convolutions)
