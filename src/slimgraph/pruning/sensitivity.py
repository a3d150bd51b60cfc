"""What a metric becomes when more and more of one group of a program goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from pydantic import ConfigDict

from slimgraph.errors import ConfigError
from slimgraph.table import text_table

RATIOS = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
"""The parts of a group that are taken away one after the other."""


def relative_loss(baseline: float, metric: float) -> float:
    """What is lost, as a part of the metric of the whole program; negative where something is gained."""
    lost = baseline - metric
    return lost / abs(baseline) if baseline else lost


def name_of(given: object) -> str:
    """What a criterion or a metric is called in a table: by its name, or that of the function."""
    return given if isinstance(given, str) else str(getattr(given, "__name__", given))


def ratios_by(delta_rate: float) -> tuple[float, ...]:
    """The ladder delta, 2 · delta, … below 1, in hundredths.

    Raises:
        ConfigError: the step is not in (0, 1).

    >>> ratios_by(0.2), ratios_by(0.35)
    ((0.2, 0.4, 0.6, 0.8), (0.35, 0.7))
    """
    if not 0 < delta_rate < 1:
        raise ConfigError(f"delta_rate is {delta_rate}; give the step from one ratio to the next, between 0 and 1.")
    steps = (round(number * delta_rate, 2) for number in range(1, int(1 / delta_rate) + 2))
    return tuple(ratio for ratio in steps if 0 < ratio < 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """A group of which more and more goes."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    group: str
    size: int
    """Indices of the whole group."""
    metrics: Mapping[float, float]
    """The metric by the part of the indices that is gone; the larger parts may be missing, where all was lost."""

    def __post_init__(self) -> None:
        if not all(0 < ratio < 1 for ratio in self.metrics):
            raise ConfigError(f"The ladder of {self.group!r} has the ratios {[*self.metrics]}; all must lie in (0, 1).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A measurement that is under way: sums over the samples so far."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    batches: int = 0
    samples: int = 0
    baseline: float = 0.0
    sums: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    """By group and ratio; those that turned out hopeless are gone."""

    @classmethod
    def of(cls, ratios: Mapping[str, Sequence[float]]) -> Self:
        """One of these ratios by group that has seen no sample yet."""
        return cls(sums={name: dict.fromkeys(several, 0.0) for name, several in ratios.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The ladders of a program's groups, and what they were measured with."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    fingerprint: str
    """Of the program."""
    criterion: str
    """Which indices of a group went first."""
    metric: str
    data: str
    """Tells the samples from others."""
    samples: int
    """0 while the first measurement is under way."""
    baseline: float
    """The metric of the whole program."""
    ladders: Mapping[str, Ladder] = field(default_factory=dict)
    """By the name of the group, in the order of the program."""
    running: Running | None = None
    """What a measurement that was interrupted has so far."""

    @property
    def losses(self) -> dict[str, dict[float, float]]:
        """What is lost by group and ratio, as a part of the metric of the whole program."""
        return {
            name: {ratio: relative_loss(self.baseline, metric) for ratio, metric in sorted(ladder.metrics.items())}
            for name, ladder in self.ladders.items()
        }

    def table(self) -> str:
        """A line for each group, the metric at each ratio."""
        ratios = sorted({ratio for ladder in self.ladders.values() for ratio in ladder.metrics})
        rows = [
            (
                name,
                ladder.size,
                *(f"{ladder.metrics[ratio]:.4g}" if ratio in ladder.metrics else "" for ratio in ratios),
            )
            for name, ladder in self.ladders.items()
        ]
        return text_table(("group", "indices", *(f"−{ratio:.0%}" for ratio in ratios)), rows)
