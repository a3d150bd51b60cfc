"""Post-training quantization: placement, integers, export, and agreement with ONNX Runtime."""

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from models import toys
from models.captured import captured, positional
from slimgraph.deploy import targets
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx, to_onnx
from slimgraph.deploy.processor import Processor
from slimgraph.deploy.targets import TARGETS, resolved_target, target_named
from slimgraph.errors import CalibrationError, ConfigError, DataError, ExportError, ProgramError, UnknownNameError
from slimgraph.program import scheme as scheme_module
from slimgraph.program.capture import capture
from slimgraph.program.count import count
from slimgraph.program.scheme import IntScheme
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import correct_bias
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import plan_from_json
from slimgraph.quantization.post_training import quantize, quantize_with_record
from slimgraph.quantization.preparation import prepare, require_finite


def batches(name, count=4, size=8):
    torch.manual_seed(0)
    made = [positional(name, size + index) for index in range(count)]
    return [list(batch) for batch in made]


def snr_db(reference, other):
    reference, other = reference.detach().double(), other.detach().double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum().clamp(min=1e-30)))


def first(outputs):
    return (
        outputs
        if isinstance(outputs, torch.Tensor)
        else next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    )


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(1)
    return capture(Chain().eval(), torch.randn(1, 3, 8, 8)).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(2)
    return [torch.randn(16, 3, 8, 8) for _ in range(4)]


# Weights that are no numbers


