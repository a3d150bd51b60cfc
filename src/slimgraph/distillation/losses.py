"""How far values of a student are from those of its teacher.

Each loss is a function of the student's values, then the teacher's, and returns one number, a mean over the samples.
The teacher's are constants: no gradient flows into them.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from slimgraph.errors import ConfigError, UnknownNameError, closest

DistillationLoss: TypeAlias = Callable[..., Tensor]
"""A function of one or several values of the student and as many of the teacher, in this order."""


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared differences; both have one shape.

    Source: Romero et al., "FitNets: hints for thin deep nets", 2015, arXiv 1412.6550, equation 3, as a mean.
    """
    _same_shapes(student, teacher)
    return F.mse_loss(student, teacher)


def fsp(student_first: Tensor, student_last: Tensor, teacher_first: Tensor, teacher_last: Tensor) -> Tensor:
    """Mean squared difference of the flow matrices G = X Yᵀ / (H W) between two values of each network.

    Args:
        student_first, student_last: (N, C₁, H, W) and (N, C₂, H, W): the channels may differ, not the size.
        teacher_first, teacher_last: with the student's C₁ and C₂, of any size that both share.
    Source: Yim et al., "A gift from knowledge distillation", CVPR 2017, equations 1 and 2.
    """
    own, expected = _flow(student_first, student_last), _flow(teacher_first, teacher_last)
    if own.shape != expected.shape:
        raise ConfigError(
            f"Flow matrices compare channels of both ends: the student has {' and '.join(map(str, own.shape[1:]))}, "
            f"the teacher {' and '.join(map(str, expected.shape[1:]))}. Take values with as many, or an adapter."
        )
    return F.mse_loss(own, expected)


def _flow(first: Tensor, last: Tensor) -> Tensor:
    if first.dim() != 4 or last.dim() != 4 or first.shape[2:] != last.shape[2:]:
        raise ConfigError(
            f"A flow matrix is of two values of shape (N, channels, H, W) with one H and W, not of {list(first.shape)} "
            f"and {list(last.shape)}."
        )
    return torch.einsum("nchw,ndhw->ncd", first, last) / (first.shape[2] * first.shape[3])


