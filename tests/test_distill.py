"""Students that learn from teachers: where values are tapped, what is compared, and what is refused."""

import sqlite3

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slimgraph
from slimgraph.distillation.cache import CachedTeacher
from slimgraph.distillation.distill import distill
from slimgraph.distillation.joined import JoinedLoss, Pair
from slimgraph.distillation.mutual import distill_mutually
from slimgraph.distillation.teacher import Teacher
from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.watch import run_with_values
from slimgraph.training.loop import fit

SGD = ("SGD", {"lr": 0.05})


class Net(nn.Module):
    def __init__(self, width=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.fc = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.fc(torch.relu(self.second(x)).mean((2, 3)))


def captured(width=4, seed=0):
    return capture(Net(width, seed).eval(), torch.zeros(1, 3, 6, 6))


@pytest.fixture(scope="module")
def student():
    return captured()


@pytest.fixture(scope="module")
def teacher():
    return captured(6, 1)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)) for _ in range(3)
    ]


def state(program):
    return {name: tensor.clone() for name, tensor in program.state_dict().items()}


def unchanged(program, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


def test_watched_values_are_those_of_the_run_and_carry_gradients(student, data):
    x = data[0][0]
    outputs, values = run_with_values(student, {"x": x}, ["first", "fc"])
    assert torch.equal(outputs, student(x))
    assert torch.equal(values["fc"], outputs)
    assert values["first"].shape == (8, 4, 6, 6)
    assert values["first"].requires_grad


def test_without_pairs_the_outputs_are_imitated_without_labels(student, teacher, data):
    before = state(student), state(teacher)
    inputs = [x for x, _ in data]
    trained = distill(student, teacher, inputs, epochs=12, optimizer=("Adam", {"lr": 0.01}))
    assert unchanged(student, before[0])
    assert unchanged(teacher, before[1])
    assert trained.history[-1].step == "distill"
    assert trained.history[-1].result["best"] > trained.history[-1].result["started"]
    x = torch.cat(inputs)
    with torch.no_grad():
        apart = [
            float(F.kl_div(each(x).log_softmax(1), teacher(x).softmax(1), reduction="batchmean"))
            for each in (trained, student)
        ]
    assert apart[0] < 0.5 * apart[1]


def test_a_module_teaches_as_its_program_does(student, data):
    module = Net(6, 1).eval()
    pairs = [Pair(student="fc", teacher="fc", loss="soft_label"), Pair(student="second", teacher="second", loss="at")]
    pairs[1] = Pair(student="second", teacher="second", loss="attention_transfer", weight=3.0)
    by_module = distill(student, module, data, pairs=pairs, steps=2, optimizer=SGD)
    by_program = distill(student, captured(6, 1), data, pairs=pairs, steps=2, optimizer=SGD)
    for name, tensor in by_module.state_dict().items():
        torch.testing.assert_close(tensor, by_program.state_dict()[name])


def test_a_step_follows_the_weighted_sum_of_all_losses(student, teacher, data):
    pairs = [Pair(student="fc", teacher="fc", loss="kl", weight=2.0, options={"temperature": 3.0})]
    x, labels = data[0]
    trained = fit(
        student,
        [(x, labels)],
        loss=JoinedLoss(
            student,
            [Teacher(teacher, ["fc"])],
            pairs,
            {"x": x},
            label_loss=lambda outputs, batch: F.cross_entropy(outputs, batch.labels),
            label_weight=0.5,
        ),
        optimizer=SGD,
        steps=1,
    ).program
    by_hand = student.copy().train()
    own, wanted = by_hand(x), teacher(x).detach()
    divergence = F.kl_div((own / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean") * 9
    (2 * divergence + 0.5 * F.cross_entropy(own, labels)).backward()
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            expected = parameter - 0.05 * parameter.grad
            torch.testing.assert_close(trained.get_parameter(f"graph_module.{name}"), expected, atol=1e-6, rtol=1e-5)


def test_adapters_learn_and_are_left_behind(student, teacher, data):
    with pytest.raises(ConfigError, match=r"l2\(second \| second\).*\[8, 4, 6, 6\].*\[8, 6, 6, 6\].*adapter"):
        distill(student, teacher, data, pairs=[Pair(student="second", teacher="second")], steps=1)
    loss = JoinedLoss(
        student,
        [Teacher(teacher, ["second"])],
        [Pair(student="second", teacher="second", adapter=True)],
        {"x": data[0][0]},
    )
    before = [parameter.detach().clone() for parameter in loss.parameters()]
    trained = fit(student, data, loss=loss, optimizer=SGD, steps=3).program
    assert [parameter.shape for parameter in before] == [(6, 4, 1, 1)]
    assert not torch.equal(before[0], next(loss.parameters()))
    assert trained.state_dict().keys() == student.state_dict().keys()
    assert loss.parts.keys() == {"l2(second | second)"}


def test_several_teachers_each_say_their_part(student, teacher, data):
    pairs = [
        Pair(student="fc", teacher="fc", teacher_number=1),
        Pair(student=("first", "second"), teacher=("first", "second"), loss="fsp"),
    ]
    twin = captured(4, 3)
    trained = distill(student, [twin, Net(9, 2).eval()], data, pairs=pairs, steps=2, optimizer=SGD)
    assert trained.history[-1].parameters["pairs"] == ["l2(fc | fc)", "fsp(first, second | first, second)"]
    with pytest.raises(ConfigError, match="no teacher 2, there are 1"):
        distill(student, teacher, data, pairs=[Pair(student="fc", teacher="fc", teacher_number=2)], steps=1)


def test_distillation_never_ends_below_the_student(student, teacher, data):
    worse = distill(student, teacher, data, steps=3, optimizer=("SGD", {"lr": 50.0}), clip=1.0)
    assert worse.history[-1].result["best"] >= worse.history[-1].result["started"]


def test_the_package_offers_distill():
    assert slimgraph.distill is distill


@pytest.mark.parametrize(
    ("pair", "error", "told"),
    [
        (Pair(student="secnd", teacher="fc"), UnknownNameError, "student has no value or output 'secnd'.*second"),
        (Pair(student="fc", teacher="f"), UnknownNameError, "teacher has no value or output 'f'.*fc"),
        (Pair(student="fc", teacher="fc", loss="l3"), UnknownNameError, "no distillation loss 'l3'"),
        (Pair(student="fc", teacher="fc", loss="fsp"), ConfigError, "compares 2 values of the student"),
        (Pair(student="fc", teacher="fc", options={"warmth": 2}), ConfigError, "warmth"),
        (Pair(student="first", teacher="fc", adapter=True), ConfigError, "no adapter leads from"),
    ],
)
def test_wrong_pairs_are_told_before_the_first_step(student, teacher, data, pair, error, told):
    with pytest.raises(error, match=told):
        distill(student, teacher, data, pairs=[pair], steps=1)


def test_a_module_without_that_submodule_is_told(student, data):
    with pytest.raises(UnknownNameError, match=r"no submodule or output 'secnd'.*second"):
        distill(student, Net(), data, pairs=[Pair(student="second", teacher="secnd")], steps=1)


def test_teachers_with_other_outputs_are_told(student, data):
    class Two(Net):
        def forward(self, x):
            return super().forward(x), x.mean()

    two = capture(Two().eval(), torch.zeros(1, 3, 6, 6))
    with pytest.raises(ConfigError, match=r"student has 1 outputs.*teacher 2"):
        distill(student, two, data, steps=1)
    with pytest.raises(ConfigError, match="no teacher"):
        distill(student, [], data, steps=1)


def test_cached_answers_are_the_teachers_in_any_order(teacher, data, tmp_path):
    plain = Teacher(teacher, ["fc", "second"])
    cached = CachedTeacher(Teacher(teacher, ["fc", "second"]), tmp_path / "answers.sqlite")
    x = data[0][0]
    first = cached({"x": x})
    cached.teacher = None  # from now on it can only look up
    order = torch.tensor([3, 1, 7])
    for name, value in plain({"x": x}).items():
        assert torch.equal(first[name], value)
        assert torch.equal(cached({"x": x[order]})[name], value[order])


def test_answers_of_another_teacher_are_not_taken(student, teacher, data, tmp_path):
    x = {"x": data[0][0]}
    first = CachedTeacher(Teacher(student, ["fc"]), tmp_path / "answers")(x)
    second = CachedTeacher(Teacher(teacher, ["fc"]), tmp_path / "answers")(x)
    assert not torch.equal(first["fc"], second["fc"])
    assert torch.equal(second["fc"], Teacher(teacher, ["fc"])(x)["fc"])


def test_with_a_cache_students_become_the_same(student, teacher, data, tmp_path):
    plain = distill(student, teacher, data, epochs=2, optimizer=SGD)
    cached = distill(student, teacher, data, epochs=2, optimizer=SGD, cache=tmp_path / "answers")
    assert unchanged(cached, plain.state_dict())


def test_a_file_that_is_no_cache_is_not_touched(student, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, and longer than a header of one hundred bytes " * 4)
    with pytest.raises(ConfigError, match=r"notes.txt cannot hold a teacher's answers"):
        CachedTeacher(Teacher(student, ["fc"]), path)
    assert path.read_text().startswith("not a database")


def test_a_spoilt_answer_is_told(student, data, tmp_path):
    path, x = tmp_path / "answers", {"x": data[0][0]}
    cached = CachedTeacher(Teacher(student, ["fc"]), path)
    cached(x)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET tensors = ?", (b"\xff" * 40,))
    database.close()
    with pytest.raises(ConfigError, match="cannot be read"):
        cached(x)


def test_peers_learn_from_each_other_as_by_hand(data):
    students, (x, labels) = [captured(4, 0), captured(6, 1)], data[0]
    trained = distill_mutually(students, [(x, labels)], steps=1, optimizer=SGD)
    for own, other, got in ((0, 1, trained[0]), (1, 0, trained[1])):
        by_hand = students[own].copy().train()
        answer, wanted = by_hand(x), students[other].copy().train()(x).detach()
        divergence = F.kl_div(answer.log_softmax(1), wanted.softmax(1), reduction="batchmean")
        (F.cross_entropy(answer, labels) + divergence).backward()
        for name, parameter in by_hand.named_parameters():
            expected = (parameter - 0.05 * parameter.grad).detach()
            torch.testing.assert_close(got.get_parameter(f"graph_module.{name}"), expected, atol=1e-6, rtol=1e-5)
    assert [program.history[-1].step for program in trained] == ["distill_mutually"] * 2


def test_one_student_has_no_peer(student, data):
    with pytest.raises(ConfigError, match="at least two"):
        distill_mutually([student], data, steps=1)
