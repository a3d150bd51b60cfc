"""Losses of distillation: answers by hand, formulas spelled out slowly, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slimgraph.distillation.losses import DISTILLATION_LOSSES, find_distillation_loss
from slimgraph.errors import ConfigError, UnknownNameError

TWO = {"student": torch.tensor([[2.0, 0.0, -1.0]]), "teacher": torch.tensor([[1.0, 1.0, -2.0]])}


def softmax(scores, temperature=1.0):
    exponents = np.exp(np.asarray(scores, dtype=np.float64) / temperature)
    return exponents / exponents.sum(axis=-1, keepdims=True)


def scores(seed, shape=(5, 7)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("size", [1, 3, 8])
def test_flow_of_maps_of_ones_is_one_whatever_their_size(size):
    ones, zeros = torch.ones(2, 1, size, size), torch.zeros(2, 1, 4, 4)
    assert float(DISTILLATION_LOSSES["fsp"](ones, ones, zeros, zeros)) == 1.0
    assert float(DISTILLATION_LOSSES["fsp"](ones, ones, torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4))) == 0.0


def test_flow_between_values_with_different_channels_by_a_slow_loop():
    first, last = scores(0, (2, 3, 4, 4)), scores(1, (2, 5, 4, 4))
    other_first, other_last = scores(2, (2, 3, 2, 2)), scores(3, (2, 5, 2, 2))
    total = 0.0
    for n in range(2):
        for i in range(3):
            for j in range(5):
                own = float((first[n, i] * last[n, j]).sum()) / 16
                expected = float((other_first[n, i] * other_last[n, j]).sum()) / 4
                total += (own - expected) ** 2
    assert math.isclose(float(DISTILLATION_LOSSES["fsp"](first, last, other_first, other_last)), total / 30)


def test_l2_is_a_mean_square():
    assert float(DISTILLATION_LOSSES["l2"](torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))) == 2.0


def test_soft_labels_have_a_temperature_on_each_side():
    given = DISTILLATION_LOSSES["soft_label"](
        TWO["student"], TWO["teacher"], student_temperature=2.0, teacher_temperature=3.0
    )
    expected = -(softmax(TWO["teacher"], 3.0) * np.log(softmax(TWO["student"], 2.0))).sum()
    assert math.isclose(float(given), expected, rel_tol=1e-6)


def test_divergence_is_zero_for_equal_classes_and_grows_with_the_squared_temperature():
    assert abs(float(DISTILLATION_LOSSES["kl"](scores(0), scores(0) + 5.0))) < 1e-12
    warm, p, q = 4.0, softmax(scores(1), 4.0), softmax(scores(0), 4.0)
    expected = 16 * (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    assert math.isclose(float(DISTILLATION_LOSSES["kl"](scores(0), scores(1), temperature=warm)), expected)


def test_standardized_scores_need_not_have_the_size_of_the_teachers():
    for name in ("soft_label", "kl", "dkd"):
        loss = DISTILLATION_LOSSES[name]
        same = loss(scores(1) * 10 + 3, scores(1), standardize=True)
        assert float(same) <= float(loss(scores(1), scores(1), standardize=True)) + 1e-9
        assert float(loss(scores(1) * 10 + 3, scores(1))) > float(loss(scores(1), scores(1))) + 0.01


def test_decoupled_parts_are_of_the_right_class_and_of_the_rest():
    own, expected, labels, warm = scores(0), scores(1), torch.tensor([0, 3, 6, 2, 2]), 2.0
    right, rest = 0.0, 0.0
    for q, p, label in zip(softmax(own, warm), softmax(expected, warm), labels, strict=True):
        b_p, b_q = [np.array([x[label], 1 - x[label]]) for x in (p, q)]
        right += (b_p * np.log(b_p / b_q)).sum() / 5
        r_p, r_q = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
        rest += (r_p * np.log(r_p / r_q)).sum() / 5
    given = DISTILLATION_LOSSES["dkd"](own, expected, labels, temperature=warm, alpha=0.5, beta=8.0)
    assert math.isclose(float(given), (0.5 * right + 8.0 * rest) * 4, rel_tol=1e-9)
    guessed = DISTILLATION_LOSSES["dkd"](own, expected, temperature=warm)
    assert float(guessed) == float(DISTILLATION_LOSSES["dkd"](own, expected, expected.argmax(1), temperature=warm))


def test_one_unlikely_class_keeps_decoupled_distillation_finite():
    own = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    loss = DISTILLATION_LOSSES["dkd"](own, torch.tensor([[-60.0, 60.0, 0.0]]))
    loss.backward()
    assert bool(own.grad.isfinite().all())
    assert math.isfinite(float(loss.detach()))


def test_normalized_scores_are_given_the_teachers_size():
    own, expected = scores(0), scores(1)
    size = expected.std(dim=1, keepdim=True)
    normal = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0) * size for x in (own, expected)]
    slow = -(softmax(normal[1]) * np.log(softmax(normal[0]))).sum(axis=1).mean()
    assert math.isclose(float(DISTILLATION_LOSSES["skd"](own, expected)), slow, rel_tol=1e-6)
    assert float(DISTILLATION_LOSSES["skd"](own, expected, multiplier=1.0)) != float(
        DISTILLATION_LOSSES["skd"](own, expected)
    )


def test_the_cosine_does_not_see_sizes():
    assert abs(float(DISTILLATION_LOSSES["cosine"](scores(0) * 9, scores(0)))) < 1e-12
    assert float(DISTILLATION_LOSSES["cosine"](torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))) == 1.0
    assert float(DISTILLATION_LOSSES["cosine"](torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]))) == 2.0


def test_attention_may_have_other_channels_and_any_size_of_values():
    value = scores(0, (2, 4, 3, 3))
    assert float(DISTILLATION_LOSSES["attention_transfer"](value.repeat(1, 2, 1, 1) * 7, value)) < 1e-20
    own = torch.tensor([[[[3.0, 4.0]]]])  # squares 9 and 16 have the norm √337
    expected = torch.tensor([[[[1.0, 0.0]]]])
    by_hand = ((9 / 337**0.5 - 1) ** 2 + (16 / 337**0.5) ** 2) / 2
    assert math.isclose(float(DISTILLATION_LOSSES["attention_transfer"](own, expected)), by_hand, rel_tol=1e-6)


def test_relations_are_correlations_of_rows_and_of_columns():
    own, expected = scores(0), scores(1)
    p, q = softmax(expected, 2.0), softmax(own, 2.0)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    given = DISTILLATION_LOSSES["dist"](own, expected, beta=2.0, gamma=3.0, temperature=2.0)
    assert math.isclose(float(given), 4 * (2 * rows + 3 * columns), rel_tol=1e-9)


@pytest.mark.parametrize("name", sorted(set(DISTILLATION_LOSSES) - {"fsp"}))
def test_a_student_that_follows_the_gradient_comes_closer(name):
    shape = (6, 4, 3, 3) if name == "attention_transfer" else (6, 5)
    own, expected = scores(0, shape).requires_grad_(), scores(1, shape)
    before = DISTILLATION_LOSSES[name](own, expected)
    before.backward()
    after = DISTILLATION_LOSSES[name](own.detach() - 0.01 * own.grad, expected)
    assert float(after) < float(before.detach())


@pytest.mark.parametrize(
    ("name", "shapes", "told"),
    [
        ("l2", [(2, 3), (2, 4)], r"\[2, 3\].*\[2, 4\].*adapter"),
        ("kl", [(2, 3), (2, 4)], r"\[2, 3\].*\[2, 4\]"),
        ("cosine", [(2, 3), (3, 3)], r"\[2, 3\].*\[3, 3\]"),
        ("dkd", [(2, 3, 4), (2, 3, 4)], r"\(N, classes\), not \[2, 3, 4\]"),
        ("dist", [(2, 3, 4), (2, 3, 4)], r"\(N, classes\), not \[2, 3, 4\]"),
        ("attention_transfer", [(2, 3, 4, 4), (2, 3, 2, 2)], r"\[2, 3, 4, 4\] and \[2, 3, 2, 2\]"),
        ("fsp", [(2, 3, 4, 4), (2, 3, 2, 2)] * 2, r"\[2, 3, 4, 4\] and \[2, 3, 2, 2\]"),
        ("fsp", [(2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 4), (2, 5, 4, 4)], "student has 3 and 3, the teacher 3 and 5"),
    ],
)
def test_shapes_that_do_not_fit_are_told(name, shapes, told):
    with pytest.raises(ConfigError, match=told):
        DISTILLATION_LOSSES[name](*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_are_above_zero(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        DISTILLATION_LOSSES["kl"](scores(0), scores(1), temperature=temperature)


def test_losses_go_by_name_or_are_functions():
    assert find_distillation_loss(F.l1_loss) is F.l1_loss
    with pytest.raises(UnknownNameError, match="soft_label"):
        find_distillation_loss("softlabel")
