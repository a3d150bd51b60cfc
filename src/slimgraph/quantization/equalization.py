"""Equalize the weight ranges of neighbouring layers, channel by channel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.program.fold import OUTPUT_AXIS
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.quantization.channel_flow import NO_CHANNEL
from slimgraph.quantization.channel_links import ChannelLink, channel_links
from slimgraph.quantization.channel_ranges import ChannelRanges
from slimgraph.quantization.rescale import LayerWeight, read_factors, rescale

aten = torch.ops.aten

MOST_SWEEPS = 100
TOLERANCE = 1e-4
"""A sweep that changes no factor by more than this part is the last one."""


def equalize(
    program: Program,
    *,
    ranges: ChannelRanges | None = None,
    most_sweeps: int = MOST_SWEEPS,
) -> Program:
    """A program that computes the same, where what a channel weighs in one layer is as much as in the next.

    For each channel from one convolution or linear layer to others (`channel_links`), the largest magnitudes of the
    weights that produce it, r₁, and that read it, r₂, both become √(r₁·r₂): the first are divided by
    s = √(r₁·r₂)/r₂, the others multiplied by it. Chains are swept until nothing moves. A channel that is never produced
    or never read, where r₁ or r₂ is zero, stays as it is.

    Args:
        ranges: of the values in front of upper limits, as of a ReLU6, as `channel_ranges` measures them for
            `clip_places`. A channel that a limit may cut stays as it is, unless they show that it stays below the limit
            before and after; what holds for these data is taken to hold.
        most_sweeps: through all chains.
    Raises:
        ProgramError: a weight is NaN or infinite.
    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1.
        There a layer has one reader; here all readers of a channel count together, and the channel may be moved,
        pooled, gated or joined with others before it is read.
    """
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
            result={"links": len(links), "channels": channels, "sweeps": sweeps},
        )
    )


def _between_layers(program: Program) -> tuple[ChannelLink, ...]:
    values = program.values
    return tuple(link for link in channel_links(program) if values[link.producer].target in OUTPUT_AXIS)


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
