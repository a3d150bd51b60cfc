"""Which layer costs how much, and why: into each small network one fault is built, and only that one is named."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from slimgraph.deploy.compare import compare
from slimgraph.errors import CalibrationError
from slimgraph.program.capture import capture
from slimgraph.quantization.analysis import analyze
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import choose_ranges, collect_statistics
from slimgraph.quantization.causes import ACTIVATION_RULES, WEIGHT_RULES
from slimgraph.quantization.evidence import activation_evidence, channel_axis
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.sensitivity import measure_sensitivity
from slimgraph.quantization.smoothing import smooth


class Chain(nn.Module):
    """Healthy: normal weights, normal inputs, and a rectifier that cuts at 6 what the first layer writes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.cut = nn.ReLU6()
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(16, 8, 3, padding=1)
        with torch.no_grad():
            self.first.weight.mul_(6)

    def forward(self, image):
        return self.last(self.relu(self.second(self.cut(self.first(image)))))


class Joined(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.join = join
        self.last = nn.Conv2d(16 if join is concatenation else 8, 8, 3, padding=1)

    def forward(self, image):
        return self.last(self.join(self.left(image), self.right(image)))


def concatenation(left, right):
    return torch.cat([left, right], dim=1)


def images(count=32):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def calibrated(module, batches, *, change=lambda plan: plan, **options):
    program = prepare(capture(module.eval(), batches[0][:1]))
    plan = plan_quantization(program, target="openvino", **options)
    statistics = collect_statistics(program, plan.range_owners, batches)
    return program, change(choose_ranges(plan, statistics)), statistics


def causes_of(module, batches=None, **given):
    """(layer, quantizer, cause, channel) of each that is named."""
    batches = [images()] if batches is None else batches
    program, plan, statistics = calibrated(module, batches, **given)
    found = analyze(program, plan, statistics, batches)
    return [(row.name, cause.quantizer, cause.name, cause.channel) for row in found.rows for cause in row.causes]


def with_range(name, low, high):
    """A plan in which the range of a value is another, in parts of the one that it had."""
    return lambda plan: replace(
        plan, ranges={**plan.ranges, name: (plan.ranges[name][0] * low, plan.ranges[name][1] * high)}
    )


def with_scheme(value, **changes):
    return lambda plan: replace(
        plan,
        activations=tuple(
            replace(each, scheme=replace(each.scheme, **changes)) if each.value == value else each
            for each in plan.activations
        ),
    )


def test_nothing_is_named_where_there_is_no_fault():
    assert causes_of(Chain()) == []
    assert causes_of(Joined(torch.add)) == []
    assert causes_of(Joined(concatenation)) == []


def test_a_channel_that_is_64_times_the_others_is_an_outlier_channel():
    module = Chain()
    with torch.no_grad():  # what is multiplied here is divided there: the function stays
        module.second.weight[5] *= 64
        module.second.bias[5] *= 64
        module.last.weight[:, 5] /= 64
    assert causes_of(module) == [("second", "activation", "outlier channel", 5)]


def test_one_pixel_in_a_million_is_an_outlier_value():
    batch = images()
    batch[3, 1, 6, 6] = 200.0  # what the first layer makes of it is cut at 6
    assert causes_of(Chain(), [batch]) == [("image", "activation", "outlier values", None)]


def test_a_range_of_a_quarter_is_a_clipped_range():
    assert causes_of(Chain(), change=with_range("relu", 1, 0.25)) == [("second", "activation", "clipped range", None)]


def test_a_range_that_begins_at_zero_for_values_of_both_signs_is_a_mismatch():
    found = causes_of(Chain(), change=with_range("image", 0, 1))
    assert found == [("image", "activation", "unsigned/signed mismatch", None)]


def test_a_symmetric_grid_for_what_is_never_negative_is_a_mismatch():
    found = causes_of(Chain(), change=with_scheme("relu", symmetric=True, signed=True))
    assert found == [("second", "activation", "unsigned/signed mismatch", None)]


def test_a_range_twenty_times_too_wide_leaves_few_codes():
    assert causes_of(Chain(), change=with_range("relu", 1, 20)) == [("second", "activation", "few codes used", None)]


def test_a_grid_of_four_bits_has_few_codes():
    assert causes_of(Chain(), change=with_scheme("cut", bits=4)) == [("first", "activation", "few codes used", None)]


def test_weights_of_four_bits_have_few_codes():
    found = causes_of(Chain(), change=lambda plan: plan.with_bits({"second": 4}))
    assert found == [("second", "weight", "few codes used", None)]


def test_one_scale_for_channels_of_unequal_weights_is_named_and_a_scale_each_is_not():
    module, batch = Chain(), images()
    with torch.no_grad():
        module.first.weight[7, 2] *= 64
    batch[:, 2] /= 64
    assert causes_of(module, [batch]) == []
    found = causes_of(module, [batch], weight_per_channel=False)
    assert found == [("first", "weight", "weights of unequal channels", 7)]


def test_one_large_weight_in_each_channel_is_named():
    module = Chain()
    with torch.no_grad():
        module.second.weight[:, 3, 1, 1] = 40 * module.second.weight.std()
    assert [found[:3] for found in causes_of(module)] == [("second", "weight", "outlier weights")]


def test_a_part_that_is_small_beside_the_other_suffers_from_the_scale_of_the_concatenation():
    module = Joined(concatenation)
    with torch.no_grad():
        module.left.weight.div_(64)
        module.left.bias.div_(64)
        module.last.weight[:, :8] *= 64
    # The part itself is too coarse where it shares the scale; the concatenation is where they come to share it.
    assert causes_of(module) == [("cat_0", "activation", "scale shared by a concatenation", None)]


def test_a_side_that_is_small_beside_the_other_is_lost_in_the_sum():
    module = Joined(torch.add)
    with torch.no_grad():
        module.left.weight.div_(64)
        module.left.bias.div_(64)
    assert causes_of(module) == [("add_0", "activation", "sum of unequal scales", None)]


def test_a_constant_value_and_a_dead_layer_have_no_fault():
    module = Chain()
    with torch.no_grad():
        module.second.weight.zero_()
        module.second.bias.fill_(-1.0)
    assert causes_of(module) == []


def test_every_cause_says_its_numbers_and_what_to_do():
    program, plan, statistics = calibrated(Chain(), [images()], change=with_range("relu", 1, 0.25))
    row = next(row for row in analyze(program, plan, statistics, [images()]).rows if row.causes)
    low, high = plan.ranges["relu"]
    assert f"lie outside of {low:.3g} … {high:.3g}" in row.causes[0].text
    assert "% of the elements" in row.causes[0].text
    assert "times as much as rounding" in row.causes[0].text
    assert "--algorithm min_max" in row.advice
    assert all(rule.name and rule.advice for rule in (*ACTIVATION_RULES, *WEIGHT_RULES))


def test_shares_are_those_of_the_noise_and_the_worst_layer_comes_first():
    batches = [images(16), images(16)]
    program, plan, statistics = calibrated(Chain(), batches, change=with_range("relu", 1, 0.5))
    found = analyze(program, plan, statistics, batches, samples=24)
    measured = measure_sensitivity(program, plan, batches, samples=24)
    assert found.samples == 24
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.noise == pytest.approx(sum(row.noise for row in measured.rows))
    assert found.rows[0].name == "second"
    assert found.rows[0].written == "relu"
    both = measured.noise["weight", "second"] + measured.noise["activation", "relu"]
    assert found.rows[0].noise == pytest.approx(both)
    assert found.rows[0].weight_share == pytest.approx(measured.noise["weight", "second"] / both)
    assert [row.noise for row in found.rows] == sorted((row.noise for row in found.rows), reverse=True)


def test_the_ratio_of_signal_to_noise_is_that_of_the_quantized_program():
    batches = [images()]
    program, plan, statistics = calibrated(Chain(), batches)
    found = {row.name: row.snr_db for row in analyze(program, plan, statistics, batches).rows}
    wanted = compare(program, apply_quantization(program, plan), batches).snr_db
    assert found["second"] == pytest.approx(wanted["relu"])
    assert found["image"] == pytest.approx(wanted["image"])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = (nn.Conv2d(a, 8, 3, padding=1) for a in (3, 8, 8))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, image):
        x = torch.relu(self.stem(image))
        x = torch.relu(x + self.inner(x))
        return self.head(self.pool(self.last(x)).flatten(1))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "openvino", "simulate"])
