"""`slimgraph compress`: a model in, a smaller and faster one out, with the proof."""

import json
import shlex
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_output_folder
from slimgraph.cli.options import (
    Algorithm,
    CalibrationData,
    Metric,
    ModelArgument,
    RepairsOption,
    Seed,
    Skip,
    Target,
    Threads,
)
from slimgraph.cli.samples import SampleOptions, open_samples
from slimgraph.errors import ConfigError

if TYPE_CHECKING:
    from slimgraph.auto.pipeline import Compression
    from slimgraph.program.program import Program
    from slimgraph.quantization.plan import QuantizationPlan
    from slimgraph.report.facts import MetricResult
    from slimgraph.training.data import DataSource

DROP_EXCEEDED = 3


def _advice(metric: "MetricResult", *, controlled: bool) -> str:
    """What may help against too large a drop."""
    spare = "" if controlled else "--control, which tries repairs, and widens layers till enough is kept; "
    judge = "" if metric.kind == "accuracy" else " --eval-data with labels measures what it means for the answers."
    return (
        f"Do not use it as it is. What may help: {spare}--skip PATTERN for the layers with the lowest signal-to-noise "
        "ratio in report.html; another --algorithm, as KL or mse; more --data, and such as the model will see. If so "
        f"much may be lost, say so with --max-drop.{judge}"
    )


@command
def compress(
    context: typer.Context,
    model: ModelArgument,
    samples: SampleOptions,
    given: ModelOptions,
    data: CalibrationData = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the result; made if it is missing.", show_default=False),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="SPEC",
            help="What to judge the result on, as --data. With labels accuracy is measured, without them agreement "
            "with the original; if not given, agreement on --data.",
            show_default=False,
        ),
    ] = None,
    target: Target = "onnxruntime",
    metric: Metric = "top1",
    max_drop: Annotated[
        float,
        typer.Option("--max-drop", help="How much of the metric may be lost, absolute. Beyond it the exit code is 3."),
    ] = 0.01,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="When more is lost than --max-drop, try other ranges and repairs, and give more bits to the fewest "
            "layers that need them, or leave them in float. If not given: with labels in --eval-data, and without "
            "--budget.",
            show_default=False,
        ),
    ] = None,
    algorithm: Algorithm = "min_max",
    repairs: RepairsOption = None,
    skip: Skip = None,
    analyze: Annotated[
        bool | None,
        typer.Option(
            "--analyze/--no-analyze",
            help="Tell in the report which layers make the loss, and why. If not given: where that takes a second at "
            "most.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits",
            metavar="NUMBERS",
            help="Bits of weights: 4; or choices for each layer, as 4,8 or 8,float, of which --budget decides.",
            show_default=False,
        ),
    ] = None,
    activation_bits: Annotated[
        str | None,
        typer.Option(
            "--activation-bits", metavar="NUMBERS", help="Bits of activations, as --bits.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="KIND=RATIO",
            help="What the result may have of the original: size=0.2 of the weights' bytes, latency=0.6 of the time, "
            "bops=0.05 of the bit operations. Within it the bits are chosen that lose least.",
            show_default=False,
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Make integers of weights and leave activations in float: 8 bits, or as --bits says.",
            show_default=False,
        ),
    ] = False,
    group: Annotated[
        int | None,
        typer.Option(
            "--group",
            metavar="SIZE",
            help="With --weights-only: how many weights of an output share a scale, 16 to 256. If not given: all.",
            show_default=False,
        ),
    ] = None,
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="Take the ranges of what linear layers read when the model runs, and calibrate none.",
            show_default=False,
        ),
    ] = False,
    threads: Threads = 1,
    seed: Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, and write nothing.", show_default=False)
    ] = False,
) -> Answer:
    """Compress MODEL to int8: writes model.onnx, model.pt2, report.html and report.json.

    Ranges are calibrated on --data, of which a few hundred samples are enough; --weights-only and --dynamic do without.
    Exit code 3 says that more was lost than --max-drop allows; the files are written all the same. What is lost is the
    metric on labelled --eval-data; without labels the fraction of samples whose greatest class is another one; and
    where the outputs are no scores of classes, closeness, 1 - |difference| / |original's output|, of which at least 0.2
    may be lost.
    """
    if out is None and not dry_run:
        raise ConfigError("Give --out, the folder of the result, or --dry-run to see the plan only.")
    if out is not None:
        require_output_folder(out)
    look([model], given, data=[data, eval_data], callables=[metric])
    from slimgraph.auto.pipeline import CompressOptions
    from slimgraph.auto.pipeline import compress as compress_program
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given, seed=seed)
        calibration = None if data is None else open_samples(data, program.signature, samples, seed=seed)
        evaluation = None if eval_data is None else open_samples(eval_data, program.signature, samples, seed=seed)
        options: CompressOptions = {
            "eval_data": evaluation,
            "target": target,
            "metric": metric,
            "max_drop": max_drop,
            "control": control,
            "analyze": analyze,
            "algorithm": algorithm,
            "repairs": repairs,
            "skip": skip or [],
            "bits": _widths("--bits", bits),
            "activation_bits": _widths("--activation-bits", activation_bits),
            "budget": budget,
            "weights_only": weights_only,
            "group": group,
            "dynamic": dynamic,
            "seed": seed,
            "threads": threads,
            "progress": progress,
            "command": shlex.join(["slimgraph", *context.obj]),
            "float_reference": None if dry_run else _users_file(model, program, calibration, evaluation),
        }
        if out is None or dry_run:
            return _planned(compress_program(program, calibration, out=out or ".", dry_run=True, **options))
        return told(compress_program(program, calibration, out=out, **options))


