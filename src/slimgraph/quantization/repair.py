"""Which repairs make a quantized program answer more like its float twin, and in which order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor

from slimgraph.errors import ConfigError, closest
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.quantization.agreement import output_noise
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import REPAIR_SAMPLES, correct_bias, correct_weights
from slimgraph.quantization.equalization import equalize
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.ranges import NEED_HISTOGRAM
from slimgraph.quantization.reach import NARROW_BITS, with_best_reach
from slimgraph.quantization.reconstruction import reconstruct
from slimgraph.quantization.samples import first_batches
from slimgraph.quantization.smoothing import ALPHAS, smooth

_Batches: TypeAlias = Sequence[Mapping[str, Tensor]]

ROUNDING_SAMPLES = 1024

_FEWEST = 4

_LEAST_GAIN = 0.02
"""The part of the noise that a repair has to take away in order to be kept."""


_RESCALING = ("smooth", "equalize")

AUTO: Literal["auto"] = "auto"
"""The name of the repairs that `best_repairs` chooses."""

NONE = "none"

_NOTHING = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """What is done beside rounding to the nearest, in this order; each leaves the float function as it was."""

    equalize: bool = False
    """Equal weight ranges from layer to layer (`equalize`)."""
    smooth: bool | float = False
    """Outlying channels of activations go into weights (`smooth`): True looks for the best strength of each link, a
    number is the strength of all."""
    reach: bool = False
    """Weights of few bits get the grid of least squared error instead of one that covers the largest (`reach`)."""
    weights: bool = False
    """Rounding makes no channel of a weight weaker or stronger (`correct_weights`)."""
    rounding: Literal["layer", "block"] | None = None
    """Rounding up or down is learned (`reconstruct`): minutes."""
    bias: bool = True
    """Biases take up what rounding shifts on average (`correct_bias`)."""

    def __post_init__(self) -> None:
        if self.rounding not in (None, "layer", "block"):
            raise ConfigError(f"rounding is {self.rounding!r}. {closest(str(self.rounding), ['layer', 'block'])}")
        if not 0 <= self.smooth <= 1:
            raise ConfigError(f"smooth is {self.smooth}; give True, False or a strength from 0 to 1, such as 0.5.")

    def __str__(self) -> str:
        """As `repairs_of` reads it.

        >>> str(Repairs(smooth=0.5, rounding="layer"))
        'smooth=0.5,rounding=layer,bias'
        """
        made = {name: getattr(self, name) for name in self.names}
        return ",".join(name if value is True else f"{name}={value}" for name, value in made.items()) or NONE

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that are made."""
        values = {found.name: getattr(self, found.name) for found in fields(self)}
        return tuple(name for name, value in values.items() if value is not False and value is not None)

    @property
    def samples(self) -> int:
        """Calibration samples that the repairs are made with."""
        return REPAIR_SAMPLES if self.rounding is None else ROUNDING_SAMPLES

    @property
    def rescales(self) -> bool:
        """Whether any of them changes the ranges of activations."""
        return self.equalize or self.smooth is not False

    @property
    def reaches(self) -> bool:
        """Whether any of them changes how far the grids of weights reach."""
        return self.reach or self.weights or self.rounding is not None

    @property
    def scales(self) -> "Repairs":
        """Of these the ones that change the ranges of activations: they come before calibration."""
        return Repairs(equalize=self.equalize, smooth=self.smooth, bias=False)


