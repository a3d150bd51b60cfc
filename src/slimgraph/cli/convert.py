"""`slimgraph convert`: a model in another form."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from slimgraph.cli.command import Answer, command
from slimgraph.cli.options import Input, Weights, allow_local_modules
from slimgraph.errors import ConfigError


@command
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="A .pt2 or .onnx file, the folder of a Paddle model, or package.module:factory."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, .onnx or .pt2.")],
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option("--precision", help="Of the numbers in an .onnx file, its inputs and outputs among them."),
    ] = "float32",
    inputs: Input = None,
    weights: Weights = None,
) -> Answer:
    """Write model IN as OUT. An .onnx file is checked against the program before it gets its name."""
    allow_local_modules(model)
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise ConfigError(f"{out} is the model that is to be converted. Give another name for the result.")
    from slimgraph.cli.models import open_program
    from slimgraph.formats import convert as convert_program
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, inputs=inputs, weights=weights)
        progress(f"Writing {out}")
        convert_program(program, out, precision=precision)
    size = out.stat().st_size
    return Answer(
        data={"model": model, "written": out, "precision": precision, "size_bytes": size},
        shown=(f"{model} is written as {out}, {size:,} bytes.",),
    )
