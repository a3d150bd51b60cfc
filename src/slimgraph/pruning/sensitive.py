"""From what the loss of each group costs to how much of each goes: the same loss everywhere."""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import numpy as np

_ROUNDING = 1e-9
"""What a number that should be 0 may be after a fit."""

Losses: TypeAlias = Mapping[str, Mapping[float, float]]
"""What is lost, by group and by the part of it that is gone."""

LossRule: TypeAlias = Literal["interpolate", "cubic"]
"""How a group's ratio follows from a loss: between the points that were measured, or on a curve through them."""

_ANCHORS = 5
"""Points (0, 0) that a curve is fitted to besides those that were measured: where nothing goes, nothing is lost."""


def step_ratio(target: float, num_steps: int) -> float:
    """What each of several equal steps removes of what is there, so that together they remove the target.

    >>> round(step_ratio(0.5, 3), 4)
    0.2063
    """
    return 1 - math.pow(1 - target, 1 / num_steps)


def ratios_by_loss(losses: Losses, level: float) -> dict[str, float]:
    """For each group the largest ratio that loses no more than `level`, interpolated towards the next point.

    Nothing is known below the first point: a group that loses more there stays whole. Behind the last point nothing is
    known either, and the ratio is that of the last point.

    >>> ratios_by_loss({"conv": {0.1: 0.0, 0.2: 0.05, 0.3: 0.2}}, 0.125)
    {'conv': 0.25}
    """
    return {name: _interpolated(sorted(points.items()), level) for name, points in losses.items()}


def _interpolated(points: list[tuple[float, float]], level: float) -> float:
    within = [number for number, (_, loss) in enumerate(points) if loss <= level]
    if not within:
        return 0.0
    last = within[-1]
    ratio, loss = points[last]
    if last + 1 == len(points):
        return ratio
    next_ratio, next_loss = points[last + 1]
    return round(ratio + (level - loss) * (next_ratio - ratio) / (next_loss - loss), 12)


def ratios_by_cubic(losses: Losses, level: float) -> dict[str, float]:
    """For each group the least ratio at which a cubic through its points reaches `level`; no more than was measured.

    The cubic is the one with the least squares at the points and at five times (0, 0).

    >>> ratios_by_cubic({"conv": {0.2: 0.04, 0.4: 0.16, 0.6: 0.36, 0.8: 0.64}}, 0.25)
    {'conv': 0.5}
    """
    return {name: _reached(points, level) for name, points in losses.items()}


def _reached(points: Mapping[float, float], level: float) -> float:
    x = np.array([0.0] * _ANCHORS + list(points))
    y = np.array([0.0] * _ANCHORS + list(points.values()))
    # Of fewer points than coefficients the smallest coefficients that go through them.
    cubic = np.linalg.lstsq(x[:, None] ** np.arange(4), y, rcond=None)[0]
    largest = max(points)
    if cubic[0] > level + _ROUNDING:
        return 0.0
    roots = np.roots((cubic - np.array([level, 0, 0, 0]))[::-1])
    real = [float(root.real) for root in roots if abs(root.imag) < _ROUNDING < root.real < 1]
    return round(min([*real, largest]), 12)


_RULES = {"interpolate": ratios_by_loss, "cubic": ratios_by_cubic}


def ratios_at(losses: Losses, level: float, rule: LossRule) -> dict[str, float]:
    """The ratio of each group at a loss level, by one of the rules."""
    return _RULES[rule](losses, level)


def largest_loss(losses: Losses) -> float:
    """The greatest loss that was measured; at this level every group is as small as it was tried."""
    return max((loss for points in losses.values() for loss in points.values()), default=-math.inf)
