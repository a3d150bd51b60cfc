"""`slimgraph verify`: do two models give the same answers, and how closely."""

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look
from slimgraph.cli.options import Data
from slimgraph.cli.samples import SampleOptions, open_samples

if TYPE_CHECKING:
    from slimgraph.training.agreement import Agreement

DIFFERENT = 1


@command
def verify(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="The reference: .pt2, .onnx, the folder of a Paddle model, or package.module:factory."
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What should agree with it, in any of these forms.")],
    data: Data,
    samples: SampleOptions,
    given: ModelOptions,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", help="Largest difference, as a fraction of the largest value of A's output.", min=0.0
        ),
    ] = 0.01,
) -> Answer:
    """Say whether models A and B agree on some data, and how closely. Exit code 0 if they do, 1 if not."""
    look([a, b], given, data=[data])
    from slimgraph.auto.outcome import counted
    from slimgraph.cli.models import open_models
    from slimgraph.progress import ProgressBar
    from slimgraph.training.agreement import agreement

    with ProgressBar() as progress:
        progress(f"Opening {a} and {b}")
        reference, other = open_models([a, b], given)
        batches = open_samples(data, reference.signature, samples)
        found = agreement(other, reference, counted(batches, progress, "Comparing"))
    # A NaN compares as false, so that it never agrees.
    agree = all(output.max_abs <= tolerance * output.reference_max_abs for output in found.outputs)
    return Answer(
        data={
            "a": a,
            "b": b,
            "agree": agree,
            "tolerance": tolerance,
            "samples": found.samples,
            "same_top1": found.same_top1,
            "outputs": found.outputs,
        },
        shown=(_verdict(a, b, found, tolerance, agree=agree), _table(found)),
        exit_code=0 if agree else DIFFERENT,
    )


def _verdict(a: str, b: str, found: "Agreement", tolerance: float, *, agree: bool) -> str:
    from slimgraph.report.words import percent

    bound = f"{'within' if agree else 'beyond'} {tolerance:g} of the largest output"
    same = "" if found.same_top1 is None else f" Top-1 is the same on {percent(found.same_top1)}."
    return f"{a} and {b} {'agree' if agree else 'do NOT agree'}: {bound}, on {found.samples:,} samples.{same}"


def _table(found: "Agreement") -> Table:
    measured = ("mean difference", "max difference", "largest of A", "SNR")
    outputs = table("output", *measured, numbers=measured)
    for output in found.outputs:
        numbers = (f"{value:.3g}" for value in (output.mean_abs, output.max_abs, output.reference_max_abs))
        outputs.add_row(output.name, *numbers, "equal" if output.snr_db == math.inf else f"{output.snr_db:.1f} dB")
    return outputs
