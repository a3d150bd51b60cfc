"""Which repairs are made, in which order, and what is kept of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError
from slimgraph.program.capture import capture
from slimgraph.quantization.agreement import output_noise
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import correct_bias, correct_weights
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import Remembering, quantize, quantize_again, quantize_with_record
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.repair import Repairs, best_repairs, repairs_of
from slimgraph.quantization.samples import first_samples


class Uneven(nn.Module):
    """A norm with an outlier and layers whose channels differ in size by a factor of a hundred."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.norm.weight[2] = 40.0
            self.fc1.weight[:, 2] /= 40.0

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(self.norm(x))))


@pytest.fixture(scope="module")
def uneven():
    torch.manual_seed(0)
    return capture(Uneven().eval(), torch.zeros(1, 8)).eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return [torch.randn(32, 8) for _ in range(4)]


def ranged(program, data, **options):
    plan = plan_quantization(program, **options)
    return choose_ranges(plan, collect_statistics(program, values_to_observe(plan), data), algorithm="min_max")


def noise(program, quantized, data):
    return output_noise(program, quantized, [program.signature.bind(batch) for batch in data])


def test_without_a_word_only_biases_are_corrected(uneven, data):
    prepared = prepare(uneven)
    plain = quantize_with_record(prepared, plan_quantization(prepared), data)
    same = quantize_with_record(prepared, plan_quantization(prepared), data, repairs=Repairs())
    assert plain.repairs == same.repairs == Repairs(bias=True)
    assert plain.prepared is prepared
    for name, tensor in plain.program.state_dict().items():
        assert torch.equal(same.program.state_dict()[name], tensor)


def test_repairs_are_made_in_order_and_told(uneven, data):
    repairs = Repairs(equalize=True, smooth=0.5, reach=True, weights=True)
    history = quantize(uneven, calibration=data, repairs=repairs, weight_bits=4).history
    steps = [entry.step for entry in history]
    assert steps[-5:] == ["equalize", "smooth", "correct_weights", "correct_bias", "quantize"]


def test_learned_rounding_is_called_with_what_was_repaired_before(uneven, data):
    repairs = Repairs(smooth=True, rounding="layer")
    record = quantize_with_record(
        prepare(uneven), plan_quantization(prepare(uneven), weight_bits=3), data, repairs=repairs
    )
    assert [entry.step for entry in record.program.history][-4:] == [
        "smooth",
        "reconstruct",
        "correct_bias",
        "quantize",
    ]


def test_the_best_repairs_are_found_and_judged_on_other_samples(uneven, data):
    prepared = prepare(uneven)
    plan = plan_quantization(prepared)
    held_out = [torch.randn(64, 8)]
    auto = quantize_with_record(prepared, plan, data, repairs="auto")
    none = quantize_with_record(prepared, plan, data, bias_correction=False)
    assert auto.repairs.smooth
    assert noise(prepared, auto.program, held_out) < 0.5 * noise(prepared, none.program, held_out)
    told = next(entry for entry in auto.program.history if entry.step == "choose_repairs")
    assert "smooth" in told.parameters["kept"]
    assert told.result["noise"]["smooth"] < told.result["noise"]["nothing"]


def test_what_helps_nothing_is_not_kept(data):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4, bias=False))
    with torch.no_grad():  # every weight on the grid already
        module[0].weight.copy_(torch.randint(-127, 128, (4, 8)) / 127.0)
        module[0].weight[:, 0] = 1.0
    prepared = prepare(capture(module.eval(), torch.zeros(1, 8)))
    found = best_repairs(prepared, plan_quantization(prepared), data, algorithm="min_max")
    assert found.repairs == Repairs(bias=False)
    assert list(found.noise)[:2] == ["nothing", "bias"]


@pytest.mark.parametrize("count", [1, 3])
def test_with_too_few_samples_nothing_is_tried(uneven, count):
    prepared = prepare(uneven)
    found = best_repairs(prepared, plan_quantization(prepared), [torch.randn(count, 8)], algorithm="min_max")
    assert found.program is prepared
    assert found.repairs == Repairs(bias=True)
    quantize(uneven, calibration=[torch.randn(count, 8)], repairs="auto")


def test_data_that_can_be_read_only_once_serve_every_repair(uneven, data):
    once = quantize(uneven, calibration=iter(data), repairs="auto")
    often = quantize(uneven, calibration=data, repairs="auto")
    assert all(torch.equal(often.state_dict()[name], tensor) for name, tensor in once.state_dict().items())
    remembered = Remembering(uneven, iter(data), samples=40)
    assert len(remembered.first()) == 2
    assert sum(len(batch["x"]) for batch in remembered) == 128
    assert len(remembered.batches) == 2


