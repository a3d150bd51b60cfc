"""Weights set to zero one by one or in blocks: which go, how many, and that they stay away while a program trains."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import slimgraph
from slimgraph.errors import ConfigError, ProgramError, UnknownNameError
from slimgraph.formats import load, save
from slimgraph.program.capture import capture
from slimgraph.pruning.gmp import GMPConfig, GMPUnstructuredPruner, Schedule
from slimgraph.pruning.unstructured import UnstructuredPruner, UnstructuredPruning
from slimgraph.pruning.weights import find_weights
from slimgraph.pruning.zeros import count_zeros
from slimgraph.training.loop import Hook, fit


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.point = nn.Conv2d(6, 8, 1)
        self.table = nn.Embedding(5, 8)
        self.position = nn.Parameter(torch.randn(1, 8) * 0.01)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x, ids):
        y = self.point(self.bn(self.conv(x)).relu()).mean((2, 3))
        return self.head(self.norm(y + self.table(ids) + self.position))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(1, 2, 4, 4), torch.zeros(1, dtype=torch.int64)))


def linear(*rows):
    """A program of one linear layer with these weights."""
    weight = torch.tensor(rows, dtype=torch.float32)
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.weight.data = weight
    return capture(net, torch.zeros(1, weight.shape[1]))


def kept(program, **options):
    (mask,) = UnstructuredPruning(**options).plan(program).masks.kept.values()
    return mask.int().tolist()


# Which go


def test_the_smallest_magnitudes_go_whatever_their_sign():
    assert kept(linear([0.1, -0.5, -0.2, 0.4]), ratio=0.5) == [[0, 1, 0, 1]]


def test_of_equals_the_first_go():
    assert kept(linear([1.0, -1.0, 1.0, 1.0]), ratio=0.5) == [[0, 0, 1, 1]]


def test_zeros_that_are_there_count():
    assert kept(linear([0.0, 3.0, 0.0, 1.0]), ratio=0.5) == [[0, 1, 0, 1]]


def test_a_threshold_takes_what_is_below_it():
    assert kept(linear([0.1, -0.5, -0.2, 0.4]), threshold=0.2) == [[0, 1, 1, 1]]


def test_a_block_is_judged_by_its_mean_magnitude_and_not_by_its_mean():
    # Blocks of 1×2: the first has the larger mean, the second the larger magnitudes.
    assert kept(linear([0.2, 0.2, 5.0, -5.0]), ratio=0.5, sparse_block=(1, 2)) == [[0, 0, 1, 1]]
    # Blocks of 2×2, with means 1, 4, 3, 2.
    rows = [[1, 1, 4, 4], [1, 1, 4, 4], [3, 3, 2, 2], [3, 3, 2, 2]]
    assert kept(linear(*rows), ratio=0.5, sparse_block=(2, 2)) == [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2


def test_blocks_at_the_edge_are_as_large_as_what_is_there():
    assert kept(linear([3.0, 3.0, 2.0, 2.0, 1.0]), ratio=1 / 3, sparse_block=(4, 2)) == [[1, 1, 1, 1, 0]]


def test_blocks_of_a_convolution_lie_at_one_position_of_its_kernel():
    net = nn.Conv2d(4, 2, 2, bias=False)
    masks = UnstructuredPruning(ratio=0.5, sparse_block=(1, 4)).plan(capture(net, torch.zeros(1, 4, 3, 3))).masks
    mask = masks.kept["weight"]
    assert all(mask[o, :, y, x].int().sum() in (0, 4) for o, y, x in itertools.product(range(2), repeat=3))
    assert masks.zeros == 16


def test_blocks_follow_outputs_and_inputs_however_the_weight_is_stored():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 9.0], [1.0, 9.0], [5.0, 2.0], [5.0, 2.0]]))  # inputs first

        def forward(self, x):
            return x @ self.weight

    found = kept(capture(Product(), torch.zeros(1, 4)), ratio=0.5, sparse_block=(1, 2))
    assert found == [[0, 1], [0, 1], [1, 0], [1, 0]]


def test_locally_every_weight_has_the_ratio_and_globally_all_together(program):
    globally = count_zeros(slimgraph.sparsify(program, ratio=0.5))
    assert globally.sparsity == 0.5
    assert len({weight.sparsity for weight in globally.weights}) > 1
    locally = count_zeros(slimgraph.sparsify(program, ratio=0.5, local_sparsity=True))
    assert {weight.sparsity for weight in locally.weights} == {0.5}


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0, 3.0]), min_size=2, max_size=9),
    ratio=st.floats(0.01, 0.99),
)
def test_exactly_so_many_go_and_none_is_greater_than_one_that_stays(values, ratio):
    pruning = UnstructuredPruning(ratio=ratio)
    (mask,) = pruning.plan(linear_of(values)).masks.kept.values()
    stays = [i for i, each in enumerate(mask.flatten().tolist()) if each]
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))  # a slow judge
    assert stays == sorted(order[round(ratio * len(values)) :])


_PROGRAMS = {}


def linear_of(values):
    program = _PROGRAMS.setdefault(len(values), linear([1.0] * len(values)))
    program.load_state_dict({"weight": torch.tensor([values])})
    return program


# Which take part


def test_weights_are_what_is_multiplied_by_and_tables(program):
    found = find_weights(program)
    names = ["conv.weight", "head.weight", "point.weight", "table.weight"]
    assert sorted(weight.name for weight in found.found) == names
    assert found.others == {"position": "is read by add, which is no product of matrices"}


def test_biases_norms_and_positions_stay(program):
    sparse = slimgraph.sparsify(program, ratio=0.9).state_dict()
    for name, tensor in program.state_dict().items():
        assert torch.equal(sparse[name], tensor) == (
            name.endswith(("bias", "position")) or "norm" in name or "bn" in name
        )


def test_only_pointwise_convolutions_on_request(program):
    sparse = slimgraph.sparsify(program, ratio=0.75, conv1x1_only=True)
    assert {w.name: w.sparsity for w in count_zeros(sparse).weights if w.zeros} == {"point.weight": 0.75}
    zeros = count_zeros(sparse, conv1x1_only=True)
    assert (zeros.sparsity, zeros.zero_parameters) == (0.75, 36 + 6 + 8)  # and the biases of both norms


@pytest.mark.parametrize(
    "skip",
    ["head", ["head.weight"], "hea?", "re:h.*d", lambda program: ["head"], lambda program: {"head.weight"}],
)
def test_what_is_skipped_stays_by_name_pattern_or_function(program, skip):
    sparse = slimgraph.sparsify(program, ratio=0.5, skip=skip)
    assert [w.name for w in count_zeros(sparse).weights if not w.zeros] == ["head.weight"]


def test_a_tied_weight_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    program = capture(Tied(), torch.zeros(1, dtype=torch.int64))
    (weight,) = find_weights(program).found
    assert {"table", "head", "table.weight", "head.weight"} <= weight.names
    assert count_zeros(slimgraph.sparsify(program, ratio=0.5, sparse_block=(2, 1))).parameters == 24


# What a sparse program is


def test_a_sparse_program_is_a_plain_one_with_zeros(program, tmp_path):
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    sparse = slimgraph.sparsify(program, ratio=0.5)
    save(sparse, tmp_path / "sparse.pt2")
    again = load(tmp_path / "sparse.pt2")
    assert again.state_dict().keys() == before.keys()
    assert count_zeros(again).sparsity == 0.5
    assert again.history[-1].step == "sparsify"
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict().items())


def test_the_report_has_a_line_for_each_weight(program):
    table = count_zeros(slimgraph.sparsify(program, ratio=0.5)).table()
    assert [line.split()[0] for line in table.splitlines()[2:-2]] == [w.name for w in find_weights(program).found]
    assert table.splitlines()[-1].endswith("50.0%")


# While a program trains


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(8, 2, 4, 4, generator=generator)
        ids = torch.randint(0, 5, (8,), generator=generator)
        made.append(({"x": x, "ids": ids}, torch.randint(0, 3, (8,), generator=generator)))
    return made


class Watch(Hook):
    """Notes the sparsity under which each step is taken, and what it leaves."""

    def __init__(self):
        self.before, self.after = [], []

    def step_begin(self, run):
        self.before.append(count_zeros(run.program).sparsity)

    def step_end(self, run):
        self.after.append(count_zeros(run.program).sparsity)


def trained(program, *hooks, steps=12, **options):
    arguments = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    return fit(
        program, batches(), loss="cross_entropy", optimizer=("SGD", arguments), steps=steps, hooks=hooks, **options
    )


def test_a_pruned_program_stays_as_sparse_under_momentum_and_decay(program):
    watch = Watch()
    fitted = trained(program, UnstructuredPruner(UnstructuredPruning(ratio=0.6)), watch)
    wanted = count_zeros(slimgraph.sparsify(program, ratio=0.6))
    found = count_zeros(fitted.program)
    assert [w.zeros for w in found.weights] == [w.zeros for w in wanted.weights]
    assert set(watch.before) == set(watch.after) == {wanted.sparsity}
    assert not torch.equal(
        fitted.program.state_dict()["head.weight"], slimgraph.sparsify(program, ratio=0.6).state_dict()["head.weight"]
    )


def test_under_a_threshold_weights_that_shrink_go_too(program):
    watch = Watch()
    decay = ("SGD", {"lr": 0.1, "weight_decay": 0.5})
    hooks = [UnstructuredPruner(UnstructuredPruning(threshold=0.05)), watch]
    fitted = fit(program, batches(), loss="cross_entropy", optimizer=decay, steps=10, hooks=hooks)
    assert watch.after == sorted(watch.after)
    assert watch.after[-1] > watch.before[0] > 0
    for weight in find_weights(fitted.program).found:
        magnitudes = weight.parameter.detach().abs()
        assert bool(((magnitudes == 0) | (magnitudes >= 0.05)).all())


def test_the_cubic_schedule_has_the_documented_ratios():
    schedule = Schedule(initial_ratio=0.15, stable_iterations=0, changes=4, between=11)
    assert [round(schedule.ratio(11 * i, 0.75), 4) for i in range(6)] == [0.15, 0.4969, 0.675, 0.7406, 0.75, 0.75]


def test_the_ratio_grows_while_the_program_trains_and_never_falls(program):
    watch = Watch()
    config = GMPConfig(stable_iterations=2, pruning_steps=4, prune_steps=3, initial_ratio=0.15)
    fitted = trained(program, GMPUnstructuredPruner(UnstructuredPruning(ratio=0.75), config), watch, steps=16)
    total = sum(w.size for w in count_zeros(program).weights)
    ratios = [0.0] * 2 + [0.15] * 3 + [0.496875] * 3 + [0.675] * 3 + [0.740625] * 3 + [0.75] * 2
    assert watch.before == pytest.approx([round(ratio * total) / total for ratio in ratios])
    assert watch.after == watch.before
    assert count_zeros(fitted.program).sparsity == pytest.approx(0.75, abs=1 / total)


def test_the_best_state_of_gradual_pruning_is_one_with_the_whole_ratio(program):
    config = GMPConfig(pruning_steps=2, prune_steps=4)
    seen = []

    def dense_is_best(evaluated):
        seen.append(count_zeros(evaluated).sparsity)
        return -seen[-1]

    pruner = GMPUnstructuredPruner(UnstructuredPruning(ratio=0.5), config)
    fitted = trained(program, pruner, steps=12, evaluate=dense_is_best, evaluate_every=2)
    assert seen[0] == 0.0
    assert count_zeros(fitted.program).sparsity == 0.5
    assert fitted.step == 10


def test_a_schedule_goes_on_where_it_was(program):
    watch = Watch()
    config = GMPConfig(pruning_steps=4, prune_steps=3, resume_iteration=6)
    half = slimgraph.sparsify(program, ratio=0.4)
    trained(half, GMPUnstructuredPruner(UnstructuredPruning(ratio=0.75), config), watch, steps=8)
    assert watch.before == pytest.approx([0.675] * 3 + [0.740625] * 3 + [0.75] * 2, abs=0.01)


@pytest.mark.parametrize(
    ("config", "changes", "between", "reached"),
    [
        (GMPConfig(), 1, 900, 900),  # 45 % of 2,000 iterations
        (GMPConfig(pruning_iterations=1001), 100, 10, 1000),
        (GMPConfig(pruning_iterations=100, pruning_steps=4), 4, 25, 100),
        (GMPConfig(pruning_iterations=100, prune_steps=30), 3, 30, 90),
        (GMPConfig(prune_steps=10, pruning_steps=7, stable_iterations=5), 7, 10, 75),
    ],
)
def test_two_of_iterations_changes_and_distance_say_the_third(config, changes, between, reached):
    schedule = config.resolved(2000)
    assert (schedule.changes, schedule.between, schedule.reached_at) == (changes, between, reached)


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of the two"),
        ({"ratio": 0.5, "threshold": 0.1}, "one of the two"),
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"ratio": -0.5}, "between 0 and 1"),
        ({"ratio": float("nan")}, "between 0 and 1"),
        ({"threshold": 0.0}, "above 0"),
        ({"threshold": float("inf")}, "above 0"),
        ({"threshold": 0.1, "local_sparsity": True}, "local_sparsity"),
        ({"ratio": 0.5, "sparse_block": (0, 4)}, "sparse_block"),
        ({"ratio": 0.5, "sparse_block": (4,)}, "sparse_block"),
        ({"threshold": 1e9}, "the largest is"),
        ({"two_four": True, "ratio": 0.5}, "two_four"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(program, options, said):
    with pytest.raises(ConfigError, match=said):
        slimgraph.sparsify(program, **options)


@pytest.mark.parametrize("skip", ["heads", ["head", "nothing.*"], lambda program: ["heads"]])
def test_a_name_that_selects_nothing_is_refused(program, skip):
    with pytest.raises(UnknownNameError, match="selects no weight"):
        slimgraph.sparsify(program, ratio=0.5, skip=skip)


def test_nothing_left_to_prune_is_told(program):
    with pytest.raises(ProgramError, match="not skipped"):
        slimgraph.sparsify(program, ratio=0.5, skip="*")
    with pytest.raises(ProgramError, match="1×1"):
        slimgraph.sparsify(linear([1.0, 2.0]), ratio=0.5, conv1x1_only=True)
    with pytest.raises(ProgramError, match="no floating-point weights"):
        slimgraph.sparsify(capture(nn.ReLU(), torch.zeros(1, 2)), ratio=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    with pytest.raises(ProgramError, match="'weight' has NaN or infinity"):
        slimgraph.sparsify(linear([1.0, value]), ratio=0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune_steps": 0}, "at least 1"),
        ({"pruning_steps": 0}, "at least 1"),
        ({"stable_iterations": -1}, "at least 0"),
        ({"resume_iteration": -2}, "at least -1"),
        ({"initial_ratio": 1.0}, "below 1"),
        ({"pruning_iterations": 5, "pruning_steps": 10}, "more than the 5"),
        ({"pruning_iterations": 5, "prune_steps": 10}, "more than the 5"),
        ({"pruning_iterations": 100, "pruning_steps": 10, "prune_steps": 3}, "two of the three"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        GMPConfig(**options)


def test_a_training_too_short_for_its_schedule_is_refused_before_it_begins(program):
    config = GMPConfig(pruning_iterations=10, pruning_steps=2)
    pruner = GMPUnstructuredPruner(UnstructuredPruning(ratio=0.5), config)
    with pytest.raises(ConfigError, match="reached after 10 iterations"):
        trained(program, pruner, steps=10)
    with pytest.raises(ConfigError, match="length of the training is not known"):
        fit(
            program,
            lambda: iter(batches()),
            loss="cross_entropy",
            optimizer="SGD",
            epochs=1,
            hooks=[GMPUnstructuredPruner(UnstructuredPruning(ratio=0.5))],
        )


def test_gradual_pruning_needs_a_ratio_above_the_first():
    with pytest.raises(ConfigError, match="threshold"):
        GMPUnstructuredPruner(UnstructuredPruning(threshold=0.1))
    with pytest.raises(ConfigError, match="above the ratio"):
        GMPUnstructuredPruner(UnstructuredPruning(ratio=0.1))
