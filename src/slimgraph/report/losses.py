"""Where the loss of a quantization comes from, as data."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRanges:
    """How far a value reaches, channel by channel, beside the range of its codes."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    code_low: float
    """What the lowest code stands for; `code_high` for the highest."""
    code_high: float
    outlier: int | None = None
    """The channel that stands out, where one does."""

    def __post_init__(self) -> None:
        assert len(self.low) == len(self.high) >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCause:
    """A fault by which a layer loses more than it would have to."""

    name: str
    quantizer: Literal["weight", "activation"]
    text: str
    """The numbers that show it."""
    advice: str
    """What to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoss:
    """What the quantizers of one layer cost: that of its weight, and that of what it writes."""

    name: str
    written: str
    """The value that becomes integers."""
    operator: str
    share: float
    """Part of the noise in the outputs that all layers bring."""
    weight_share: float
    """Part of `share` that is due to the weight."""
    noise: float
    """Energy of the change of the outputs as a part of their energy, when only this layer is quantized."""
    snr_db: float | None
    causes: tuple[LossCause, ...] = ()
    advice: str = ""
    """What to do, in a line; empty where there is nothing."""
    why: str = ""
    """The causes with their numbers, in a line; also that there is none, where the layer costs much."""
    channels: ChannelRanges | None = None
    """Of the worst layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossAccount:
    """The layers, the one that costs most first."""

    layers: tuple[LayerLoss, ...]
    noise: float
    """Sum over the layers."""
    samples: int
    """On which each layer was tried alone."""
