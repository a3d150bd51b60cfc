"""How far the grid of a weight reaches so that rounding to it loses the least."""

from dataclasses import replace

import torch
from torch import Tensor

import slimgraph.program.edit as edit
from slimgraph.program.program import Program
from slimgraph.program.scheme import IntScheme, rows_of
from slimgraph.quantization.plan import QuantizationPlan

NARROW_BITS = 6
"""Up to here clipping the largest weights pays; with more bits the largest magnitude is the best reach, or nearly."""

_COARSE = 32
_FINE = 16
_LEAST = 0.15
"""The part of the largest magnitude that is tried last: with 2 bits and long tails the best is about a fifth."""

_CHUNK = 2**22
"""Elements that are rounded at once."""


def best_reach(weight: Tensor, scheme: IntScheme) -> tuple[float, ...]:
    """The largest magnitude that the grid should cover, for the tensor, or for each channel, or for each of its groups.

    Of 32 parts of the largest magnitude, down to 15 % of it, and of 16 around the best of these, it takes the one with
    the least squared rounding error; the largest magnitude itself is among them, so that no channel does worse.

    Args:
        weight: real numbers, of any shape.
        scheme: a symmetric grid.
    """
    rows_CK = rows_of(weight.detach().float(), scheme)  # C = channels, or groups of them; K = their elements
    largest_C = rows_CK.abs().amax(dim=1)
    parts_T = torch.linspace(1.0, _LEAST, _COARSE, dtype=torch.float64)  # T = those that are tried
    error_C, best_C = _tried(rows_CK, largest_C, parts_T[:, None].expand(-1, len(rows_CK)), scheme)
    step = (1.0 - _LEAST) / (_COARSE - 1)
    around_T = torch.linspace(-step, step, _FINE, dtype=torch.float64)
    finer_error_C, finer_C = _tried(rows_CK, largest_C, (best_C + around_T[:, None]).clamp(_LEAST, 1.0), scheme)
    chosen_C = torch.where(finer_error_C < error_C, finer_C, best_C)
    return tuple((chosen_C * largest_C.double()).tolist())


def _tried(rows_CK: Tensor, largest_C: Tensor, parts_TC: Tensor, scheme: IntScheme) -> tuple[Tensor, Tensor]:
    """The least error of each channel and the part of its largest magnitude that gave it; the larger one of equals."""
    first, last = scheme.code_range
    error_C = torch.full((len(rows_CK),), torch.inf, dtype=torch.float64)
    best_C = torch.ones(len(rows_CK), dtype=torch.float64)
    channels = max(1, _CHUNK // max(1, rows_CK.shape[1]))
    for start in range(0, len(rows_CK), channels):
        here = slice(start, start + channels)
        rows = rows_CK[here]
        for part_C in parts_TC[:, here].to(rows.device):
            reach = part_C * largest_C[here].double()
            scale = scheme.parameters(-reach, reach)[0][:, None]
            codes = (rows / scale).round_().clamp_(first, last)
            error = codes.mul_(scale).sub_(rows).square_().sum(dim=1, dtype=torch.float64).cpu()
            better = error < error_C[here]
            error_C[here] = torch.where(better, error, error_C[here])
            best_C[here] = torch.where(better, part_C.cpu(), best_C[here])
    return error_C, best_C


def with_best_reach(program: Program, plan: QuantizationPlan, *, most_bits: int = NARROW_BITS) -> QuantizationPlan:
    """The plan with the best reach for each weight of at most so many bits that has none yet.

    Args:
        program: the float program that the plan speaks of.
    """
    found = {
        weight.value: best_reach(edit.tensor_named(program.graph_module, weight.weight), weight.scheme)
        for weight in plan.weights
        if weight.scheme.bits <= most_bits and weight.value not in plan.weight_reach
    }
    return replace(plan, weight_reach={**plan.weight_reach, **found})
