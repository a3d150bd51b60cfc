"""Everything that a report says, as data."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

from slimgraph.deploy.latency import LatencyComparison
from slimgraph.program.program import HistoryEntry, Json
from slimgraph.report.environment import Environment
from slimgraph.report.facts import AccuracyControl, MetricResult, ModelFacts
from slimgraph.report.headline import Headline, headline
from slimgraph.report.losses import LossAccount

SCHEMA_VERSION = 1
"""Of `report.json`. A new key leaves it; a key that goes away or changes its meaning raises it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer of the compressed model beside the same layer of the original."""

    name: str
    operator: str
    scheme: str
    """How it computes: "int8 per channel", "float"."""
    low: float | None = None
    """Range of the layer's output that the codes cover; None, as `high` and `scale`, where it has no codes."""
    high: float | None = None
    scale: float | None = None
    snr_db: float | None = None
    """Signal-to-noise ratio of the layer's output against the original's; infinite where they are equal."""
    macs: int | None = None
    """Multiply-accumulates for one sample."""
    parameters: int = 0
    size_bytes_before: int = 0
    """Of the layer's parameters as stored."""
    size_bytes_after: int = 0
    note: str = ""
    """Why it is as it is, where that is not plain: "kept in float: first layer"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHistogram:
    """Distribution of a value over the calibration data, and the range that was chosen for it."""

    name: str
    edges: tuple[float, ...]
    """Ascending, one more than `counts`."""
    counts: tuple[float, ...]
    low: float
    high: float
    """Values outside `low` … `high` saturate."""
    algorithm: str = ""
    """What chose the range."""
    codes: tuple[int, int] | None = None
    """The codes that stand for `low` and `high`."""

    def __post_init__(self) -> None:
        assert len(self.edges) == len(self.counts) + 1 >= 2
        assert all(math.isfinite(edge) for edge in (*self.edges, self.low, self.high))
        assert all(left <= right for left, right in pairwise(self.edges))
        assert self.low <= self.high

    @property
    def clipped_ratio(self) -> float:
        """Fraction of the elements outside the range, those of a bin taken as evenly spread; NaN without any."""
        total = math.fsum(self.counts)
        if total == 0:
            return math.nan
        outside = 0.0
        for (left, right), count in zip(pairwise(self.edges), self.counts, strict=True):
            if left == right:
                outside += count * (not self.low <= left <= self.high)
            else:
                inside = max(0.0, min(right, self.high) - max(left, self.low))
                outside += count * (1 - inside / (right - left))
        return outside / total


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that the user should know."""

    level: Literal["warning", "notice"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done to a model and what came of it."""

    title: str
    original: ModelFacts
    compressed: ModelFacts
    metric: MetricResult | None
    """None: not measured."""
    latency: LatencyComparison | None
    """None: not measured."""
    environment: Environment
    command: str
    """What to type to get this result again."""
    created: datetime
    """With its time zone."""
    layers: tuple[LayerRow, ...] = ()
    """In order of computation."""
    histograms: tuple[ValueHistogram, ...] = ()
    history: tuple[HistoryEntry, ...] = ()
    notices: tuple[Notice, ...] = ()
    control: AccuracyControl | None = None
    """None: nothing had to be done, or should be, to keep within the drop that is allowed."""
    losses: LossAccount | None = None
    """None: it was not analyzed."""
    made_for: str | None = None
    """The target, where the runtime that latency was measured in is not its own."""

    def __post_init__(self) -> None:
        assert self.created.tzinfo is not None

    @property
    def headline(self) -> Headline:
        """The first line."""
        return headline(self.original, self.compressed, self.metric, self.latency, made_for=self.made_for)

    @property
    def size_ratio(self) -> float:
        """Size of the compressed file / size of the original."""
        return self.compressed.size_bytes / self.original.size_bytes


def worst_first(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """Layers by falling damage: lowest signal-to-noise ratio first, not a number before all, not measured last."""

    def damage(layer: LayerRow) -> tuple[int, float]:
        if layer.snr_db is None:
            return (2, 0.0)
        return (0, 0.0) if math.isnan(layer.snr_db) else (1, layer.snr_db)

    return sorted(layers, key=damage)


def _why_missing(key: str, value: float) -> str:
    if math.isnan(value):
        return "not a number"
    return "infinite: equal to the original" if key == "snr_db" and value > 0 else "infinite"


def _plain(value: object, pointer: str, missing: dict[str, Json]) -> Json:
    """JSON form of a value; a number that JSON cannot hold becomes None, with its reason in `missing`."""
    if isinstance(value, float) and not math.isfinite(value):
        missing[pointer] = _why_missing(pointer.rpartition("/")[2], value)
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{pointer}/{_escaped(str(key))}", missing) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{pointer}/{index}", missing) for index, item in enumerate(value)]
    assert is_dataclass(value), f"{pointer} is a {type(value).__name__}, which a report cannot hold"
    # What a type computes from its fields is as much part of the report as the fields.
    computed = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
    names = [*computed, *(field.name for field in fields(value))]
    return {name: _plain(getattr(value, name), f"{pointer}/{name}", missing) for name in names}


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def as_json(report: object) -> dict[str, Json]:
    """A report, this or another dataclass, as plain JSON values; numbers that were computed from others included.

    NaN and infinity become None; the key `missing` has the reason for each, under its JSON pointer (RFC 6901). Any
    other None was not measured or does not apply.
    """
    missing: dict[str, Json] = {}
    content = _plain(report, "", missing)
    assert isinstance(content, dict)
    return {"schema_version": SCHEMA_VERSION, **content, "missing": missing}


def to_json(report: object) -> str:
    """Text of the JSON file of a report: equal reports give equal text."""
    return json.dumps(as_json(report), indent=2, allow_nan=False) + "\n"