@pytest.mark.parametrize("tensor", ["conv2.weight", "fc.bias", "bn1.running_mean"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(chain, images, tensor, bad):
    program = chain.copy()
    program.state_dict()[tensor].view(-1)[0] = bad
    with pytest.raises(ProgramError, match=rf"1 of \d+ numbers of '{tensor}' are NaN or infinite"):
        quantize(program, calibration=(pytest.fail("data were read") for _ in images))


def test_masks_may_be_infinite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([-0.5, -float("inf"), 0.0, 0.0]))
            self.zeros = nn.Parameter(torch.tensor([0.0, 0.0, float("-inf"), 0.0]))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.softmax(self.fc(x) + self.mask + self.zeros, dim=1)

    require_finite(capture(Masked(), torch.zeros(1, 4)))


# Placement


def test_every_value_between_integer_operators_is_quantized(chain):
    plan = plan_quantization(prepare(chain))
    assert [a.value for a in plan.activations] == ["x", "relu_0", "conv2", "relu_1", "mean_0"]
    assert [w.value for w in plan.weights] == ["conv1", "conv2", "fc"]
    assert all(a.everywhere for a in plan.activations if a.value not in ("x",))
    assert set(plan.rectifiers) == {"relu_0", "relu_1"}


def test_a_layer_that_was_skipped_stays_float(chain):
    plan = plan_quantization(prepare(chain), skip=["conv2"])
    assert [w.value for w in plan.weights] == ["conv1", "fc"]
    assert "conv2" in plan.kept_float


@pytest.mark.parametrize(("name", "layer", "operator"), [("Lstm", "lstm/lstm_0", "lstm"), ("Gru", "gru/gru_0", "gru")])
def test_layers_with_weights_that_no_kernel_is_for_are_told(name, layer, operator):
    program = prepare(captured(name))
    plan = plan_quantization(program)
    assert plan.kept_float == {layer: f"no {operator} is quantized for onnxruntime"}
    assert layer in {row.value for row in count(program).rows}
    assert f"{layer} stays float: no {operator} is quantized" in plan.table()


def test_tables_and_products_with_weights_are_told_and_other_tensors_are_not():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.fc = nn.Embedding(50, 8), nn.LayerNorm([4, 8]), nn.Linear(8, 3)
            self.place = nn.Parameter(torch.zeros(1, 4, 8))
            self.mix = nn.Parameter(torch.zeros(3, 3))

        def forward(self, ids):
            return torch.mm(self.fc(self.norm(self.words(ids) + self.place)).mean(1), self.mix.t())

    plan = plan_quantization(capture(Words(), torch.zeros(1, 4, dtype=torch.int64)))
    assert plan.kept_float == {
        "words": "no embedding is quantized for onnxruntime",
        "mm_0": "no mm is quantized for onnxruntime",
    }
    assert [weight.value for weight in plan.weights] == ["fc"]


def test_targets_differ_where_their_runtimes_do():
    program = prepare(captured("Transposed"))
    assert any("transposed" in why for why in plan_quantization(program, target="onnxruntime").kept_float.values())
    assert len(plan_quantization(program, target="tensorrt").weights) > len(
        plan_quantization(program, target="onnxruntime").weights
    )
    assert all(not a.scheme.signed for a in plan_quantization(program, target="openvino").activations)
    assert all(a.scheme.symmetric for a in plan_quantization(program, target="tensorrt").activations)
    assert {w.scheme.bits for w in plan_quantization(program, target="onnxruntime-avx2").weights} == {7}


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_what_moves_the_output_of_a_layer_has_the_scale_of_that_output(target):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.two(nn.functional.max_pool2d(self.one(x), 2))

    plan = plan_quantization(capture(Pooled(), torch.zeros(1, 3, 8, 8)), target=target)
    owners = {a.value: a.range_of for a in plan.activations}
    assert owners == {"x": "x", "one": "one", "max_pool2d_0": "one"}


@pytest.mark.parametrize(
    ("target", "name"),
    [("tensorrt", "DotProductAttention"), ("openvino", "DotProductAttention"), ("simulate", "TransformerBlock")],
)
def test_attention_is_as_good_in_integers_for_every_target_and_can_be_run(target, name, tmp_path):
    program = captured(name).eval()
    quantized = quantize(program, calibration=batches(name), target=target)
    inputs = positional(name, 8)
    assert snr_db(first(program(*inputs)), first(quantized(*inputs))) > 25
    export_onnx(quantized, tmp_path / "model.onnx")
    check = check_export(quantized, tmp_path / "model.onnx", inputs)
    assert check.largest_code_difference <= 1


PRODUCT = "attention/scaled_dot_product_attention_0"


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "simulate"])
def test_products_inside_attention_read_integers(target):
    plan = plan_quantization(prepare(captured("TransformerBlock"), target=target), target=target)
    values = {a.value: a for a in plan.activations}
    assert {f"{PRODUCT}/transposed", f"{PRODUCT}/probabilities", "attention/view_3"} <= values.keys()
    assert not plan.kept_float
    fixed = {name: a.known_range for name, a in values.items() if a.known_range is not None}
    # TensorRT and OpenVINO compute softmax in float, and what it gives has a range that is measured.
    assert fixed == ({f"{PRODUCT}/probabilities": (0.0, 255 / 256)} if target == "simulate" else {})


def test_attention_stays_one_operator_where_the_target_does_not_compute_it():
    program = prepare(captured("TransformerBlock"))
    assert [n for n in program.values if n.startswith(PRODUCT)] == [PRODUCT]
    assert PRODUCT in plan_quantization(program, target="tensorrt").kept_float  # and whoever forgot to say so is told


class Softmaxes(nn.Module):
    """A softmax between integers, as in attention over channels; and a masked one."""

    def __init__(self):
        super().__init__()
        self.gate, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        gate = torch.softmax(self.gate(x), dim=1)
        masked = torch.softmax(torch.where(x > 0, x, -torch.inf).view(-1, 3, 64).transpose(1, 2) * 2.0, dim=1)
        return self.head(self.conv(x) * gate), masked @ x.flatten(2)


