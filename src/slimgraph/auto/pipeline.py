"""Compress a program from end to end, with the proof: files, and a report of what was measured."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypedDict, Unpack, overload

from slimgraph.auto.account import report_of, with_result
from slimgraph.auto.given_data import Data, open_given
from slimgraph.auto.measurements import Judged, Measurements, measure
from slimgraph.auto.notices import (
    capture_notices,
    metric_notices,
    placement_notices,
    speed_notices,
    tail_notices,
    target_notices,
)
from slimgraph.auto.outcome import Progress, is_measured
from slimgraph.auto.staging import staging
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import add_tail, export_onnx
from slimgraph.deploy.onnx_tail import check_stitched
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.deploy.targets import resolved_target
from slimgraph.errors import ConfigError
from slimgraph.program.archive import save_program
from slimgraph.program.count import count
from slimgraph.program.program import Program, require_program
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.quantize import (
    Quantization,
    prepare,
    quantize_with_record,
    require_finite,
    require_float,
    require_work,
)
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, range_algorithm
from slimgraph.report.content import Notice, Report
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
    """By name: `FILES`, and `model.onnx.data` where the weights do not fit into one ONNX file."""

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
    algorithm: str
    skip: Sequence[str]
    seed: int
    threads: int
    progress: Progress | None
    title: str | None
    command: str | None
    float_reference: str | os.PathLike[str] | None


@overload
def compress(
    program: Program,
    data: Data,
    *,
    out: str | os.PathLike[str],
    dry_run: Literal[False] = False,
    **options: Unpack[CompressOptions],
) -> Compression: ...


@overload
def compress(
    program: Program,
    data: Data,
    *,
    out: str | os.PathLike[str],
    dry_run: Literal[True],
    **options: Unpack[CompressOptions],
) -> QuantizationPlan: ...


def compress(
    program: Program,
    data: Data,
    *,
    out: str | os.PathLike[str],
    eval_data: Data | None = None,
    target: str = "onnxruntime",
    metric: str = "top1",
    max_drop: float = 0.01,
    algorithm: str = DEFAULT_ALGORITHM,
    skip: Sequence[str] = (),
    seed: int = 0,
    threads: int = 1,
    dry_run: bool = False,
    progress: Progress | None = None,
    title: str | None = None,
    command: str | None = None,
    float_reference: str | os.PathLike[str] | None = None,
) -> Compression | QuantizationPlan:
    """The program in int8, written to `out` as ONNX and as a program, with a report of what was gained and lost.

    Ranges are calibrated on `data`; labels there are ignored. Both models are measured in ONNX Runtime: the metric on
    `eval_data`, or where it has no labels how often the answers agree; latency call by call in turn. The ONNX file is
    checked against the program. Either all files are written or none, and an older result stays until then.

    Args:
        data: what `open_data` takes, or batches that can be read more than once.
        out: folder of the result.
        eval_data: as `data`; None measures agreement on the calibration data.
        target: where the model will run. "onnxruntime" becomes "onnxruntime-avx2" on an x86 processor without VNNI.
        metric: "top1", "top5" or "module:callable"; higher is better.
        max_drop: how much of the metric may be lost, absolute. A result that lost more is written, and says so first.
        algorithm: how ranges are chosen: abs_max, min_max, avg, hist, KL, mse, emd or ptf.
        skip: layers that stay float, as `select` takes them.
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
    resolved = resolved_target(target)
    calibration = open_given(data, program.signature, what="data", seed=seed)
    evaluation = None if eval_data is None else open_given(eval_data, program.signature, what="eval_data", seed=seed)
    _try_out(program, calibration, evaluation, metric, float_reference)
    original = prepare(program, target=resolved)
    plan = plan_quantization(original, target=resolved, skip=skip)
    if dry_run:
        return plan
    require_work(plan)
    say = progress or _say_nothing
    how = Judged(
        calibration=calibration, evaluation=evaluation, metric=metric, max_drop=max_drop, seed=seed, threads=threads
    )
    with staging(out) as folder:
        quantized = _quantized(original, plan, calibration, algorithm, say)
        found = _measured(program, quantized, folder / "model.onnx", float_reference, how, say)
        say("Writing the report", 0, None)
        result = with_result(quantized, found)
        save_program(result, folder / "model.pt2")
        report = report_of(
            quantized,
            found,
            (
                *target_notices(target, resolved),
                *_rewritten_notices(program, float_reference),
                *_notices(program, quantized, found, how),
            ),
            after=result,
            title=title or _title(program),
            command=command or f"slimgraph.compress(program, data, out={os.fspath(out)!r}, …)",
        )
        write_report(report, folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return Compression(
        report=report, program=result, plan=quantized.plan, files={name: Path(out) / name for name in names}
    )


def _check(program: Program, *, metric: str, algorithm: str, max_drop: float, threads: int) -> None:
    """Refuse what is wrong before any work is done."""
    require_program(program)
    require_float(program)
    require_finite(program)
    find_metric(metric)
    range_algorithm(algorithm)
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ConfigError(
            f"max_drop is {max_drop}; give 0 or more, in the metric's unit: 0.01 is one point of accuracy."
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
    original: Program, plan: QuantizationPlan, calibration: DataSource, algorithm: str, say: Progress
) -> Quantization:
    return quantize_with_record(
        original,
        plan,
        (batch.inputs for batch in calibration),
        algorithm=algorithm,
        histograms=True,  # the report shows them
        progress=lambda seen: say("Calibrating", seen, calibration.samples),
        stage=lambda name: say(name, 0, None),
    )


def _measured(
    program: Program,
    quantized: Quantization,
    file: Path,
    float_reference: str | os.PathLike[str] | None,
    how: Judged,
    say: Progress,
) -> Measurements:
    """Write the quantized program as ONNX, check it, and measure it against the original."""
    tail = quantized.program.tail
    with TemporaryDirectory(dir=file.parent) as scratch:
        # What is measured is the network: post-processing is the same before and after, and no float to compare.
        head = file if tail is None else Path(scratch) / "model.onnx"
        say("Writing ONNX", 0, None)
        export_onnx(quantized.program, head, with_tail=False)
        say("Checking the ONNX file", 0, None)
        some = next(iter(how.calibration)).inputs
        check_export(quantized.program, head, some, called=file.name)
        if tail is not None:
            add_tail(tail, head, file)
            signature = quantized.program.signature
            one = {name: x[:1] if name in signature.batched else x for name, x in signature.bind(some).items()}
            check_stitched(file, head, tail, one)
        reference = Path(scratch) / "float.onnx" if float_reference is None else Path(float_reference)
        if float_reference is None:
            export_onnx(program, reference, with_tail=False)
        return measure(reference, head, quantized.prepared, quantized.program, how, say)


def _notices(program: Program, quantized: Quantization, found: Measurements, how: Judged) -> Iterator[Notice]:
    yield from metric_notices(found.metric, on_calibration_data=how.evaluation is None, limit=how.max_drop)
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