def repairs_of(text: str) -> "Repairs | Literal['auto']":
    """The repairs that a text names: "auto", "none", or one after another; what is not named is not made.

    Raises:
        ConfigError: a name is of no repair, or has a value that it does not take.

    >>> repairs_of("bias, smooth=0.5") == Repairs(bias=True, smooth=0.5)
    True
    """
    if text == AUTO:
        return AUTO
    wanted: dict[str, Any] = {"bias": False}
    for part in [] if text == NONE else text.split(","):
        name, is_given, value = (word.strip() for word in part.partition("="))
        names = [found.name for found in fields(Repairs)]
        if name not in names:
            raise ConfigError(f"repairs is {text!r}. There is no {name!r}. {closest(name, [*names, AUTO, NONE])}")
        wanted[name] = True
        if name == "rounding":
            wanted[name] = value
        elif is_given and name == "smooth":
            wanted[name] = _strength(value)
        elif is_given:
            raise ConfigError(f"repairs has {part.strip()!r}, but {name} takes no value: name it, or leave it out.")
    return Repairs(**wanted)


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"smooth is {text!r}; give a strength from 0 to 1, as smooth=0.5, or smooth alone.") from None


def repairs_named(given: "Repairs | str | None", *, bias_correction: bool = True) -> "Repairs | Literal['auto']":
    """The repairs that were asked for; without any the correction of biases, if that.

    Raises:
        ConfigError: it is something else, or `bias_correction` says another thing than `given`.
    """
    if given is None:
        return Repairs(bias=bias_correction)
    if not isinstance(given, (Repairs, str)):
        raise ConfigError(f'repairs is {given!r}; give Repairs(…), "auto", "none", names as "bias,smooth", or None.')
    wanted = repairs_of(given) if isinstance(given, str) else given
    if not bias_correction and wanted != AUTO and wanted.bias:
        raise ConfigError("bias_correction is False, but repairs has bias. Leave bias_correction out.")
    return wanted


def repair_scales(program: Program, plan: QuantizationPlan, batches: Iterable[Any], repairs: Repairs) -> Program:
    """The float program with channels rescaled as `repairs` say: what comes before calibration.

    Args:
        plan: made for the program; it fits to the result as well.
        batches: the first samples of the calibration data.
    """
    if repairs.equalize:
        program = equalize(program)
    if repairs.smooth is not False and repairs.smooth is not True:
        return smooth(program, plan, batches, alpha=repairs.smooth)
    return smooth(program, plan, batches, alpha=ALPHAS) if repairs.smooth else program


def repair_rounding(
    program: Program, plan: QuantizationPlan, batches: Iterable[Any], repairs: Repairs
) -> tuple[Program, QuantizationPlan]:
    """The float program and plan that `apply_quantization` rounds as `repairs` say: what comes after calibration.

    Args:
        plan: with ranges.
        batches: the first samples of the calibration data, `repairs.samples` of them if there are as many; they are
            read several times.
    """
    reference = program
    if repairs.reach:
        plan = with_best_reach(program, plan)
    if repairs.weights:
        program, plan = correct_weights(program, plan)
    if repairs.rounding is not None:
        program, plan = reconstruct(program, plan, batches, regions=repairs.rounding, samples=ROUNDING_SAMPLES)
    if repairs.bias:
        program = correct_bias(program, plan, batches, reference=reference)
    return program, plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRepairs:
    """The repairs that were chosen."""

    program: Program
    """The float program, with its channels as they rescale them."""
    repairs: Repairs
    noise: Mapping[str, float]
    """Of the outputs, by what was tried: each with those that were kept before it, and first "nothing" at all."""


