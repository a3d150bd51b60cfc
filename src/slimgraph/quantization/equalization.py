"""Equalize the weight ranges of neighbouring layers, channel by channel."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.program.fold import OUTPUT_AXIS, set_bias
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.quantization.channel_flow import MOVES, NO_CHANNEL
from slimgraph.quantization.channel_links import ChannelLink, Reader, channel_links
from slimgraph.quantization.channel_ranges import ChannelRanges
from slimgraph.quantization.rescale import LayerWeight, read_factors, rescale

aten = torch.ops.aten

MOST_SWEEPS = 100
TOLERANCE = 1e-4
"""A sweep that changes no factor by more than this part is the last one."""


def equalize(
    program: Program,
    *,
    relu6: Literal["keep", "replace"] = "keep",
    ranges: ChannelRanges | None = None,
    most_sweeps: int = MOST_SWEEPS,
) -> Program:
    """A program that computes the same, where what a channel weighs in one layer is as much as in the next.

    For each channel from one convolution or linear layer to others (`channel_links`), the largest magnitudes of the
    weights that produce it, r₁, and that read it, r₂, both become √(r₁·r₂): the first are divided by
    s = √(r₁·r₂)/r₂, the others multiplied by it. Chains are swept until nothing moves. A channel that is never produced
    or never read, where r₁ or r₂ is zero, stays as it is.

    Args:
        relu6: "keep" leaves a channel that a ReLU6 (or another upper limit) may cut as it is, unless `ranges` shows
            that it stays below the limit before and after. "replace" makes plain ReLUs of those between two layers
            first, which is another function wherever they cut.
        ranges: of the values in front of the limits, as `channel_ranges` measures them for `clip_places`. What holds
            for these data is taken to hold.
        most_sweeps: through all chains.
    Raises:
        ProgramError: a weight is NaN or infinite.
        ConfigError: `relu6` is neither.
    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1.
        There a layer has one reader; here all readers of a channel count together, and the channel may be moved,
        pooled, gated or joined with others before it is read.
    """
    if relu6 not in ("keep", "replace"):
        raise ConfigError(f"relu6 is {relu6!r}. {closest(str(relu6), ['keep', 'replace'])}")
    links = _between_layers(program)
    if relu6 == "replace":
        program = _without_limits(program, links)
        links = _between_layers(program)
    chains = _Chains(program, links, ranges or {})
    sweeps = 0
    while sweeps < most_sweeps:
        sweeps += 1
        if chains.sweep() <= TOLERANCE:
            break
    equalized = rescale(program, links, chains.factors)
    channels = sum(int((factors != 1).sum()) for factors in chains.factors.values())
    return equalized.with_history(
        HistoryEntry(
            step="equalize",
            parameters={"relu6": relu6},
            result={"links": len(links), "channels": channels, "sweeps": sweeps},
        )
    )


def _between_layers(program: Program) -> tuple[ChannelLink, ...]:
    values = program.values
    return tuple(link for link in channel_links(program) if values[link.producer].target in OUTPUT_AXIS)


def _without_limits(program: Program, links: Sequence[ChannelLink]) -> Program:
    unlimited = program.copy()
    values = unlimited.values
    for name in dict.fromkeys(clip.name for link in links for clip in link.clips):
        node = values[name]
        node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}
    return edit.finish(unlimited)


class _Chains:
    """Magnitudes of all weights in the links, and the factors so far: weights are rescaled once, in the end."""

    def __init__(self, program: Program, links: Sequence[ChannelLink], ranges: ChannelRanges) -> None:
        values = program.values
        self._links = links
        names = dict.fromkeys(
            name for link in links for name in (link.producer, *(reader.layer for reader in link.readers))
        )
        # G = groups, O = outputs in a group, I = inputs in a group
        self._magnitude_GOI = {name: LayerWeight(program, values[name]).magnitude().cpu() for name in names}
        self._bounds = {link.producer: _bounds(link, ranges) for link in links}
        self.factors = {link.producer: torch.ones(link.channels, dtype=torch.float64) for link in links}

    def sweep(self) -> float:
        """One step for each link; how far the factor that moved most did."""
        largest = 0.0
        for link in self._links:
            if not bool((self._bounds[link.producer].movable).any()):
                continue
            step = self._step(link)
            self.factors[link.producer] *= step
            self._apply(link, step)
            largest = max(largest, float((step.log()).abs().max()))
        return largest

    def _step(self, link: ChannelLink) -> Tensor:
        produced = self._magnitude_GOI[link.producer].amax(dim=2).reshape(-1).double()
        read = torch.zeros(link.channels + 1, dtype=torch.float64)  # the last is NO_CHANNEL
        for reader in link.readers:
            magnitude = self._magnitude_GOI[reader.layer].amax(dim=1).reshape(-1).double()
            read = read.scatter_reduce(0, reader.place.channels % len(read), magnitude, "amax")
        read = read[:-1]
        bounds = self._bounds[link.producer]
        works = bounds.movable & (produced > 0) & (read > 0)
        wanted = torch.where(works, (produced / read).sqrt(), 1.0)
        done = self.factors[link.producer]
        return torch.where(works, torch.maximum(done * wanted, bounds.least) / done, 1.0)

    def _apply(self, link: ChannelLink, step: Tensor) -> None:
        produced = self._magnitude_GOI[link.producer]
        produced /= step.float().reshape(produced.shape[0], -1, 1)
        for reader in link.readers:
            magnitude = self._magnitude_GOI[reader.layer]
            magnitude *= read_factors(reader, step).float().reshape(magnitude.shape[0], 1, -1)


@dataclass(frozen=True, slots=True)
class _Bounds:
    movable: Tensor
    least: Tensor
    """A smaller factor would bring the channel to a limit."""


def _bounds(link: ChannelLink, ranges: ChannelRanges) -> _Bounds:
    movable, least = link.free.clone(), torch.zeros(link.channels, dtype=torch.float64)
    for clip in link.clips:
        known = ranges.get((clip.place.value, clip.place.axis))
        there = clip.place.channels != NO_CHANNEL
        channels = clip.place.channels[there]
        part = torch.full((len(clip.place.channels),), torch.inf, dtype=torch.float64)
        if known is not None:
            part = known.high.double().cpu() / clip.top
        part = part[there]
        movable[channels[part > 1]] = False
        least = least.scatter_reduce(0, channels, torch.where(part > 1, 0.0, part), "amax")
    return _Bounds(movable, least)


# High biases

_SHIFTING = MOVES | {aten.relu.default, aten.dropout.default, aten.clone.default, aten.contiguous.default}
"""Operators behind which a channel that is lower by c is still lower by c, as long as it does not get below zero."""


def absorb_high_biases(program: Program, ranges: ChannelRanges) -> Program:
    """The program with the part of each channel that is always there taken from before a ReLU to the next layer's bias.

    Where a channel is never below c > 0 in front of a ReLU, its bias may be lower by c, if the layers that read it add
    W·c to theirs: relu(x − c) = relu(x) − c. The channel's range gets smaller by c. Layers that pad with zeros are left
    alone, since their padding would have to be −c.

    Args:
        ranges: of the producers' values, as `channel_ranges` measures them for `producer_places`. What holds for
            these data is taken to hold.
    Source: Nagel et al., 2019, section 4.1.3. There c comes from the statistics of a batch norm, max(0, β − 3γ), so
        that one value in a thousand is cut; here from the lowest value in the data.
    """
    absorbed = program.copy()
    values = absorbed.values
    readers = edit.count_readers(absorbed.graph_module)
    channels = 0
    for link in _between_layers(program):
        node = values[link.producer]
        known = ranges.get((link.producer, link.axis))
        bias = edit.constant_of(absorbed.graph_module, edit.arguments(node)["bias"])
        if known is None or bias is None or not _shifts(link) or any(_pads(values[r.layer]) for r in link.readers):
            continue
        constant = torch.where(link.unclipped, known.low.double().cpu().clamp(min=0), 0.0)
        if not bool(constant.any()):
            continue
        channels += int((constant > 0).sum())
        set_bias(absorbed, node, (bias.detach().double().cpu() - constant).to(bias), readers)
        for reader in link.readers:
            _add_constant(absorbed, values[reader.layer], reader, constant, readers)
    edit.finish(absorbed)
    return absorbed.with_history(HistoryEntry(step="absorb_high_biases", result={"channels": channels}))


def _shifts(link: ChannelLink) -> bool:
    operators = {node.target for node in link.through}
    return aten.relu.default in operators and operators <= _SHIFTING


def _pads(node: fx.Node) -> bool:
    """Whether a layer reads zeros beside its input; every transposed convolution does, at its borders."""
    if node.target is aten.linear.default:
        return False
    if OUTPUT_AXIS[node.target] == 1:  # type: ignore[index]
        return True
    padding = edit.arguments(node)["padding"]
    return padding not in ("valid",) and (isinstance(padding, str) or any(padding))


def _add_constant(program: Program, node: fx.Node, reader: Reader, constant: Tensor, readers: Counter[int]) -> None:
    weight = LayerWeight(program, node)
    weight_GOI = weight.grouped(weight.tensor.double().cpu())
    weight_GOI = weight_GOI.flatten(3).sum(dim=3) if weight_GOI.dim() > 3 else weight_GOI
    given = torch.cat([constant, constant.new_zeros(1)])[reader.place.channels]
    more = (weight_GOI * given.reshape(len(weight_GOI), 1, -1)).sum(dim=2).reshape(-1)
    bias = edit.constant_of(program.graph_module, edit.arguments(node)["bias"])
    set_bias(program, node, (more if bias is None else bias.detach().double().cpu() + more).to(weight.tensor), readers)
