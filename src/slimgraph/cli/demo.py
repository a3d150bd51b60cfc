"""`slimgraph demo`: the whole way on real data, in less than a minute."""

from pathlib import Path
from typing import Annotated

import typer

from slimgraph.cli.command import Answer, command
from slimgraph.cli.compress import told
from slimgraph.cli.options import Seed


@command
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the result.")] = Path("slimgraph-demo"),
    seed: Seed = 0,
) -> Answer:
    """Train a small network on handwritten digits, compress it, and measure what that gave."""
    from slimgraph.auto.pipeline import compress
    from slimgraph.cli.digits_network import train_digits
    from slimgraph.files import output_directory
    from slimgraph.progress import ProgressBar

    output_directory(out)  # before anything takes time
    with ProgressBar() as progress:
        progress("Training a network on handwritten digits")
        program = train_digits(seed=seed, progress=progress)
        result = compress(
            program,
            "digits:train[:256]",
            eval_data="digits:test",
            out=out,
            seed=seed,
            progress=progress,
            title="Handwritten digits",
            command=f"slimgraph demo --seed {seed}",
        )
    answer = told(result)
    report = result.files["report.html"]
    return Answer(
        data=answer.data,
        shown=(*answer.shown[:-1], f"The report, to open in a browser: {report}"),
        exit_code=answer.exit_code,
    )
