"""Measure the lowest and highest value of single channels by one pass over calibration data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slimgraph.errors import CalibrationError
from slimgraph.program.program import Program
from slimgraph.quantization.calibration import observe
from slimgraph.quantization.channel_links import ChannelLink, Place


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRange:
    """Lowest and highest value at each index of an axis, float64 on the CPU, shape (size of the axis,)."""

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitudes."""
        return torch.maximum(-self.low, self.high)


ChannelRanges: TypeAlias = Mapping[tuple[str, int], ChannelRange]
"""By name of the value and axis."""


def channel_ranges(program: Program, places: Iterable[Place], batches: Iterable[Any]) -> ChannelRanges:
    """The range of each channel at the given places, over all batches, in constant memory.

    Args:
        batches: what `Signature.bind` takes, each.
    Raises:
        CalibrationError: there is no batch, or a value has NaN or infinity; the message names value and batch.
        DataError: a batch does not fit the program.
    """
    wanted: dict[str, set[int]] = {}
    for place in places:
        wanted.setdefault(place.value, set()).add(place.axis)
    found: dict[tuple[str, int], ChannelRange] = {}

    def see(name: str, value: Tensor, batch: int) -> None:
        for axis in wanted[name] if value.numel() else ():
            others = [other for other in range(value.dim()) if other != axis]
            low, high = (value.amin(others), value.amax(others)) if others else (value, value)
            low, high = low.double().cpu(), high.double().cpu()
            if not bool((low.isfinite() & high.isfinite()).all()):
                raise CalibrationError(
                    f"The value {name!r} holds NaN or an infinity in calibration batch {batch} (counted from 0). Look "
                    "for broken samples there, or check that the float model is sound on them."
                )
            if (before := found.get((name, axis))) is not None:
                low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
            found[name, axis] = ChannelRange(low, high)

    observe(program, wanted, batches, see)
    return found


def reader_places(links: Iterable[ChannelLink]) -> list[Place]:
    """Where channels are read: what smoothing looks at."""
    return [reader.place for link in links for reader in link.readers]


def clip_places(links: Iterable[ChannelLink]) -> list[Place]:
    """Where channels may be cut: what equalization behind ReLU6 looks at."""
    return [clip.place for link in links for clip in link.clips]
