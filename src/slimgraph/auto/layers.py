"""Tell layer by layer what quantization did: how each computes, on which range, with which error."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import fx

from slimgraph.deploy.compare import Comparison
from slimgraph.program.count import Count
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.program.scheme import quantize
from slimgraph.quantization.operators import data_inputs, rectified_range
from slimgraph.quantization.plan import ActivationQuantizer, QuantizationPlan, WeightQuantizer
from slimgraph.quantization.statistics import ValueStatistics
from slimgraph.report.content import LayerRow, ValueHistogram

_BINS = 256
"""Of a histogram in the report; its picture has half as many bars."""

_HISTOGRAMS = 24
"""Pictures that a reader will look at, and a page can hold; the worst values are shown."""


def layer_rows(
    original: Program, plan: QuantizationPlan, before: Count, after: Count, comparison: Comparison
) -> tuple[LayerRow, ...]:
    """A row for each operator that accumulates or stores something, in order of computation.

    Args:
        original: the float program that `plan` speaks of.
        plan: with ranges.
        before: count of the float program.
        after: count of the quantized program.
        comparison: of the two.
    """
    values, snr_db = original.values, comparison.snr_db
    quantizers = {quantizer.value: quantizer for quantizer in plan.activations}
    weights = {weight.value: weight for weight in plan.weights}
    bytes_after = {row.value: row.weight_bytes for row in after.rows}
    rows = []
    for row in before.rows:
        node = values.get(row.value)
        written = row.value if node is None else _written_value(node, quantizers)
        quantizer = quantizers.get(written)
        low, high, scale = grid_of_value(quantizer, plan) if quantizer and not quantizer.dynamic else (None, None, None)
        rows.append(
            LayerRow(
                name=row.value,
                operator=row.operator,
                scheme="float" if node is None else _scheme(original, node, weights, quantizers),
                low=low,
                high=high,
                scale=scale,
                snr_db=snr_db.get(written, snr_db.get(row.value)),
                macs=row.macs,
                parameters=row.parameters,
                size_bytes_before=row.weight_bytes,
                size_bytes_after=bytes_after.get(row.value, 0),
                note=f"kept in float: {plan.kept_float[row.value]}" if row.value in plan.kept_float else "",
            )
        )
    return tuple(rows)


def most_damaged(plan: QuantizationPlan, comparison: Comparison) -> list[str]:
    """The values that own a range whose pictures are shown, the most damaged first."""
    damage = {row.value: place for place, row in enumerate(comparison.rows)}
    return sorted(plan.ranges, key=lambda name: damage.get(name, len(damage)))[:_HISTOGRAMS]


def range_histograms(
    plan: QuantizationPlan,
    statistics: Mapping[str, ValueStatistics],
    values: Iterable[str],
    *,
    algorithm: str,
) -> tuple[ValueHistogram, ...]:
    """How those of the values that own a range are distributed, and the range.

    Args:
        plan: with ranges.
        statistics: with histograms.
        algorithm: what chose the ranges.
    """
    schemes = {quantizer.value: quantizer for quantizer in plan.activations}
    return tuple(
        _histogram(schemes[name], statistics[name], plan, algorithm)
        for name in dict.fromkeys(values)
        if name in plan.ranges and name in statistics
    )


def _written_value(node: fx.Node, quantizers: Mapping[str, ActivationQuantizer]) -> str:
    """The value that a layer's kernel writes: its own, or that of the activation function fused behind it."""
    own, readers = value_of(node), list(node.users)
    if own not in quantizers and len(readers) == 1 and rectified_range(readers[0]) is not None:
        behind = value_of(readers[0])
        return behind if behind in quantizers else own
    return own


def grid_of_value(quantizer: ActivationQuantizer, plan: QuantizationPlan) -> tuple[float, float, float]:
    """Lowest and highest real value that the codes stand for, and the scale."""
    low, high = plan.ranges[quantizer.range_of]
    step, zero = quantizer.scheme.parameters(torch.tensor(low), torch.tensor(high))
    scale, zero_point = step.item(), int(zero.item())
    first, last = quantizer.scheme.code_range
    return ((first - zero_point) * scale, (last - zero_point) * scale, scale)


def _scheme(
    program: Program,
    node: fx.Node,
    weights: Mapping[str, WeightQuantizer],
    quantizers: Mapping[str, ActivationQuantizer],
) -> str:
    weight = weights.get(value_of(node))
    if weight is not None:
        return weight.scheme.described
    sources = [quantizers.get(value_of(source)) for source in data_inputs(program, node)]
    if len(sources) > 1 and sources[0] is not None and all(sources):  # a product of two activations
        return f"int{sources[0].scheme.bits}"
    return "float"


def _histogram(
    quantizer: ActivationQuantizer, seen: ValueStatistics, plan: QuantizationPlan, algorithm: str
) -> ValueHistogram:
    name, scheme = quantizer.value, quantizer.scheme
    density, (low, high) = seen.density(), plan.ranges[name]
    first, last = float(density.edges[0]), float(density.edges[-1])
    if first == last:
        edges, counts = np.array([first, last]), np.array([density.counts.sum()])
    else:
        edges, counts = np.linspace(first, last, _BINS + 1), density.rebinned(first, last, _BINS)
    ends = torch.tensor([low, high], dtype=torch.float32)
    codes = quantize(ends, *scheme.parameters(ends[0], ends[1]), scheme).tolist()
    return ValueHistogram(
        name=name,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        low=low,
        high=high,
        algorithm=algorithm,
        codes=(codes[0], codes[1]),
    )