@pytest.mark.parametrize(
    ("target", "scale", "zero_point"),
    [("simulate", 1 / 256, -128), ("mobile", 1 / 256, 0)],  # as TensorFlow Lite and ONNX Runtime want it
)
def test_an_integer_softmax_writes_steps_of_one_256th_without_calibration(target, scale, zero_point, tmp_path):
    torch.manual_seed(0)
    images = [torch.randn(16, 3, 8, 8)]
    program = capture(Softmaxes(), images[0])
    prepared = prepare(program, target=target)
    plan = plan_quantization(prepared, target=target)
    assert "softmax_0" not in values_to_observe(plan)
    made = quantize_with_record(prepared, plan, images)
    quantizer = made.program.value("softmax_0/quantized")
    assert quantizer.args[1:3] == (scale, zero_point)
    assert made.plan.ranges["softmax_0"] == (0.0, 255 / 256)
    assert "softmax_1" not in {a.value for a in made.plan.activations if a.known_range is not None}
    export_onnx(made.program, tmp_path / "model.onnx")
    assert check_export(made.program, tmp_path / "model.onnx", images[0]).largest_code_difference <= 1


def test_the_probabilities_of_narrow_codes_have_narrow_codes_too():
    plan = plan_quantization(
        prepare(captured("TransformerBlock"), target="simulate"), target="simulate", activation_bits=4
    )
    (softmax,) = [a for a in plan.activations if a.known_range is not None]
    assert (softmax.scheme.code_range, softmax.known_range) == ((-8, 7), (0.0, 15 / 16))


HASWELL = Processor(name="Haswell", architecture="x86_64", features=("avx2",))
ZEN_4 = Processor(name="Zen 4", architecture="x86_64", features=("avx2", "avx512", "avx512_vnni"))
GRAVITON = Processor(name="Graviton", architecture="arm64", features=("dotprod", "neon"))


def test_onnxruntime_keeps_to_7_bits_where_8_overflow():
    assert resolved_target("onnxruntime", HASWELL) == "onnxruntime-avx2"
    assert resolved_target("onnxruntime", ZEN_4) == resolved_target("onnxruntime", GRAVITON) == "onnxruntime"
    assert [resolved_target(name, HASWELL) for name in TARGETS if name != "onnxruntime"] == [*TARGETS][1:]


def test_quantize_takes_the_variant_of_this_processor_unless_a_target_is_given_itself(chain, images, monkeypatch):
    def largest_code(target):
        return int(quantize(chain, calibration=images, target=target).state_dict()["conv1.weight"].abs().max())

    monkeypatch.setattr(targets, "detect_processor", lambda: HASWELL)
    assert largest_code("onnxruntime") <= 63
    assert largest_code(target_named("onnxruntime")) == 127
    monkeypatch.setattr(targets, "detect_processor", lambda: ZEN_4)
    assert largest_code("onnxruntime") == 127


def test_wrong_requests_are_refused_with_the_closest_names(chain):
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        plan_quantization(chain, target="onnxruntim")
    with pytest.raises(UnknownNameError, match="conv1"):
        plan_quantization(chain, skip=["conv11"])
    with pytest.raises(ConfigError, match="8 bits at most"):
        plan_quantization(chain, weight_bits=16)


def test_calibration_data_may_be_a_specification(chain, images, tmp_path):
    np.savez(
        tmp_path / "calib.npz", x=torch.cat([x for (x,) in images] if isinstance(images[0], list) else images).numpy()
    )
    by_name = quantize(chain, calibration=str(tmp_path / "calib.npz")).state_dict()
    assert all(
        torch.equal(tensor, by_name[name]) for name, tensor in quantize(chain, calibration=images).state_dict().items()
    )
    with pytest.raises(CalibrationError, match="a NoneType; give batches"):
        quantize(chain, calibration=None)


