"""What training makes small: losses by name, and imitation of another model."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from slimgraph.errors import ConfigError, DataError, UnknownNameError, closest
from slimgraph.program.program import Program, require_program
from slimgraph.training.batch import Batch

Loss: TypeAlias = Callable[..., Tensor]
"""Called with the outputs of the program for a batch, and that batch. Returns one number, a mean over the samples.

One with an attribute `taps`, names of values of the program, is given these as a third argument, by name.
"""


def _against_labels(
    outputs: Any, batch: Batch, *, name: str, measure: Callable[[Tensor, Tensor], Tensor], classes: bool
) -> Tensor:
    if batch.labels is None:
        raise DataError(
            f"The loss {name} needs labels, and the data have none. Without labels a program can imitate another: "
            "slimgraph.training.losses.imitate(teacher)."
        )
    named = _by_name(outputs)
    if len(named) != 1 and "logits" not in named:
        raise DataError(
            f"The program has {len(named)} outputs ({', '.join(named)}), and none is named logits, so nothing says "
            f"which one the loss {name} is of. Give a function of outputs and batch."
        )
    scores = named["logits"] if "logits" in named else next(iter(named.values()))
    labels = batch.labels
    if not classes:
        labels = labels.to(scores.dtype)
        if labels.dim() + 1 == scores.dim() and scores.shape[-1] == 1:
            labels = labels[..., None]
    fits = scores.shape[:1] + scores.shape[2:] == labels.shape if classes else scores.shape == labels.shape
    if not fits or (classes and labels.is_floating_point()):
        raise DataError(
            f"The loss {name} does not apply to an output of shape {list(scores.shape)} and labels "
            f"{str(batch.labels.dtype).removeprefix('torch.')}{list(batch.labels.shape)}. Give a function of outputs "
            "and batch."
        )
    return measure(scores, labels)


def _named_loss(name: str, measure: Callable[[Tensor, Tensor], Tensor], *, classes: bool = False) -> tuple[str, Loss]:
    return name, partial(_against_labels, name=name, measure=measure, classes=classes)


LOSSES: Mapping[str, Loss] = MappingProxyType(
    dict(
        (
            _named_loss("cross_entropy", F.cross_entropy, classes=True),
            _named_loss("mse", F.mse_loss),
            _named_loss("l1", F.l1_loss),
            _named_loss("smooth_l1", F.smooth_l1_loss),
            _named_loss("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits),
        )
    )
)
"""The losses that go by a name: PyTorch's own, of the only output, or of the one named logits, and the labels."""


