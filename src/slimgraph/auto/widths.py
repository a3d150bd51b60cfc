"""Take the bits that were asked for, and choose among them where there are several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slimgraph.auto.given_data import first_samples
from slimgraph.auto.measurements import Judged
from slimgraph.auto.outcome import Progress
from slimgraph.auto.result_files import ResultFiles
from slimgraph.deploy.layer_latency import measure_layer_latency
from slimgraph.deploy.targets import target_named
from slimgraph.errors import ConfigError
from slimgraph.program.program import Program
from slimgraph.quantization.mixed_bits import FLOAT, Budget, LayerTimes, MixedBits, budget_of, choose_bits
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization
from slimgraph.quantization.reach import NARROW_BITS
from slimgraph.quantization.sensitivity import measure_sensitivity

_BYTE = 8


def as_widths(given: int | Sequence[int]) -> tuple[int, ...]:
    """The bits that were given: one number, or several as choices."""
    return tuple(given) if isinstance(given, Sequence) else (given,)


def as_budget(given: Budget | str | None) -> Budget | None:
    """The budget that was given, perhaps as text."""
    return budget_of(given) if isinstance(given, str) else given


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Bits that layers may have."""

    weights: tuple[int, ...] = ()
    """None: the target's. `FLOAT` is a choice beside others."""
    activations: tuple[int, ...] = ()
    budget: Budget | None = None
    """Decides where there are several."""

    def __post_init__(self) -> None:
        for option, widths in (("bits", self.weights), ("activation_bits", self.activations)):
            for bits in widths:
                allowed = [*range(2, 17), FLOAT] if option == "bits" else range(2, 17)
                if not isinstance(bits, int) or bits not in allowed:
                    also = f", or {FLOAT} for float" if option == "bits" else ""
                    raise ConfigError(f"{option} has {bits!r}; give 2 to 16{also}.")
        if self.weights and set(self.weights) == {FLOAT}:
            raise ConfigError("bits has float only, which leaves nothing to quantize. Give another width beside it.")
        several = len({*self.weights}) > 1 or len({*self.activations}) > 1
        if several and self.budget is None:
            raise ConfigError("There are several choices of bits. Give a budget that decides, such as size=0.2.")
        if self.budget is not None and not several:
            raise ConfigError(f"The budget {self.budget} has nothing to decide. Give choices of bits, such as 4,8.")

    @property
    def are_choices(self) -> bool:
        """Whether bits have to be chosen."""
        return self.budget is not None

    @property
    def are_narrow(self) -> bool:
        """Whether weights may have so few bits that rounding has to be repaired."""
        return any(bits <= NARROW_BITS for bits in self.weights)

    def plan(
        self,
        program: Program,
        target: str,
        skip: Sequence[str],
        mixed: MixedBits | None,
        spared: Mapping[str, str],
    ) -> QuantizationPlan:
        """The plan with the widest of the bits, or with those that were chosen.

        Raises:
            ConfigError: the target computes with fewer bits.
        """
        weights, activations = self._for(target)
        floats = {} if mixed is None else dict.fromkeys(mixed.spared, f"it is in float within {mixed.budget}")
        plan = plan_quantization(
            program,
            target=target,
            skip=skip,
            spared={**floats, **spared},
            weight_bits=max(weights, default=None),
            activation_bits=max(activations, default=None),
        )
        return plan if mixed is None else mixed.on(plan)

    def _for(self, target: str) -> tuple[list[int], list[int]]:
        """The integer widths; where the target's byte has fewer bits that are used, 8 are those."""
        own = target_named(target).weight.bits
        weights = [min(bits, own) if bits == _BYTE else bits for bits in self.weights if bits != FLOAT]
        return sorted({*weights}), sorted({*self.activations})

    def chosen(self, quantized: Quantization, files: ResultFiles, how: Judged, say: Progress) -> MixedBits:
        """The bits with the least noise within the budget, as measured on the first of the calibration data.

        Raises:
            ConfigError: nothing is within it.
        """
        assert self.budget is not None
        say("Measuring sensitivity", 0, None)
        weights, activations = self._for(quantized.plan.target)
        sensitivity = measure_sensitivity(
            quantized.prepared,
            quantized.plan,
            quantized.repair_batches,
            weight_bits=weights,
            activation_bits=activations,
        )
        return choose_bits(
            quantized.prepared,
            quantized.plan,
            sensitivity,
            self.budget,
            weight_bits=[*weights, *([FLOAT] if FLOAT in self.weights else [])]
            or [quantized.plan.weights[0].scheme.bits],
            activation_bits=activations,
            times=self._times(quantized, files, how, say) if self.budget.kind == "latency" else None,
        )

    def _times(self, quantized: Quantization, files: ResultFiles, how: Judged, say: Progress) -> LayerTimes:
        files.export(quantized.program, say)
        say("Measuring layers", 0, None)
        sample = next(first_samples(how.calibration, quantized.program.signature, 1, at_once=1))
        floating, integer = (
            measure_layer_latency(file, sample, threads=how.threads) for file in (files.reference, files.head)
        )
        return LayerTimes(
            floating_us=floating.layers_us,
            integer_us=integer.layers_us,
            others_us=integer.others_us,
            floating_total_us=floating.total_us,
        )