def test_a_plan_is_json_and_is_read_back(chain):
    plan = plan_quantization(prepare(chain))
    assert [w["value"] for w in json.loads(plan.to_json())["weights"]] == ["conv1", "conv2", "fc"]
    assert plan_from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"target"', '"taget"', "target"),
        ('"bits": 8', '"bits": 99', "bits is 99"),
        ('"everywhere": true', '"everywhere": "yes"', r"activations\.\d+\.everywhere"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(chain, old, new, said):
    text = plan_quantization(prepare(chain)).to_json().replace(old, new, 1)
    with pytest.raises(ConfigError, match=said):
        plan_from_json(text)


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (1.0, -1.0)])
def test_a_plan_holds_no_range_that_is_none(chain, low, high):
    plan = plan_quantization(prepare(chain))
    ranges = dict.fromkeys(plan.range_owners, (-1.0, 1.0))
    first = plan.range_owners[0]
    with pytest.raises(ConfigError, match=f"range of '{first}' is {low} … {high}"):
        plan.with_ranges({**ranges, first: (low, high)})


def test_a_reach_has_one_number_for_each_scale():
    weight = torch.randn(4, 6)
    with pytest.raises(ConfigError, match=r"reach has 3 numbers.*\[4, 6\] has 4 scales as int8 per channel"):
        weight_scale(weight, IntScheme(narrow=True, axis=0), [1.0, 2.0, 3.0])
    assert weight_scale(weight, IntScheme(narrow=True, axis=0, group=3), [1.0] * 8).shape == (4, 2)


def test_the_value_whose_range_a_plan_lacks_is_named(chain):
    plan = plan_quantization(prepare(chain))
    owner, *others = plan.range_owners
    partly = dataclasses.replace(plan, ranges=dict.fromkeys(others, (-1.0, 1.0)))
    with pytest.raises(ConfigError, match=f"no range for '{owner}'"):
        apply_quantization(prepare(chain), partly)


# Integers


def rounded(weight, scheme):
    scale = weight_scale(weight, scheme)
    return scheme_module.quantize(weight, scale, torch.zeros_like(scale, dtype=torch.int32), scheme), scale


def test_a_grid_that_a_plan_states_takes_the_place_of_the_largest_weight(chain, images):
    prepared = prepare(chain)
    plan = plan_quantization(prepared)
    plan = choose_ranges(plan, collect_statistics(prepared, plan.range_owners, images))
    plan = dataclasses.replace(plan, weight_reach={"fc": tuple([2.54] * len(chain.state_dict()["fc.weight"]))})
    scales = apply_quantization(prepared, plan).state_dict()["fc.weight_scale"]
    assert scales.tolist() == pytest.approx([0.02] * len(scales))


def test_weights_are_rounded_to_the_grid_of_their_channel():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    codes, scale = rounded(weight, IntScheme(narrow=True, axis=0))
    assert scale.tolist() == pytest.approx([2 / 127, 0.5 / 127])
    assert codes.tolist() == [[64, -127], [127, 64]]  # 63.5 goes to the even 64


def test_the_quantized_program_holds_integers_and_says_so(chain, images):
    quantized = quantize(chain, calibration=images)
    state = quantized.state_dict()
    assert state["conv1.weight"].dtype == torch.int8
    assert state["conv1.bias"].dtype == torch.int32
    assert quantized.history[-1].step == "quantize"
    assert chain.state_dict()["conv1.weight"].dtype == torch.float32  # the original is as it was


@pytest.mark.parametrize("unit", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_a_network_computes_as_well_in_small_units_as_in_large_ones(where, unit):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, bias=False)
    data = torch.rand(16, 3, 8, 8) * (unit if where == "input" else 1.0)
    with torch.no_grad():
        conv.weight *= unit if where == "weight" else 1.0
    program = capture(nn.Sequential(conv, nn.ReLU()).eval(), data[:1])
    quantized = quantize(program, calibration=[data])
    assert snr_db(program(data) / unit, quantized(data) / unit) > 40  # as with a unit of one


