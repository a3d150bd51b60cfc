"""What is known of a model before and after it was compressed, its latency apart."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerKernels:
    """How many operators of one kind run in integers, as counted in the graph that the runtime optimized."""

    kind: str
    """Plural, as it is read: "convolutions", "matrix products"."""
    integer: int
    total: int

    def __post_init__(self) -> None:
        assert 0 <= self.integer <= self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One of the two models, as a file."""

    label: str
    """What a reader calls it: "float", "int8"."""
    size_bytes: int
    """Of everything that has to be deployed, external data included."""
    parameters: int | None = None
    macs: int | None = None
    """Multiply-accumulates for one sample."""
    integer_kernels: tuple[IntegerKernels, ...] = ()
    """Empty where they were not counted."""

    def __post_init__(self) -> None:
        assert self.size_bytes > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """A metric of both models on the same samples; higher is better."""

    name: str
    kind: Literal["accuracy", "agreement", "closeness"]
    """`agreement` compares answers with those of the original, and `closeness` numbers where there are no answers to
    count: they say nothing about how many are right."""
    before: float
    """Always 1 for agreement and closeness: the original is like itself."""
    after: float
    samples: int
    max_drop: float | None = None
    """Largest `drop` that the user allowed, absolute: 0.01 is one point. None: no limit."""
    unit: Literal["fraction", "plain"] = "fraction"
    """A fraction lies between 0 and 1 and is shown in percent; a plain number is shown as it is."""
    change_interval: tuple[float, float] | None = None
    """95 % interval of `after - before`, where it was estimated; both models saw the same samples, so it is paired."""

    def __post_init__(self) -> None:
        assert self.kind == "accuracy" or self.before == 1.0
        # `not outside` rather than `inside`: a metric that became NaN is a result, and the report has to say so.
        assert self.unit == "plain" or not any(value < 0 or value > 1 for value in (self.before, self.after))

    @property
    def drop(self) -> float:
        """What compression cost; negative for a gain."""
        return self.before - self.after

    @property
    def exceeds_max_drop(self) -> bool:
        """Whether more was lost than allowed. A metric that is not a number is never within a limit."""
        # 0.875 - 0.865 is a little more than 0.01 in binary, and is not more than one point.
        return self.max_drop is not None and not self.drop <= self.max_drop + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class SparedLayer:
    """A layer that was taken out of the quantization, or given more bits, so that the metric holds."""

    name: str
    bits: int | None
    """None: it is in float."""
    noise_share: float
    """The part that is gone with it of the noise that all quantizers together bring into the outputs."""
    lost_us: float | None
    """Microseconds of a call by which the layer is slower than in integers, as measured before; None: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Something that was tried so that less is lost, and what it gave."""

    kind: Literal["ranges", "repairs", "layers"]
    what: str
    """The algorithm of ranges; a repair, beside those kept before it, or all that were kept; bits of layers."""
    noise: float | None
    """Of the outputs on calibration samples, as a part of their energy; None: not measured."""
    drop: float | None
    """Of the metric; None: not measured, since the noise did not speak for it."""
    kept: bool
    """Whether the result has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyControl:
    """What was done since the metric dropped by more than allowed."""

    limit: float
    drop_before: float
    """With every layer in integers that the target has integer kernels for."""
    drop: float
    """With what was done; where the limit was not met, with every layer in float or of more bits."""
    met: bool
    algorithm_before: str
    algorithm: str
    """What chose the ranges in the end."""
    repairs_before: tuple[str, ...]
    repairs: tuple[str, ...]
    """Those that were made in the end."""
    spared: tuple[SparedLayer, ...]
    """The costliest for the metric first."""
    layers: int
    """How many could have been spared; 0 where it did not come to that."""
    attempts: tuple[Attempt, ...]
    """In the order in which they were made: what costs the result nothing comes first."""

    @property
    def trials(self) -> int:
        """How often the metric was measured."""
        return len([attempt for attempt in self.attempts if attempt.drop is not None])
