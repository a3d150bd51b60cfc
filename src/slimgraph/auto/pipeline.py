"""Compress a program from end to end, with the proof: files, and a report of what was measured."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Literal, TypedDict, Unpack, overload

from slimgraph.auto.account import report_of, with_result
from slimgraph.auto.accuracy import Means, control_accuracy, held_out
from slimgraph.auto.analyze import losses_of
from slimgraph.auto.given_data import Data, first_samples, open_given
from slimgraph.auto.measurements import Judged, Measurements, drop_of, lost_us, measure
from slimgraph.auto.notices import (
    bits_notices,
    capture_notices,
    control_notices,
    metric_notices,
    placement_notices,
    speed_notices,
    tail_notices,
    target_notices,
    uncalibrated_notices,
    uncontrolled_notices,
)
from slimgraph.auto.outcome import Progress, is_measured
from slimgraph.auto.result_files import ResultFiles
from slimgraph.auto.staging import staging
from slimgraph.auto.uncalibrated import made_up, uncalibrated
from slimgraph.auto.widths import Widths, as_budget, as_widths
from slimgraph.deploy.ort import export_ort
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.deploy.targets import resolved_target
from slimgraph.errors import ConfigError
from slimgraph.program.archive import save_program
from slimgraph.program.count import count
from slimgraph.program.program import Program
from slimgraph.quantization.correct_bias import REPAIR_SAMPLES
from slimgraph.quantization.mixed_bits import Budget, MixedBits
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization, quantize_with_record
from slimgraph.quantization.preparation import prepare, require_quantizable, require_work
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, range_algorithm
from slimgraph.quantization.repair import AUTO, Repairs, repairs_named
from slimgraph.report.content import Notice, Report
from slimgraph.report.facts import AccuracyControl, MetricResult
from slimgraph.report.page import write_report
from slimgraph.training.data import DataSource
from slimgraph.training.evaluate import evaluate, find_metric

FILES = ("model.onnx", "model.pt2", "report.html", "report.json")
"""What a compression writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What a compression gave."""

    report: Report
    program: Program
    """As in `model.pt2`."""
    plan: QuantizationPlan
    """What was done, with the ranges that were chosen."""
    files: Mapping[str, Path]
    """By name: `FILES`, `model.onnx.data` where the weights do not fit into one ONNX file, `model.ort` for "mobile"."""

    def __repr__(self) -> str:
        return f"Compression({self.report.headline.text!r}, files={', '.join(map(str, self.files.values()))})"

    @property
    def drop_exceeded(self) -> bool:
        """Whether more was lost than `max_drop` allows."""
        return self.report.metric is not None and self.report.metric.exceeds_max_drop


class CompressOptions(TypedDict, total=False):
    """How to compress; see `compress`."""

    eval_data: Data | None
    target: str
    metric: str
    max_drop: float
    control: bool | None
    analyze: bool | None
    algorithm: str
    repairs: Repairs | str | None
    skip: Sequence[str]
    bits: int | Sequence[int]
    activation_bits: int | Sequence[int]
    budget: Budget | str | None
    weights_only: bool
    group: int | None
    dynamic: bool
    seed: int
    threads: int
    progress: Progress | None
    title: str | None
    command: str | None
    float_reference: str | os.PathLike[str] | None


@overload
def compress(
    program: Program,
    data: Data | None = None,
    *,
    out: str | os.PathLike[str],
    dry_run: Literal[False] = False,
    **options: Unpack[CompressOptions],
) -> Compression: ...


@overload
def compress(
    program: Program,
    data: Data | None = None,
    *,
    out: str | os.PathLike[str],
    dry_run: Literal[True],
    **options: Unpack[CompressOptions],
) -> QuantizationPlan: ...


def compress(
    program: Program,
    data: Data | None = None,
    *,
    out: str | os.PathLike[str],
    eval_data: Data | None = None,
    target: str = "onnxruntime",
    metric: str = "top1",
    max_drop: float = 0.01,
    control: bool | None = None,
    analyze: bool | None = None,
    algorithm: str = DEFAULT_ALGORITHM,
    repairs: Repairs | str | None = None,
    skip: Sequence[str] = (),
    bits: int | Sequence[int] = (),
    activation_bits: int | Sequence[int] = (),
    budget: Budget | str | None = None,
    weights_only: bool = False,
    group: int | None = None,
    dynamic: bool = False,
    seed: int = 0,
    threads: int = 1,
    dry_run: bool = False,
    progress: Progress | None = None,
    title: str | None = None,
    command: str | None = None,
    float_reference: str | os.PathLike[str] | None = None,
) -> Compression | QuantizationPlan:
    """The program in int8, written to `out` as ONNX and as a program, with a report of what was gained and lost.

    Ranges are calibrated on `data`; labels there are ignored. Without ranges, as `weights_only` and `dynamic` have it,
    data are needed by those only who want to know what is lost. Both models are measured in ONNX Runtime: the metric on
    `eval_data`, or where it has no labels how often the answers agree; latency call by call in turn. The ONNX file is
    checked against the program. Either all files are written or none, and an older result stays until then.

    Args:
        data: what `open_data` takes, or batches that can be read more than once. None is for `weights_only` and
            `dynamic`: without `eval_data` nothing is judged then.
        out: folder of the result.
        eval_data: as `data`; None measures agreement on the calibration data.
        target: where the model will run. "onnxruntime" becomes "onnxruntime-avx2" on an x86 processor without VNNI.
        metric: "top1", "top5" or "module:callable"; higher is better.
        max_drop: how much of the metric may be lost, absolute. A result that lost more is written, and says so first.
        control: when more is lost, look for other ranges and repairs, and give the fewest layers more bits that need
            them, or take them out of the quantization. None: where `eval_data` has labels and no budget chooses bits;
            True: also with a budget, and to let the answers agree with the original's.
        analyze: tell in the report which layers make the loss, and why. None: where that takes a second at most.
        algorithm: how ranges are chosen: abs_max, min_max, avg, hist, KL, mse, emd or ptf.
        repairs: what is done against rounding errors, as for `quantize`: `Repairs`, or a text as "auto", "none",
            "bias,smooth". None: biases are corrected, and `control` may choose others; weights of up to 6 bits get
            what "auto" finds from the beginning.
        skip: layers that stay float, as `select` takes them.
        bits: of weights: one number, as `weight_bits` of `quantize`; several are choices for each layer, of which 32
            is float. None: the target's.
        activation_bits: as `bits`, of activations.
        budget: what the result may have of the original, as "size=0.2", "latency=0.6" or "bops=0.05": within it the
            bits are chosen that bring the least noise.
        weights_only: activations stay in float, weights get 8 bits or those of `bits`. With `data` they are rounded so
            that layers answer as before on it (GPTQ), without to the nearest.
        group: of weights alone: how many weights of an output share a scale, 16 to 256; None is all of them.
        dynamic: what linear layers read becomes integers on ranges that are taken when the program runs.
        seed: of all that is random.
        threads: with which latency is measured.
        dry_run: return the plan, and measure and write nothing.
        progress: told what is going on.
        title: of the report; None takes the name of the captured module.
        command: what the report says one has to type to get it again.
        float_reference: `.onnx` file to measure against; None is the program itself, as ONNX.
    Raises:
        SlimgraphError: anything given cannot be used, the program has nothing to quantize, or the ONNX file does not
            compute what the program computes.
    """
    _check(program, metric=metric, algorithm=algorithm, max_drop=max_drop, threads=threads)
    unranged = uncalibrated(
        weights_only=weights_only,
        dynamic=dynamic,
        group=group,
        bits=as_widths(bits),
        activation_bits=as_widths(activation_bits),
        budget=budget,
        algorithm=algorithm,
        repairs=repairs,
        control=control,
        analyze=analyze,
    )
    if data is None and unranged is None:
        raise ConfigError(
            "Ranges are calibrated on data, and none were given. Give some (data=, --data); weights alone and ranges "
            "at inference (weights_only, dynamic; --weights-only, --dynamic) need none."
        )
    resolved = resolved_target(target)
    widths = Widths(weights=as_widths(bits), activations=as_widths(activation_bits), budget=as_budget(budget))
    by_default: Repairs | Literal["auto"] = AUTO if widths.are_narrow else Repairs()
    wanted = by_default if repairs is None else repairs_named(repairs)
    given = None if data is None else open_given(data, program.signature, what="data", seed=seed)
    evaluation = None if eval_data is None else open_given(eval_data, program.signature, what="eval_data", seed=seed)
    calibration = given or evaluation or made_up(program.signature)
    _try_out(program, calibration, evaluation, metric, float_reference)
    original = prepare(program, target=resolved)

    def replan(mixed: MixedBits | None, spared: Mapping[str, str] = MappingProxyType({})) -> QuantizationPlan:
        if unranged is not None:
            return unranged.plan(original, resolved, skip)
        return widths.plan(original, resolved, skip, mixed, spared)

    plan = replan(None)
    if dry_run:
        return plan
    if unranged is None:
        require_work(plan)
    say = progress or _say_nothing
    how = Judged(
        calibration=calibration, evaluation=evaluation, metric=metric, max_drop=max_drop, seed=seed, threads=threads
    )
    with staging(out) as folder, TemporaryDirectory(dir=folder) as scratch:
        if unranged is not None:
            say("Rounding weights", 0, None)
            quantized = unranged.quantized(original, plan, given)
        else:
            repaired = Repairs() if widths.are_choices else wanted
            quantized = _quantized(original, plan, calibration, algorithm, repaired, say)
        files = ResultFiles(
            program,
            folder / "model.onnx",
            Path(scratch),
            float_reference,
            # Weights alone have kernels that read them as they are.
            narrow=resolved.startswith("onnxruntime") and not weights_only,
        )
        mixed = None
        if widths.are_choices:
            mixed = widths.chosen(quantized, files, how, say)
            quantized = _quantized(original, replan(mixed), calibration, algorithm, wanted, say)
        judged: MetricResult | None = None
        if given is None and evaluation is None:
            files.write_checked(quantized.program, how, say)
        else:
            judged = files.write(quantized.program, how, say)
        controlled = None
        unasked = how.labelled is not None and mixed is None  # what it spares costs some of a budget
        tightens = unranged is None and (unasked if control is None else control)
        if judged is not None and judged.exceeds_max_drop and tightens:
            again = partial(replan, mixed)

            def repair(chosen: str) -> Quantization:
                return _quantized(original, again({}), calibration, chosen, AUTO, say)

            quantized, judged, controlled = _controlled(
                quantized, judged, again, repair if repairs is None and wanted != AUTO else None, files, how, say
            )
        if resolved.startswith("mobile"):
            say("Writing the file for mobile runtimes", 0, None)
            export_ort(folder / "model.onnx", folder / "model.ort", next(iter(calibration)).inputs)
        found = measure(files.reference, files.head, quantized.prepared, quantized.program, how, say, metric=judged)
        losses = losses_of(quantized, calibration, found.comparison, wanted=analyze) if unranged is None else None
        say("Writing the report", 0, None)
        result = with_result(quantized, found)
        save_program(result, folder / "model.pt2")
        report = report_of(
            quantized,
            found,
            (
                *target_notices(resolved if weights_only else target, resolved),
                *uncalibrated_notices(quantized),
                *_rewritten_notices(program, float_reference),
                *bits_notices(mixed),
                *uncontrolled_notices(found.metric, mixed, control),
                *control_notices(controlled, found.metric),
                *_notices(program, quantized, found, how),
            ),
            control=controlled,
            losses=losses,
            after=result,
            title=title or _title(program),
            command=command
            or f"slimgraph.compress(program, {'' if data is None else 'data, '}out={os.fspath(out)!r}, …)",
        )
        write_report(report, folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return Compression(
        report=report, program=result, plan=quantized.plan, files={name: Path(out) / name for name in names}
    )


def _check(program: Program, *, metric: str, algorithm: str, max_drop: float, threads: int) -> None:
    """Refuse what is wrong before any work is done."""
    require_quantizable(program)
    find_metric(metric)
    range_algorithm(algorithm)
    if not (isinstance(max_drop, (int, float)) and math.isfinite(max_drop) and max_drop >= 0):
        raise ConfigError(
            f"max_drop is {max_drop!r}; give 0 or more, in the metric's unit: 0.01 is one point of accuracy."
        )
    if threads < 1:
        raise ConfigError(f"threads is {threads}; give 1 or more.")


def _try_out(
    program: Program,
    calibration: DataSource,
    evaluation: DataSource | None,
    metric: str,
    float_reference: str | os.PathLike[str] | None,
) -> None:
    """Use metric and reference on one batch, so that one that does not fit is found before the work, not after it."""
    if evaluation is not None and is_measured(metric, evaluation):
        evaluate(program, islice(evaluation, 1), metric=metric)
    if float_reference is not None:
        reference = OnnxModel.open(float_reference)
        reference.signature.bind(next(iter(calibration)).inputs, where=f"A batch for {os.fspath(float_reference)}")
        wanted, found = ([spec.name for spec in model.signature.outputs] for model in (program, reference))
        if program.tail is not None and not set(wanted) <= set(found):
            raise ConfigError(
                f"{os.fspath(float_reference)} computes {', '.join(found)}. Measured is the network without its "
                f"post-processing, which computes {', '.join(wanted)}. Leave the reference out."
            )


def _quantized(
    original: Program,
    plan: QuantizationPlan,
    calibration: DataSource,
    algorithm: str,
    repairs: Repairs | Literal["auto"],
    say: Progress,
) -> Quantization:
    return quantize_with_record(
        original,
        plan,
        (batch.inputs for batch in calibration),
        algorithm=algorithm,
        repairs=repairs,
        histograms=True,  # the report shows them
        progress=lambda seen: say("Calibrating", seen, calibration.samples),
        stage=lambda name: say(name, 0, None),
    )


def _controlled(
    quantized: Quantization,
    metric: MetricResult,
    replan: Callable[[Mapping[str, str]], QuantizationPlan],
    repair: Callable[[str], Quantization] | None,
    files: ResultFiles,
    how: Judged,
    say: Progress,
) -> tuple[Quantization, MetricResult, AccuracyControl]:
    """The quantization that loses no more than allowed, what its file loses, and what was done.

    Where there is none, the one that was given, whose file is there again.
    """
    signature = quantized.program.signature
    written, judged = quantized, metric

    def confirm(candidate: Quantization) -> float:
        nonlocal written, judged
        written, judged = candidate, files.write(candidate.program, how, say)
        return judged.drop

    means = Means(
        replan=replan,
        repair=repair,
        drop_of=lambda program: drop_of(program, quantized.prepared, metric, how),
        confirm=confirm,
        # Other targets' files run here as well, but what their runtimes fuse is not seen here.
        lost_us=lambda: (
            lost_us(files.reference, files.head, signature, how)
            if quantized.plan.target.startswith(("onnxruntime", "mobile"))
            else {}
        ),
        calibration=lambda: (batch.inputs for batch in how.calibration),
        held_out=held_out(
            first_samples(how.calibration, signature, 2 * REPAIR_SAMPLES), skipped=REPAIR_SAMPLES // 8, most=4
        ),
        say=say,
    )
    assert metric.max_drop is not None
    final, account = control_accuracy(quantized, means, limit=metric.max_drop, drop=metric.drop)
    if final is not written:
        confirm(final)
    return final, judged, account


def _notices(program: Program, quantized: Quantization, found: Measurements, how: Judged) -> Iterator[Notice]:
    chosen_on = how.evaluation is None and quantized.samples > 0
    yield from metric_notices(found.metric, on_calibration_data=chosen_on, limit=how.max_drop)
    yield from speed_notices(quantized.plan, found.kernels_after, found.latency)
    yield from placement_notices(quantized.plan, count(quantized.prepared))
    yield from capture_notices(program.history)
    yield from tail_notices(program.tail)


def _rewritten_notices(program: Program, float_reference: str | os.PathLike[str] | None) -> Iterator[Notice]:
    """What the original was, where it was not the file that the program came from."""
    if float_reference is None and any(entry.step.startswith("import_") for entry in program.history):
        yield Notice(
            level="notice",
            text="The original whose size and latency are told is the imported model written again as ONNX, not the "
            "file that it was read from, whose own may differ.",
        )


def _title(program: Program) -> str:
    """Name of the class of the captured module, where the history has it."""
    for entry in program.history:
        if isinstance(module := entry.parameters.get("module"), str):
            return module.rpartition(".")[2]
    return "Model"


def _say_nothing(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""