def test_without_the_layers_to_skip_the_quantizer_is_gone(target):
    program = prepare(capture(Residual().eval(), images(1)), target=target)
    plan = plan_quantization(program, target=target)
    batches = [images()]
    statistics = collect_statistics(program, plan.range_owners, batches)
    found = analyze(program, choose_ranges(plan, statistics), statistics, batches)
    assert len(found.rows) >= 4
    for row in found.rows:
        without = plan_quantization(program, target=target, skip=row.skip)
        if row.weight_share > 0.5:
            assert row.name not in {weight.value for weight in without.weights}
        else:
            assert row.written not in {activation.value for activation in without.activations}


def test_channels_lie_where_those_that_read_them_look():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, image):
            return self.head(self.norm(self.patch(image).flatten(2).transpose(1, 2)))

    program = capture(Tokens().eval(), images(1))
    values = program.values
    assert {name: channel_axis(values[name]) for name in ("image", "patch", "norm", "head")} == {
        "image": 1,
        "patch": 1,
        "norm": 2,
        "head": 2,
    }


def test_the_spread_of_channels_is_that_of_all_batches():
    batches = [images(16), 2 * images(16)]
    program, plan, statistics = calibrated(Chain(), batches)
    named = [{"image": batch} for batch in batches]
    spread = activation_evidence(program, plan, statistics, named)["image"].spread
    everything = torch.cat(batches).double()
    assert np.allclose(spread.low, everything.amin((0, 2, 3)))
    assert np.allclose(spread.high, everything.amax((0, 2, 3)))
    assert np.allclose(spread.rms, everything.square().mean((0, 2, 3)).sqrt())


