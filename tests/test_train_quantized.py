"""Quantization-aware training in one call: it starts at post-training quantization and never ends below it."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import slimgraph
from slimgraph.errors import ConfigError, DataError, ProgramError, TrainingError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.qdq import is_quantized
from slimgraph.quantization import Pact, apply_quantization, freeze
from slimgraph.quantization.aware_training import FreezeLate, train_quantized
from slimgraph.quantization.post_training import quantize
from slimgraph.training.batch import Batch
from slimgraph.training.loop import Hook
from slimgraph.training.losses import imitate

LOW = {"target": "simulate", "weight_bits": 3}
FAST = {"optimizer": ("AdamW", {"lr": 1e-3}), "schedule": None}


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 4)),
    ).train()
    for _ in range(60):
        network(torch.randn(64, 2, 8, 8))  # until its running statistics are those of the data
    network[-1].weight.data *= 10  # sure of its answers, as trained networks are
    return capture(network.eval(), torch.zeros(1, 2, 8, 8))


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(4, 32, 2, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def labelled(program, images):
    return [(x, program(x).argmax(1)) for x in images]


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def reached(quantized):
    entry = quantized.history[-1]
    assert entry.step == "train_quantized"
    return entry.result


def test_without_a_step_it_is_post_training_quantization(program, images):
    given = train_quantized(program, images, steps=0)
    assert equal(given, quantize(program, calibration=images))
    assert reached(given)["best_step"] == 0


def test_without_labels_it_learns_to_answer_as_the_float_program(program, images):
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    quantized = train_quantized(program, images, epochs=12, **LOW, optimizer=("AdamW", {"lr": 1e-3}))
    post_training = train_quantized(program, images, steps=0, **LOW)
    assert is_quantized(quantized.graph)
    every, loss = Batch({"input": torch.cat(images)}, None), imitate(program)
    errors = [loss(each(every.inputs["input"]), every).item() for each in (quantized, post_training)]
    assert errors[0] < 0.75 * errors[1]
    told = reached(quantized)
    assert (-told["best"], -told["post_training"]) == pytest.approx(errors, rel=1e-4)
    assert told["post_training"] == reached(post_training)["post_training"]
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict().items())


def test_with_labels_it_learns_them_and_is_judged_by_the_metric(program, labelled):
    quantized = train_quantized(program, labelled, epochs=6, evaluate=labelled, **LOW, **FAST)
    told = reached(quantized)
    assert quantized.history[-1].parameters == {"judged_by": "top1"}
    assert told["best"] == slimgraph.evaluate(quantized, labelled).value > told["post_training"]


def test_it_never_ends_below_post_training_quantization(program, images):
    first = []

    def only_the_first_is_good(quantized):
        first.append(quantized)
        return 1.0 if len(first) == 1 else 0.5

    given = train_quantized(program, images, epochs=2, evaluate=only_the_first_is_good, **LOW, **FAST)
    assert equal(given, first[0])
    assert reached(given) == {"post_training": 1.0, "best": 1.0, "best_step": 0, "steps": 8}
    assert all(is_quantized(each.graph) for each in first)


def test_ranges_and_statistics_are_still_in_the_last_quarter(program, images):
    seen = []

    class Watch(Hook):
        def step_end(self, run):
            state = run.program.state_dict()
            seen.append((state["1.running_mean"].clone(), state["quantizers.input.interval"].clone()))

    followed = {"activation_quantize_type": "moving_average"}
    train_quantized(program, images, epochs=2, hooks=[Watch()], freeze_ranges_at=0.5, **followed)
    changed = [[not torch.equal(*pair) for pair in zip(*two, strict=True)] for two in pairwise(seen)]
    assert [statistics for statistics, _ in changed] == [True] * 5 + [False] * 2
    assert [ranges for _, ranges in changed] == [True] * 3 + [False] * 4


class Groups(Hook):
    """Notes what the optimizer was made with."""

    def begin(self, run):
        self.rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        self.made = type(run.optimizer).__name__


@pytest.mark.parametrize(("bits", "rate"), [({"weight_bits": 4}, 0.01), ({"activation_bits": 4}, 0.01), ({}, 0.001)])
def test_steps_are_learned_by_descent_whose_rate_fits_the_bits(bits, rate, program, images):
    seen = Groups()
    train_quantized(program, images, steps=1, target="simulate", schedule=None, hooks=[seen], **bits)
    assert seen.made == "SGD"
    assert seen.rates == {"weights": rate, "steps": rate}


def test_an_optimizer_that_normalizes_gradients_gives_each_step_a_rate_of_its_size(program, images):
    seen = Groups()
    train_quantized(program, images, steps=1, schedule=None, optimizer="AdamW", hooks=[seen])
    assert seen.rates["weights"] == 5e-4
    assert seen.rates["steps"] < 1e-4  # steps of 8 bits are far smaller than weights


def test_few_bits_of_activations_begin_with_ranges_of_least_squared_error(program, images):
    few = {"target": "simulate", "activation_bits": 3, "steps": 0}
    usual, chosen = (train_quantized(program, images, **few, **more) for more in ({}, {"algorithm": "mse"}))
    assert equal(usual, chosen)
    assert not equal(usual, train_quantized(program, images, **few, algorithm="min_max"))


def test_what_is_trained_can_be_exported_while_training_goes_on(program, images, tmp_path):
    class Export(Hook):
        def step_end(self, run):
            frozen = freeze(run.program)
            slimgraph.save(apply_quantization(frozen.program, frozen.plan), tmp_path / f"{run.step}.pt2")

    alone = train_quantized(program, images, steps=2, **FAST)
    exported = train_quantized(program, images, steps=2, hooks=[Export()], **FAST)
    assert equal(alone, exported)
    assert slimgraph.load(tmp_path / "2.pt2")(images[0]).shape == (32, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_quantize_type": "lsq", "activation_quantize_type": "lsq_plus"},
        {"weight_quantize_type": "abs_max", "activation_quantize_type": "range_abs_max"},
        {"pact": Pact(alpha=4.0), "mixed_precision": "bf16"},
        {"optimizer": "SGD", "clip": 1.0, "accumulate": 2, "freeze_ranges_at": None, "freeze_statistics_at": None},
    ],
)
def test_every_way_to_find_ranges_trains(options, program, images):
    quantized = train_quantized(program, images, **{**LOW, **FAST, "epochs": 2, **options})
    assert reached(quantized)["best"] >= reached(quantized)["post_training"]
    weights = {name: t for name, t in quantized.state_dict().items() if t.dtype == torch.int8 and t.dim() == 4}
    assert max(int(t.abs().max()) for t in weights.values()) == 3


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"data": iter([])}, DataError, "iterator"),
        ({"data": []}, DataError, "no batch"),
        ({"evaluate": iter([])}, DataError, "iterator"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, ConfigError, "a name of torch.optim"),
        ({"freeze_ranges_at": 1.5}, ConfigError, "freeze_ranges_at is 1.5"),
        ({"steps": None}, ConfigError, "give one of them"),
        ({"weight_bits": 17}, ConfigError, "17"),
        ({"optimizer": "Sgd"}, UnknownNameError, "Closest: SGD"),
        ({"schedule": "cosinus"}, UnknownNameError, "Closest: cosine"),
    ],
)
def test_what_cannot_be_used_is_told(options, error, said, program, images):
    with pytest.raises(error, match=said):
        train_quantized(program, **{"data": images, "steps": 1, **options})


def test_data_may_be_named():
    digits = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.zeros(1, 1, 8, 8))
    trained = train_quantized(digits, "digits:train[:64]", steps=2, evaluate="digits:test[:64]")
    assert trained.history[-1].parameters == {"judged_by": "top1"}
    with pytest.raises(DataError, match="nowhere"):
        train_quantized(digits, "nowhere.npz", steps=2)


def test_labels_of_no_classes_need_a_loss(program, images):
    data = [(x, torch.randn(32, 4)) for x in images]
    with pytest.raises(ConfigError, match="Give `loss`"):
        train_quantized(program, data, steps=1)
    assert train_quantized(program, data, steps=1, loss="mse").history[-1].parameters == {"judged_by": "loss"}


def test_a_quantized_program_is_refused(program, images):
    with pytest.raises(ProgramError, match="quantized already"):
        train_quantized(quantize(program, calibration=images), images, steps=1)


def test_a_stream_must_say_how_long_it_trains(program, images):
    with pytest.raises(ConfigError, match="steps= instead of epochs="):
        train_quantized(program, lambda: iter(images), epochs=1, schedule=None)
    train_quantized(
        program, lambda: iter(images), epochs=1, schedule=None, freeze_ranges_at=None, freeze_statistics_at=None
    )


def test_a_training_that_diverges_says_where(program, images):
    with pytest.raises(TrainingError, match=r"The loss of step \d+ .*The best state so far"):
        train_quantized(program, images, steps=60, optimizer=("SGD", {"lr": 1e20}), schedule=None)


def test_freezing_is_a_hook_of_its_own():
    with pytest.raises(ConfigError, match="freeze_statistics_at is -1"):
        FreezeLate(statistics_at=-1)
