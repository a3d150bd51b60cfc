"""Training a program: the loop's arithmetic, its hooks, what it keeps, and how it fails."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from slimgraph.errors import ConfigError, DataError, OutputError, TrainingError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.training.batch import Batch
from slimgraph.training.evaluate import evaluate
from slimgraph.training.loop import Hook, fit
from slimgraph.training.losses import imitate
from slimgraph.training.optim import make_optimizer, make_schedule

SGD = ("SGD", {"lr": 0.1})


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1, bias=False)
        self.fc.weight.data.fill_(1.0)

    def forward(self, x):
        return self.fc(x)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


@pytest.fixture
def line():
    return capture(Line(), torch.zeros(1, 1))


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return capture(Small().eval(), torch.randn(1, 2, 6, 6))


@pytest.fixture
def small(captured):
    return captured.copy()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 8, 2, 6, 6, generator=generator)
    return [(x, torch.randint(0, 3, (8,), generator=generator)) for x in images]


def state(program):
    return {name: tensor.clone() for name, tensor in program.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Arithmetic


def test_one_step_by_hand(line):
    # (w x - y)^2 with w = 1, x = 2, y = 0: the gradient is 2 * 2 * 2 = 8
    fitted = fit(line, [(torch.tensor([[2.0]]), torch.tensor([[0.0]]))], loss="mse", optimizer=SGD, steps=1)
    assert fitted.program.state_dict()["fc.weight"].item() == pytest.approx(1 - 0.1 * 8)
    assert fitted.losses == (4.0,)
    assert (fitted.step, fitted.value, fitted.evaluations) == (1, None, ())


def test_it_does_what_a_bare_loop_does(small, batches):
    bare = small.copy().train()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    torch.manual_seed(5)
    for _ in range(2):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(bare(x), y).backward()
            nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
            optimizer.step()
            schedule.step()
    fitted = fit(
        small,
        batches,
        loss="cross_entropy",
        optimizer=("AdamW", {"lr": 0.01}),
        schedule=("StepLR", {"step_size": 3, "gamma": 0.5}),
        epochs=2,
        clip=0.5,
        seed=5,
    )
    assert equal(fitted.program.state_dict(), bare.state_dict())


def test_accumulated_batches_are_one_large_batch(small, batches):
    still = small.copy()  # batch norms and dropout would see other batches
    still.graph_module.eval()
    network = capture(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), torch.zeros(1, 2, 6, 6))
    uneven = [batches[0], (batches[1][0][:3], batches[1][1][:3])]
    whole = [tuple(torch.cat(parts) for parts in zip(*uneven, strict=True))]
    options = {"loss": "cross_entropy", "optimizer": SGD, "epochs": 1}
    apart, together = fit(network, uneven, accumulate=2, **options), fit(network, whole, **options)
    for name, tensor in apart.program.state_dict().items():
        torch.testing.assert_close(tensor, together.program.state_dict()[name])
    assert apart.losses == pytest.approx(together.losses)


def test_the_end_of_an_epoch_makes_a_step_of_what_is_left(small, batches):
    fitted = fit(small, batches[:3], loss="cross_entropy", optimizer=SGD, epochs=2, accumulate=2)
    assert len(fitted.losses) == 4


def test_steps_go_on_over_as_many_passes_as_they_take(small, batches):
    assert len(fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=6).losses) == 6


def test_mixed_precision_computes_in_bfloat16_and_keeps_parameters(small, batches):
    types = []

    class Watch(Hook):
        def step_end(self, run):
            types.append(run.program.copy().eval()(batches[0][0]).dtype)

    fitted = fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=2, mixed_precision="bf16", hooks=[Watch()])
    plain = fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=2)
    assert types == [torch.float32] * 2  # a copy made meanwhile is an ordinary program
    assert {tensor.dtype for tensor in fitted.program.parameters()} == {torch.float32}
    assert fitted.losses != plain.losses
    assert fitted.losses == pytest.approx(plain.losses, rel=0.02)


# What it leaves as it was


def test_the_given_program_and_the_random_numbers_of_the_caller_stay(small, batches):
    before, mode, numbers = state(small), small.training, torch.get_rng_state()
    fitted = fit(small, batches, loss="cross_entropy", optimizer=SGD, epochs=1)
    assert equal(before, small.state_dict())
    assert fitted.program.training == small.training == mode
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in (*small.parameters(), *fitted.program.parameters()))


def test_the_same_seed_gives_the_same_weights_and_another_one_others(small, batches):
    fits = [fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=3, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (fitted.program.state_dict() for fitted in fits)
    assert equal(one, same)
    assert not equal(one, other)


def test_evaluating_changes_nothing_of_the_training(small, batches):
    def noisy(program):
        assert not program.training
        assert not torch.is_grad_enabled()
        return torch.rand(()).item()

    options = {"loss": "cross_entropy", "optimizer": SGD, "steps": 4, "keep_best": False}
    quiet = fit(small, batches, **options)
    judged = fit(small, batches, evaluate=noisy, evaluate_every=1, **options)
    assert equal(quiet.program.state_dict(), judged.program.state_dict())
    assert judged.step == 4


def test_accelerators_of_the_user_are_left_alone(small, batches):
    fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=1)
    assert not AcceleratorState._shared_state
    try:
        Accelerator(cpu=True, mixed_precision="bf16")  # would be refused if ours were still there
        with pytest.raises(ConfigError, match="has an Accelerator with 'bf16'"):
            fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=1)
        fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=1, mixed_precision="bf16")
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()


# Best


def test_a_run_never_ends_below_its_start(small, batches):
    fitted = fit(
        small,
        batches,
        loss="cross_entropy",
        optimizer=("SGD", {"lr": 1.0}),
        epochs=2,
        evaluate=lambda program: -(program.state_dict()["fc.bias"] - small.state_dict()["fc.bias"]).abs().sum().item(),
    )
    assert (fitted.step, fitted.value) == (0, 0.0)
    assert equal(fitted.program.state_dict(), small.state_dict())
    assert [step for step, _ in fitted.evaluations] == [0, 4, 8]


def test_the_best_state_is_given_and_on_disk_with_its_step(small, batches, tmp_path):
    values = iter([0.5, 0.2, 0.9, math.nan, 0.9, 0.1])
    seen = {}

    class Remember(Hook):
        def evaluated(self, run):
            seen[run.step] = state(run.program)

    fitted = fit(
        small,
        batches,
        loss="cross_entropy",
        optimizer=SGD,
        steps=5,
        evaluate=lambda program: next(values),
        evaluate_every=1,
        best_path=tmp_path / "best.safetensors",
        hooks=[Remember()],
    )
    assert (fitted.step, fitted.value) == (2, 0.9)  # the earliest of equals
    assert equal(fitted.program.state_dict(), seen[2])
    assert equal(load_file(tmp_path / "best.safetensors"), seen[2])
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert file.metadata() == {"step": "2", "value": "0.9"}
    entry = fitted.program.history[-1]
    assert (entry.step, entry.result) == ("fit", {"steps": 5, "kept_step": 2, "value": 0.9})


def test_an_evaluation_of_labelled_data_is_a_value(small, batches):
    fitted = fit(small, batches, loss="cross_entropy", optimizer=SGD, epochs=1, evaluate=lambda p: evaluate(p, batches))
    assert fitted.value == max(value for _, value in fitted.evaluations)
    assert fitted.value == evaluate(fitted.program, batches).value


def test_a_file_that_cannot_be_written_stops_the_run(small, batches, tmp_path):
    with pytest.raises(OutputError):
        fit(
            small,
            batches,
            loss="cross_entropy",
            optimizer=SGD,
            steps=1,
            evaluate=lambda p: 1.0,
            best_path=tmp_path / "nowhere" / "best.safetensors",
        )


# Hooks


def test_hooks_are_called_at_their_places(small, batches):
    class Log(Hook):
        def __init__(self):
            self.calls = []

        def __getattribute__(self, name):
            if name in ("begin", "epoch_begin", "step_begin", "step_end", "evaluated", "epoch_end", "end"):
                return lambda run: self.calls.append((name, run.step, run.epoch))
            return super().__getattribute__(name)

    log = Log()
    fit(small, batches[:2], loss="cross_entropy", optimizer=SGD, epochs=2, evaluate=lambda p: 0.0, hooks=[log])
    step = [[("step_begin", s, e), ("step_end", s + 1, e)] for s, e in ((0, 0), (1, 0), (2, 1), (3, 1))]
    assert log.calls == [
        *[("begin", 0, 0), ("evaluated", 0, 0), ("epoch_begin", 0, 0), *step[0], *step[1]],
        *[("evaluated", 2, 1), ("epoch_end", 2, 1), ("epoch_begin", 2, 1), *step[2], *step[3]],
        *[("evaluated", 4, 2), ("epoch_end", 4, 2), ("end", 4, 2)],
    ]


def test_a_hook_can_end_the_run_and_sees_how_long_it_would_be(small, batches):
    class Stop(Hook):
        def step_end(self, run):
            assert run.total_steps == 8
            run.stop = run.step == 3

    assert len(fit(small, batches, loss="cross_entropy", optimizer=SGD, epochs=2, hooks=[Stop()]).losses) == 3


def test_progress_is_told_after_each_step(small, batches):
    told = []
    fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=3, progress=lambda *said: told.append(said))
    assert told == [("Training", 1, 3), ("Training", 2, 3), ("Training", 3, 3)]


# Optimizers and schedules


def test_an_optimizer_of_the_programs_parameters_goes_on_with_its_state(small, batches):
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    small.train()
    nn.functional.cross_entropy(small(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    twin = small.copy()
    twin_optimizer = copy.deepcopy(
        optimizer, {id(a): b for a, b in zip(small.parameters(), twin.parameters(), strict=True)}
    )
    before = state(small)
    fitted = fit(small, batches[1:2], loss="cross_entropy", optimizer=optimizer, steps=1)
    assert equal(before, small.state_dict())
    torch.manual_seed(0)
    nn.functional.cross_entropy(twin(batches[1][0]), batches[1][1]).backward()
    twin_optimizer.step()
    assert equal(fitted.program.state_dict(), twin.state_dict())


def test_an_optimizer_can_be_made_by_a_function_of_groups(small, batches):
    def groups(program):
        named = dict(program.named_parameters())
        return [{"params": [named["fc.bias"]], "lr": 0.5}]

    fitted = fit(
        small,
        batches,
        loss="cross_entropy",
        optimizer=lambda given: torch.optim.SGD(given, lr=0.0),
        groups=groups,
        steps=1,
    )
    changed = {n for n, p in fitted.program.named_parameters() if not torch.equal(p, small.state_dict()[n])}
    assert changed == {"fc.bias"}


@pytest.mark.parametrize(
    ("optimizer", "error", "said"),
    [
        ("sgd", UnknownNameError, "Closest: SGD"),
        (("SGD", {"rate": 1}), ConfigError, "rate"),
        (("SGD", {"lr": -1}), ConfigError, "lr|learning rate"),
        ("LBFGS", ConfigError, "closure|several times"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), ConfigError, "1 of 1 parameters"),
        (lambda groups: None, ConfigError, "NoneType"),
        (("SGD",), ConfigError, "pair"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_told(optimizer, error, said, small, batches):
    with pytest.raises(error, match=said):
        fit(small, batches, loss="cross_entropy", optimizer=optimizer, steps=1)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        (("linear", {"warmup": 2}), [1 / 3, 2 / 3, 1, 0.5]),
        (("linear", {"warmup": 0.5}), [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
        ("CosineAnnealingLR", [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
        (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), [1, 1, 0.5, 0.5]),
    ],
)
def test_a_schedule_sets_the_rate_of_each_step(schedule, rates):
    optimizer = make_optimizer(("SGD", {"lr": 1.0}), [{"params": [nn.Parameter(torch.zeros(1))]}], {})
    made, seen = make_schedule(schedule, optimizer, 4), []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    assert seen == pytest.approx(rates)


def test_a_schedule_that_follows_the_metric_is_stepped_by_it(small, batches):
    rates = []

    class Watch(Hook):
        def step_begin(self, run):
            rates.append(run.optimizer.param_groups[0]["lr"])

    fit(
        small,
        batches,
        loss="cross_entropy",
        optimizer=SGD,
        steps=4,
        schedule=("ReduceLROnPlateau", {"mode": "max", "patience": 0, "factor": 0.5}),
        evaluate=lambda p: 0.0,
        evaluate_every=2,
        hooks=[Watch()],
    )
    assert rates == [0.1, 0.1, 0.05, 0.05]


def test_a_schedule_needs_the_length_of_a_stream(small, batches):
    options = {"loss": "cross_entropy", "optimizer": SGD, "schedule": "cosine"}
    with pytest.raises(ConfigError, match="steps= instead of epochs="):
        fit(small, lambda: iter(batches), epochs=1, **options)
    assert len(fit(small, lambda: iter(batches), steps=6, **options).losses) == 6


# Data and losses


@pytest.mark.parametrize("form", ["pair", "dict", "Batch", "loader"])
def test_batches_have_many_forms(form, small, batches):
    made = {
        "pair": batches,
        "dict": [{"x": x, "label": y} for x, y in batches],
        "Batch": [Batch({"x": x}, y) for x, y in batches],
        "loader": torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])), 8
        ),
    }[form]
    options = {"loss": "cross_entropy", "optimizer": SGD, "epochs": 1}
    assert fit(small, made, **options).losses == fit(small, batches, **options).losses


def test_wrong_data_stop_before_the_first_step(small, batches):
    called = []
    options = {"loss": "cross_entropy", "optimizer": SGD, "evaluate": called.append}
    with pytest.raises(DataError, match=r"The training data, batch 0.*\[8, 6, 6, 2\]"):
        fit(small, [(batches[0][0].movedim(1, -1), batches[0][1])], epochs=1, **options)
    with pytest.raises(DataError, match="label 3"):
        fit(small, [(batches[0][0], batches[0][1] + 3)], epochs=1, **options)
    with pytest.raises(DataError, match="no batch"):
        fit(small, [], epochs=1, **options)
    assert called == []


def test_a_used_up_iterator_is_told_at_the_second_epoch(small, batches):
    with pytest.raises(DataError, match="used up"):
        fit(small, iter(batches), loss="cross_entropy", optimizer=SGD, epochs=2)


@pytest.mark.parametrize(
    ("loss", "error", "said"),
    [
        ("crossentropy", UnknownNameError, "Closest: cross_entropy"),
        ("mse", DataError, r"does not apply to an output of shape \[8, 3\]"),
        (lambda outputs, batch: outputs, ConfigError, r"returned \[8, 3\]"),
        (lambda outputs, batch: 3.0, ConfigError, "returned <class 'float'>|returned float"),
        (lambda outputs, batch: outputs.detach().sum(), TrainingError, "any parameter"),
    ],
)
def test_a_loss_that_cannot_be_used_is_told(loss, error, said, small, batches):
    with pytest.raises(error, match=said):
        fit(small, batches, loss=loss, optimizer=SGD, steps=1)


def test_labels_are_asked_for_where_a_loss_needs_them(small, batches):
    with pytest.raises(DataError, match="imitate"):
        fit(small, [x for x, _ in batches], loss="cross_entropy", optimizer=SGD, steps=1)


def test_imitation_needs_no_labels_and_is_zero_for_oneself(small, batches):
    images = [x for x, _ in batches]
    other = small.copy()
    other.load_state_dict({name: t * 1.5 if t.is_floating_point() else t for name, t in state(small).items()})
    loss = imitate(small)

    def judge(program):
        return -sum(loss(program(x), Batch({"x": x}, None)).item() for x in images)

    assert judge(small) == pytest.approx(0, abs=1e-6)
    fitted = fit(other, images, loss=loss, optimizer=SGD, epochs=8, evaluate=judge)
    assert fitted.value > fitted.evaluations[0][1] * 0.9


def test_imitation_of_class_scores_is_the_divergence():
    teacher = capture(nn.Identity(), torch.zeros(1, 2))
    own, wanted = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    # 0.75 ln(0.75 / 0.5) + 0.25 ln(0.25 / 0.5)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert imitate(teacher)(own, Batch({"input": wanted}, None)).item() == pytest.approx(expected)
    probabilities = torch.tensor([[0.75, 0.25]])
    even = torch.tensor([[0.5, 0.5]])
    assert imitate(teacher)(even, Batch({"input": probabilities}, None)).item() == pytest.approx(expected)


def test_imitation_of_other_outputs_is_the_relative_squared_error():
    teacher = capture(nn.Identity(), torch.zeros(1, 2, 2))
    wanted = torch.full((1, 2, 2), 2.0)
    assert imitate(teacher)(wanted * 1.5, Batch({"input": wanted}, None)).item() == pytest.approx(0.25)


# Failures


@pytest.mark.parametrize(
    "options", [{}, {"epochs": 1, "steps": 1}, {"steps": 1, "clip": 0}, {"epochs": 1, "accumulate": 0}]
)
def test_options_that_contradict_are_told(options, small, batches):
    with pytest.raises(ConfigError):
        fit(small, batches, loss="cross_entropy", optimizer=SGD, **options)


def test_a_loss_that_is_not_a_number_names_step_layer_and_the_best_state(small, batches, tmp_path):
    class Break(Hook):
        def step_begin(self, run):
            if run.step == 2:
                run.program.state_dict()["bn.running_var"].fill_(1.0)
                run.program.state_dict()["conv.weight"].fill_(3e38)

    path = tmp_path / "best.safetensors"
    with pytest.raises(TrainingError) as told:
        fit(
            small,
            batches,
            loss="cross_entropy",
            optimizer=SGD,
            steps=4,
            evaluate=lambda p: 1.0,
            hooks=[Break()],
            best_path=path,
        )
    message = str(told.value)
    assert message.startswith(
        "The loss of step 3 is nan. The first value that is not finite is 'conv', of the layer 'conv'"
    )
    assert f"of step 0, is the error's `fitted`, and in {path}" in message
    assert "(here 0.1)" in message
    assert equal(told.value.fitted.program.state_dict(), small.state_dict())


def test_a_parameter_that_is_not_finite_is_named_as_such(small, batches):
    class Break(Hook):
        def step_end(self, run):
            run.program.state_dict()["fc.weight"][0, 0] = math.inf

    with pytest.raises(TrainingError, match=r"step 2 is (nan|inf)\. The parameter 'fc.weight' was not finite any more"):
        fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=2, hooks=[Break()])


def test_a_loss_function_that_breaks_by_itself_is_told_apart(small, batches):
    def broken(outputs, batch):
        return outputs.sum() * math.inf

    with pytest.raises(TrainingError, match="loss function made it"):
        fit(small, batches, loss=broken, optimizer=SGD, steps=1)


def test_a_gradient_that_is_not_finite_is_found_where_gradients_are_clipped(small, batches):
    def steep(outputs, batch):
        return (outputs * 0).abs().sum().sqrt()  # the slope of a square root at zero

    with pytest.raises(TrainingError, match=r"The loss of step 1 is 0, but its gradient is not finite.*'conv.weight'"):
        fit(small, batches, loss=steep, optimizer=SGD, steps=1, clip=1.0)


def test_an_interruption_says_where_the_best_state_is_and_changes_nothing(small, batches, tmp_path):
    class Interrupt(Hook):
        def step_end(self, run):
            if run.step == 2:
                raise KeyboardInterrupt

    before, mode, numbers = state(small), small.training, torch.get_rng_state()
    path = tmp_path / "best.safetensors"
    with pytest.raises(KeyboardInterrupt) as told:
        fit(
            small,
            batches,
            loss="cross_entropy",
            optimizer=SGD,
            epochs=1,
            evaluate=lambda p: 1.0,
            best_path=path,
            hooks=[Interrupt()],
        )
    assert told.value.__notes__ == [f"The best state so far, of step 0, is in {path}."]
    assert equal(before, small.state_dict())
    assert small.training == mode
    assert torch.equal(numbers, torch.get_rng_state())
    assert not AcceleratorState._shared_state
    assert equal(load_file(path), before)


def test_several_processes_are_refused(small, batches, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one of 2"):
        fit(small, batches, loss="cross_entropy", optimizer=SGD, steps=1)