def test_saturation_and_rounding_are_told_apart():
    batches = [images()]
    program, plan, statistics = calibrated(Chain(), batches, change=with_range("image", 0.5, 0.5))
    seen = activation_evidence(program, plan, statistics, [{"image": batches[0]}])["image"]
    x = batches[0].double()
    low, high = seen.grid
    cut = x.clamp(low, high)
    rounded = (cut / seen.scale).round() * seen.scale
    assert seen.saturation_error == pytest.approx(float((x - cut).square().mean()), rel=0.02)
    assert seen.rounding_error == pytest.approx(float((cut - rounded).square().mean()), rel=0.02)
    # Half a step beyond the last code is rounding still; the bins of the histogram are an eighth of that.
    outside = ((x < low - seen.scale / 2) | (x > high + seen.scale / 2)).double().mean()
    assert sum(seen.clipped) == pytest.approx(float(outside), rel=0.02)


def test_statistics_without_histograms_are_refused():
    program, plan, _ = calibrated(Chain(), [images()])
    bare = collect_statistics(program, plan.range_owners, [images()], histogram=False)
    with pytest.raises(CalibrationError, match=r"no histogram of 'image'.*histogram=True"):
        analyze(program, plan, bare, [images()])


def test_the_table_says_share_numbers_and_advice():
    program, plan, statistics = calibrated(Chain(), [images()], change=with_range("relu", 1, 0.25))
    first, rule, worst, *_ = analyze(program, plan, statistics, [images()]).table(limit=2).splitlines()
    assert first.split()[:3] == ["layer", "operator", "share"]
    assert set(rule) == {"-"}
    assert worst.startswith("second")
    assert "clipped range (activation)" in worst


def noise_of(module, batches, *, rescale=lambda program, plan: program, **options):
    program = prepare(capture(module.eval(), batches[0][:1]))
    plan = plan_quantization(program, target="openvino", **options)
    program = rescale(program, plan)
    statistics = collect_statistics(program, plan.range_owners, batches)
    found = analyze(program, choose_ranges(plan, statistics), statistics, batches)
    return found.noise, [cause.name for row in found.rows for cause in row.causes]


def test_smoothing_helps_against_an_outlier_channel():
    module, batches = Chain(), [images()]
    with torch.no_grad():
        module.second.weight[5] *= 64
        module.second.bias[5] *= 64
        module.last.weight[:, 5] /= 64
    before, faults = noise_of(module, batches)
    assert faults == ["outlier channel"]
    after, faults = noise_of(module, batches, rescale=lambda program, plan: smooth(program, plan, batches))
    assert faults == []
    assert after < before / 10


def test_smoothing_is_advised_only_where_channels_can_be_scaled():
    def advice(activation):
        module = Chain()
        module.relu = activation
        with torch.no_grad():
            module.second.weight[5] *= 64
            module.second.bias[5] *= 64
            module.last.weight[:, 5] /= 64
        program, plan, statistics = calibrated(module, [images()])
        found = analyze(program, plan, statistics, [images()]).rows
        return next(row.advice for row in found if "outlier channel" in row.why and row.causes)

    assert advice(nn.ReLU()).startswith("smooth or equalize the channels")
    assert advice(nn.GELU()).startswith("its channels cannot be scaled, so --skip ")


def test_an_algorithm_that_clips_helps_against_outlier_values():
    batch = images()
    batch[3, 1, 6, 6] = 200.0
    program, wide, statistics = calibrated(Chain(), [batch])
    row = next(row for row in analyze(program, wide, statistics, [batch]).rows if row.causes)
    assert re.match(r"--algorithm KL \(to [\d.]+\) or avg \(to [\d.]+\); if they matter", row.advice)
    usual = [images()]  # what the one image loses is the price
    before = analyze(program, wide, statistics, usual).noise
    narrow = choose_ranges(replace(wide, ranges={}), statistics, algorithm="avg")
    assert analyze(program, narrow, statistics, usual).noise < before / 10


def test_a_scale_for_each_channel_helps_against_unequal_weights():
    module, batch = Chain(), images()
    with torch.no_grad():
        module.first.weight[7, 2] *= 64
    batch[:, 2] /= 64
    before, _ = noise_of(module, [batch], weight_per_channel=False)
    after, _ = noise_of(module, [batch])
    assert after < before / 5
