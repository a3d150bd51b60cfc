"""`slimgraph sensitivity`: what a model loses without a part of one layer."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_output_folder
from slimgraph.cli.options import Data, Metric, ModelArgument, Seed
from slimgraph.cli.samples import SampleOptions, open_samples
from slimgraph.errors import ConfigError
from slimgraph.files import output_directory

if TYPE_CHECKING:
    from slimgraph.pruning.sensitivity import Sensitivity
    from slimgraph.report.sensitivity import Curve, SensitivityReport


@command
def sensitivity(
    context: typer.Context,
    model: ModelArgument,
    data: Data,
    samples: SampleOptions,
    given: ModelOptions,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The numbers, .json; a page with the curves gets the same name with .html. A measurement that was "
            "interrupted goes on with what is there.",
        ),
    ],
    metric: Metric = "top1",
    criterion: Annotated[
        str, typer.Option("--criterion", help="Which indices of a group go first, as for prune.")
    ] = "l2_norm",
    delta_rate: Annotated[
        float, typer.Option("--delta-rate", help="Step from one part that goes to the next: 0.1, 0.2, … below 1.")
    ] = 0.1,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="PATTERN",
            help="Layers to measure: a name, a glob as 'stage1.*', or re:PATTERN. Any number of times; otherwise all.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Layers to leave out, likewise.", show_default=False),
    ] = None,
    norm_axes: Annotated[
        bool, typer.Option("--norm-axes", help="Also channels that a layer or group norm runs over, as for prune.")
    ] = False,
    stop_loss: Annotated[
        float,
        typer.Option(
            "--stop-loss", help="No more of a group is tried once this part of the metric is lost; 1 tries everything."
        ),
    ] = 0.5,
    eval_rate: Annotated[
        float | None,
        typer.Option("--eval-rate", help="Part of the samples to use, always the same.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Processes of a Ray cluster that share the groups; needs slimgraph[ray].",
            min=1,
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
) -> Answer:
    """Measure what MODEL loses when a part of one layer goes, for `slimgraph prune --sensitivity`. Nothing is trained.

    Layers whose channels can only go together are one group: `slimgraph groups` shows them.
    """
    if out.suffix.lower() != ".json":
        raise ConfigError(f"--out is {out}; give a name that ends in .json. The page gets the same name with .html.")
    require_output_folder(out.parent)
    look([model], given, data=[data], callables=[metric])
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar
    from slimgraph.pruning.measure_sensitivity import measure_sensitivity
    from slimgraph.pruning.sensitivity import ratios_by
    from slimgraph.report.environment import read_environment
    from slimgraph.report.sensitivity import SensitivityReport, write_sensitivity

    ratios = ratios_by(delta_rate)
    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given, seed=seed)
        batches = open_samples(data, program.signature, samples, seed=seed)
        output_directory(out.parent)
        found = measure_sensitivity(
            program,
            batches,
            ratios=ratios,
            layers=layers,
            skip=skip or [],
            norm_axes=norm_axes,
            criterion=criterion,
            metric=metric,
            stop_loss=None if stop_loss >= 1 else stop_loss,
            eval_rate=eval_rate,
            seed=seed,
            file=out,
            workers=workers,
            progress=lambda stage, done, _: progress(stage, done, batches.samples if eval_rate is None else None),
        )
    report = SensitivityReport(
        title=Path(model).stem if Path(model).exists() else model,
        metric=found.metric,
        criterion=found.criterion,
        baseline=found.baseline,
        samples=found.samples,
        curves=_curves(found),
        environment=read_environment(),
        command=shlex.join(["slimgraph", *context.obj]),
        created=datetime.now(UTC).astimezone(),
    )
    page = out.with_suffix(".html")
    write_sensitivity(report, page, data_file=out.name)
    return _told(report, model, (out, page))


def _curves(found: "Sensitivity") -> "tuple[Curve, ...]":
    from slimgraph.report.sensitivity import Curve

    losses = found.losses
    return tuple(
        Curve(name=name, size=ladder.size, losses=losses[name])
        for name, ladder in found.ladders.items()
        if ladder.metrics
    )


def _told(report: "SensitivityReport", model: str, files: tuple[Path, ...]) -> Answer:
    from slimgraph.report.words import percent

    columns = [f"−{ratio:.0%}" for ratio in report.ratios]
    shown = table("group", "indices", *columns, numbers=("indices", *columns))
    for curve in report.ranked:
        cells = (percent(curve.losses[ratio]) if ratio in curve.losses else "" for ratio in report.ratios)
        shown.add_row(*map(Text, (curve.name, str(curve.size), *cells)))
    return Answer(
        data={
            "model": model,
            "metric": report.metric,
            "criterion": report.criterion,
            "baseline": report.baseline,
            "samples": report.samples,
            "losses": {curve.name: curve.losses for curve in report.curves},
            "files": files,
        },
        shown=(
            f"{report.headline}.",
            shown,
            f"Parts of {report.metric} that are lost; it is {report.baseline:.4g} on {report.samples:,} samples.",
            f"Written: {', '.join(map(str, files))}",
        ),
    )
