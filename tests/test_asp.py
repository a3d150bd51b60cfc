"""Two of four along what products sum over, wherever the graph keeps the weight."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slimgraph
from slimgraph.errors import ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.pruning.asp import check_two_four, plan_two_four
from slimgraph.training.loop import fit
from slimgraph.training.masks import KeepMasks


def two_largest(weight_OK):
    """By trying all pairs of each four."""
    kept = torch.zeros_like(weight_OK, dtype=torch.bool)
    for row, start in itertools.product(range(weight_OK.shape[0]), range(0, weight_OK.shape[1], 4)):
        four = weight_OK[row, start : start + 4].abs()
        best = max(itertools.combinations(range(4), 2), key=lambda pair: float(four[list(pair)].sum()))
        kept[row, [start + i for i in best]] = True
    return kept


class Functional(nn.Module):
    """A weight, and what is done with it."""

    def __init__(self, shape, compute):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight)


def by_columns(w):
    return w.T


CASES = {
    # name: shape of the weight, input, computation, and how the weight becomes rows [O, K]
    "linear": ((6, 8), (1, 8), F.linear, lambda w: w),
    "matmul": ((8, 6), (1, 8), torch.matmul, by_columns),
    "matmul, transposed": ((6, 8), (1, 8), lambda x, w: x @ w.t(), lambda w: w),
    "linear, transposed twice": ((6, 8), (1, 8), lambda x, w: F.linear(x, w.permute(1, 0).mT), lambda w: w),
    "weight on the left": ((6, 8), (1, 8, 3), lambda x, w: w @ x, lambda w: w),
    "addmm": ((8, 6), (1, 8), lambda x, w: torch.addmm(torch.zeros(6), x, w), by_columns),
    "reshaped": ((3, 2, 8), (1, 8), lambda x, w: F.linear(x, w.reshape(6, 8)), lambda w: w.reshape(6, 8)),
    "scaled": ((6, 8), (1, 8), lambda x, w: F.linear(x, w * 0.5), lambda w: w),
    "einsum": ((8, 2, 3), (1, 8), lambda x, w: torch.einsum("bk,khd->bhd", x, w), lambda w: w.reshape(8, 6).T),
    "batched": ((2, 8, 3), (1, 2, 1, 8), lambda x, w: x @ w, lambda w: w.mT.reshape(6, 8)),
    "expanded": ((8, 6), (4, 1, 8), lambda x, w: torch.bmm(x, w.expand(4, 8, 6)), by_columns),
    "three of one": ((18, 8), (1, 8), lambda x, w: sum(F.linear(x, part) for part in w.chunk(3)), lambda w: w),
    "used twice": ((8, 8), (1, 8), lambda x, w: F.linear(F.linear(x, w), w), lambda w: w),
    "conv1d": ((6, 8, 3), (1, 8, 5), F.conv1d, lambda w: w.permute(0, 2, 1).reshape(18, 8)),
    "conv2d": ((6, 8, 3, 3), (1, 8, 5, 5), F.conv2d, lambda w: w.permute(0, 2, 3, 1).reshape(54, 8)),
    "conv3d": ((6, 4, 1, 2, 1), (1, 4, 3, 3, 3), F.conv3d, lambda w: w.permute(0, 2, 3, 4, 1).reshape(12, 4)),
    "grouped": (
        (6, 4, 3, 3),
        (1, 8, 5, 5),
        lambda x, w: F.conv2d(x, w, groups=2),
        lambda w: w.permute(0, 2, 3, 1).reshape(54, 4),
    ),
    "transposed convolution": (
        (8, 6, 2, 2),
        (1, 8, 3, 3),
        F.conv_transpose2d,
        lambda w: w.permute(1, 2, 3, 0).reshape(24, 8),
    ),
    "transposed and grouped": (
        (8, 3, 2, 2),
        (1, 8, 3, 3),
        lambda x, w: F.conv_transpose2d(x, w, groups=2),
        lambda w: w.reshape(2, 4, 3, 2, 2).permute(0, 2, 3, 4, 1).reshape(24, 4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_two_largest_of_each_four_stay_along_what_is_summed_over(name):
    shape, input_shape, compute, rows = CASES[name]
    program = capture(Functional(shape, compute), torch.randn(input_shape))
    sparse = slimgraph.sparsify(program, two_four=True)
    dense, found = program.state_dict()["weight"], sparse.state_dict()["weight"]
    assert torch.equal(rows(found), rows(dense) * two_largest(rows(dense)))
    assert check_two_four(sparse).sparse == ("weight",)
    assert check_two_four(program).sparse == ()
    assert check_two_four(program).weights[0].groups == rows(dense).numel() // 4 * (2 if name == "used twice" else 1)


def test_of_equals_the_first_two_stay():
    program = capture(nn.Linear(8, 1, bias=False), torch.zeros(1, 8))
    program.load_state_dict({"weight": torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0]])})
    assert plan_two_four(program).masks.kept["weight"].int().tolist() == [[1, 1, 0, 0, 1, 0, 0, 1]]


def test_recurrent_layers_sum_over_inputs_and_states():
    program = capture(nn.LSTM(8, 4, batch_first=True), torch.zeros(1, 5, 8))
    sparse = slimgraph.sparsify(program, two_four=True)
    assert check_two_four(sparse).sparse == ("weight_ih_l0", "weight_hh_l0")
    weight = program.state_dict()["weight_hh_l0"]
    assert torch.equal(sparse.state_dict()["weight_hh_l0"], weight * two_largest(weight))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.table = nn.Embedding(5, 8)
        self.square = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x, ids):
        y = self.depth(self.stem(x) * self.scale).mean((2, 3)) + self.table(ids)
        return self.head(y @ self.square @ self.square.t())


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    return capture(Mixed().eval(), (torch.randn(1, 3, 5, 5), torch.zeros(1, dtype=torch.int64)))


def test_what_cannot_be_two_of_four_stays_dense_and_is_told_why(mixed):
    plan = plan_two_four(mixed)
    assert list(plan.masks.kept) == ["head.weight"]
    assert {name: reason.split(",")[0] for name, reason in plan.dense.items()} == {
        "stem.weight": "sums over 3",
        "depth.weight": "sums over 1",
        "table.weight": "is a table of which rows are looked up: nothing is summed over",
        "square": "is read along different axes",
        "scale": "is read by mul",
    }
    assert "50.0% zero" in plan.table()
    assert "sums over 3" in plan.table()


def test_what_is_skipped_stays_dense():
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.zeros(1, 8))
    assert plan_two_four(program, skip="1").dense == {"1.weight": "is skipped"}
    with pytest.raises(UnknownNameError, match="selects no weight"):
        plan_two_four(program, skip="2")


def test_a_program_without_any_such_weight_is_refused_with_the_reasons():
    with pytest.raises(ProgramError, match="'weight' sums over 3, which is no multiple of 4"):
        slimgraph.sparsify(capture(nn.Linear(3, 4), torch.zeros(1, 3)), two_four=True)


def test_two_of_four_holds_while_a_program_trains():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)).eval()
    program = capture(net, torch.randn(1, 4, 3, 3))
    masks = plan_two_four(program).masks
    data = [(torch.randn(8, 4, 3, 3), torch.randint(0, 4, (8,))) for _ in range(4)]
    optimizer = ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01})
    fitted = fit(program, data, loss="cross_entropy", optimizer=optimizer, epochs=3, hooks=[KeepMasks(masks)])
    check = check_two_four(fitted.program)
    assert check.sparse == ("0.weight", "4.weight")
    assert [row.split()[-1] for row in check.table().splitlines()[2:]] == ["yes", "yes"]


def test_integer_weights_are_judged_by_the_numbers_that_they_stand_for():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), torch.zeros(1, 4, 5, 5))
    batches = [torch.randn(4, 4, 5, 5)]
    sparse = slimgraph.quantize(slimgraph.sparsify(program, two_four=True), calibration=batches)
    assert check_two_four(sparse).sparse == ("0.weight", "2.weight")
    dense = slimgraph.quantize(program, calibration=batches)
    assert check_two_four(dense).sparse == ()
    with pytest.raises(ProgramError, match="Prune the float one"):
        slimgraph.prune(dense)
