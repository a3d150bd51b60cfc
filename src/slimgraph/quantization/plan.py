"""What a quantization does to a program: which values and weights become integers, and on which grids."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from types import MappingProxyType
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from slimgraph.errors import ConfigError, UnknownNameError, closest, first_fault
from slimgraph.program.scheme import IntScheme
from slimgraph.table import text_table

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationQuantizer:
    """A value that becomes integers."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    value: str
    scheme: IntScheme
    everywhere: bool
    """Everything that reads the value reads the quantized one; otherwise only the operators that run in integers."""
    range_of: str
    """The value whose range sets the scale: itself, or the one with which it shares a scale."""
    known_range: tuple[float, float] | None = None
    """The range where no data are needed to know it: that of a softmax in integers."""
    dynamic: bool = False
    """The range is taken anew from every tensor at inference; nothing is calibrated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantizer:
    """A convolution or linear layer whose weight becomes integers."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    value: str
    """Name of the value that the layer produces."""
    weight: str
    """Qualified name of the weight."""
    scheme: IntScheme
    input: str | None
    """The quantized value that the layer reads; None where only the weight is in integers."""
    integer_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """What a quantization does to a program; without `ranges` it is a proposal, with them it can be applied."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    target: str
    activations: tuple[ActivationQuantizer, ...]
    weights: tuple[WeightQuantizer, ...]
    consumers: Mapping[str, tuple[str, ...]]
    """For values that are not quantized everywhere: the values of the operators that read the quantized one."""
    rectifiers: Mapping[str, float | None]
    """Activation functions that may be left out where the range performs them, with the value above which they cut;
    None where they never do."""
    kept_float: Mapping[str, str]
    """Layers with weights, and operators that could run in integers elsewhere, that do not here, and why."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest real value, by the value that owns the range."""
    weight_reach: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Largest magnitude that the grid of a weight covers, by layer value: one number, or one for each output channel,
    or one for each group of one channel after another.
    A layer that is not here takes the largest magnitude of its weight."""
    output_scales: Mapping[str, float] = field(default_factory=dict)
    """How large the outputs of operators were while the program trained, by value: the documents'
    `out_threshold`. Nothing here is computed with it."""

    def __post_init__(self) -> None:
        for name, (low, high) in self.ranges.items():
            if not (isfinite(low) and isfinite(high) and low <= high):
                raise ConfigError(f"The range of {name!r} is {low} … {high}; give two finite numbers, the lower first.")

    def table(self) -> str:
        """The plan as text: a line for each weight, and what stays in float."""
        rows = [(w.value, w.weight, w.scheme.described, w.input or "") for w in self.weights]
        lines = [text_table(("layer", "weight", "as", "reads"), rows)]
        lines += [f"{len(self.activations)} values are quantized for {self.target}."]
        lines += [f"{name} stays float: {why}." for name, why in self.kept_float.items()]
        return "\n".join(lines)

    def with_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> "QuantizationPlan":
        """The plan with measured ranges, beside those that need no measuring."""
        known = {a.value: a.known_range for a in self.activations if a.known_range is not None}
        missing = sorted(set(self.range_owners) - ranges.keys())
        if missing:
            raise ConfigError(
                f"The ranges lack {len(missing)} values, {missing[0]!r} first. Give one for each of `range_owners`."
            )
        return replace(self, ranges={**ranges, **known})

    def with_bits(
        self, weights: Mapping[str, int], activations: Mapping[str, int] = MappingProxyType({})
    ) -> "QuantizationPlan":
        """The plan with other widths for some layers' weights, and for some values.

        A value takes those with which it shares its scale along. A weight of another width loses its reach, which was
        that of its old grid; ranges stay.

        Args:
            weights: bits by layer.
            activations: bits by value.
        Raises:
            UnknownNameError: a name is of nothing that the plan quantizes.
            ConfigError: bits that no grid has.
        """
        quantizers = {activation.value: activation for activation in self.activations}
        layers = {weight.value: weight for weight in self.weights}
        for given, existing in ((weights, list(layers)), (activations, list(quantizers))):
            for name in given:
                if name not in existing:
                    raise UnknownNameError(f"The plan does not quantize {name!r}. {closest(name, existing)}")
        by_owner = {quantizers[name].range_of: bits for name, bits in activations.items()}
        changed = {name for name, bits in weights.items() if layers[name].scheme.bits != bits}
        return replace(
            self,
            weights=tuple(
                replace(weight, scheme=replace(weight.scheme, bits=weights.get(weight.value, weight.scheme.bits)))
                for weight in self.weights
            ),
            activations=tuple(
                replace(found, scheme=replace(found.scheme, bits=by_owner.get(found.range_of, found.scheme.bits)))
                for found in self.activations
            ),
            weight_reach={name: reach for name, reach in self.weight_reach.items() if name not in changed},
        )

    @property
    def range_owners(self) -> tuple[str, ...]:
        """Values whose statistics set the scales; each covers the values that share its scale."""
        known = {quantizer.value for quantizer in self.activations if quantizer.known_range is not None}
        owners = dict.fromkeys(quantizer.range_of for quantizer in self.activations if not quantizer.dynamic)
        return tuple(name for name in owners if name not in known)

    def require_ranges(self) -> None:
        """Return if the plan has the ranges that it needs.

        Raises:
            ConfigError: it was not calibrated yet, or lacks one.
        """
        missing = [owner for owner in self.range_owners if owner not in self.ranges]
        if missing:
            lacks = f"no range for {missing[0]!r}" if self.ranges else "no ranges"
            raise ConfigError(f"The plan has {lacks}. Calibrate it first: choose_ranges(plan, collect_statistics(…)).")

    def require_values(self, existing: Iterable[str]) -> None:
        """Return if a program with these values has every one that the plan speaks of.

        Raises:
            ConfigError: it lacks one.
        """
        known = dict.fromkeys(existing)
        for name in (*(a.value for a in self.activations), *(w.value for w in self.weights)):
            if name not in known:
                raise ConfigError(
                    f"The plan speaks of the value {name!r}, which this program does not have. {closest(name, known)} "
                    "Apply it to the program that it was made for: one that `prepare` gave, if that was."
                )

    def to_json(self) -> str:
        """The plan as JSON text, which `plan_from_json` reads."""
        return _ADAPTER.dump_json(self, indent=1).decode()


_ADAPTER = TypeAdapter(QuantizationPlan)


def plan_from_json(text: str) -> QuantizationPlan:
    """The plan that `QuantizationPlan.to_json` wrote.

    Raises:
        ConfigError: the text is no such plan; the message says where.
    """
    try:
        return _ADAPTER.validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(f"This is no quantization plan: {first_fault(error)}.") from error
