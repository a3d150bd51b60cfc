"""Rounding of a weight up or down as something that is learned."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.errors import ConfigError
from slimgraph.program.scheme import IntScheme, dequantize, quantize

_STRETCH_HIGH, _STRETCH_LOW = 1.1, -0.1
"""ζ and γ of the paper: the sigmoid reaches 0 and 1 at finite logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealing:
    """How the choice between up and down hardens while it is learned."""

    weight: float = 10.0
    """λ, of the mean over the weights of 1 − |2h − 1|^β, against the reconstruction error over that of rounding to the
    nearest."""
    start: float = 20.0
    """β at the end of the warm-up: only what has nearly decided is drawn to its end."""
    end: float = 2.0
    """β in the last step."""
    warm_up: float = 0.2
    """The part of the steps in which nothing is drawn."""

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.warm_up < 1 or min(self.start, self.end) <= 0:
            raise ConfigError(
                f"{self}: weight is at least 0, start and end are above 0, and warm_up is at least 0 and less than 1."
            )

    def exponent(self, step: int, steps: int) -> float | None:
        """β in a step, along half a cosine; None during the warm-up."""
        first = self.warm_up * steps
        if step < first:
            return None
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * (step - first) / (steps - first))) / 2


class LearnedRounding:
    """The codes of a weight, each between its floor and the next one while it is learned, and one of them in the end.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, arXiv 2004.10568,
    equations 21 to 24.
    """

    def __init__(self, weight: Tensor, scale: Tensor, scheme: IntScheme) -> None:
        """The soft codes begin where the real weight is.

        Args:
            scale: as `IntScheme.parameters` gives it.
        """
        self.scheme, self.scale = scheme, scale
        self._scale = on_grid(torch.ones_like(weight, dtype=scheme.dtype), scale, scheme)  # one for each element
        position = weight.detach() / self._scale
        self._floor = position.floor()
        inside = (position - self._floor - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
        self.logits = inside.logit().requires_grad_()

    def up(self) -> Tensor:
        """h: how far each code is from its floor to the next, 0 to 1."""
        stretched = self.logits.sigmoid() * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW
        return stretched.clamp(0.0, 1.0)

    def soft(self, up: Tensor) -> Tensor:
        """The weight while it is learned."""
        return (self._floor + up).clamp(*self.scheme.code_range) * self._scale

    def codes(self) -> Tensor:
        """The codes that were learned, in the scheme's storage type."""
        nearer = (self.up().detach() >= 0.5).to(self._floor.dtype)
        return (self._floor + nearer).clamp(*self.scheme.code_range).to(self.scheme.dtype)

    def hard(self) -> Tensor:
        """The weight that was learned: scale × code."""
        return on_grid(self.codes(), self.scale, self.scheme)


def undecided(up: Tensor, exponent: float) -> Tensor:
    """Σ 1 − |2h − 1|^β: 0 where every code has decided."""
    return (1 - (2 * up - 1).abs().pow(exponent)).sum()


def on_grid(codes: Tensor, scale: Tensor, scheme: IntScheme) -> Tensor:
    """Real values of the codes of a weight."""
    return dequantize(codes, scale, torch.zeros_like(scale, dtype=torch.int32), scheme)


def nearest(weight: Tensor, scale: Tensor, scheme: IntScheme) -> Tensor:
    """The weight rounded to the nearest codes."""
    return on_grid(quantize(weight, scale, torch.zeros_like(scale, dtype=torch.int32), scheme), scale, scheme)
