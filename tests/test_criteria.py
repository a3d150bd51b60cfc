"""Scores of indices, by hand and by their laws."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError, DataError, ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.pruning.axes import Atom, Cat, Prod
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.slices import owners, rows_of
from slimgraph.training.losses import imitate


class Two(nn.Module):
    """Three hidden numbers between two inputs and one output: h = W x, y = v · h."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.a.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 1.0]]))
        self.b.weight = nn.Parameter(torch.tensor([[0.0, 2.0, -1.0]]))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.fixture(scope="module")
def two():
    program = capture(Two().eval(), torch.zeros(1, 2))
    return program, find_groups(program)


def scores(two, criterion, **options):
    (found,) = score_groups(*two, criterion, **options).values()
    return found


def proportional(found, wanted):
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found, wanted / wanted.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("criterion", "master", "whole"),
    [
        ("l1_norm", [7.0, 1.0, 2.0], [7.0, 3.0, 3.0]),
        ("l2_norm", [5.0, 1.0, 2**0.5], [5.0, 5**0.5, 3**0.5]),
        # Distances of (3, 4), (0, 1), (-1, 1): √18, 5 and 1; with v as a third coordinate √22, √26 and √10.
        (
            "geometry_median",
            [18**0.5 + 5, 18**0.5 + 1, 6.0],
            [22**0.5 + 26**0.5, 22**0.5 + 10**0.5, 26**0.5 + 10**0.5],
        ),
    ],
)
def test_weights_are_judged_as_one_vector_for_each_index(two, criterion, master, whole):
    proportional(scores(two, criterion, master=True), master)
    proportional(scores(two, criterion), whole)


def test_the_mean_score_of_a_group_is_one_so_that_groups_can_be_ranked_together(two):
    assert float(scores(two, "l1_norm").mean()) == pytest.approx(1)


def test_taylor_is_the_square_of_the_first_order_change_of_the_loss(two):
    # The loss is the mean of y = v · W x; an index contributes v_i (W x)_i twice: once through W, once through v.
    batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])]
    found = scores(two, "taylor", data=batches, loss=lambda outputs, batch: outputs.mean())
    hidden = [torch.tensor([3.0, 0.0, -1.0]), torch.tensor([4.0 + 7.0, 1.0 + 1.0, 1.0 + 0.0]) / 2]
    wanted = sum((2 * torch.tensor([0.0, 2.0, -1.0]) * h).square() for h in hidden)
    torch.testing.assert_close(found, wanted.double())


def test_taylor_averages_the_gradient_within_a_batch(two):
    # The third index adds 1 to the loss of one sample, counted in two tensors, and takes 1 from that of the other.
    samples = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mean = partial(scores, two, "taylor", loss=lambda outputs, batch: outputs.mean())
    assert mean(data=[samples])[2] == 0
    assert mean(data=samples[:, None])[2] == 2 * 2.0**2


def test_taylor_without_a_loss_asks_how_far_the_outputs_move(two):
    one = [torch.tensor([[1.0, 0.0]])]
    torch.testing.assert_close(scores(two, "taylor", data=one), torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64))


def test_taylor_with_labels(two):
    data = [(torch.randn(4, 2), torch.randn(4, 1)) for _ in range(3)]
    found = scores(two, "taylor", data=data, loss="mse")
    assert found[1] > found[0] == 0  # the output does not read the first
    assert torch.equal(found, scores(two, "taylor", data=data, loss="mse"))


def test_a_loss_without_a_gradient_is_refused(two):
    with pytest.raises(DataError, match="its own teacher"):
        scores(two, "taylor", data=[torch.ones(1, 2)], loss=imitate(two[0]))


def test_the_program_and_its_gradients_stay_as_they_are(two):
    scores(two, "taylor", data=[torch.ones(1, 2)])
    assert all(p.grad is None for p in two[0].parameters())


def test_random_scores_follow_the_seed(two):
    assert torch.equal(scores(two, "random", seed=3), scores(two, "random", seed=3))
    assert not torch.equal(scores(two, "random", seed=3), scores(two, "random", seed=4))


def test_a_function_of_the_rows(two):
    def last(group, rows):
        assert {place: matrix.shape for place, matrix in rows.items()} == {"a.weight:0": (3, 2), "b.weight:1": (3, 1)}
        return rows["b.weight:1"][:, 0] + 1

    proportional(scores(two, last), [1.0, 3.0, 0.0])
    with pytest.raises(ConfigError, match=r"scores of shape \[2\]"):
        scores(two, lambda group, rows: torch.zeros(2))
    with pytest.raises(ConfigError, match="type NoneType"):
        scores(two, lambda group, rows: None)
    with pytest.raises(ConfigError, match="not finite"):
        scores(two, lambda group, rows: torch.full((3,), torch.nan))


def test_bn_scale_is_the_scale_of_the_norm_behind():
    module = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1))
    module[1].weight = nn.Parameter(torch.tensor([0.5, -2.0, 0.1]))
    program = capture(module.eval(), torch.zeros(1, 1, 4, 4))
    groups = find_groups(program)
    normed = dataclasses.replace(groups, groups=groups.groups[:1])
    proportional(score_groups(program, normed, "bn_scale")["0.weight:0"], [0.5, 2.0, 0.1])
    with pytest.raises(ProgramError, match=r"none belongs to the group '3\.weight:0'"):
        score_groups(program, groups, "bn_scale")


def test_wrong_requests_say_what_there_is(two):
    with pytest.raises(UnknownNameError, match="l1_norm"):
        scores(two, "l1_nrm")
    with pytest.raises(ConfigError, match="give data="):
        scores(two, "taylor")
    with pytest.raises(ConfigError, match="no use for one"):
        scores(two, "l1_norm", loss="mse")
    with pytest.raises(DataError, match="no batch"):
        scores(two, "taylor", data=[])


def test_places_of_an_axis_that_go_with_an_index():
    a, b = Atom(2), Atom(3)
    assert owners(Prod((a, b)), b).tolist() == [0, 1, 2, 0, 1, 2]
    assert owners(Prod((a, b)), a).tolist() == [0, 0, 0, 1, 1, 1]
    assert owners(Cat((b, a, Prod((a, a)))), a).tolist() == [-1, -1, -1, 0, 1, 0, 0, 1, 1]
    tensor = torch.arange(12).reshape(2, 6)
    assert rows_of(tensor, 1, owners(Prod((a, b)), b)).tolist() == [[0, 6, 3, 9], [1, 7, 4, 10], [2, 8, 5, 11]]


def test_all_factors_of_a_fused_axis_are_judged_by_all_their_elements():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 3 * 2 * 5), nn.Linear(10, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(-1, 6, 3, 2, 5).permute(2, 0, 3, 1, 4).unbind(0)
            x = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(x.transpose(1, 2).reshape(-1, 6, 10))

    module = Heads().eval()
    with torch.no_grad():
        module.qkv.weight.view(3, 2, 5, 4)[:, 1] = 0
        module.qkv.bias.view(3, 2, 5)[:, 1] = 0
        module.out.weight.view(3, 2, 5)[:, 1] = 0
    program = capture(module, torch.zeros(1, 6, 4))
    groups = find_groups(program)
    found = {groups[name].size: score for name, score in score_groups(program, groups).items()}
    assert found[2].tolist() == [2.0, 0.0]
    assert len(found[5]) == 5