def test_what_is_zero_everywhere_has_a_scale_to_divide_by():
    for scheme in (IntScheme(), IntScheme(signed=False, symmetric=False)):
        scale, zero_point = scheme.parameters(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0]))
        assert scale[0] == torch.tensor(1e-8) < scale[1]
        assert zero_point[0] == 0


def test_a_bias_too_large_for_its_grid_widens_the_weight_scale(images):
    model = Chain().eval()
    with torch.no_grad():
        model.conv2.weight[0] *= 1e-12  # scale so small that bias / scale overflows int32
        model.conv2.bias[0] = 3.0
    program = capture(model, images[0]).eval()
    quantized = quantize(program, calibration=images, bias_correction=False)
    assert snr_db(program(images[0]), quantized(images[0])) > 20


@pytest.mark.parametrize("algorithm", ["abs_max", "min_max", "avg", "hist", "KL", "mse", "emd", "ptf"])
def test_every_algorithm_gives_a_program_close_to_the_float_one(chain, images, algorithm):
    quantized = quantize(chain, calibration=images, algorithm=algorithm)
    assert snr_db(chain(images[0]), quantized(images[0])) > 15


def test_the_record_tells_what_led_to_the_program(chain, images):
    prepared, stages, seen = prepare(chain), [], []
    plan = plan_quantization(prepared)
    made = quantize_with_record(
        prepared, plan, iter(images), algorithm="min_max", progress=seen.append, stage=stages.append
    )
    assert (made.samples, seen) == (64, [16, 32, 48, 64])
    assert stages == ["Calibrating", "Correcting biases"]
    assert made.prepared is prepared
    assert made.plan.ranges.keys() == made.statistics.keys()
    direct = quantize(chain, calibration=images, algorithm="min_max", target=target_named("onnxruntime"))
    assert torch.equal(made.program(images[0]), direct(images[0]))


@pytest.mark.parametrize(
    ("algorithm", "asked", "kept"), [("min_max", False, False), ("min_max", True, True), ("mse", False, True)]
)
def test_histograms_are_counted_where_the_algorithm_or_the_caller_wants_them(chain, images, algorithm, asked, kept):
    prepared = prepare(chain)
    made = quantize_with_record(
        prepared, plan_quantization(prepared), images[:1], algorithm=algorithm, histograms=asked, bias_correction=False
    )
    assert {statistics.histogram is not None for statistics in made.statistics.values()} == {kept}


def test_one_pass_of_statistics_serves_every_algorithm(chain, images):
    program = prepare(chain)
    plan = plan_quantization(program)
    read = []

    def counted():
        for batch in images:
            read.append(len(batch))
            yield batch

    statistics = collect_statistics(program, values_to_observe(plan), counted())
    ranges = {name: choose_ranges(plan, statistics, algorithm=name).ranges for name in ("min_max", "mse", "KL")}
    assert len(read) == len(images)
    assert ranges["min_max"] != ranges["mse"]


def test_unusable_calibration_is_refused(chain, images):
    with pytest.raises(CalibrationError, match="no batch"):
        quantize(chain, calibration=[])
    with pytest.raises(DataError, match=r"batch 0.*NaN"):
        quantize(chain, calibration=[images[0] * float("nan")])
    with pytest.raises(DataError, match=r"batch 1.*takes"):
        quantize(chain, calibration=[images[0], images[0][:, :2]])
    plan = plan_quantization(chain)
    with pytest.raises(ConfigError, match="no ranges"):
        apply_quantization(chain, plan)


def test_statistics_that_do_not_serve_the_plan_are_refused(chain, images):
    program = prepare(chain)
    plan = plan_quantization(program)
    extremes = collect_statistics(program, values_to_observe(plan), images[:1], histogram=False)
    with pytest.raises(CalibrationError, match=r"'mse' reads histograms.*histogram=True"):
        choose_ranges(plan, extremes, algorithm="mse")
    del extremes["x"]
    with pytest.raises(CalibrationError, match=r"lack 1 values of the plan, 'x' first.*values_to_observe"):
        choose_ranges(plan, extremes)


