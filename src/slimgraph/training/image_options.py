"""How pictures become numbers, as a user says it."""

import math
from dataclasses import dataclass
from typing import Literal

from slimgraph.errors import ConfigError


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How a picture becomes numbers: (pixel / 255 - mean) / std, after resizing and a centre crop."""

    image_size: int | tuple[int, int] | None = None
    """Side, or height and width, of the crop; None is what the program takes, or where that is free, no resizing."""
    resize_size: int | None = None
    """Shorter side that a picture is resized to before the crop, for a square crop; None is the side of the crop."""
    mean: float | tuple[float, ...] = 0.0
    """One number, or one per channel in the order of the program's channels. x / 127.5 - 1 is mean 0.5, std 0.5."""
    std: float | tuple[float, ...] = 1.0
    """As `mean`; more than 0."""
    order: Literal["RGB", "BGR"] = "RGB"
    """Order of three channels."""

    def __post_init__(self) -> None:
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        for side in (*sides, self.resize_size):
            if side is not None and side < 1:
                raise ConfigError(f"An image size is {side}; give at least 1.")
        if self.resize_size is not None and any(side is not None and side > self.resize_size for side in sides):
            raise ConfigError(f"resize_size is {self.resize_size}, smaller than the crop of {self.image_size}.")
        if not all(math.isfinite(value) for value in _numbers(self.mean)):
            raise ConfigError(f"mean is {self.mean}; give finite numbers.")
        if not all(0 < value < math.inf for value in _numbers(self.std)):
            raise ConfigError(f"std is {self.std}; give numbers above 0.")
        if self.order not in ("RGB", "BGR"):
            raise ConfigError(f"order is {self.order!r}; give RGB or BGR.")
