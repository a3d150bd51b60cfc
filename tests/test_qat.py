"""Quantization-aware training: where it starts, what it trains, what it exports."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError, ProgramError
from slimgraph.program.archive import load_program, save_program
from slimgraph.program.capture import capture
from slimgraph.program.check import check
from slimgraph.program.fake_quantize import ROUNDING
from slimgraph.program.freeze import freeze_ranges_, freeze_statistics_
from slimgraph.program.names import value_of
from slimgraph.program.value_range import FOLLOWING
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import choose_ranges, collect_statistics
from slimgraph.quantization.correct_bias import correct_bias
from slimgraph.quantization.fake_quantizers import PACT_LAYERS, Pact
from slimgraph.quantization.freezing import freeze
from slimgraph.quantization.insertion import insert
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.qat import parameter_groups, prepare_qat
from slimgraph.quantization.reach import with_best_reach

PER_TENSOR = ("abs_max", "range_abs_max", "moving_average_abs_max")
PER_CHANNEL = ("channel_wise_abs_max", "lsq", "lsq_plus")


class Residual(nn.Module):
    """Depthwise, strided, both rectifiers, a concatenation, a pool, dropout, and a norm that learns nothing."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.conv2, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        y = nn.functional.relu6(self.bn2(self.depthwise(x)))
        x = self.bn3(self.conv2(y)) + x
        x = nn.functional.max_pool2d(torch.cat([torch.relu(x), y], 1), 2)
        return self.fc(self.dropout(x.mean((2, 3))))


