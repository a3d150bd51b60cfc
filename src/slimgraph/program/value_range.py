"""Operators that follow the range of a value while a program trains, and remember it when it evaluates.

Each gives the interval of real values that a grid should cover, as a tensor (2,), or (2, channels) where it is taken
along an axis. What is below `bottom` or above `top` counts as lying there: a rectifier that the quantizer performs cuts
it off. The tensors that they remember in are changed in place while `training`, and only read otherwise.
"""

import torch
from torch import Tensor

from slimgraph.program.fake_quantize import define_operator

WINDOW_SIZE = 10_000
MOVING_RATE = 0.9
COLD_SCALE = 0.001
"""The scale before anything was seen, in the documents."""
OUT_THRESHOLD = "out_threshold"
"""Under this name a program's history, and a file, have how large the outputs of operators were in training."""


def _extremes(x: Tensor, bottom: float, top: float) -> Tensor:
    """Lowest and highest value, cut to [bottom, top]."""
    if bottom == 0.0:
        high = x.amax().float()
        low = torch.zeros_like(high)
    else:
        low, high = (extreme.float() for extreme in torch.aminmax(x))
    return torch.stack([low, high]).clamp(bottom, top)


def _magnitude(x: Tensor, bottom: float, top: float) -> Tensor:
    return _extremes(x, bottom, top).abs().amax()


def _around_zero(reach: Tensor, bottom: float, top: float) -> Tensor:
    return torch.stack([-reach, reach]).clamp(bottom, top)


@torch.no_grad()
def _abs_max(x: Tensor, axis: int | None, bottom: float, top: float) -> Tensor:
    if axis is None:
        return _around_zero(_magnitude(x, bottom, top), bottom, top)
    return _around_zero(x.abs().amax([a for a in range(x.dim()) if a != axis]).float(), bottom, top)


@torch.no_grad()
def _min_max(x: Tensor, bottom: float, top: float) -> Tensor:
    return _extremes(x, bottom, top)


@torch.no_grad()
def _range_abs_max(
    x: Tensor, scale: Tensor, window: Tensor, iteration: Tensor, training: bool, bottom: float, top: float
) -> Tensor:
    if training:
        current = _magnitude(x, bottom, top)
        place = iteration.remainder(window.numel()).reshape(1)
        removed = window.index_select(0, place).reshape(())
        window.index_copy_(0, place, current.reshape(1))
        filled = torch.arange(window.numel(), device=window.device) < iteration
        largest = torch.where(filled, window, 0.0).amax()
        kept = torch.where((removed - scale).abs() < 1e-6, largest, scale)
        scale.copy_(torch.where(scale < current, current, kept))
        iteration.add_(1)
    return _around_zero(scale, bottom, top)


@torch.no_grad()
def _moving_average_abs_max(
    x: Tensor, scale: Tensor, accum: Tensor, state: Tensor, training: bool, rate: float, bottom: float, top: float
) -> Tensor:
    if training:
        accum.mul_(rate).add_(_magnitude(x, bottom, top))
        state.mul_(rate).add_(1.0)
        scale.copy_(accum / state)
    return _around_zero(scale, bottom, top)


@torch.no_grad()
def _moving_average_min_max(
    x: Tensor, interval: Tensor, accum: Tensor, state: Tensor, training: bool, rate: float, bottom: float, top: float
) -> Tensor:
    if training:
        accum.mul_(rate).add_(_extremes(x, bottom, top))
        state.mul_(rate).add_(1.0)
        interval.copy_(accum / state)
    return interval.clamp(bottom, top)


@torch.no_grad()
def _norm_gain(weight: Tensor, gamma: Tensor | None, variance: Tensor, eps: float, axis: int) -> Tensor:
    gain = (variance.double() + eps).rsqrt()
    gain = (gain if gamma is None else gain * gamma.double()).float()
    gain = torch.where(gain.abs() < SMALLEST_GAIN, SMALLEST_GAIN, gain)
    return spread_over_weight(gain, weight, axis)


SMALLEST_GAIN = 1e-20
"""Stands for a gain of zero where something is divided by it: such weights have the code 0 and stay zero."""


def spread_over_weight(channels: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A number for each output channel in a shape that broadcasts against a weight, which has them in its axis `axis`.

    Transposed convolutions hold the output channels of one group in axis 1, and the groups one after the other in axis
    0.
    """
    own = weight.shape[axis]
    if axis == 0 or channels.numel() == own:
        return channels.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
    groups = channels.numel() // own
    by_group = channels.reshape(groups, 1, own).expand(groups, weight.shape[0] // groups, own)
    return by_group.reshape(weight.shape[0], own, *[1] * (weight.dim() - 2))


ABS_MAX = define_operator("abs_max(Tensor x, int? axis, float bottom, float top) -> Tensor", _abs_max)
"""Around zero to the largest magnitude of this tensor, or of each index of an axis; nothing is remembered."""

MIN_MAX = define_operator("min_max(Tensor x, float bottom, float top) -> Tensor", _min_max)
"""From the lowest to the highest value of this tensor; nothing is remembered."""

RANGE_ABS_MAX = define_operator(
    "range_abs_max(Tensor x, Tensor(a!) scale, Tensor(b!) window, Tensor(c!) iteration, bool training, float bottom, "
    "float top) -> Tensor",
    _range_abs_max,
)
"""Around zero to the largest magnitude of the last steps, as many as `window` has elements."""

MOVING_AVERAGE_ABS_MAX = define_operator(
    "moving_average_abs_max(Tensor x, Tensor(a!) scale, Tensor(b!) accum, Tensor(c!) state, bool training, float rate, "
    "float bottom, float top) -> Tensor",
    _moving_average_abs_max,
)
"""Around zero to the moving average of the largest magnitudes: accum / state, both multiplied by `rate` a step."""

MOVING_AVERAGE_MIN_MAX = define_operator(
    "moving_average_min_max(Tensor x, Tensor(a!) interval, Tensor(b!) accum, Tensor(c!) state, bool training, "
    "float rate, float bottom, float top) -> Tensor",
    _moving_average_min_max,
)
"""From the moving average of the lowest values to that of the highest; as `MOVING_AVERAGE_ABS_MAX` otherwise."""

NORM_GAIN = define_operator(
    "norm_gain(Tensor weight, Tensor? gamma, Tensor variance, float eps, int axis) -> Tensor", _norm_gain
)
"""What folding a batch norm would multiply a weight by, in a shape that broadcasts against the weight."""

FOLLOWING = (RANGE_ABS_MAX, MOVING_AVERAGE_ABS_MAX, MOVING_AVERAGE_MIN_MAX)
"""Those that remember; their argument `training` is number 4."""

MEASURING = (ABS_MAX, MIN_MAX)