def soft_label(
    student: Tensor,
    teacher: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Cross entropy of the student's classes to the teacher's, −Σ softmax(t / Tₜ) log softmax(s / Tₛ).

    Args:
        student, teacher: scores before softmax, classes along the last axis.
        student_temperature, teacher_temperature: above 1 they let less likely classes count more.
        standardize: bring scores to mean 0 and deviation 1 first, so that the student need not match their size: Sun et
            al., "Logit standardization in knowledge distillation", CVPR 2024, arXiv 2403.01427.
    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, arXiv 1503.02531, section 2. The
    gradient is not multiplied by the squared temperature; `kl` is.
    """
    _scores(student, teacher, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    expected = torch.softmax(teacher / teacher_temperature, dim=-1)
    return -(expected * F.log_softmax(student / student_temperature, dim=-1)).sum(dim=-1).mean()


def kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, standardize: bool = False) -> Tensor:
    """Kullback–Leibler divergence KL(teacher ‖ student) of the softened classes, times the squared temperature.

    Args:
        student, teacher, standardize: as for `soft_label`.
    Source: as for `soft_label`.
    """
    _scores(student, teacher, temperature=temperature)
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    own, expected = (F.log_softmax(scores / temperature, dim=-1) for scores in (student, teacher))
    return _divergence(own, expected) * temperature**2


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Decoupled distillation: the right class against the rest, times alpha, and the rest among itself, times beta.

    Args:
        student, teacher, standardize: as for `soft_label`, of shape (N, classes).
        labels: the right classes, (N,); without them they are those that the teacher finds most likely.
        temperature, alpha, beta: the paper takes 4, 1 and 8 on CIFAR-100.
    Source: Zhao et al., "Decoupled knowledge distillation", CVPR 2022, arXiv 2203.08679, equation 7.
    """
    _scores(student, teacher, temperature=temperature)
    if student.dim() != 2:
        raise ConfigError(f"Decoupled distillation is of scores of shape (N, classes), not {list(student.shape)}.")
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    if labels is None or labels.shape != student.shape[:1] or labels.is_floating_point():
        labels = teacher.argmax(dim=1)
    own, expected = (F.log_softmax(scores / temperature, dim=1) for scores in (student, teacher))
    right = F.one_hot(labels, student.shape[1]).bool()
    binary = [torch.stack([logs[right], _log_sum(logs, ~right)], dim=1) for logs in (own, expected)]
    rest = [F.log_softmax(logs.masked_fill(right, -1e4), dim=1) for logs in (own, expected)]
    return (alpha * _divergence(*binary) + beta * _divergence(*rest)) * temperature**2


def skd(student: Tensor, teacher: Tensor, *, multiplier: float | None = None) -> Tensor:
    """Cross entropy of classes whose scores were normalized, and then given the size of the teacher's.

    Args:
        student, teacher: scores before softmax, classes along the last axis.
        multiplier: the deviation that both are given; None is that of the teacher's scores, sample by sample.
    Source: the loss `skd` of PaddleSlim.
    """
    _scores(student, teacher)
    size = teacher.std(dim=-1, keepdim=True) if multiplier is None else multiplier
    own, expected = (F.layer_norm(scores, scores.shape[-1:], eps=1e-7) * size for scores in (student, teacher))
    return soft_label(own, expected)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − the cosine of the angle between the values of a sample; their sizes do not count. Both have one shape."""
    _same_shapes(student, teacher)
    return 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1).mean()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of normalized maps of attention, the mean over the channels of the squares.

    Args:
        student, teacher: (N, channels, …) with the same axes behind the channels, which may differ in number.
    Source: Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017, arXiv 1612.03928, section 3.1; of
    the squared distance the mean is taken.
    """
    if student.dim() < 3 or student.shape[2:] != teacher.shape[2:]:
        raise ConfigError(
            "Maps of attention are of values (N, channels, …) with the same axes behind the channels, not of "
            f"{list(student.shape)} and {list(teacher.shape)}."
        )
    own, expected = (F.normalize(value.square().mean(dim=1).flatten(1), dim=1) for value in (student, teacher))
    return F.mse_loss(own, expected)


def dist(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """1 − Pearson's correlation of the probabilities, over the classes of a sample and over the samples of a class.

    Args:
        student, teacher: scores before softmax, (N, classes).
        beta, gamma: weights of the two.
    Source: Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022, arXiv 2205.10536, equation 11.
    """
    _scores(student, teacher, temperature=temperature)
    if student.dim() != 2:
        raise ConfigError(f"DIST is of scores of shape (N, classes), not {list(student.shape)}.")
    own, expected = (torch.softmax(scores / temperature, dim=1) for scores in (student, teacher))
    relations = beta * _unrelated(own, expected) + gamma * _unrelated(own.T, expected.T)
    return relations * temperature**2


def _unrelated(x: Tensor, y: Tensor) -> Tensor:
    """1 − Pearson's correlation of rows, their mean."""
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    return 1 - F.cosine_similarity(x, y, dim=1).mean()


DISTILLATION_LOSSES: Mapping[str, DistillationLoss] = MappingProxyType(
    {
        "fsp": fsp,
        "l2": l2,
        "soft_label": soft_label,
        "kl": kl,
        "dkd": dkd,
        "skd": skd,
        "cosine": cosine,
        "attention_transfer": attention_transfer,
        "dist": dist,
    }
)
"""The losses that go by a name."""

WITH_LABELS: frozenset[DistillationLoss] = frozenset({dkd})
"""Those that also take `labels`."""


def find_distillation_loss(loss: str | DistillationLoss) -> DistillationLoss:
    """The loss of that name; a function is taken as it is.

    Raises:
        UnknownNameError: there is no loss of that name.
    """
    if callable(loss):
        return loss
    if loss not in DISTILLATION_LOSSES:
        raise UnknownNameError(
            f"There is no distillation loss {loss!r}. {closest(str(loss), DISTILLATION_LOSSES)} Your own is a function "
            "of the student's values and the teacher's."
        )
    return DISTILLATION_LOSSES[loss]


def _same_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"The student's value has shape {list(student.shape)}, the teacher's {list(teacher.shape)}. Take values of "
            "one shape; an adapter makes up for a different number of channels."
        )


def _scores(student: Tensor, teacher: Tensor, **temperatures: float) -> None:
    _same_shapes(student, teacher)
    for name, temperature in temperatures.items():
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigError(f"{name} is {temperature}; give more than 0.")


def _standardized(scores: Tensor) -> Tensor:
    deviation = scores.std(dim=-1, keepdim=True, correction=0).clamp(min=1e-7)
    return (scores - scores.mean(dim=-1, keepdim=True)) / deviation


def _divergence(own: Tensor, expected: Tensor) -> Tensor:
    """KL(expected ‖ own) of logarithms of probabilities along the last axis, a mean over all others."""
    return F.kl_div(own, expected, reduction="none", log_target=True).sum(dim=-1).mean()


def _log_sum(logs: Tensor, chosen: Tensor) -> Tensor:
    return logs.masked_fill(~chosen, -math.inf).logsumexp(dim=1)