def _users_file(
    model: str, program: "Program", calibration: "DataSource | None", evaluation: "DataSource | None"
) -> Path | None:
    """The ONNX file that MODEL names, to be measured against; None where it cannot stand for its program."""
    from slimgraph.auto.given_data import first_samples
    from slimgraph.auto.uncalibrated import made_up
    from slimgraph.deploy.runtime import OnnxModel
    from slimgraph.errors import DataError, ModelLoadError

    path = Path(model)
    if path.suffix.lower() != ".onnx" or program.tail is not None:
        return None
    try:
        file = OnnxModel.open(path)
        for data in [given for given in (calibration, evaluation) if given is not None] or [made_up(program.signature)]:
            for batch in islice(data, 1):  # a file may be made for one sample, and has to take whole batches
                file.signature.bind(batch.inputs)
            for sample in first_samples(data, program.signature, 1, at_once=1):
                file(sample)
    except (DataError, ModelLoadError):
        return None
    outputs = [[spec.name for spec in signature.outputs] for signature in (file.signature, program.signature)]
    return path if outputs[0] == outputs[1] else None


def _widths(option: str, text: str | None) -> tuple[int, ...]:
    """Numbers of bits; "float" is 32."""
    if text is None:
        return ()
    try:
        return tuple(32 if part.strip() == "float" else int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; give a number of bits, or several as 4,8 or 8,float.") from None


def _planned(plan: "QuantizationPlan") -> Answer:
    return Answer(data=json.loads(plan.to_json()), shown=(plan.table(),))


def told(result: "Compression") -> Answer:
    """What a compression gave: the first line of its report, the numbers, what else to know, and the files."""
    from slimgraph.report.page import summary

    report = result.report
    advice = None
    if result.drop_exceeded and report.metric is not None:
        advice = _advice(report.metric, controlled=report.control is not None)
    numbers = table("", report.original.label, report.compressed.label, "change")
    for line in summary(report):
        numbers.add_row(line.quantity, line.before, line.after, line.change)
    return Answer(
        data={
            "headline": report.headline.text,
            "drop_exceeded": result.drop_exceeded,
            "advice": advice,
            "metric": report.metric,
            "control": report.control,
            "size_bytes_before": report.original.size_bytes,
            "size_bytes_after": report.compressed.size_bytes,
            "latency": report.latency,
            "notices": report.notices,
            "files": result.files,
        },
        shown=(
            report.headline.text,
            *([advice] if advice else []),
            numbers,
            *(f"{notice.level.capitalize()}: {notice.text}" for notice in report.notices),
            f"Written: {', '.join(str(path) for path in result.files.values())}",
        ),
        exit_code=DROP_EXCEEDED if result.drop_exceeded else 0,
    )