def find_loss(loss: str | Loss) -> Loss:
    """The loss of that name; a function is taken as it is.

    Raises:
        UnknownNameError: there is no loss of that name.
    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError(
            f"There is no loss {loss!r}. {closest(str(loss), LOSSES)} Your own is a function of outputs and batch."
        )
    return LOSSES[loss]


def imitate(teacher: Program, *, temperature: float = 1.0) -> Loss:
    """The loss of a program that should answer as `teacher` does; labels are not looked at.

    Scores of classes, which are an only output (N, classes) or one named logits, are compared by the Kullback–Leibler
    divergence KL(teacher ‖ student), with both softened by the temperature and multiplied by its square; probabilities
    are compared as they are. Other outputs are compared by the mean squared error, divided by the mean square of the
    teacher's. Of several outputs the mean is taken.

    Args:
        teacher: it stays as it is; a copy in evaluation mode answers, on the device of the batches.
        temperature: above 1 it lets less likely classes count more.
    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, arXiv 1503.02531, section 2.
    """
    require_program(teacher)
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; give more than 0.")
    return _Imitation(teacher, temperature)


class _Imitation:
    __name__ = "imitate"

    def __init__(self, teacher: Program, temperature: float) -> None:
        self._teacher = teacher.copy().eval()
        self._temperature = temperature

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        device = next(iter(batch.inputs.values())).device
        if self._teacher.device != device:
            self._teacher.to(device)
        with torch.no_grad():
            wanted = _by_name(self._teacher(**batch.inputs))
        given = _by_name(outputs)
        if [tuple(x.shape) for x in given.values()] != [tuple(x.shape) for x in wanted.values()]:
            told = [", ".join(f"{name}{list(x.shape)}" for name, x in side.items()) for side in (given, wanted)]
            raise DataError(f"The program answers {told[0]}, and the one that it should imitate {told[1]}.")
        terms = []
        for (name, own), expected in zip(given.items(), wanted.values(), strict=True):
            if not own.is_floating_point():
                continue
            if _of_classes(name, given):
                terms.append(_divergence(own, expected, self._temperature))
            else:
                terms.append(F.mse_loss(own, expected) / _mean_square(expected))
        if not terms:
            raise DataError("The program has no output of real numbers that could be compared.")
        return torch.stack(terms).mean()


def imitation_probe(outputs: Any, generator: torch.Generator) -> Tensor:
    """A random number with the curvature of `imitate` in its gradient, where student and teacher are one program.

    There the loss is zero, and so is its gradient. Whatever θ scales or shifts in the program, the second derivative of
    the loss, N times, is the sum over the N samples of the expected (∂probe_n/∂θ)², probe = Σ_n probe_n:

    - of a divergence it is the Fisher information: probe_n = log p(y_n), y_n drawn from the program's own answer;
    - of a mean squared error it is 2 ‖∂output_n/∂θ‖² by its scale: probe_n = √2 Σ ±output_n by the root of that, the
      signs random.

    Args:
        outputs: of the program for a batch.
        generator: on the CPU.
    Sources: Martens, "New insights and perspectives on the natural gradient method", 2014, arXiv 1412.1193, section 5;
    for the signs Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
    """
    given = _by_name(outputs)
    terms = []
    for name, own in given.items():
        if not own.is_floating_point():
            continue
        if _of_classes(name, given):
            logs = own.clamp(min=1e-12).log() if _are_probabilities(own) else F.log_softmax(own, dim=1)
            drawn = torch.multinomial(logs.detach().exp().float().cpu(), 1, generator=generator)
            terms.append(logs.gather(1, drawn.to(own.device)).sum())
        else:
            signs = torch.randint(0, 2, own.shape, generator=generator) * 2 - 1
            size = _mean_square(own.detach()) * own.numel() / max(len(own), 1)
            terms.append((own * signs.to(own)).sum() * (2 / size).sqrt())
    if not terms:
        raise DataError("The program has no output of real numbers that could be compared.")
    return torch.stack(terms).sum() / math.sqrt(len(terms))


def _of_classes(name: str, outputs: Mapping[str, Tensor]) -> bool:
    """Whether an output tells classes apart: (N, classes), and the only one or named logits."""
    own = outputs[name]
    return own.dim() == 2 and own.shape[1] > 1 and (len(outputs) == 1 or name == "logits")


def _mean_square(x: Tensor) -> Tensor:
    return x.square().mean().clamp(min=torch.finfo(x.dtype).tiny)


def _are_probabilities(x: Tensor) -> bool:
    """Whether the model ends in a softmax."""
    return bool((x >= 0).all()) and bool(((x.sum(dim=1) - 1).abs() < 1e-3).all())


def _divergence(own: Tensor, expected: Tensor, temperature: float) -> Tensor:
    if _are_probabilities(expected):
        return F.kl_div(own.clamp(min=1e-12).log(), expected, reduction="batchmean")
    own, expected = (F.log_softmax(scores / temperature, dim=1) for scores in (own, expected))
    return F.kl_div(own, expected, reduction="batchmean", log_target=True) * temperature**2


def _by_name(outputs: Any) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    return dict(outputs) if isinstance(outputs, Mapping) else {f"output_{i}": x for i, x in enumerate(outputs)}