def test_another_plan_gets_the_same_repairs(uneven, data):
    prepared = prepare(uneven)
    plan = plan_quantization(prepared, weight_bits=4)
    repairs = Repairs(smooth=0.5, reach=True)
    done = quantize_with_record(prepared, plan, data, repairs=repairs, histograms=True)
    again = quantize_again(done, plan, data)
    for name, tensor in done.program.state_dict().items():
        assert torch.equal(again.program.state_dict()[name], tensor)
    wide = quantize_again(done, plan_quantization(prepared), data)
    wider = plan_quantization(prepared).with_ranges(done.plan.ranges)
    stale = quantize_again(done, replace(wider, weight_reach=done.plan.weight_reach), data)
    assert wide.plan.weight_reach == stale.plan.weight_reach == {}
    uncorrected = quantize_again(done, plan, data, repairs=replace(done.repairs, bias=False))
    assert "correct_bias" not in [entry.step for entry in uncorrected.program.history]
    assert uncorrected.repairs == Repairs(smooth=0.5, reach=True, bias=False)


def test_grids_that_were_strengthened_are_not_strengthened_twice(uneven, data):
    prepared = prepare(uneven)
    plan = plan_quantization(prepared, weight_bits=3)
    done = quantize_with_record(prepared, plan, data, repairs=Repairs(weights=True), histograms=True)
    again = quantize_again(done, replace(done.plan, ranges={}), data)
    assert again.plan == done.plan


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("none", Repairs(bias=False)),
        ("auto", "auto"),
        ("bias", Repairs()),
        ("smooth", Repairs(smooth=True, bias=False)),
        ("smooth=0", Repairs(smooth=0.0, bias=False)),
        ("equalize, smooth=0.5 ,reach,weights,bias", Repairs(equalize=True, smooth=0.5, reach=True, weights=True)),
        ("rounding=block,bias", Repairs(rounding="block")),
    ],
)
def test_repairs_are_named_by_what_is_made(text, meant):
    assert repairs_of(text) == meant
    assert repairs_of(str(meant)) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smoth", r"There is no 'smoth'\. .*smooth"),
        ("bias,autos", "There is no 'autos'"),
        ("", "There is no ''"),
        ("bias,", "There is no ''"),
        ("bias=1", "bias takes no value"),
        ("smooth=much", "smooth is 'much'"),
        ("smooth=2", "smooth is 2.0"),
        ("rounding", "rounding is ''"),
        ("rounding=layers", "rounding is 'layers'. .*layer"),
    ],
)
def test_names_of_no_repair_are_refused_with_the_closest(text, said):
    with pytest.raises(ConfigError, match=said):
        repairs_of(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repairs": "best"}, "repairs is 'best'"),
        ({"repairs": Repairs(), "bias_correction": False}, "bias_correction is False"),
    ],
)
def test_repairs_that_are_none_are_refused(uneven, data, options, message):
    with pytest.raises(ConfigError, match=message):
        quantize(uneven, calibration=data, **options)


@pytest.mark.parametrize(("option", "value"), [("rounding", "blocks"), ("smooth", 1.5), ("smooth", -1)])
def test_options_that_repairs_do_not_have_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value!r}"):
        Repairs(**{option: value})


# Weights by their statistics


def test_corrected_weights_keep_their_codes_and_their_strength(uneven, data):
    prepared = prepare(uneven)
    plan = ranged(prepared, data, weight_bits=3)
    corrected, wider = correct_weights(prepared, plan)
    for planned in plan.weights:
        before, after = prepared.state_dict()[planned.weight], corrected.state_dict()[planned.weight]
        strength = (before * after).sum(1) / before.square().sum(1)
        torch.testing.assert_close(strength, torch.ones_like(strength), rtol=1e-5, atol=0)
    plain, repaired = apply_quantization(prepared, plan), apply_quantization(corrected, wider)
    for planned in plan.weights:
        assert torch.equal(plain.state_dict()[planned.weight], repaired.state_dict()[planned.weight])


def test_channels_of_zeros_are_left_alone(data):
    module = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        module[0].weight[1] = 0.0
    prepared = prepare(capture(module.eval(), torch.zeros(1, 8)))
    corrected, plan = correct_weights(prepared, ranged(prepared, data, weight_bits=3))
    assert corrected.state_dict()["0.weight"].isfinite().all()
    scale = weight_scale(corrected.state_dict()["0.weight"], plan.weights[0].scheme, plan.weight_reach["0"])
    assert scale.isfinite().all()


def test_biases_are_corrected_towards_the_program_that_was_float(uneven, data):
    prepared = prepare(uneven)
    plan = ranged(prepared, data, weight_bits=3, target="openvino")  # integer biases have coarse steps
    rounded, plan = correct_weights(prepared, plan)
    x = torch.cat(data)
    shift = {}
    for name, reference in (("of the rounded", None), ("of the float", prepared)):
        repaired = apply_quantization(correct_bias(rounded, plan, data, samples=128, reference=reference), plan)
        shift[name] = (prepared(x) - repaired(x)).mean(0).abs().max()
    assert shift["of the float"] < 0.1 * shift["of the rounded"]


def test_the_first_samples_are_joined_where_they_fit(uneven):
    parts = first_samples(uneven, [torch.zeros(5, 8), torch.ones(5, 8), torch.ones(5, 8)], 8)
    assert [len(part["x"]) for part in parts] == [8]