def alive(module, seed=0):
    """Statistics and affine parameters that are not those of a fresh norm; some gains are negative."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            if part.affine:
                part.weight.data.normal_(generator=generator)
                part.bias.data.normal_(generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(alive(Residual()), torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def calibrated(program, images, **options):
    prepared = prepare(program, target=options.get("target", "onnxruntime"))
    plan = plan_quantization(prepared, **options)
    return choose_ranges(plan, collect_statistics(prepared, plan.range_owners, images), algorithm="min_max")


@pytest.fixture(scope="module")
def plan(program, images):
    return calibrated(program, images)


def train(qat, images, steps=6, rate=0.01):
    optimizer = torch.optim.SGD(parameter_groups(qat, learning_rate=rate), lr=rate)
    qat.train()
    for step in range(steps):
        optimizer.zero_grad()
        qat(images[step % len(images)]).square().mean().backward()
        optimizer.step()
    return qat


def deployed(qat):
    frozen = freeze(qat)
    return apply_quantization(frozen.program, frozen.plan)


def assert_same_codes(one, other):
    """Outputs of a last layer in float: another scale, weight or range moves all of them, rounded biases next to none.

    Sums in another order put one value in ten thousand on the other side of a tie; what depends on it jumps.
    """
    difference = (one - other).abs() / one.std()
    assert difference.median() <= 2e-3
    assert difference.max() <= 0.1


# Where it starts


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "openvino", "simulate"])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [("channel_wise_abs_max", "moving_average"), ("lsq", "lsq"), ("lsq_plus", "lsq_plus")],
)
def test_it_starts_where_post_training_quantization_ends(target, weights, activations, program, images):
    plan = calibrated(program, images, target=target)
    qat = prepare_qat(program, plan, weight_quantize_type=weights, activation_quantize_type=activations)
    assert qat.training
    assert_same_codes(qat.eval()(images[0]), apply_quantization(prepare(program, target=target), plan)(images[0]))


@pytest.mark.parametrize("weights", PER_TENSOR)
@pytest.mark.parametrize("activations", ["moving_average_abs_max", "range_abs_max"])
def test_ranges_of_the_documents_start_there_too_on_their_grids(weights, activations, program, images):
    plan = calibrated(program, images, target="simulate")
    one_scale = dataclasses.replace(
        plan,
        weights=tuple(dataclasses.replace(w, scheme=dataclasses.replace(w.scheme, axis=None)) for w in plan.weights),
    )
    qat = prepare_qat(program, plan, weight_quantize_type=weights, activation_quantize_type=activations).eval()
    assert_same_codes(qat(images[0]), apply_quantization(prepare(program, target="simulate"), one_scale)(images[0]))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("weights", PER_TENSOR)
@pytest.mark.parametrize("activations", ["moving_average_abs_max", "range_abs_max"])
def test_magnitudes_hold_the_two_sides_of_asymmetric_grids(target, weights, activations, program, images):
    plan = calibrated(program, images, target=target, weight_per_channel=False)
    qat = prepare_qat(program, plan, weight_quantize_type=weights, activation_quantize_type=activations).eval()
    assert_same_codes(qat(images[0]), apply_quantization(prepare(program, target=target), plan)(images[0]))
    train(qat, [3 * image for image in images])  # ranges move
    ranges = freeze(qat).plan.ranges
    assert all(high > plan.ranges[name][1] for name, (_, high) in ranges.items() if name == "x")
    assert_same_codes(qat.eval()(images[0]), deployed(qat)(images[0]))


@pytest.mark.parametrize("weights", ["channel_wise_abs_max", *PER_TENSOR])
def test_ranges_taken_anew_start_at_the_dynamic_quantization(weights, program, images):
    plan = calibrated(program, images, weight_per_channel=weights == "channel_wise_abs_max")
    qat = prepare_qat(program, plan, weight_quantize_type=weights, activation_quantize_type="abs_max").eval()
    owners = {found.value: found.range_of for found in plan.activations}
    read = {owners[weight.input] for weight in plan.weights}
    dynamic = dataclasses.replace(
        plan, activations=tuple(dataclasses.replace(a, dynamic=a.range_of in read) for a in plan.activations)
    )
    assert_same_codes(qat(images[0]), apply_quantization(prepare(program), dynamic)(images[0]))


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 8), (4, 16), (8, 3), (16, 5), (3, 12)])
def test_weights_and_activations_have_bits_of_their_own(weight_bits, activation_bits, program, images):
    bits = {"target": "simulate", "weight_bits": weight_bits, "activation_bits": activation_bits}
    plan = calibrated(program, images, **bits)
    qat = prepare_qat(program, plan).eval()
    assert_same_codes(qat(images[0]), apply_quantization(prepare(program, target="simulate"), plan)(images[0]))
    weight = next(n for n in qat.graph.nodes if value_of(n) == "conv2.weight/fake_quantized")
    assert weight.args[2:4] == (-(2 ** (weight_bits - 1)) + 1, 2 ** (weight_bits - 1) - 1)


def test_corrected_biases_go_into_the_norms(program, plan, images):
    prepared = prepare(program)
    corrected = correct_bias(prepared, plan, images)
    qat = prepare_qat(program, plan, repaired=corrected).eval()
    assert_same_codes(qat(images[0]), apply_quantization(corrected, plan)(images[0]))
    other = prepared.copy()
    other.state_dict()["conv2.weight"].mul_(2)
    with pytest.raises(ConfigError, match="other biases"):
        prepare_qat(program, plan, repaired=other)


@pytest.mark.parametrize("target", ["onnxruntime", "simulate"])
@pytest.mark.parametrize("weights", PER_TENSOR)
def test_one_scale_for_a_weight_starts_there_too(target, weights, program, images):
    plan = calibrated(program, images, target=target, weight_per_channel=False)
    qat = prepare_qat(program, plan, weight_quantize_type=weights).eval()
    assert_same_codes(qat(images[0]), apply_quantization(prepare(program, target=target), plan)(images[0]))


@pytest.mark.parametrize(
    ("weights", "per_channel"),
    [("channel_wise_abs_max", True), ("lsq", True), *((weights, False) for weights in ("lsq", *PER_TENSOR))],
)
def test_grids_begin_where_the_plan_lets_them_reach(weights, per_channel, program, images):
    options = {"target": "simulate", "weight_bits": 3, "weight_per_channel": per_channel}
    prepared = prepare(program, target="simulate")
    near = calibrated(program, images, **options)
    plan = with_best_reach(prepared, near)
    qat = prepare_qat(program, plan, weight_quantize_type=weights).eval()
    wanted = apply_quantization(prepared, plan)(images[0])
    assert_same_codes(qat(images[0]), wanted)
    assert (apply_quantization(prepared, near)(images[0]) - wanted).abs().max() > wanted.std() / 10
    train(qat, images)
    assert_same_codes(qat.eval()(images[0]), deployed(qat)(images[0]))


def test_weights_that_were_rounded_by_learning_are_where_training_begins(program, images):
    plan = calibrated(program, images, target="simulate", weight_bits=4)
    prepared = prepare(program, target="simulate")
    flipped = prepared.copy()  # as learned rounding does: codes of a grid, and not the nearest ones
    reach = {}
    for planned in plan.weights:
        weight = flipped.state_dict()[planned.weight]
        others = [a for a in range(weight.dim()) if a != planned.scheme.axis]
        largest = weight.abs().amax(others)
        scale = (largest / 7).reshape([-1 if a == planned.scheme.axis else 1 for a in range(weight.dim())])
        weight.copy_((weight / scale).floor().clamp(-7, 7) * scale)
        reach[planned.value] = tuple(largest.tolist())
    plan = dataclasses.replace(plan, weight_reach=reach)
    qat = prepare_qat(program, plan, repaired=flipped).eval()
    wanted = apply_quantization(flipped, plan)(images[0])
    assert_same_codes(qat(images[0]), wanted)
    assert (apply_quantization(prepared, plan)(images[0]) - wanted).abs().max() > wanted.std() / 10


def test_a_cold_start_is_that_of_the_documents(program, plan):
    qat = prepare_qat(program, plan, activation_quantize_type="moving_average_abs_max", warm=False)
    state = qat.state_dict()
    assert state["quantizers.relu_0.scale"] == torch.tensor(0.001)
    assert state["quantizers.relu_0.accum"] == state["quantizers.relu_0.state"] == 1


def test_a_cold_learned_step_of_a_weight_is_that_of_its_paper(program, plan):
    qat = prepare_qat(program, plan, weight_quantize_type="lsq", warm=False)
    weight = program.state_dict()["conv2.weight"]
    wanted = 2 * weight.abs().mean((1, 2, 3)) / 127**0.5
    torch.testing.assert_close(qat.state_dict()["quantizers.conv2/weight.step"], wanted)


# What trains


def test_training_reaches_every_parameter_and_quantizers_fold_nothing(program, plan, images):
    qat = train(prepare_qat(program, plan), images, steps=1)
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in qat.named_parameters() if name != "conv2.bias"
    )
    assert sum(n.target is torch.ops.aten.batch_norm.default for n in qat.graph.nodes) == 3
    check(qat)


def test_every_quantizer_stands_where_the_plan_says_and_none_stands_twice(program, plan):
    qat = prepare_qat(program, plan)
    rounded = [value_of(n) for n in qat.graph.nodes if n.target in ROUNDING]
    weights = [f"{w.weight}/fake_quantized" for w in plan.weights]
    activations = [name for name in rounded if name not in weights]
    # Quantizers bear the names of the rectifiers that they perform. The ReLU in front of the concatenation stays, and
    # is rounded behind it; the pool behind that only moves codes.
    wanted = ["x", "relu_0", "relu6_0", "conv2", "cat_0", "mean_0"]
    assert [name.removesuffix("/fake_quantized") for name in activations] == wanted
    assert [name for name in activations if name in wanted] == ["relu_0", "relu6_0"]
    assert len(rounded) == len(activations) + len(weights)
    assert sum(n.target is torch.ops.aten.relu.default for n in qat.graph.nodes) == 1


def test_evaluation_changes_nothing_and_training_follows(program, plan, images):
    qat = prepare_qat(program, plan)
    before = copy.deepcopy(qat.state_dict())
    qat.eval()(images[0] * 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in qat.state_dict().items())
    qat.train()(images[0] * 3)
    changed = {name for name, tensor in qat.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {"quantizers.x.interval", "bn1.running_mean", "bn3.running_var"} <= changed


@pytest.mark.parametrize("compiled", [False, True])
def test_statistics_and_ranges_freeze_while_training_goes_on(compiled, program, plan, images):
    qat = prepare_qat(program, plan)
    run = torch.compile(qat, backend="aot_eager") if compiled else qat
    run(images[0])
    freeze_ranges_(qat)
    before = copy.deepcopy(qat.state_dict())
    run(images[1] * 3)
    state = qat.state_dict()
    assert torch.equal(before["quantizers.x.interval"], state["quantizers.x.interval"])
    assert not torch.equal(before["bn1.running_mean"], state["bn1.running_mean"])
    freeze_statistics_(qat)
    before = copy.deepcopy(state)
    torch.manual_seed(0)
    frozen = run(images[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in qat.state_dict().items())
    torch.manual_seed(0)
    torch.testing.assert_close(frozen, qat.copy()(images[1]), rtol=1e-3, atol=1e-3)
    freeze_statistics_(qat, False)
    run(images[1])
    assert not torch.equal(before["bn1.running_mean"], qat.state_dict()["bn1.running_mean"])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("learned", ["lsq", "lsq_plus"])
def test_a_compiled_step_learns_what_an_eager_one_does(backend, learned):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )
    program = capture(alive(network), torch.zeros(1, 3, 8, 8))
    batches = list(torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    plan = calibrated(program, batches, weight_bits=4)
    eager = prepare_qat(program, plan, weight_quantize_type=learned, activation_quantize_type=learned)
    other = eager.copy()
    compiled = torch.compile(other, backend=backend)
    optimizers = [torch.optim.SGD(parameter_groups(each, learning_rate=0.01), lr=0.01) for each in (eager, other)]
    began = copy.deepcopy(eager.state_dict())
    for batch in batches:
        for run, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            run(batch).square().mean().backward()
            optimizer.step()
    steps = [name for name in began if name.endswith(".step")]
    assert steps
    assert not any(torch.equal(began[name], eager.state_dict()[name]) for name in steps)
    for name, tensor in eager.state_dict().items():  # sums in another order, and what one code more makes of them
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_optimizers_do_not_pull_learned_steps_to_zero(program, plan, images):
    qat = prepare_qat(program, plan, weight_quantize_type="lsq", activation_quantize_type="lsq")
    weights, steps = parameter_groups(qat, learning_rate=0.1, weight_decay=0.01)
    assert (weights["weight_decay"], steps["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in qat.named_parameters()}
    assert all(names[id(p)].endswith((".step", ".offset")) for p in steps["params"])
    assert len(weights["params"]) + len(steps["params"]) == len(names)


def test_a_step_that_was_led_below_zero_is_frozen_as_training_computes_with_it(program, plan, images):
    qat = prepare_qat(program, plan, weight_quantize_type="lsq", activation_quantize_type="lsq").eval()
    for name, parameter in qat.named_parameters():
        if name.endswith(".step"):
            parameter.detach()[0] = -0.1
    frozen = freeze(qat)
    torch.testing.assert_close(apply_quantization(frozen.program, frozen.plan)(images[0]), qat(images[0]))


def test_learned_steps_change_no_faster_than_weights_where_gradients_are_normalized(program, plan, images):
    qat = prepare_qat(program, plan, weight_quantize_type="lsq", activation_quantize_type="lsq")
    began = {name: p.detach().clone() for name, p in qat.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(qat, learning_rate=1e-3, normalized=True))
    for batch in images[:4]:
        optimizer.zero_grad()
        qat(batch).square().mean().backward()
        optimizer.step()
    change = {
        name: ((p.detach() - began[name]).abs().sum() / began[name].abs().sum()).item()
        for name, p in qat.named_parameters()
        if p.dim() > 1 or name.endswith(".step")
    }
    steps = [part for name, part in change.items() if name.endswith(".step")]
    weights = [part for name, part in change.items() if not name.endswith(".step")]
    assert 0 < max(steps) < 3 * max(weights)


@pytest.mark.parametrize("pact", [Pact(), PACT_LAYERS, Pact(alpha=0.5)])
def test_clipping_levels_are_learned_with_their_own_rate_and_only_bound_the_range(pact, program, plan, images):
    qat = prepare_qat(program, plan, pact=pact)
    *_, levels = parameter_groups(qat, learning_rate=1e-4, weight_decay=0.01, pact=pact)
    assert levels["weight_decay"] == pact.weight_decay
    assert levels["lr"] == 1e-4 * pact.learning_rate_multiplier
    train(qat, images)
    frozen = freeze(qat)
    assert all(max(-low, high) <= pact.alpha * 1.1 for low, high in frozen.plan.ranges.values())
    assert_same_codes(qat.eval()(images[0]), apply_quantization(frozen.program, frozen.plan)(images[0]))


@pytest.mark.parametrize(
    ("weights", "activations", "pact"),
    [
        ("channel_wise_abs_max", "moving_average", None),
        ("lsq", "lsq_plus", None),
        ("abs_max", "range_abs_max", Pact()),
    ],
)
def test_mixed_precision_trains_in_bfloat16_and_keeps_parameters_and_ranges_in_float32(
    weights, activations, pact, program, plan, images
):
    qat = prepare_qat(program, plan, weight_quantize_type=weights, activation_quantize_type=activations, pact=pact)
    with torch.autocast("cpu", torch.bfloat16):
        output = qat(images[0])
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in qat.parameters())
    qat.eval()
    before = copy.deepcopy(qat.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        qat(images[0] * 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in qat.state_dict().items())


# What it exports


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        *((weights, "moving_average") for weights in (*PER_CHANNEL, *PER_TENSOR)),
        *(("channel_wise_abs_max", activations) for activations in ("range_abs_max", "lsq", "lsq_plus")),
        ("abs_max", "moving_average_abs_max"),
    ],
)
def test_what_is_exported_computes_what_was_trained(weights, activations, program, plan, images):
    qat = prepare_qat(program, plan, weight_quantize_type=weights, activation_quantize_type=activations)
    train(qat, images)
    before = copy.deepcopy(qat.state_dict())
    exported = deployed(qat)
    assert_same_codes(qat.eval()(images[0]), exported(images[0]))
    assert all(torch.equal(before[name], tensor) for name, tensor in qat.state_dict().items())
    train(qat, images, steps=1)  # training goes on


def test_exported_weight_codes_are_the_trained_ones(program, plan, images):
    qat = train(prepare_qat(program, plan), images)
    frozen = freeze(qat)
    codes = apply_quantization(frozen.program, frozen.plan).state_dict()["depthwise.weight"].float()
    weight = qat.state_dict()["depthwise.weight"]
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    sign = qat.state_dict()["bn2.weight"].sign().reshape(-1, 1, 1, 1)
    assert torch.equal(codes, (weight / scale).round() * sign)
    assert codes.abs().max() == 127


def test_it_can_be_saved_loaded_copied_and_trained_on(tmp_path, program, plan, images):
    qat = train(prepare_qat(program, plan), images)
    save_program(qat, tmp_path / "qat.pt2")
    loaded = load_program(tmp_path / "qat.pt2")
    check(loaded)
    assert torch.equal(loaded(images[0]), qat.eval()(images[0]))
    assert torch.equal(deployed(loaded)(images[0]), deployed(qat)(images[0]))
    twin = loaded.copy()
    for each in (loaded, twin, qat):
        torch.manual_seed(0)
        each.train()(images[1])
    states = [each.state_dict() for each in (qat, loaded, twin)]
    assert all(torch.equal(states[0][n], states[1][n]) and torch.equal(states[0][n], states[2][n]) for n in states[0])
    freeze_statistics_(loaded)
    before = loaded.state_dict()["bn1.running_mean"].clone()
    loaded(images[0])
    assert torch.equal(before, loaded.state_dict()["bn1.running_mean"])


def test_dynamic_ranges_stay_dynamic(program, images):
    plan = calibrated(program, images, target="simulate")
    qat = train(prepare_qat(program, plan, activation_quantize_type="abs_max"), images, steps=1).eval()
    frozen = freeze(qat)
    # What layers with weights read is measured anew; the sum of two branches is not read by any.
    assert {a.value for a in frozen.plan.activations if a.dynamic} == {a.value for a in plan.activations}
    assert not any(n.target in FOLLOWING for n in qat.graph.nodes)


def test_a_rectifier_that_a_dynamic_range_performs_keeps_its_gradient():
    network = capture(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)), torch.randn(2, 1, 2, 2))
    images = [torch.tensor([[[[-2.0, -1.0], [1.0, 2.0]]]])]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.fill_(float(name.endswith("weight")))
    qat = prepare_qat(network, calibrated(network, images), activation_quantize_type="abs_max")
    assert not any(n.target is torch.ops.aten.relu.default for n in qat.graph.nodes)
    qat(images[0]).sum().backward()
    torch.testing.assert_close(qat.graph_module.get_parameter("0.bias").grad, torch.tensor([2.0]))


# Unusual networks


class Odd(nn.Module):
    """A weight that two layers read, one of which is rounded with a norm behind; transposed, grouped, two norms."""

    def __init__(self):
        super().__init__()
        self.up, self.bn1 = nn.ConvTranspose2d(4, 8, 2, groups=2), nn.BatchNorm2d(8)
        self.conv, self.bn2, self.bn3 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.bn3(self.bn2(self.conv(torch.relu(self.bn1(self.up(x))))))
        x = self.fc(x.mean((2, 3)))
        return self.fc(torch.tanh(x)) + x @ self.fc.weight


@pytest.mark.parametrize("weights", ["channel_wise_abs_max", "abs_max", "moving_average_abs_max", "lsq"])
def test_tied_weights_and_transposed_grouped_and_twice_normalized_layers(weights, tmp_path):
    torch.manual_seed(0)
    odd = capture(alive(Odd()), torch.randn(1, 4, 6, 6))
    images = list(torch.randn(2, 16, 4, 6, 6))
    plan = calibrated(odd, images, target="simulate")
    qat = prepare_qat(odd, plan, weight_quantize_type=weights)
    train(qat, images)
    assert_same_codes(qat.eval()(images[0]), deployed(qat)(images[0]))
    save_program(qat, tmp_path / "odd.pt2")
    assert torch.equal(load_program(tmp_path / "odd.pt2")(images[0]), qat(images[0]))


def test_a_channel_whose_norm_is_zero_is_zero(images):
    torch.manual_seed(0)
    network = alive(Residual())
    network.bn2.weight.data[3] = 0
    dead = capture(network, images[0])
    for weights in ("abs_max", "channel_wise_abs_max"):
        qat = prepare_qat(dead, calibrated(dead, images), weight_quantize_type=weights)
        train(qat, images, steps=2, rate=0.0)
        assert all(bool(p.grad.isfinite().all()) for p in qat.parameters())
        assert_same_codes(qat.eval()(images[0]), deployed(qat)(images[0]))


def test_attention_is_spelled_out_where_the_target_computes_it():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)
            self.dropout = nn.Dropout(0.1)

        def forward(self, x):
            q, k, v = self.dropout(self.qkv(self.dropout(self.norm(x)))).chunk(3, -1)
            return x + nn.functional.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    network = capture(Attention().eval(), torch.randn(1, 6, 8))
    batches = list(torch.randn(2, 16, 6, 8))
    for target in ("simulate", "openvino", "onnxruntime"):
        plan = calibrated(network, batches, target=target)
        qat = prepare_qat(network, plan).eval()
        ptq = apply_quantization(prepare(network, target=target), plan)
        torch.testing.assert_close(qat(batches[0]), ptq(batches[0]), rtol=1e-3, atol=1e-3)
        train(qat, batches)
        torch.testing.assert_close(qat.eval()(batches[0]), deployed(qat)(batches[0]), rtol=1e-3, atol=1e-3)


# Refusals


def test_wrong_requests_are_refused_before_anything_is_built(program, plan, images):
    with pytest.raises(ConfigError, match="channel_wise_abs_max"):
        prepare_qat(program, plan, weight_quantize_type="chanel_wise_abs_max")
    with pytest.raises(ConfigError, match="no range for 'x'"):
        prepare_qat(program, dataclasses.replace(plan, ranges={}))
    with pytest.raises(ConfigError, match="window_size is 0"):
        insert(program, plan, window_size=0)
    with pytest.raises(ConfigError, match="moving_rate is 1"):
        insert(program, plan, moving_rate=1.0)
    with pytest.raises(ConfigError, match="both learn"):
        insert(program, plan, activation_quantize_type="lsq", pact=Pact())
    with pytest.raises(ConfigError, match="'tensorrt' has no operator that takes the range"):
        insert(program, dataclasses.replace(plan, target="tensorrt"), activation_quantize_type="abs_max")
    with pytest.raises(ConfigError, match=r"activation_bits is 7.*DynamicQuantizeLinear"):
        prepare_qat(program, calibrated(program, images, activation_bits=7), activation_quantize_type="abs_max")
    with pytest.raises(ConfigError, match="alpha is 0"):
        Pact(alpha=0.0)
    with pytest.raises(ConfigError, match="does not have"):
        prepare_qat(capture(nn.Linear(3, 3), torch.zeros(1, 3)), plan)
    qat = prepare_qat(program, plan)
    with pytest.raises(ProgramError, match="quantized already"):
        prepare_qat(qat, plan)
    with pytest.raises(ProgramError, match="no fake quantizers"):
        freeze(program)
    with pytest.raises(ProgramError, match="no fake quantizers"):
        freeze(freeze(qat).program)
    with pytest.raises(ProgramError, match="fake quantizers, for training"):
        quantize(qat, calibration=images)
