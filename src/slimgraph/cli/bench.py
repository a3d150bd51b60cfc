"""`slimgraph bench`: how long one call takes."""

from typing import TYPE_CHECKING, Annotated

import typer

from slimgraph.cli.command import Answer, command
from slimgraph.cli.given import ModelOptions, look
from slimgraph.cli.options import ModelArgument, Seed, Threads
from slimgraph.errors import ConfigError, closest

if TYPE_CHECKING:
    from slimgraph.program.signature import Signature


def _sizes(texts: list[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not name or not size.isdecimal():
            raise ConfigError(f"--size is {text!r}; give the name of a free axis and its size, as height=640.")
        sizes[name] = int(size)
    return sizes


def _require_sizes(model: str, signature: "Signature", sizes: dict[str, int]) -> None:
    """Refuse what `measure_latency` would, in the words of this command."""
    from slimgraph.deploy.random_inputs import axes_without_size

    unknown = [axis for axis in sizes if axis not in signature.free_axes]
    if unknown:
        raise ConfigError(
            f"--size names the axis {unknown[0]!r}, which {model} does not leave free. "
            f"{closest(unknown[0], signature.free_axes)}"
        )
    if missing := axes_without_size(signature, sizes):
        wanted = " ".join(f"--size {axis}=N" for axis in missing)
        raise ConfigError(
            f"{model} takes {', '.join(map(str, signature.inputs))}, and nothing says how long "
            f"{', '.join(map(repr, missing))} should be. Give {wanted}."
        )


@command
def bench(
    model: ModelArgument,
    given: ModelOptions,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="The original: both are called in turn.", show_default=False),
    ] = None,
    threads: Threads = 1,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", help="Samples in a call. Otherwise 1, or what the model has fixed.", min=1, show_default=False
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="AXIS=N", help="Size of another free axis, as height=640.", show_default=False),
    ] = None,
    seed: Seed = 0,
) -> Answer:
    """Measure how long one call of MODEL takes.

    An .onnx file runs in ONNX Runtime, everything else in PyTorch.
    """
    names = [model] if against is None else [model, against]
    sizes = _sizes(size or [])
    look(names, given)
    from slimgraph.cli.models import open_models
    from slimgraph.deploy.latency import LatencyComparison, measure_latency
    from slimgraph.deploy.random_inputs import random_inputs
    from slimgraph.deploy.runtime import OnnxModel
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {' and '.join(names)}")
        opened = open_models(names, given, seed=seed)
        for name, each in zip(names, opened, strict=True):
            _require_sizes(name, each.signature, sizes)
        # A session that is opened again for its threads does not know of sizes that --input has fixed.
        fixed = random_inputs(opened[0].signature, batch=batch, sizes=sizes, seed=seed) if given.inputs else None
        progress("Measuring")
        latency = measure_latency(
            opened[0],
            fixed,
            against=None if against is None else opened[1],
            threads=threads,
            batch=batch,
            sizes=sizes,
            seed=seed,
        )
    runtimes = ["ONNX Runtime" if isinstance(each, OnnxModel) else "PyTorch" for each in opened]
    told = ", against ".join(f"{name} in {runtime}" for name, runtime in zip(names, runtimes, strict=True))
    return Answer(
        data={
            "model": model,
            "runtime": runtimes[0],
            **({} if against is None else {"against": against, "against_runtime": runtimes[1]}),
            ("comparison" if isinstance(latency, LatencyComparison) else "latency"): latency,
        },
        shown=(f"{told}: {latency}",),
    )
