"""`slimgraph prune`: a model in, one with fewer channels, heads and neurons out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_output_folder
from slimgraph.cli.groups import NormAxes
from slimgraph.cli.options import ModelArgument, Seed, Threads
from slimgraph.cli.samples import SampleOptions, open_samples

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
        float, typer.Option("--flops-removed", metavar="PART", help="The part of the FLOPs that is to go at least.")
    ] = 0.5,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="What --flops-removed is a part of: macs, parameters, memory (bytes of the weights), or latency, "
            "which is measured for every choice that is tried.",
        ),
    ] = "macs",
    criterion: Annotated[
        str,
        typer.Option(
            "--criterion",
            help="What matters: l1_norm, l2_norm, geometry_median, bn_scale, taylor (reads --data) or random.",
        ),
    ] = "l2_norm",
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="global ranks all channels of the model; uniform takes the same part of each layer; sensitive takes "
            "of each what loses the same, by --sensitivity.",
            show_default="global, or sensitive with --sensitivity",
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
            help="As for compress. Statistics of batch norms are estimated anew on it, and taylor reads it.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            help="For taylor, with labels in --data: cross_entropy, mse, … Without it the model is its own teacher.",
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
    require_output_folder(out)
    look([model], given, data=[data])
    from slimgraph.auto.pruned import write_pruned
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar
    from slimgraph.pruning.batch_norm import batch_norms, reestimate_batch_norm
    from slimgraph.pruning.groups import find_groups
    from slimgraph.pruning.prune import plan_pruning

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given, seed=seed)
        batches = None if data is None else open_samples(data, program.signature, samples, seed=seed)
        progress("Following the axes")
        groups = find_groups(program, norm_axes=norm_axes)
        progress("Choosing what goes")
        plan = plan_pruning(
            program,
            flops_removed=flops_removed,
            criterion=criterion,
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
