"""`slimgraph analyze`: where a quantization loses, why, and what to do about it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_output_folder
from slimgraph.cli.options import Algorithm, Data, ModelArgument, Seed, Skip, Target
from slimgraph.cli.samples import SampleOptions, open_samples

if TYPE_CHECKING:
    from slimgraph.auto.analyze import AnalysisResult


@command
def analyze(
    context: typer.Context,
    model: ModelArgument,
    data: Data,
    samples: SampleOptions,
    given: ModelOptions,
    target: Target = "onnxruntime",
    algorithm: Algorithm = "min_max",
    skip: Skip = None,
    tried: Annotated[
        int | None,
        typer.Option(
            "--samples",
            help="Samples on which each quantizer is tried alone. Otherwise 4 to 32, as a minute allows.",
            min=1,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Layers to print; --json has all.", min=1)] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for analysis.html, a page with pictures, and analysis.json.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
) -> Answer:
    """Say which layers make the loss when MODEL is quantized, why, and what to do about it.

    MODEL is quantized as `slimgraph compress` does it, with ranges from --data; nothing is measured on a runtime.
    """
    if out is not None:
        require_output_folder(out)
    look([model], given, data=[data])
    from slimgraph.auto.analyze import analyze as analyze_program
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given, seed=seed)
        result = analyze_program(
            program,
            open_samples(data, program.signature, samples, seed=seed),
            target=target,
            algorithm=algorithm,
            skip=skip or [],
            samples=tried,
            out=out,
            seed=seed,
            progress=progress,
            title=Path(model).stem if Path(model).exists() else model,
            command=shlex.join(["slimgraph", *context.obj]),
        )
    return _told(result, model, limit)


def _told(result: "AnalysisResult", model: str, limit: int) -> Answer:
    from slimgraph.report.analysis import headline
    from slimgraph.report.words import number, percent

    losses = result.losses
    columns = ("layer", "operator", "share", "by weight", "SNR dB", "cause", "what to do")
    shown = table(*columns, numbers=("share", "by weight", "SNR dB"))
    for layer in losses.layers[:limit]:
        cells = (
            layer.name,
            layer.operator,
            percent(layer.share),
            f"{100 * layer.weight_share:.0f} %",
            number(layer.snr_db),
            layer.why,
            layer.advice,
        )
        shown.add_row(*map(Text, cells))
    left_out = len(losses.layers) - limit
    return Answer(
        data={
            "model": model,
            "headline": headline(losses.layers),
            "target": result.plan.target,
            "noise": losses.noise,
            "samples": losses.samples,
            "layers": losses.layers,
            "files": result.files,
        },
        shown=(
            f"{headline(losses.layers)}.",
            f"Noise is {percent(losses.noise)} of the outputs' energy for {result.plan.target}, on {losses.samples} "
            "samples.",
            shown,
            *([f"… and {left_out} layers that cost less."] if left_out > 0 else []),
            *([f"Written: {', '.join(map(str, result.files))}"] if result.files else []),
        ),
    )
