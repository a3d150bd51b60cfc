"""Move outlying channels of activations into the weights that read them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import ConfigError
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.quantization.apply import weight_scale
from slimgraph.quantization.calibration import observe
from slimgraph.quantization.channel_links import ChannelLink, Reader, channel_links
from slimgraph.quantization.channel_ranges import ChannelRange, ChannelRanges, channel_ranges, reader_places
from slimgraph.quantization.correct_bias import REPAIR_SAMPLES
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.rescale import LayerWeight, read_factors, rescale
from slimgraph.quantization.samples import first_batches, first_samples

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

SEARCH_SAMPLES = 8
"""Samples on which strengths are compared: every pixel or token of them counts."""


def smooth(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    alpha: float | Sequence[float] = ALPHAS,
    samples: int = REPAIR_SAMPLES,
) -> Program:
    """A program that computes the same, with the channels of quantized activations nearer to each other in size.

    Each channel between an operator with a gain (a norm, a layer, a product with a vector) and the layers that read it
    is divided by s = max|x|^α / max|w|^(1−α), and their weights multiplied by it. The larger α, the more of an
    activation's outliers goes into the weights. All s of a link are divided by their geometric mean, which no grid
    notices. A channel that is always zero, or that no weight reads, stays as it is, as does one that meets a ReLU6.

    Args:
        plan: made for the program, with or without ranges; layers that it leaves in float are not smoothed for.
        batches: calibration data, as `Signature.bind` takes it; the first `samples` samples are used.
        alpha: one strength for all links, or those of which each link gets the best, or none: what makes the least
            squared error in the outputs of the readers, with input and weight rounded, on the first eight samples.
        samples: from which the largest magnitudes are taken.
    Raises:
        ConfigError: a strength is not between 0 and 1.
        CalibrationError: there is no batch, or a value has NaN or infinity.
        DataError: a batch does not fit the program.
    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        2022, arXiv 2211.10438. There norms are followed by linear layers; here any link of `channel_links` is smoothed.
    """
    strengths = (alpha,) if isinstance(alpha, (int, float)) else tuple(alpha)
    if not strengths or not all(0 <= strength <= 1 for strength in strengths):
        raise ConfigError(f"alpha is {alpha}; give strengths from 0 to 1, such as 0.5.")
    rounded = _rounded_readers(plan)
    links = [link for link in channel_links(program) if any(reader.layer in rounded for reader in link.readers)]
    chosen: dict[str, float | None] = {}
    factors: dict[str, Tensor] = {}
    if links:
        used = list(first_batches(program, batches, samples))  # as they came, so that an error names the right one
        ranges = channel_ranges(program, reader_places(links), used)
        tried = {link.producer: {a: _factors(program, link, ranges, a) for a in strengths} for link in links}
        if isinstance(alpha, (int, float)):
            chosen = dict.fromkeys(tried, float(alpha))
        else:
            errors = _errors(program, links, rounded, ranges, tried, first_samples(program, used, SEARCH_SAMPLES))
            chosen = {name: min(found, key=lambda a: found[a]) for name, found in errors.items()}
        factors = {name: tried[name][a] for name, a in chosen.items() if a is not None}
    told: dict[str, Json] = dict(chosen.items())
    smoothed = rescale(program, links, factors)
    parameters: dict[str, Json] = {"alpha": list(strengths), "samples": samples}
    return smoothed.with_history(HistoryEntry(step="smooth", parameters=parameters, result={"alpha": told}))


@dataclass(frozen=True, slots=True)
class _Rounded:
    """The grids of what a layer reads, and of its weight."""

    activation: IntScheme
    weight: IntScheme


def _rounded_readers(plan: QuantizationPlan) -> dict[str, _Rounded]:
    schemes = {activation.value: activation.scheme for activation in plan.activations}
    return {w.value: _Rounded(schemes[w.input], w.scheme) for w in plan.weights if w.input is not None}


def _factors(program: Program, link: ChannelLink, ranges: ChannelRanges, alpha: float) -> Tensor:
    values = program.values
    largest = torch.zeros(
        2, link.channels + 1, dtype=torch.float64
    )  # of activations and weights; the last is no channel
    for reader in link.readers:
        place = reader.place
        magnitude = LayerWeight(program, values[reader.layer]).magnitude().amax(dim=1).reshape(-1).double().cpu()
        for row, found in zip(largest, (ranges[place.value, place.axis].magnitude, magnitude), strict=True):
            row.scatter_reduce_(0, place.channels % len(row), found, "amax")
    active, weight = largest[:, :-1]
    works = link.unclipped & (active > 0) & (weight > 0)
    if not bool(works.any()):
        return torch.ones(link.channels, dtype=torch.float64)
    wanted = torch.where(works, alpha * active.log() - (1 - alpha) * weight.log(), 0.0)
    return torch.where(works, (wanted - wanted[works].mean()).exp(), 1.0)


def _errors(
    program: Program,
    links: Sequence[ChannelLink],
    rounded: Mapping[str, _Rounded],
    ranges: ChannelRanges,
    tried: Mapping[str, Mapping[float, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
) -> dict[str, dict[float | None, float]]:
    """For each link and strength the error in the outputs of its readers, as parts of their energy; None is without."""
    values = program.values
    by_value: dict[str, list[tuple[ChannelLink, Reader]]] = {}
    for link in links:
        for reader in link.readers:
            if reader.layer in rounded:
                by_value.setdefault(reader.place.value, []).append((link, reader))
    sums: dict[tuple[str, str, float | None], float] = {}
    energy: dict[tuple[str, str], float] = {}

    def see(name: str, x: Tensor, _: int) -> None:
        for link, reader in by_value[name]:
            layer = _Layer(program, values[reader.layer], reader, rounded[reader.layer])
            exact = layer(x)
            known = ranges[reader.place.value, reader.place.axis]
            pair = (link.producer, reader.layer)
            energy[pair] = energy.get(pair, 0.0) + float(exact.double().square().sum())
            for strength, factors in ((None, None), *tried[link.producer].items()):
                change = layer.rounded(x, known, factors).sub_(exact)
                key = (*pair, strength)
                sums[key] = sums.get(key, 0.0) + float(change.double().square().sum())

    observe(program, by_value, batches, see)
    found: dict[str, dict[float | None, float]] = {link.producer: {} for link in links}
    for (producer, layer_name, strength), error in sums.items():
        part = error / energy[producer, layer_name] if energy[producer, layer_name] else 0.0
        found[producer][strength] = found[producer].get(strength, 0.0) + part
    return found


class _Layer:
    """A convolution or linear layer without its bias, in float and with input and weight on their grids."""

    def __init__(self, program: Program, node: fx.Node, reader: Reader, grids: _Rounded) -> None:
        self._node, self._reader, self._grids = node, reader, grids
        self._weight = LayerWeight(program, node)

    def __call__(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self._weight.tensor if weight is None else weight
        others = {name: given for name, given in self._node.kwargs.items() if name != "bias"}
        result: Tensor = self._node.target(x, weight, None, *self._node.args[3:], **others)  # type: ignore[operator]
        return result

    def rounded(self, x: Tensor, known: ChannelRange, factors: Tensor | None) -> Tensor:
        """The output where channels were divided by the factors of a link first, and the weight multiplied."""
        weight, low, high = self._weight.tensor, known.low, known.high
        if factors is not None:
            gain = read_factors(self._reader, factors)
            low, high = low / gain, high / gain
            shape = [-1 if axis == self._reader.place.axis else 1 for axis in range(x.dim())]
            x = x / gain.to(x.device, x.dtype).reshape(shape)
            weight = self._weight.scaled(inputs=gain)
        activation = self._grids.activation
        scale, zero_point = activation.parameters(low.amin(), high.amax())
        x = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), *activation.code_range)
        steps = weight_scale(weight, self._grids.weight)
        zeros = torch.zeros_like(steps, dtype=torch.int32)
        codes = quantize(weight, steps, zeros, self._grids.weight)
        return self(x, dequantize(codes, steps, zeros, self._grids.weight).to(weight.dtype))