def test_a_plan_is_applied_to_the_program_that_it_was_made_for_only(chain, images):
    program = prepare(chain)
    plan = plan_quantization(program)
    ranged = choose_ranges(plan, collect_statistics(program, values_to_observe(plan), images))
    other = capture(nn.Sequential(nn.Conv2d(3, 8, 3)), images[0][:1])
    with pytest.raises(ConfigError, match=r"does not have\. .*program that it was made for"):
        apply_quantization(other, ranged)
    layer = dataclasses.replace(plan.weights[0], value="conv11")
    with pytest.raises(ConfigError, match=r"'conv11'.*Closest: conv1"):
        apply_quantization(program, dataclasses.replace(ranged, weights=(layer,)))


def unread():
    """Calibration data that must not be touched."""
    yield pytest.fail("the data were read")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"algorithm": "msee"}, UnknownNameError, "Closest: mse"),
        ({"target": "onnxruntim"}, UnknownNameError, "onnxruntime"),
        ({"skip": ["op:conv2d", "op:linear"]}, ProgramError, r"nothing to quantize .*fc: it was asked to"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_the_data_are_read(options, error, message, chain):
    with pytest.raises(error, match=message):
        quantize(chain, calibration=unread(), **options)


def test_a_quantized_program_is_not_quantized_again(chain, images):
    with pytest.raises(ProgramError, match="quantized already"):
        quantize(quantize(chain, calibration=images), calibration=unread())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_program_in_another_type_is_refused_with_the_reason(dtype, chain):
    with pytest.raises(ProgramError, match=r"nothing to quantize .*conv1: it does not compute in float32"):
        quantize(chain.copy().to(dtype), calibration=unread())


def test_what_comes_out_of_training_is_quantized_for_evaluation():
    module = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))  # a norm that cannot be folded
    data = torch.rand(8, 3, 8, 8)
    trained = capture(module, data).train()
    quantized = quantize(trained, calibration=[data])
    assert trained.training
    assert torch.equal(quantized(data)[:2], quantized(data[:2]))


def test_products_of_activations_alone_are_worth_quantizing():
    class Product(nn.Module):
        def forward(self, x, y):
            return x @ y

    pair = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    quantized = quantize(capture(Product(), pair), calibration=[pair], target="tensorrt")
    assert quantized.history[-1].parameters["activations"] == 2


def test_same_data_same_program(chain, images):
    one, two = (quantize(chain, calibration=images) for _ in range(2))
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(one.state_dict()[key], two.state_dict()[key]) for key in one.state_dict())


# Bias correction


def test_corrected_layers_have_the_mean_output_that_they_had(chain, images):
    program = prepare(chain)
    plan = plan_quantization(program, weight_bits=3)  # coarse, so that there is something to repair
    plan = choose_ranges(plan, collect_statistics(program, values_to_observe(plan), images), algorithm="min_max")
    plain = apply_quantization(program, plan).eval()
    repaired = apply_quantization(correct_bias(program, plan, images), plan).eval()
    data = torch.cat(images)
    shift = (program(data) - plain(data)).mean(0).abs().mean()
    assert (program(data) - repaired(data)).mean(0).abs().mean() < 0.1 * shift


# Export


@pytest.mark.parametrize("name", toys.TOYS)
def test_quantized_toys_compute_the_same_in_onnx_runtime(name, tmp_path):
    program = captured(name).eval()
    quantized = quantize(program, calibration=batches(name))
    path = tmp_path / "model.onnx"
    export_onnx(quantized, path)
    check = check_export(quantized, path, positional(name, 8))
    assert check.largest_code_difference <= 1
    inputs = positional(name, 8)
    assert snr_db(first(program(*inputs)), first(quantized(*inputs))) > 15


