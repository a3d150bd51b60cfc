"""`slimgraph prune`: a model in, one with fewer channels, heads and neurons out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_output_folder
from slimgraph.cli.groups import NormAxes
from slimgraph.cli.options import ModelArgument, Seed, Threads
from slimgraph.cli.samples import SampleOptions, open_samples
from slimgraph.errors import ConfigError

if TYPE_CHECKING:
    from slimgraph.auto.pruned import Pruned
    from slimgraph.program.program import Program


@command
def prune(
    model: ModelArgument,
    given: ModelOptions,
    samples: SampleOptions,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the result; made if it is missing.")],
    flops_removed: Annotated[
        float | None,
        typer.Option(
            "--flops-removed",
            metavar="PART",
            help="The part of the FLOPs that is to go at least.",
            show_default="0.5",
        ),
    ] = None,
    heads_removed: Annotated[
        float,
        typer.Option(
            "--heads-removed",
            metavar="PART",
            help="Of a transformer: the part of the heads that goes, in place of a part of the FLOPs.",
            show_default=False,
        ),
    ] = 0.0,
    feed_forward_removed: Annotated[
        float,
        typer.Option(
            "--feed-forward-removed",
            metavar="PART",
            help="Of a transformer: the part of the feed-forward neurons that goes.",
            show_default=False,
        ),
    ] = 0.0,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="What --flops-removed is a part of: macs, parameters, memory (bytes of the weights), or latency, "
            "which is measured for every choice that is tried.",
        ),
    ] = "macs",
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="What matters: l1_norm, l2_norm, geometry_median, bn_scale, taylor or fisher (both read --data) or "
            "random.",
            show_default="l2_norm, or fisher for heads and feed-forward neurons",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="global ranks all channels of the model; uniform takes the same part of each layer; sensitive takes "
            "of each what loses the same, by --sensitivity.",
            show_default="global, sensitive with --sensitivity, or uniform for heads and feed-forward neurons",
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE",
            help="What `slimgraph sensitivity` wrote for MODEL, with the same --criterion.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Layers that keep all their outputs: a name, a glob as 'head.*', or re:PATTERN. Any number of times.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SPEC",
            help="As for compress. Statistics of batch norms are estimated anew on it, and taylor and fisher read it.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            help="For taylor and fisher, with labels in --data: cross_entropy, mse, … Without it the model is its own "
            "teacher.",
            show_default=False,
        ),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option("--multiple-of", help="What the channels that stay are a multiple of.", min=1)
    ] = 8,
    norm_axes: NormAxes = False,
    proof: Annotated[
        bool,
        typer.Option(
            "--proof/--no-proof",
            help="Compute that the result is MODEL with zeros for what is removed.",
            show_default=True,
        ),
    ] = True,
    threads: Threads = 1,
    seed: Seed = 0,
) -> Answer:
    """Prune MODEL: writes model.pt2, model.onnx, plan.json and report.json. Train the result a little afterwards."""
    by_parts = bool(heads_removed or feed_forward_removed)
    if by_parts and (flops_removed is not None or by != "macs" or sensitivity is not None):
        raise ConfigError(
            "--heads-removed and --feed-forward-removed say by themselves how much goes: leave out --flops-removed, "
            "--by and --sensitivity."
        )
    require_output_folder(out)
    look([model], given, data=[data])
    from slimgraph.auto.pruned import write_pruned
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar
    from slimgraph.pruning.batch_norm import batch_norms, reestimate_batch_norm
    from slimgraph.pruning.groups import find_groups
    from slimgraph.pruning.prune import plan_pruning
    from slimgraph.pruning.transformer import plan_transformer_pruning

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given, seed=seed)
        batches = None if data is None else open_samples(data, program.signature, samples, seed=seed)
        progress("Following the axes")
        groups = find_groups(program, norm_axes=norm_axes)
        progress("Choosing what goes")
        plan = (
            plan_transformer_pruning(
                program,
                heads_removed=heads_removed,
                feed_forward_removed=feed_forward_removed,
                criterion=criterion or "fisher",
                allocation=allocation or "uniform",  # type: ignore[arg-type]  # checked there
                data=batches,
                loss=loss,
                skip=skip or [],
                multiple_of=multiple_of,
                seed=seed,
                groups=groups,
            )
            if by_parts
            else plan_pruning(
                program,
                flops_removed=0.5 if flops_removed is None else flops_removed,
                criterion=criterion or "l2_norm",
                allocation=allocation or ("global" if sensitivity is None else "sensitive"),  # type: ignore[arg-type]
                sensitivity=sensitivity,
                by=by,  # type: ignore[arg-type]
                threads=threads,
                data=batches,
                loss=loss,
                skip=skip or [],
                norm_axes=norm_axes,
                multiple_of=multiple_of,
                seed=seed,
                groups=groups,
            )
        )

        def finished(pruned: "Program") -> "Program":
            if batches is None or not batch_norms(pruned):
                return pruned
            return reestimate_batch_norm(pruned, batches)

        result = write_pruned(
            program, plan, out, groups=groups, finish=finished, proof=proof, threads=threads, stage=progress
        )
    return _told(result)


def _told(result: "Pruned") -> Answer:
    before, after, latency = result.before, result.after, result.latency
    numbers = table("", "before", "after", "of it", numbers=("before", "after", "of it"))
    for what, old, new in (
        ("MACs", before.macs, after.macs),
        ("parameters", before.parameters, after.parameters),
        ("bytes of weights", before.weight_bytes, after.weight_bytes),
        ("bytes of ONNX", before.file_bytes, after.file_bytes),
    ):
        numbers.add_row(what, f"{old:,}", f"{new:,}", f"{new / old:.0%}" if old else "")
    return Answer(
        data={
            "flops_removed": result.flops_removed,
            "before": before,
            "after": after,
            "latency": latency,
            "files": result.files,
        },
        shown=(
            f"{result.flops_removed:.1%} of the FLOPs are removed. In ONNX Runtime: {latency}.",
            "Train the model a little before it is used: it answers worse than it did.",
            numbers,
            f"Written: {', '.join(str(path) for path in result.files.values())}",
        ),
    )
