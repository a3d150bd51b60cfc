"""Learned rounding: regions, reach, the programs side by side, and what is promised of the result."""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import nn

from models import toys
from models.captured import captured, positional
from slimgraph.errors import CalibrationError, ConfigError, DataError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.scheme import IntScheme, quantize
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.calibration import choose_ranges, collect_statistics
from slimgraph.quantization.documented_reconstruction import reconstruct_as_documented
from slimgraph.quantization.learned_rounding import Annealing, LearnedRounding, nearest, on_grid
from slimgraph.quantization.lockstep import Schedule, batches_of
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import plan_from_json
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.reach import best_reach, with_best_reach
from slimgraph.quantization.reconstruction import reconstruct
from slimgraph.quantization.regions import Region, block_regions, layer_regions, resolve
from slimgraph.quantization.simulation import LayerTensors, Simulation

NARROW = IntScheme(bits=4, narrow=True, axis=0)


def planned(program, batches, **options):
    prepared = prepare(program)
    plan = plan_quantization(prepared, **{"target": "simulate", "weight_bits": 4, **options})
    return prepared, choose_ranges(plan, collect_statistics(prepared, plan.range_owners, batches))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Network(nn.Module):
    """A layer, two residual blocks, a layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = Block(8), Block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.two(self.one(torch.relu(self.stem(x)))).mean((2, 3)))


@functools.cache
def network():
    torch.manual_seed(0)
    return capture(Network().eval(), torch.zeros(1, 3, 8, 8))


def images(count=4, size=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def codes_of(program, plan):
    """Integer codes of each planned weight after `apply_quantization`."""
    tensors = dict(apply_quantization(program, plan).graph_module.named_buffers())
    return {weight.value: tensors[weight.weight] for weight in plan.weights if weight.weight in tensors}


def squared_error(program, other, batches):
    with torch.no_grad():
        return float(sum((program(x) - other(x)).square().sum() for x in batches))


# Reach


def test_the_best_reach_of_three_codes_leaves_an_outlier_clipped():
    # Codes -1, 0, 1. Reaching 3 would round all ones to 0, an error of 8; the least is at the mean magnitude.
    weight = torch.tensor([[1.0] * 4 + [-1.0] * 4 + [3.0]])
    (reach,) = best_reach(weight, IntScheme(bits=2, narrow=True, axis=0))
    assert reach == pytest.approx((8 * 1 + 3) / 9, abs=0.02)  # found in steps of 3 * 0.85 / 31 / 8


def test_weights_that_lie_on_a_grid_keep_it():
    weight = torch.arange(-7.0, 8.0)[None] * 0.125
    assert best_reach(weight, NARROW) == (0.875,)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_the_best_reach_never_rounds_worse_than_the_largest_magnitude_and_nearly_as_well_as_any(bits, axis):
    weight = torch.randn(6, 5, 3, 3).pow(3)
    scheme = IntScheme(bits=bits, narrow=True, axis=axis)

    def error(reach):
        lost = nearest(weight, weight_scale(weight, scheme, reach), scheme) - weight
        return lost.square().sum() if axis is None else lost.square().movedim(axis, 0).flatten(1).sum(1)

    largest = weight.abs().amax().reshape(1) if axis is None else weight.abs().movedim(axis, 0).flatten(1).amax(1)
    found = error(best_reach(weight, scheme))
    assert (found <= error(largest.tolist()) * (1 + 1e-5)).all()  # sums reorder
    tried = torch.stack([error((largest * part).tolist()) for part in torch.linspace(0.15, 1, 400)])
    assert (found <= tried.amin(0) * 1.05 + 1e-9).all()


def test_a_channel_of_zeros_has_no_reach_and_stays_zero():
    weight = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)])
    reach = best_reach(weight, NARROW)
    assert reach[0] == 0.0
    assert nearest(weight, weight_scale(weight, NARROW, reach), NARROW)[0].tolist() == [0.0] * 4


def test_only_narrow_weights_without_a_reach_get_the_best_one():
    prepared, plan = planned(network(), images())
    wide = dataclasses.replace(plan.weights[1], scheme=dataclasses.replace(plan.weights[1].scheme, bits=8))
    plan = dataclasses.replace(
        plan, weights=(plan.weights[0], wide, *plan.weights[2:]), weight_reach={"stem": (2.0,) * 8}
    )
    found = with_best_reach(prepared, plan).weight_reach
    assert found["stem"] == (2.0,) * 8
    assert set(found) == {w.value for w in plan.weights} - {wide.value}
    assert plan_from_json(dataclasses.replace(plan, weight_reach=found).to_json()).weight_reach == found


# Rounding that is learned


def test_soft_codes_begin_at_the_real_weight_and_end_at_its_floor_or_the_next_code():
    weight = torch.randn(5, 7)
    scale = weight_scale(weight, NARROW, best_reach(weight, NARROW))
    rounding = LearnedRounding(weight, scale, NARROW)
    inside = (weight / scale[:, None]).abs() < 7
    torch.testing.assert_close(rounding.soft(rounding.up())[inside], weight[inside])
    assert torch.equal(rounding.codes(), quantize(weight, scale, torch.zeros(5, dtype=torch.int32), NARROW))
    with torch.no_grad():
        rounding.logits.copy_(torch.randn_like(weight) * 9)
    difference = (rounding.codes() - (weight / scale[:, None]).floor())[inside]
    assert set(difference.tolist()) == {0.0, 1.0}
    assert rounding.codes().abs().max() <= 7
    assert torch.equal(rounding.hard(), on_grid(rounding.codes(), scale, NARROW))


def test_the_exponent_is_silent_while_it_warms_up_then_falls_along_a_cosine():
    annealing = Annealing(start=20.0, end=2.0, warm_up=0.2)
    assert annealing.exponent(19, 100) is None
    assert annealing.exponent(20, 100) == 20.0
    assert annealing.exponent(60, 100) == pytest.approx(11.0)
    assert annealing.exponent(99, 100) == pytest.approx(2.0, abs=0.02)
    constant = Annealing(weight=0.1, start=3.0, end=3.0, warm_up=0.0)  # as PaddleSlim has it
    assert [constant.exponent(step, 10) for step in (0, 9)] == [3.0, 3.0]
    with pytest.raises(ConfigError, match="warm_up"):
        Annealing(warm_up=1.0)


def all_roundings(weight, scale):
    """Every way to round each element to its floor or the next code."""
    for ups in itertools.product([0.0, 1.0], repeat=weight.numel()):
        yield ((weight / scale[:, None]).floor() + torch.tensor(ups).reshape(weight.shape)).clamp(-7, 7) * scale[
            :, None
        ]


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(6, 2, bias=False)),
        nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)),
    ],
)
def test_the_best_of_all_roundings_is_found(network):
    # Inputs that rise and fall together, so that errors of weights can cancel; rounding to the nearest adds them up.
    torch.manual_seed(2)
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    x = torch.randn(64, 1) + 0.5 * torch.randn(64, layers[0].in_features)
    for layer in layers:
        layer.reset_parameters()
    prepared, plan = planned(capture(network.eval(), x[:1]), [x])
    plan = with_best_reach(prepared, plan)
    weights = [layer.weight.detach() for layer in layers]
    names = [weight.weight for weight in plan.weights]
    scales = [weight_scale(w, q.scheme, plan.weight_reach[q.value]) for w, q in zip(weights, plan.weights, strict=True)]

    def error(*candidates):
        found = torch.func.functional_call(network, dict(zip(names, candidates, strict=True)), (x,))
        return float((found - network(x)).detach().square().sum())

    best = min(error(*c) for c in itertools.product(*map(all_roundings, weights, scales)))
    near = error(*(nearest(w, s, NARROW) for w, s in zip(weights, scales, strict=True)))
    learned, found = reconstruct(
        prepared,
        plan,
        [x] * 8,
        regions=[("input", plan.weights[-1].value)],
        batch_size=64,
        activations=False,
        biases=False,
    )
    assert best < 0.7 * near  # the case is one
    assert error(*(learned.state_dict()[name] for name in names)) == pytest.approx(best, rel=1e-4)
    for weight in plan.weights:
        assert found.weight_reach[weight.value] == pytest.approx(plan.weight_reach[weight.value])


# Regions


def test_residual_blocks_are_regions_and_what_is_between_them_are_layers():
    prepared, plan = planned(network(), images())
    assert [(r.inputs, r.output) for r in block_regions(prepared, plan)] == [
        (("x",), "relu_0"),
        (("relu_0",), "one/relu_1"),
        (("one/relu_1",), "two/relu_1"),
        (("mean_0",), "head"),
    ]
    assert [(r.inputs, r.output) for r in layer_regions(prepared, plan)] == [
        (("x",), "relu_0"),
        (("relu_0",), "one/relu_0"),
        (("one/relu_0",), "one.second"),
        (("one/relu_1",), "two/relu_0"),
        (("two/relu_0",), "two.second"),
        (("mean_0",), "head"),
    ]


class Nested(nn.Module):
    """A block around two blocks."""

    def __init__(self):
        super().__init__()
        self.before, self.one, self.two, self.after = nn.Conv2d(4, 4, 1), Block(4), Block(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.before(x)
        return self.after(x + self.two(self.one(x)))


def test_a_region_with_too_many_layers_gives_way_to_those_inside():
    prepared, plan = planned(capture(Nested().eval(), torch.zeros(1, 4, 6, 6)), [torch.randn(4, 4, 6, 6)])
    outer = [r.output for r in block_regions(prepared, plan, most_layers=4)]
    inner = [r.output for r in block_regions(prepared, plan, most_layers=3)]
    assert outer == ["before", "add_0", "after"]
    assert inner == ["before", "one/relu_1", "two/relu_1", "after"]


def test_a_value_that_leaves_a_block_sideways_opens_it():
    class Sideways(Network):
        def forward(self, x):
            x = torch.relu(self.stem(x))
            inner = torch.relu(self.one.first(x))
            return x + self.one.second(inner), inner.mean((2, 3))

    prepared, plan = planned(capture(Sideways().eval(), torch.zeros(1, 3, 8, 8)), images())
    assert [r.output for r in block_regions(prepared, plan)] == ["relu_0", "relu_1", "one.second"]


@pytest.mark.parametrize("name", sorted(toys.TOYS))
def test_every_layer_of_a_network_is_in_just_one_region(name):
    batches = [positional(name, 4)]
    prepared, plan = planned(captured(name), batches)
    own = {}
    for weight in plan.weights:
        own.setdefault(weight.weight, []).append(weight)
    plan = dataclasses.replace(plan, weights=tuple(same[0] for same in own.values() if len(same) == 1))
    for found in (layer_regions(prepared, plan), block_regions(prepared, plan)):
        spans = resolve(prepared, plan, found)
        layers = [node for span in spans for node in span.layers]
        assert sorted(node.name for node in layers) == sorted(prepared.value(w.value).name for w in plan.weights)
        known = set()
        for span in spans:  # what each one needs is there when its turn comes
            for node in (*span.before, *span.nodes):
                assert all(source in known or source.op == "placeholder" for source in node.all_input_nodes)
                known.add(node)


@pytest.mark.parametrize(
    ("regions", "error", "said"),
    [
        ("blocks", ConfigError, "Closest: block"),
        ([("nothing", "head")], UnknownNameError, "no value 'nothing'"),
        ([("one/relu_0", "one/relu_1")], ConfigError, "alone. Add relu_0 to the inputs"),
        ([("head", "one/relu_1")], ConfigError, "does not depend on them"),
        ([("one.second", "one/add_0")], ConfigError, "Add relu_0"),
        ([("mean_0", "head"), ("two/relu_1", "head")], ConfigError, "'head' is in two regions"),
        ([("two/relu_1", "mean_0")], ConfigError, "no weight that the plan rounds"),
        ([Region(inputs=("mean_0",), output="head", weights=("head.bias",))], ConfigError, "Closest: head.weight"),
    ],
)
def test_regions_that_cannot_be_are_refused(regions, error, said):
    prepared, plan = planned(network(), images())
    with pytest.raises(error, match=said):
        reconstruct(prepared, plan, images(), regions=regions, steps=1)


def test_regions_of_the_user_may_have_several_inputs_and_name_their_weights():
    prepared, plan = planned(network(), images())
    regions = [
        (["relu_0", "one/relu_0"], "two/relu_1"),
        Region(inputs=("x",), output="one/relu_0", weights=("stem.weight",)),
    ]
    learned, _ = reconstruct(prepared, plan, images(), regions=regions, steps=3)
    changed = {n for n, w in learned.state_dict().items() if not torch.equal(w, prepared.state_dict()[n])}
    assert {n for n in changed if n.endswith("weight")} == {
        "stem.weight", "one.second.weight", "two.first.weight", "two.second.weight"
    }  # fmt: skip
    assert [r["output"] for r in learned.history[-1].result["regions"]] == ["one/relu_0", "two/relu_1"]


def test_regions_that_need_each_other_are_refused():
    prepared, plan = planned(network(), images())
    both = [
        Region(inputs=("x", "one/relu_1"), output="two/relu_1", weights=("stem.weight", "two.first.weight")),
        Region(inputs=("relu_0",), output="one/relu_1"),
    ]
    with pytest.raises(ConfigError):
        reconstruct(prepared, plan, images(), regions=both, steps=1)


# The programs side by side


@pytest.mark.parametrize("target", ["simulate", "onnxruntime"])
@pytest.mark.parametrize("name", sorted(set(toys.TOYS) - {"Lstm", "Gru"}))
def test_a_simulation_computes_what_the_quantized_program_does(name, target):
    batch = positional(name, 4)
    prepared, plan = planned(captured(name), [batch], target=target)
    rounded = {}
    for weight in plan.weights:
        tensor = prepared.state_dict()[weight.weight]
        scale = weight_scale(tensor, weight.scheme)
        rounded[prepared.value(weight.value)] = LayerTensors(nearest(tensor, scale, weight.scheme), None)
    simulation, results, outputs = Simulation(prepared, plan), {}, None
    inputs = iter(prepared.signature.bind(batch).values())
    with torch.no_grad():
        wanted = apply_quantization(prepared, plan).graph_module(*prepared.signature.bind(batch).values())
        for node in prepared.graph.nodes:
            if node.op == "placeholder":
                results[node] = simulation.rounded(node, next(inputs))
            elif node.op == "call_function":
                results[node] = simulation.rounded(node, simulation.raw(node, results, rounded))
            elif node.op == "output":
                outputs = [results[source] for source in node.args[0]]
    for given, expected in zip(outputs, wanted, strict=True):
        # Biases are not rounded, and sums that reorder may move a value to the next code.
        assert (given - expected).square().mean() <= 1e-3 * expected.square().mean() + 1e-8


def test_samples_are_cut_into_batches_of_one_size_whatever_comes():
    program = network()
    given = [torch.full((size, 3, 8, 8), float(index)) for index, size in enumerate((3, 40, 1, 1, 90))]
    found = batches_of(program, given, samples=128, size=16)
    assert [len(batch["x"]) for batch in found] == [16] * 8
    assert torch.equal(torch.cat([batch["x"] for batch in found]), torch.cat(given)[:128])
    assert [len(batch["x"]) for batch in batches_of(program, given, samples=16, size=32)] == [2] * 8
    assert len(batches_of(program, given[:1], samples=1024, size=32)) == 1


def test_sequences_of_different_lengths_are_not_joined():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.relu(self.fc(x)).mean(1)

    program = capture(Rows().eval(), torch.zeros(1, 5, 4), dynamic={"x": {0: "batch", 1: "length"}})
    given = [torch.randn(3, length, 4) for length in (5, 5, 7, 2)]
    found = batches_of(program, given, samples=12, size=6)
    assert [tuple(batch["x"].shape[:2]) for batch in found][:2] == [(1, 5), (1, 5)]
    prepared, plan = planned(program, given)
    learned, _ = reconstruct(prepared, plan, given, steps=2, samples=12)
    assert learned.history[-1].parameters["samples"] == 12


# The options of the documents


def test_the_options_of_the_documents_say_regions_epochs_and_whether_activations_are_rounded():
    prepared, plan = planned(network(), images())
    learned, _ = reconstruct_as_documented(prepared, plan, images(), epochs=2, batch_size=16, samples=64)
    said = learned.history[-1].parameters
    assert (said["regions"], said["steps"], said["lr"], said["activations"]) == ("layer", 2 * 8, 0.1, False)
    found, _ = reconstruct_as_documented(
        prepared, plan, images(), recon_level="region-wise", epochs=1, simulate_activation_quant=True
    )
    said = found.history[-1].parameters
    assert (said["regions"], said["drop"], said["activations"]) == ("block", 0.5, True)
    given, _ = reconstruct_as_documented(
        prepared, plan, images(), recon_level="region-wise", epochs=1,
        regions=[("relu_0", "one/relu_1")], region_weights_names=[["one.second.weight"]],
    )  # fmt: skip
    changed = {n for n, w in given.state_dict().items() if not torch.equal(w, prepared.state_dict()[n])}
    assert changed <= {"one.second.weight", "one.second.bias"}
    assert given.history[-1].parameters["regions"] == ["relu_0 → one/relu_1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recon_level": "layerwise"}, "Closest: layer-wise"),
        ({"recon_level": "region-wise", "regions": []}, "nothing would be learned"),
        ({"regions": [("x", "head")]}, "recon_level is 'layer-wise'"),
        ({"recon_level": "region-wise", "region_weights_names": [["a"]]}, "1 lists of names for 0 regions"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_options_of_the_documents_that_contradict_each_other_are_refused(options, said):
    prepared, plan = planned(network(), images())
    with pytest.raises(ConfigError, match=said):
        reconstruct_as_documented(prepared, plan, images(), **options)


# What is promised of the result


def test_it_learns_where_inference_mode_is_on():
    with torch.inference_mode():
        given = [x.clone() for x in images()]
        prepared, plan = planned(network(), given)
        learned, _ = reconstruct(prepared, plan, given, steps=3)
    assert not any(tensor.is_inference() for tensor in learned.state_dict().values())


@pytest.mark.parametrize("name", sorted(set(toys.TOYS) - {"Lstm", "Gru"}))
@pytest.mark.parametrize("regions", ["layer", "block"])
def test_applying_the_plan_gives_the_codes_that_were_learned(name, regions):
    batches = [positional(name, 8) for _ in range(2)]
    prepared, plan = planned(captured(name), batches, target="onnxruntime", weight_bits=3)
    before = {key: tensor.clone() for key, tensor in prepared.state_dict().items()}
    learned, found = reconstruct(prepared, plan, batches, regions=regions, steps=8, lr=0.2, drop=0.5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in prepared.state_dict().items())
    codes = codes_of(learned, found)
    for weight in found.weights:
        if weight.value not in codes:
            continue  # tied: its codes have another name
        real, given = before[weight.weight], learned.state_dict()[weight.weight]
        if torch.equal(real, given):
            continue
        scale = weight_scale(given, weight.scheme, found.weight_reach[weight.value])
        assert torch.equal(on_grid(codes[weight.value], scale, weight.scheme), given)
        first, last = weight.scheme.code_range
        shape = [-1 if axis == weight.scheme.axis else 1 for axis in range(real.dim())]
        floor = (real / scale.reshape(shape)).floor()
        inside = (floor >= first) & (floor < last)
        assert set((codes[weight.value] - floor)[inside].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(("regions", "drop"), [("layer", 0.0), ("block", 0.0), ("block", 0.5)])
def test_what_is_learned_answers_fresh_data_better_than_rounding_to_the_nearest(regions, drop):
    prepared, plan = planned(network(), images(), weight_bits=3)
    learned, found = reconstruct(prepared, plan, images(), regions=regions, drop=drop, steps=60, lr=0.3)
    told = learned.history[-1].result["regions"]
    assert [r["kept"] for r in told][1:] == ["learned"] * (len(told) - 1)  # noise at the input: errors never cancel
    assert all((r["learned_error"] < r["nearest_error"]) == (r["kept"] == "learned") for r in told)
    fresh = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))]
    near = squared_error(prepared, apply_quantization(prepared, with_best_reach(prepared, plan)), fresh)
    assert squared_error(prepared, apply_quantization(learned, found), fresh) < 0.6 * near


def test_where_nothing_better_is_learned_the_nearest_codes_stay():
    prepared, plan = planned(network(), images())
    # One step that tears every logit to the wrong side.
    learned, found = reconstruct(prepared, plan, images(), steps=1, lr=1000.0)
    told = learned.history[-1].result["regions"]
    assert {r["kept"] for r in told} == {"nearest"}
    assert all(r["learned_error"] >= r["nearest_error"] for r in told)
    nearest_codes = codes_of(prepared, with_best_reach(prepared, plan))
    assert all(torch.equal(codes, nearest_codes[value]) for value, codes in codes_of(learned, found).items())


def test_the_same_seed_gives_the_same_codes_and_leaves_the_global_generator_alone():
    prepared, plan = planned(network(), images())
    before = torch.random.get_rng_state()
    runs = [reconstruct(prepared, plan, images(), steps=20, lr=0.05, drop=0.5, seed=seed) for seed in (4, 4, 5)]
    assert torch.equal(before, torch.random.get_rng_state())
    states = [learned.state_dict() for learned, _ in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_biases_are_learned_only_on_request():
    prepared, plan = planned(network(), images())
    fixed, _ = reconstruct(prepared, plan, images(), steps=30, lr=0.05, biases=False)
    moved, _ = reconstruct(prepared, plan, images(), steps=30, lr=0.05)
    names = [name for name in prepared.state_dict() if name.endswith("bias")]
    assert all(torch.equal(fixed.state_dict()[name], prepared.state_dict()[name]) for name in names)
    assert any(not torch.equal(moved.state_dict()[name], prepared.state_dict()[name]) for name in names)


def test_a_weight_that_two_layers_read_is_left_to_rounding_to_the_nearest():
    batches = [positional("SharedModules", 8)]
    prepared, plan = planned(captured("SharedModules"), batches)
    counts = [w.weight for w in plan.weights]
    shared = {name for name in counts if counts.count(name) > 1}
    assert shared
    learned, _ = reconstruct(prepared, plan, batches, steps=2)
    assert all(torch.equal(learned.state_dict()[name], prepared.state_dict()[name]) for name in shared)


def test_memory_bounds_the_samples_and_the_history_says_how_many_were_left():
    prepared, plan = planned(network(), images())
    regions = block_regions(prepared, plan)
    live = Schedule(prepared, resolve(prepared, plan, regions)).bytes_at_most()
    # Inside a block: its input, what a layer there reads, and what it gives; 2048 bytes each.
    assert live == prepared.signature.example_sizes["batch"] * 3 * 2048
    learned, _ = reconstruct(prepared, plan, images(), steps=1, memory_bytes=10 * 2 * 3 * 2048)
    said = learned.history[-1].parameters
    assert (said["samples"], said["samples_wanted"]) == (10, 1024)


def test_a_program_whose_batch_is_fixed_is_learned_from_whole_batches():
    class Fixed(Network):
        def forward(self, x):
            return super().forward(x.reshape(4, 3, 8, 8))

    program = capture(Fixed().eval(), torch.zeros(4, 3, 8, 8))
    assert program.signature.batch_axis is None
    batches = images(count=9, size=4)
    prepared, plan = planned(program, batches)
    learned, found = reconstruct(prepared, plan, batches, steps=10, lr=0.05, samples=36)
    assert learned.history[-1].parameters["samples"] == 36
    apply_quantization(learned, found)(batches[0])


def test_progress_counts_the_steps_of_all_regions():
    prepared, plan = planned(network(), images())
    told = []
    reconstruct(prepared, plan, images(), steps=2, progress=lambda *what: told.append(what))
    assert [done for _, done, _ in told] == list(range(1, 9))
    assert {total for _, _, total in told} == {8}
    assert told[2][0] == "relu_0 → one/relu_1"


def test_an_interruption_leaves_the_program_as_it_was():
    prepared, plan = planned(network(), images())
    prepared.train()
    before = {key: tensor.clone() for key, tensor in prepared.state_dict().items()}

    def interrupt(region, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(prepared, plan, images(), steps=3, progress=interrupt)
    assert prepared.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in prepared.state_dict().items())
    assert all(parameter.grad is None for parameter in prepared.parameters())


def test_values_that_are_no_numbers_are_named():
    prepared, plan = planned(network(), images())
    broken = prepared.copy()
    with torch.no_grad():
        broken.state_dict()["one.second.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="one/relu_1"):
        reconstruct(broken, plan, images(), steps=1)
    with pytest.raises(DataError, match="batch 0: input 'x'"):
        reconstruct(prepared, plan, [torch.full((4, 3, 8, 8), torch.inf)], steps=1)
    with pytest.raises(CalibrationError, match="There is no batch"):
        reconstruct(prepared, plan, [], steps=1)


def test_a_loss_that_becomes_nan_names_the_region_and_its_layers(monkeypatch):
    prepared, plan = planned(network(), images())
    monkeypatch.setattr(LearnedRounding, "up", lambda self: torch.full_like(self.logits, torch.nan) + 0 * self.logits)
    with pytest.raises(CalibrationError, match=r"x → relu_0 is nan in step 0.*stem cannot be learned"):
        reconstruct(prepared, plan, images(), steps=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"drop": 1.5}, "drop 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    prepared, plan = planned(network(), images())
    with pytest.raises(ConfigError, match=said):
        reconstruct(prepared, plan, images(), **options)


def test_a_plan_without_ranges_is_refused():
    prepared = prepare(network())
    with pytest.raises(ConfigError, match="Calibrate it first"):
        reconstruct(prepared, plan_quantization(prepared), images())


def test_a_bias_for_which_the_grid_is_widened_keeps_its_codes():
    # A channel without weights: its bias alone sets the scale, and learning must not push it beyond.
    program = network()
    with torch.no_grad():
        program.state_dict()["one.first.weight"][2] = 0.0
        program.state_dict()["one.first.bias"][2] = 3.0
    prepared, plan = planned(program, images(), target="onnxruntime")
    learned, found = reconstruct(prepared, plan, images(), steps=30, lr=0.2)
    codes = codes_of(learned, found)
    for weight in found.weights:
        scale = weight_scale(learned.state_dict()[weight.weight], weight.scheme, found.weight_reach[weight.value])
        assert torch.equal(on_grid(codes[weight.value], scale, weight.scheme), learned.state_dict()[weight.weight])
    quantized = apply_quantization(learned, found)
    stored = dict(quantized.graph_module.named_buffers())
    wanted = weight_scale(codes["one.first"], NARROW, found.weight_reach["one.first"])
    assert torch.equal(stored["one.first.weight_scale"], wanted)
