"""What a structured pruning removes from a program."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from slimgraph.errors import ConfigError, first_fault
from slimgraph.table import text_table


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedGroup:
    """Which indices of a group go."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    size: int
    """Before."""
    removed: tuple[int, ...]
    """In ascending order; never all."""

    def __post_init__(self) -> None:
        wrong = [index for index in self.removed if not 0 <= index < self.size]
        if wrong or list(self.removed) != sorted(set(self.removed)):
            raise ConfigError(
                f"The group {self.name!r} has the indices 0 to {self.size - 1}; {list(wrong or self.removed)[:5]} "
                "cannot be removed. Give each once, in ascending order."
            )
        if len(self.removed) >= self.size:
            raise ConfigError(f"All {self.size} indices of the group {self.name!r} would go. Leave at least one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningPlan:
    """What a structured pruning removes: indices by group, and what that means for each tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    groups: tuple[PrunedGroup, ...]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    """The indices that stay, by tensor and axis, in order; tensors and axes that stay whole are left out."""
    norm_axes: bool = False
    """Whether axes may be among them that a layer or group norm runs over."""
    reached: float | None = None
    """The part of the cost that goes, where a part of one was asked for: indices are whole, so it is a little more."""

    def table(self) -> str:
        """A line for each group."""
        rows = [(g.name, g.size, g.size - len(g.removed), f"{len(g.removed) / g.size:.0%}") for g in self.groups]
        return text_table(("group", "indices", "left", "removed"), rows)

    def to_json(self) -> str:
        """The plan as JSON text, which `pruning_plan_from_json` reads."""
        return _ADAPTER.dump_json(self, indent=1).decode()


_ADAPTER = TypeAdapter(PruningPlan)


def pruning_plan_from_json(text: str) -> PruningPlan:
    """The plan that `PruningPlan.to_json` wrote.

    Raises:
        ConfigError: the text is no such plan; the message says where.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"This is no pruning plan: {first_fault(error)}.") from error
