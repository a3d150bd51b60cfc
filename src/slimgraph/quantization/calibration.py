"""Measure the ranges of values by one pass over calibration data."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slimgraph.errors import CalibrationError, DataError
from slimgraph.program.parts import in_parts
from slimgraph.program.program import Program
from slimgraph.program.signature import samples_in
from slimgraph.program.watch import Watching, require_values
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, NEED_HISTOGRAM, range_algorithm
from slimgraph.quantization.statistics import ValueStatistics

See: TypeAlias = Callable[[str, Tensor, int], None]
"""Is shown a value: its name, the tensor, and the number of the batch that it is of, from 0."""


def collect_statistics(
    program: Program,
    values: Collection[str],
    batches: Iterable[Any],
    *,
    histogram: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, ValueStatistics]:
    """Statistics of the named values over all batches, in one pass and constant memory.

    Args:
        batches: what `Signature.bind` takes, each.
        histogram: also count values into histograms, which every algorithm but abs_max, min_max and avg needs.
        progress: called after each batch with the number of samples seen.
    Raises:
        CalibrationError: there is no batch, or a value has NaN or infinity; the message names value and batch.
        DataError: a batch does not fit the program.
    """
    statistics = {name: ValueStatistics(histogram=histogram) for name in values}
    observe(
        program,
        statistics,
        batches,
        lambda name, value, batch: statistics[name].update(value, name=name, batch=batch),
        progress=progress,
    )
    return statistics


def observe(
    program: Program,
    values: Collection[str],
    batches: Iterable[Any],
    see: See,
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run the program over all batches and show the named values as they appear, each batch in parts.

    Args:
        see: must not write into what it is shown, or keep it.
    Raises:
        UnknownNameError: there is no such value.
        CalibrationError: there is no batch.
        DataError: a batch does not fit the program, or has NaN or infinity.
    """
    require_values(program, values)
    index = 0
    runner = Watching(program, values, lambda name, value: see(name, value, index))
    was_training = program.training
    program.eval()
    seen = 0
    try:
        with torch.inference_mode():
            for index, batch in enumerate(batches):
                bound = program.signature.bind(batch, where=f"Calibration batch {index}")
                require_finite_inputs(bound, index)
                try:
                    for part in in_parts(program, bound):
                        runner.run(*(tensor.to(program.device) for tensor in part.values()))
                except IndexError as error:  # a row that a table has not got, asked for by the contents of the inputs
                    reason = str(error).partition("\n")[0]
                    raise DataError(f"Calibration batch {index} cannot be run by the program: {reason}.") from error
                seen += samples_in(bound)
                if progress is not None:
                    progress(seen)
    finally:
        program.train(was_training)
    if not seen:
        raise CalibrationError(
            "The calibration data has no batch. Give at least one; an iterator that was read before is empty."
        )


def require_finite_inputs(batch: Mapping[str, Tensor], index: int) -> None:
    """Return if the inputs of a calibration batch are numbers.

    Raises:
        DataError: one has NaN or infinity; the message names it, and the batch.
    """
    for name, tensor in batch.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"Calibration batch {index}: input {name!r} has NaN or infinite values. "
                "Repair those samples, or leave them out."
            )


def choose_ranges(
    plan: QuantizationPlan,
    statistics: Mapping[str, ValueStatistics],
    *,
    algorithm: str = DEFAULT_ALGORITHM,
    **options: Any,
) -> QuantizationPlan:
    """The plan with the range that `algorithm` reads from the statistics for each scale.

    A value behind a rectifier that will be left out starts at zero and ends where the rectifier cuts.

    Args:
        statistics: of `values_to_observe(plan)` at least.
        algorithm: a name in `RANGE_ALGORITHMS`.
        options: of that algorithm, as `hist_percent=0.9999` of hist.
    Raises:
        UnknownNameError: there is no such algorithm, or it has no such option.
        CalibrationError: the statistics lack a value, or the histograms that the algorithm reads.
    """
    choose = range_algorithm(algorithm, options)
    schemes = {quantizer.value: quantizer.scheme for quantizer in plan.activations}
    missing = [owner for owner in plan.range_owners if owner not in statistics]
    if missing:
        raise CalibrationError(
            f"The statistics lack {len(missing)} values of the plan, {missing[0]!r} first. "
            "Collect those of values_to_observe(plan)."
        )
    if algorithm in NEED_HISTOGRAM and any(statistics[owner].histogram is None for owner in plan.range_owners):
        raise CalibrationError(
            f"The algorithm {algorithm!r} reads histograms, and the statistics have none. "
            "Collect them with histogram=True."
        )
    ranges = {}
    for owner in plan.range_owners:
        low, high = choose(statistics[owner], schemes[owner], **options)
        if owner in plan.rectifiers:
            top = plan.rectifiers[owner]
            low, high = 0.0, high if top is None else min(high, top)
        ranges[owner] = (low, high)
    return plan.with_ranges(ranges)


def calibrate(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    algorithm: str = DEFAULT_ALGORITHM,
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> QuantizationPlan:
    """The plan with the ranges that `algorithm` finds in one pass over calibration data.

    To try several algorithms on one pass, call `collect_statistics` once and `choose_ranges` for each.

    Args:
        program: the one that the plan was made for, in float.
        batches: what `Signature.bind` takes, each.
        algorithm: abs_max, min_max, avg, hist, KL, mse, emd or ptf.
        progress: called after each batch with the number of samples seen.
        options: of that algorithm.
    Raises:
        UnknownNameError: there is no such algorithm, or it has no such option; nothing was read then.
        CalibrationError, DataError: the data cannot be used.
    """
    range_algorithm(algorithm, options)
    statistics = collect_statistics(
        program, values_to_observe(plan), batches, histogram=algorithm in NEED_HISTOGRAM, progress=progress
    )
    return choose_ranges(plan, statistics, algorithm=algorithm, **options)


def values_to_observe(plan: QuantizationPlan) -> tuple[str, ...]:
    """The values whose statistics the plan's ranges need: a value that is only moved adds nothing to its source's."""
    return plan.range_owners
