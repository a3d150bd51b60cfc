"""Post-training quantization in one call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from slimgraph.deploy.targets import Target
from slimgraph.errors import CalibrationError
from slimgraph.program.program import Program
from slimgraph.program.signature import samples_in
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import REPAIR_SAMPLES
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.preparation import prepare_and_plan, require_work
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, NEED_HISTOGRAM, range_algorithm
from slimgraph.quantization.repair import (
    AUTO,
    Repairs,
    best_repairs,
    repair_rounding,
    repair_scales,
    repairs_named,
)
from slimgraph.quantization.statistics import ValueStatistics
from slimgraph.training.data import open_data


def quantize(
    program: Program,
    *,
    calibration: str | Iterable[Any],
    target: str | Target = "onnxruntime",
    algorithm: str = DEFAULT_ALGORITHM,
    skip: Sequence[str] = (),
    operators: Sequence[str] | None = None,
    bias_correction: bool = True,
    repairs: Repairs | str | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    weight_per_channel: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Program:
    """The program with integer weights and quantized activations, as the target computes it.

    Args:
        program: a float program; it stays as it is.
        calibration: batches of real inputs, without labels, as `Signature.bind` takes them, or a specification of them
            (`open_data`); read once. A few hundred samples are enough.
        target: name of the runtime that will run the result (`slimgraph.deploy.targets`), or a `Target`.
            "onnxruntime" becomes "onnxruntime-avx2" on an x86 processor without VNNI; a `Target` stays what it is.
        algorithm: how ranges are chosen: abs_max, min_max, avg, hist, KL, mse, emd or ptf.
        skip: layers that stay float: names, globs, `re:…` or `op:…`.
        operators: what may be quantized, by kind ("convolution", "linear", …) or by the documents' names ("conv2d",
            "mul", …); `slimgraph targets` lists them. None is all that the target computes in integers.
        bias_correction: take each layer's mean rounding error off its bias. False is for `repairs` of None or "auto";
            other `repairs` say by themselves whether that is done, and may not contradict it.
        repairs: what else is done against rounding errors, also by names as "bias,smooth" (`repairs_of`); "auto" tries
            what is cheap, and keeps what makes the outputs more alike on samples that it was not made with. None is the
            correction of biases only.
        weight_bits: fewer bits for weights than the target's; one number, where `bits` of `compress` are choices.
        activation_bits: fewer bits for activations than the target's.
        weight_per_channel: False gives each weight one scale instead of one for each output channel.
        progress: called after each batch with the number of samples seen.
    Raises:
        CalibrationError, DataError: the data cannot be used.
        UnknownNameError, ConfigError: no such target, algorithm or layer, or the target has no kernel of that width.
        ProgramError: the program is none, is quantized already, has a weight that is NaN or infinite, or has nothing
            that the target computes in integers.

    >>> import torch
    >>> from slimgraph.program.capture import capture
    >>> program = capture(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    >>> quantize(program, calibration=[torch.randn(8, 4)]).state_dict()["weight"].dtype
    torch.int8
    """
    prepared, plan = prepare_and_plan(
        program,
        target,
        skip=skip,
        operators=operators,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_per_channel=weight_per_channel,
    )
    return quantize_with_record(
        prepared,
        plan,
        _batches(program, calibration),
        algorithm=algorithm,
        bias_correction=bias_correction,
        repairs=repairs,
        progress=progress,
    ).program


def _batches(program: Program, calibration: str | Iterable[Any]) -> Iterable[Any]:
    if isinstance(calibration, str):
        return (batch.inputs for batch in open_data(calibration, program.signature))
    if not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"The calibration data are a {type(calibration).__name__}; give batches of inputs, or a specification as "
            "calib.npz."
        )
    return calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A quantized program and how it came about."""

    program: Program
    prepared: Program
    """The float program that the plan speaks of, with its channels as the repairs scale them."""
    plan: QuantizationPlan
    """With ranges."""
    statistics: Mapping[str, ValueStatistics]
    algorithm: str
    """What chose the ranges."""
    samples: int
    """Of calibration data."""
    repair_batches: Sequence[Mapping[str, Tensor]] = ()
    """The first of the calibration data, with which the repairs were made."""
    repairs: Repairs = Repairs()  # noqa: RUF009 - it is frozen
    """Those that were made; what "auto" has chosen."""
    repair_noise: Mapping[str, float] = field(default_factory=dict)
    """Of the outputs, by what "auto" tried (`ChosenRepairs`); empty where nothing was tried."""


def quantize_with_record(
    prepared: Program,
    plan: QuantizationPlan,
    calibration: Iterable[Any],
    *,
    algorithm: str = DEFAULT_ALGORITHM,
    bias_correction: bool = True,
    repairs: Repairs | str | None = None,
    histograms: bool = False,
    progress: Callable[[int], None] | None = None,
    stage: Callable[[str], None] | None = None,
) -> Quantization:
    """What a plan makes of the program that it was made for, with all that led there.

    Args:
        prepared: as `prepare` gives it; it stays as it is.
        calibration, algorithm, bias_correction, repairs, progress: as for `quantize`.
        histograms: also in the statistics for an algorithm that does without.
        stage: told what begins.
    Raises:
        CalibrationError, DataError: the data cannot be used.
        UnknownNameError: no such algorithm.
        ProgramError: the plan quantizes nothing.
    """
    range_algorithm(algorithm)
    require_work(plan)
    wanted = repairs_named(repairs, bias_correction=bias_correction)
    say = stage or _say_nothing
    samples = 0

    def count(seen: int) -> None:
        nonlocal samples
        samples = seen
        if progress is not None:
            progress(seen)

    samples_kept = 2 * REPAIR_SAMPLES if wanted == AUTO else wanted.samples
    remembered = Remembering(prepared, calibration, samples=samples_kept)
    tried: Mapping[str, float] = {}
    if wanted == AUTO:
        say("Trying repairs")
        chosen = best_repairs(prepared, plan, remembered.first(), algorithm=algorithm, bias=bias_correction)
        scaled, made, tried = chosen.program, chosen.repairs, chosen.noise
    else:
        made = wanted
        scaled = repair_scales(prepared, plan, remembered.first(), made) if made.rescales else prepared
    say("Calibrating")
    statistics = collect_statistics(
        scaled,
        values_to_observe(plan),
        remembered,
        histogram=histograms or algorithm in NEED_HISTOGRAM,
        progress=count,
    )
    ranged = choose_ranges(plan, statistics, algorithm=algorithm)
    if made.bias or made.rounding is not None:
        say("Correcting biases" if made.rounding is None else "Learning to round")
    rounded, ranged = repair_rounding(scaled, ranged, remembered.batches, made)
    return Quantization(
        program=apply_quantization(rounded, ranged),
        prepared=scaled,
        plan=ranged,
        statistics=statistics,
        algorithm=algorithm,
        samples=samples,
        repair_batches=tuple(remembered.batches),
        repairs=made,
        repair_noise=tried,
    )


def quantize_again(
    done: Quantization,
    plan: QuantizationPlan,
    calibration: Iterable[Any],
    *,
    algorithm: str | None = None,
    repairs: Repairs | None = None,
) -> Quantization:
    """What another plan makes of the same program, without another pass over the data wherever that can be.

    Args:
        done: a quantization of the program, whose statistics hold histograms.
        plan: without ranges it gets them from the statistics; a value whose scale was another's takes that one's.
        calibration: read only if the plan needs the range of a value that has no statistics yet.
        algorithm: another than before.
        repairs: others than before, but those that rescale channels: these are made already.
    Raises:
        ProgramError: the plan quantizes nothing.
    """
    require_work(plan)
    repairs = done.repairs if repairs is None else repairs
    algorithm = done.algorithm if algorithm is None else algorithm
    statistics = dict(done.statistics)
    for activation in done.plan.activations:
        if activation.range_of in statistics:
            statistics.setdefault(activation.value, statistics[activation.range_of])
    if missing := [name for name in values_to_observe(plan) if name not in statistics]:
        statistics |= collect_statistics(done.prepared, missing, calibration)
    ranged = plan if plan.ranges else choose_ranges(plan, statistics, algorithm=algorithm)
    if done.repairs.reaches:  # they find the reach again, for the grids that weights have now
        before = done.plan.weight_reach
        own = {name: reach for name, reach in ranged.weight_reach.items() if reach != before.get(name)}
        ranged = replace(ranged, weight_reach=own)
    rounded, ranged = repair_rounding(done.prepared, ranged, done.repair_batches, repairs)
    return replace(
        done,
        program=apply_quantization(rounded, ranged),
        plan=ranged,
        statistics=statistics,
        algorithm=algorithm,
        repairs=repairs,
    )


def _say_nothing(stage: str) -> None:
    """Progress that nobody asked for."""


class Remembering:
    """Hands on batches and keeps the first samples, so that data which can be read only once serves several passes."""

    def __init__(self, program: Program, batches: Iterable[Any], *, samples: int) -> None:
        self._program, self._samples = program, samples
        self._source = enumerate(batches)
        self._kept = 0
        self.batches: list[dict[str, Tensor]] = []

    def first(self) -> list[dict[str, Tensor]]:
        """The batches that are kept, read now if they were not before."""
        while self._kept < self._samples and self._next() is not None:
            pass
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from list(self.batches)
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> dict[str, Tensor] | None:
        for index, batch in self._source:
            bound = self._program.signature.bind(batch, where=f"Calibration batch {index}")
            if self._kept < self._samples:
                self.batches.append(bound)
                self._kept += samples_in(bound)
            return bound
        return None
