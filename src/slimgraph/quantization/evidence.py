"""What a quantizer meets: the numbers from which the cause of its error is told."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

import slimgraph.deploy.targets as kinds
import slimgraph.program.edit as edit
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.program.scheme import IntScheme, rows_of
from slimgraph.quantization.apply import weight_grid
from slimgraph.quantization.calibration import observe
from slimgraph.quantization.channel_links import channel_links
from slimgraph.quantization.density import Density, Floats
from slimgraph.quantization.operators import WEIGHT_AXIS, kind_of
from slimgraph.quantization.plan import ActivationQuantizer, QuantizationPlan, WeightQuantizer
from slimgraph.quantization.ranges import RANGE_ALGORITHMS
from slimgraph.quantization.rounding_error import rounded_moments
from slimgraph.quantization.statistics import ValueStatistics


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Spread:
    """How large a value is, channel by channel; float64, shape (channels,)."""

    low: Floats
    high: Floats
    rms: Floats
    zeros: float
    """Part of all elements that are zero."""

    @property
    def reach(self) -> Floats:
        """The largest magnitude."""
        return np.maximum(-self.low, self.high)


@dataclass(frozen=True, eq=False, kw_only=True)
class ActivationEvidence:
    """A quantized value beside its grid."""

    scheme: IntScheme
    scale: float
    zero_point: int
    spread: Spread | None
    """None where the value has no axis of channels whose size stays."""
    density: Density | None
    """None where the range is taken at inference."""
    parts: Mapping[str, tuple[float, float]]
    """Lowest and highest number of each value that is concatenated or summed here."""
    operator: str | None
    """Kind of the operator that computes the value."""
    can_be_scaled: bool
    """Whether its channels may be divided by numbers that the weights behind are multiplied by."""
    ranges: Callable[[], Mapping[str, tuple[float, float]]]
    """The range that each algorithm would choose."""

    @cached_property
    def grid(self) -> tuple[float, float]:
        """Lowest and highest real number that has a code."""
        first, last = self.scheme.code_range
        return ((first - self.zero_point) * self.scale, (last - self.zero_point) * self.scale)

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Lowest and highest element."""
        if self.density is not None:
            return float(self.density.edges[0]), float(self.density.edges[-1])
        if self.spread is not None:
            return float(self.spread.low.min()), float(self.spread.high.max())
        return self.grid

    @property
    def is_constant(self) -> bool:
        """Whether all elements are the same."""
        return self.extent[0] == self.extent[1]

    def codes_between(self, low: float, high: float) -> int:
        """How many codes numbers from `low` to `high` use."""
        first, last = self.scheme.code_range
        begin, end = (min(max(round(x / self.scale) + self.zero_point, first), last) for x in (low, high))
        return end - begin + 1

    @property
    def codes(self) -> int:
        """How many there are."""
        first, last = self.scheme.code_range
        return last - first + 1

    @cached_property
    def clipped(self) -> tuple[float, float]:
        """Part of the elements below the lowest code, and above the highest one, by more than rounding."""
        if self.density is None:
            return (0.0, 0.0)
        ends = np.array(self.grid) + np.array([-0.5, 0.5]) * self.scale
        below = self.density.below(ends)[0] / self.density.mass_at_edges[-1]
        return float(below[0]), float(1.0 - below[1])

    @cached_property
    def saturation_error(self) -> float:
        """Mean square of what is cut off."""
        if self.density is None:
            return 0.0
        low, high = self.grid
        edges, counts = self.density.edges, self.density.counts
        centres = (edges[:-1] + edges[1:]) / 2
        cut = np.maximum(centres - high, 0.0) + np.maximum(low - centres, 0.0)
        cut[cut <= self.scale / 2] = 0.0
        return float((counts * cut**2).sum() / counts.sum())

    @cached_property
    def rounding_error(self) -> float:
        """Mean square of what is rounded off between the codes."""
        if self.density is None:
            return self.scale**2 / 12
        edges, counts = self.density.edges, self.density.counts
        middles, widths = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
        mean_square = float((counts * (middles**2 + widths**2 / 12)).sum() / counts.sum())
        ends = np.array([self.grid[0]]), np.array([self.grid[1]])
        moments = rounded_moments(self.density, self.scheme, *ends)
        total = mean_square - 2.0 * moments.mean_product[0] + moments.mean_square[0]
        return max(float(total) - self.saturation_error, 0.0)

    def quantile(self, outside: float) -> float:
        """The magnitude beyond which this part of the elements lies that are not zero."""
        assert self.density is not None
        edges, counts = self.density.edges, self.density.counts
        magnitudes = np.maximum(np.abs(edges[:-1]), np.abs(edges[1:]))
        order = np.argsort(-magnitudes)
        beyond = np.cumsum(counts[order])
        wanted = outside * self.count_not_zero
        return float(magnitudes[order][min(int(np.searchsorted(beyond, wanted)), len(order) - 1)])

    @cached_property
    def count_not_zero(self) -> float:
        """Elements that are not zero, nearly: how many are is known of some samples."""
        assert self.density is not None
        zeros = 0.0 if self.spread is None else self.spread.zeros
        return float(self.density.mass_at_edges[-1]) * (1.0 - zeros)


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightEvidence:
    """A weight beside its grid."""

    scheme: IntScheme
    channel_reach: Floats
    """Largest magnitude in each output channel."""
    row_reach: Floats
    """Largest magnitude in each row of weights that has a scale of its own."""
    row_rms: Floats
    row_scale: Floats

    @property
    def codes(self) -> int:
        """How many there are."""
        first, last = self.scheme.code_range
        return last - first + 1