@pytest.mark.parametrize("name", ["ConvChain", "Residual", "Depthwise", "SqueezeExcite", "Grouped", "Conv1d"])
def test_every_convolution_becomes_an_integer_kernel(name, tmp_path):
    quantized = quantize(captured(name), calibration=batches(name))
    path = tmp_path / "model.onnx"
    export_onnx(quantized, path)
    count = count_kernels(path)
    assert count.convolutions_float == 0
    assert count.convolutions_integer > 0


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_exports_and_runs(target, chain, images, tmp_path):
    quantized = quantize(chain, calibration=images, target=target)
    path = tmp_path / "model.onnx"
    export_onnx(quantized, path)
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(path)
    got = session.run(None, {"x": images[0].numpy()})[0]
    assert snr_db(quantized(images[0]), torch.from_numpy(got)) > 25


def test_equal_programs_give_equal_bytes(chain, images, tmp_path):
    quantized = quantize(chain, calibration=images)
    for name in ("one", "two"):
        export_onnx(quantized, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_file_speaks_the_program_s_names(chain, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(chain, path)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["output"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {"conv1", "conv2", "relu_0"} <= {node.name for node in graph.node}
    assert {"conv1.weight", "fc.bias"} <= {tensor.name for tensor in graph.initializer}
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_exports_hold_halves(precision, chain, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(chain, path, precision=precision)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    wanted = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[precision]
    assert model.graph.input[0].type.tensor_type.elem_type == wanted
    assert {t.data_type for t in model.graph.initializer if "weight" in t.name} == {wanted}


def test_large_weights_go_beside_the_model(chain, images, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(chain, path, external_data_above=100)
    assert (tmp_path / "model.onnx.data").exists()
    got = onnxruntime.InferenceSession(path).run(None, {"x": images[0].numpy()})[0]
    np.testing.assert_allclose(got, chain(images[0]).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_file_that_computes_something_else_is_caught(chain, images, tmp_path):
    quantized = quantize(chain, calibration=images)
    path = tmp_path / "model.onnx"
    export_onnx(quantized, path)
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "conv2.weight")
    weight.raw_data = bytes(-np.frombuffer(weight.raw_data, dtype=np.int8))
    onnx.save(model, path)
    with pytest.raises(ExportError, match="quanta"):
        check_export(quantized, path, images[0])


def test_codes_narrower_than_their_type_are_clipped_in_the_file(chain, images):
    plan_bits = quantize(chain, calibration=images, activation_bits=6)
    model = to_onnx(plan_bits)
    assert sum(node.op_type == "Clip" for node in model.graph) > 0


def test_schemes_cannot_hold_nonsense():
    with pytest.raises(ConfigError, match="2 to 16"):
        IntScheme(bits=1)
    assert dataclasses.replace(IntScheme(), bits=4).code_range == (-8, 7)


# Layers that share, compute or lack what others have


class SharedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(x)) - 1.0)


class ComputedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias * 2)


class LearnedQuery(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.fc = nn.Parameter(torch.randn(1, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) * self.fc(self.query) + x.reshape(-1, 1, 2, 3).mean(dim=None, keepdim=True).flatten(1)


@pytest.mark.parametrize("module", [SharedLinear, ComputedBias, LearnedQuery])
def test_unusual_layers_keep_their_mean_when_biases_are_corrected(module):
    torch.manual_seed(0)
    program = capture(module().eval(), torch.randn(2, 6)).eval()
    data = [torch.randn(64, 6) for _ in range(2)]
    repaired = quantize(program, calibration=data)
    assert snr_db(program(data[0]), repaired(data[0])) > 25
    assert (program(data[0]) - repaired(data[0])).mean(0).abs().max() < 0.02


def test_each_call_of_a_shared_layer_is_corrected_by_itself():
    torch.manual_seed(0)
    program = capture(SharedLinear().eval(), torch.randn(2, 6)).eval()
    data = [torch.randn(64, 6)]
    plan = plan_quantization(program, weight_bits=3)
    plan = choose_ranges(plan, collect_statistics(program, values_to_observe(plan), data), algorithm="min_max")
    repaired = apply_quantization(correct_bias(program, plan, data, samples=64), plan)
    assert (program(data[0]) - repaired(data[0])).mean(0).abs().max() < 0.02


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.head(self.head(x).relu())


def test_a_layer_that_is_called_on_several_maps_is_stored_once(tmp_path):
    torch.manual_seed(0)
    data = [torch.randn(8, 4, 6, 6)]
    quantized = quantize(capture(SharedHead().eval(), data[0]), calibration=data)
    codes = [tensor for tensor in quantized.state_dict().values() if tensor.dim() == 4]
    assert [tensor.dtype for tensor in codes] == [torch.int8]
    export_onnx(quantized, tmp_path / "model.onnx")
    assert count_kernels(tmp_path / "model.onnx").convolutions_integer == 2


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = SharedHead().head

    def forward(self, x):
        return self.head(self.head(x) * 1e-9)


def test_a_call_whose_bias_asks_for_wider_steps_has_codes_of_its_own():
    torch.manual_seed(0)
    data = [torch.randn(8, 4, 6, 6)]
    program = capture(Narrow().eval(), data[0])
    quantized = quantize(program, calibration=data)
    assert sum(tensor.dim() == 4 for tensor in quantized.state_dict().values()) == 2
    assert snr_db(program(data[0]), quantized(data[0])) > 25


def test_the_biases_of_a_layer_that_reads_no_batch_are_corrected_one_by_one():
    torch.manual_seed(0)
    data = [torch.randn(8) for _ in range(3)]
    program = capture(nn.Linear(8, 5).eval(), data[0])
    plan = plan_quantization(program, weight_bits=3)
    plan = choose_ranges(plan, collect_statistics(program, values_to_observe(plan), data), algorithm="min_max")
    repaired = apply_quantization(correct_bias(program, plan, data), plan)
    assert torch.stack([program(x) - repaired(x) for x in data]).mean(0).abs().max() < 0.005  # a step of the bias
    assert torch.stack([program(x) - apply_quantization(program, plan)(x) for x in data]).mean(0).abs().max() > 0.02


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, factor, x):
        return self.fc(x * factor)


@pytest.mark.parametrize("repairs", ["auto", "rounding=layer,bias"])
def test_samples_are_counted_by_the_input_that_has_some(repairs):
    torch.manual_seed(0)
    data = [(torch.tensor(2.0), torch.randn(16, 6)) for _ in range(3)]
    program = capture(Scaled().eval(), data[0])
    prepared = prepare(program)
    record = quantize_with_record(prepared, plan_quantization(prepared), data, repairs=repairs)
    assert record.samples == 48
    assert snr_db(program(*data[0]), record.program(*data[0])) > 25


class MixedConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.three(torch.cat([torch.relu(self.one(x)), self.two(x)], 1))


def test_a_signed_neighbour_in_a_concatenation_does_not_keep_a_relu_alive(tmp_path):
    torch.manual_seed(0)
    data = [torch.randn(8, 3, 6, 6)]
    quantized = quantize(capture(MixedConcat().eval(), data[0]), calibration=data)
    export_onnx(quantized, tmp_path / "model.onnx")
    count = count_kernels(tmp_path / "model.onnx")
    assert (count.convolutions_integer, count.convolutions_float) == (3, 0)


def test_an_index_beyond_a_table_is_told_with_its_batch():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, ids):
            return self.fc(self.table(ids).mean(1))

    program = capture(Words(), torch.zeros(2, 3, dtype=torch.long))
    batches = [torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), 12)]
    with pytest.raises(DataError, match="Calibration batch 1 cannot be run by the program: index out of range"):
        quantize(program, calibration=batches)
