"""`slimgraph convert`: a model in another form."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from slimgraph.cli.command import Answer, command
from slimgraph.cli.given import ModelOptions, look, require_output


@command
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="A .pt2 or .onnx file, the folder of a Paddle model, or package.module:factory."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .onnx, .pt2, or .ort.")],
    given: ModelOptions,
    precision: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option("--precision", help="Of the numbers in an .onnx file, its inputs and outputs among them."),
    ] = "float32",
    float_codes: Annotated[
        bool,
        typer.Option(
            "--float-codes",
            help="Hold the integer weights of a quantized model as float32 numbers, followed by their scales, in an "
            ".onnx file: for runtimes that read no integer weights.",
            show_default=False,
        ),
    ] = False,
) -> Answer:
    """Write model IN as OUT. An .onnx file is checked against the program before it gets its name."""
    require_output(out, model)
    look([model], given)
    from slimgraph.cli.models import open_program
    from slimgraph.formats import convert as convert_program
    from slimgraph.importers.axis_notices import axis_notices
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given)
        progress(f"Writing {out}")
        convert_program(program, out, precision=precision, float_codes=float_codes, progress=progress)
    size, notices = out.stat().st_size, list(axis_notices(program.history))
    return Answer(
        data={"model": model, "written": out, "precision": precision, "size_bytes": size, "notices": notices},
        shown=(f"{model} is written as {out}, {size:,} bytes.", *(f"Notice: {notice}" for notice in notices)),
    )