def activation_evidence(
    program: Program,
    plan: QuantizationPlan,
    statistics: Mapping[str, ValueStatistics],
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[str, ActivationEvidence]:
    """What each quantized value of a plan meets, by name.

    Args:
        statistics: of the calibration, with histograms.
        batches: some samples, which tell the channels; read once, in constant memory.
    """
    values = program.values
    wanted = {quantizer.value: quantizer for quantizer in plan.activations}
    computed = {name: _computing(values[name]) for name in wanted}
    parts = {name: [value_of(part) for part in _parts(node)] for name, node in computed.items()}
    spreads = _spreads(program, {*wanted, *(part for found in parts.values() for part in found)}, batches)
    scalable = {reader.place.value for link in channel_links(program) for reader in link.readers}
    return {
        name: _activation(
            quantizer,
            plan,
            statistics.get(name, statistics.get(quantizer.range_of)),
            spreads.get(name),
            parts={part: spreads[part] for part in parts[name] if part in spreads},
            operator=kind_of(computed[name]),
            can_be_scaled=name in scalable,
        )
        for name, quantizer in wanted.items()
    }


def _activation(
    quantizer: ActivationQuantizer,
    plan: QuantizationPlan,
    seen: ValueStatistics | None,
    spread: Spread | None,
    *,
    parts: Mapping[str, Spread],
    operator: str | None,
    can_be_scaled: bool,
) -> ActivationEvidence:
    if not quantizer.dynamic:
        low, high = plan.ranges[quantizer.range_of]
    else:
        low, high = (0.0, 0.0) if spread is None else (float(spread.low.min()), float(spread.high.max()))
    scale, zero_point = quantizer.scheme.parameters(torch.tensor(low), torch.tensor(high))
    return ActivationEvidence(
        scheme=quantizer.scheme,
        scale=scale.item(),
        zero_point=int(zero_point),
        spread=spread,
        density=None if quantizer.dynamic or seen is None or seen.histogram is None else seen.density(),
        parts={name: (float(part.low.min()), float(part.high.max())) for name, part in parts.items()},
        operator=operator,
        can_be_scaled=can_be_scaled,
        ranges=partial(_ranges, None if quantizer.dynamic else seen, quantizer.scheme),
    )


def _ranges(seen: ValueStatistics | None, scheme: IntScheme) -> dict[str, tuple[float, float]]:
    return {} if seen is None else {name: choose(seen, scheme) for name, choose in RANGE_ALGORITHMS.items()}


def weight_evidence(program: Program, plan: QuantizationPlan, weight: WeightQuantizer) -> WeightEvidence:
    """What the quantizer of a weight meets."""
    tensor = edit.tensor_named(program.graph_module, weight.weight).detach().float()
    rows = rows_of(tensor, weight.scheme)
    channels = tensor.movedim(WEIGHT_AXIS.get(kind_of(program.values[weight.value]) or "", 0), 0).flatten(1)
    scale = weight_grid(tensor, weight.scheme, plan.weight_reach.get(weight.value))[0]
    return WeightEvidence(
        scheme=weight.scheme,
        channel_reach=_array(channels.abs().amax(dim=1)),
        row_reach=_array(rows.abs().amax(dim=1)),
        row_rms=_array(rows.square().mean(dim=1).sqrt()),
        row_scale=_array(scale.reshape(-1)),
    )


def _array(x: Tensor) -> Floats:
    found: Floats = x.double().cpu().numpy()
    return found


def _computing(node: fx.Node) -> fx.Node:
    """The operator whose result a value is: a rectifier behind a sum or a concatenation only cuts it."""
    source = node.args[0] if node.args else None
    is_cut = isinstance(source, fx.Node) and kind_of(source) in (kinds.ADD, kinds.CONCAT) and kind_of(node) is None
    return source if is_cut and len(source.users) == 1 else node  # type: ignore[union-attr, return-value]


def _parts(node: fx.Node) -> list[fx.Node]:
    given = node.args[0] if kind_of(node) == kinds.CONCAT else node.args[:2] if kind_of(node) == kinds.ADD else ()
    return [part for part in given if isinstance(part, fx.Node) and value_of(part)]  # type: ignore[union-attr]


# Channels


def channel_axis(node: fx.Node) -> int | None:
    """The axis of a value along which its channels lie, as those that read or write it see it; None without one."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    for reader in node.users:
        kind = kind_of(reader)
        if kind in (kinds.CONVOLUTION, kinds.TRANSPOSED_CONVOLUTION):
            return 1
        if kind == kinds.LINEAR:
            return value.dim() - 1
        if kind == kinds.MATMUL:  # the axis over which products are summed
            return value.dim() - (1 if reader.args[0] is node else 2)
    kind = kind_of(node)
    if kind in (kinds.CONVOLUTION, kinds.TRANSPOSED_CONVOLUTION):
        return 1
    if kind == kinds.LINEAR or value.dim() == 3:  # tokens
        return value.dim() - 1
    return 1


class _Sums:
    """Extremes and energy of the channels of a value, over batches."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._low = self._high = self._energy = torch.zeros(0)
        self._count = self._zeros = 0
        self._varies = False

    def add(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        others = [axis for axis in range(x.dim()) if axis != self._axis]
        low, high = x.amin(others).double().cpu(), x.amax(others).double().cpu()
        energy = x.square().sum(others, dtype=torch.float64).cpu()
        if self._count:
            if low.shape != self._low.shape:
                self._varies = True
                return
            low, high, energy = torch.minimum(low, self._low), torch.maximum(high, self._high), energy + self._energy
        self._low, self._high, self._energy = low, high, energy
        self._count += x.numel() // len(low)
        self._zeros += x.numel() - int(torch.count_nonzero(x))

    @property
    def spread(self) -> Spread | None:
        if self._varies or not self._count:
            return None
        return Spread(
            low=_array(self._low),
            high=_array(self._high),
            rms=_array((self._energy / self._count).sqrt()),
            zeros=self._zeros / (self._count * len(self._low)),
        )


def _spreads(program: Program, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Spread]:
    values = program.values
    axes = {name: channel_axis(values[name]) for name in names}
    sums = {
        name: _Sums(axis)
        for name, axis in axes.items()
        if axis is not None and values[name].meta["val"].is_floating_point()
    }
    observe(program, sums, batches, lambda name, value, _: sums[name].add(value))
    return {name: spread for name, found in sums.items() if (spread := found.spread) is not None}