def best_repairs(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    algorithm: str,
    bias: bool = True,
) -> ChosenRepairs:
    """The cheap repairs that lower the noise of the outputs.

    One after the other is tried with those that are kept already: made and calibrated on one half of the samples,
    measured on the other one. It is kept where it takes away 2 % of the noise at least. Nothing that learns is tried.

    Args:
        plan: made for the program, without ranges.
        batches: calibration data; the first 64 samples are used. With fewer than four nothing is tried.
        algorithm: what will choose the ranges.
        bias: False tries no correction of biases.
    """
    fitted, held_out = _halves(program, list(first_batches(program, batches, 2 * REPAIR_SAMPLES)))
    best = Repairs(bias=False)
    if not fitted:
        return ChosenRepairs(program=program, repairs=replace(best, bias=bias), noise={})
    trials = _Trials(program, plan, fitted, held_out, algorithm)
    noise = trials.noise(best)
    tried = {_NOTHING: noise}
    narrow = any(weight.scheme.bits <= NARROW_BITS for weight in plan.weights)
    candidates = [*(["bias"] if bias else []), *_RESCALING, *(["weights", "reach"] if narrow else [])]
    for name in candidates:
        wanted: dict[str, Any] = {name: True}
        more = replace(best, **wanted)
        if name in _RESCALING and not trials.differ(best, more):
            continue
        tried[name] = found = trials.noise(more)
        if found < (1 - _LEAST_GAIN) * noise:
            best, noise = more, found
        trials.forget_all_but(best)
    kept: list[Json] = [name for name in tried if name != _NOTHING and getattr(best, name)]
    told: dict[str, Json] = {**tried}
    entry = HistoryEntry(step="choose_repairs", parameters={"kept": kept}, result={"noise": told})
    return ChosenRepairs(program=trials.rescaled(best).with_history(entry), repairs=best, noise=tried)


def _halves(program: Program, batches: _Batches) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Samples to fit on and others to judge on; nothing where there are too few."""
    batched = program.signature.batched
    if not batched:
        middle = len(batches) // 2
        return [dict(batch) for batch in batches[:middle]], [dict(batch) for batch in batches[middle:]]
    fitted: list[dict[str, Tensor]] = []
    held_out: list[dict[str, Tensor]] = []
    samples = sum(len(batch[min(batched)]) for batch in batches)
    if samples < _FEWEST:
        return fitted, held_out
    missing = samples // 2
    for batch in batches:
        for side, part in ((fitted, slice(missing)), (held_out, slice(missing, None))):
            rows = {name: x[part] if name in batched else x for name, x in batch.items()}
            if len(rows[min(batched)]):
                side.append(rows)
        missing = max(0, missing - len(batch[min(batched)]))
    return fitted, held_out


class _Trials:
    """Quantizes the program with repairs, as often as asked; what was rescaled and calibrated once is kept."""

    def __init__(
        self, program: Program, plan: QuantizationPlan, fitted: _Batches, held_out: _Batches, algorithm: str
    ) -> None:
        self._program, self._plan = program, plan
        self._fitted, self._held_out, self._algorithm = fitted, held_out, algorithm
        self._ready: dict[Repairs, tuple[Program, QuantizationPlan]] = {}

    def rescaled(self, repairs: Repairs) -> Program:
        """The float program as the repairs rescale it."""
        return self._calibrated(repairs.scales)[0]

    def differ(self, repairs: Repairs, others: Repairs) -> bool:
        """Whether they rescale the program in different ways."""
        one, other = (self.rescaled(given).state_dict() for given in (repairs, others))
        return any(not tensor.equal(other[name]) for name, tensor in one.items() if name in other)

    def forget_all_but(self, repairs: Repairs) -> None:
        """Give back the memory of what was tried with other scales."""
        self._ready = {scales: ready for scales, ready in self._ready.items() if scales == repairs.scales}

    def noise(self, repairs: Repairs) -> float:
        """Of the outputs that were not calibrated on."""
        program, plan = repair_rounding(*self._calibrated(repairs.scales), self._fitted, repairs)
        return output_noise(self._program, apply_quantization(program, plan), self._held_out)

    def _calibrated(self, scales: Repairs) -> tuple[Program, QuantizationPlan]:
        if scales not in self._ready:
            program = repair_scales(self._program, self._plan, self._fitted, scales)
            histogram = self._algorithm in NEED_HISTOGRAM
            statistics = collect_statistics(program, values_to_observe(self._plan), self._fitted, histogram=histogram)
            self._ready[scales] = program, choose_ranges(self._plan, statistics, algorithm=self._algorithm)
        return self._ready[scales]
