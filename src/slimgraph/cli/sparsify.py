"""`slimgraph sparsify`: a model in, one with zeros among its weights out."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_output_folder
from slimgraph.cli.options import ModelArgument
from slimgraph.errors import ConfigError


@command
def sparsify(
    model: ModelArgument,
    given: ModelOptions,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the result; made if it is missing.")],
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio", metavar="PART", help="The part of the weights that is zero afterwards.", show_default=False
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="MAGNITUDE",
            help="Instead: weights of a lesser magnitude become zero.",
            show_default=False,
        ),
    ] = None,
    two_four: Annotated[
        bool,
        typer.Option(
            "--two-four",
            help="Instead: two of every four weights that are summed over next to each other stay.",
            show_default=False,
        ),
    ] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="The ratio is that of each weight, instead of all together.", show_default=False),
    ] = False,
    block: Annotated[
        str, typer.Option("--block", metavar="MxN", help="Outputs × inputs that become zero together, as 1x4.")
    ] = "1x1",
    conv1x1_only: Annotated[
        bool, typer.Option("--conv1x1-only", help="Only convolutions of 1×1.", show_default=False)
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Layers or parameters that stay as they are: a name, a glob as 'head.*', or re:PATTERN. Any number of "
            "times.",
            show_default=False,
        ),
    ] = None,
) -> Answer:
    """Set weights of MODEL to zero: writes model.pt2, model.onnx and report.json. Train the result afterwards.

    The files are as large as before, and ONNX Runtime is as fast; runtimes for sparse weights gain from it.
    """
    sparse_block = _block(block)
    require_output_folder(out)
    look([model], given)
    from slimgraph.auto.sparsified import write_sparsified
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar
    from slimgraph.pruning.asp import plan_two_four
    from slimgraph.pruning.sparsify import apply_sparsity
    from slimgraph.pruning.unstructured import UnstructuredPruning

    if two_four and (ratio, threshold, local, sparse_block, conv1x1_only) != (None, None, False, (1, 1), False):
        raise ConfigError("--two-four says which weights go: half of each four. Give nothing else but --skip.")

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given)
        progress("Choosing what goes")
        plan = (
            plan_two_four(program, skip=skip or ())
            if two_four
            else UnstructuredPruning(
                ratio=ratio,
                threshold=threshold,
                local_sparsity=local,
                sparse_block=sparse_block,
                conv1x1_only=conv1x1_only,
                skip=skip or (),
            ).plan(program)
        )
        progress("Writing the sparse program")
        result = write_sparsified(apply_sparsity(program, plan), out, dense=plan.dense)
    zeros = result.zeros
    shown = table("weight", "shape", "elements", "zeros", "of it", numbers=("elements", "zeros", "of it"))
    for weight in zeros.weights:
        cells = ("×".join(map(str, weight.shape)), f"{weight.size:,}", f"{weight.zeros:,}", f"{weight.sparsity:.1%}")
        shown.add_row(Text(weight.name), *cells)
    return Answer(
        data={"zeros": zeros, "dense": result.dense, "files": result.files},
        shown=(
            f"{zeros.sparsity:.1%} of the weights are zero, {zeros.total_sparsity:.1%} of all parameters.",
            "Train the model before it is used, with its zeros kept: it answers worse than it did.",
            shown,
            *(Text(f"{name} stays dense: it {reason}.") for name, reason in result.dense.items()),
            f"Written: {', '.join(str(path) for path in result.files.values())}",
        ),
    )


def _block(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text, re.ASCII)
    if match is None:
        raise ConfigError(f"--block is {text!r}; give outputs × inputs, as 1x4.")
    return int(match[1]), int(match[2])
