"""Share the points of a sensitivity measurement among the processes of a Ray cluster."""

import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slimgraph.errors import ConfigError
from slimgraph.program.archive import load_program, save_program
from slimgraph.program.program import Program
from slimgraph.pruning.sensitivity import Running
from slimgraph.pruning.sensitivity_pass import Pending, measured
from slimgraph.training.batch import Batch
from slimgraph.training.metrics import Metric

_SHARES = 2
"""Pieces of work for each process: what is done is kept, and the last piece keeps few waiting."""


def measured_on_ray(
    program: Program,
    pending: Pending,
    scores: Mapping[str, Tensor],
    batches: Sequence[Batch],
    score: Metric,
    stop_loss: float | None,
    *,
    workers: int,
    norm_axes: bool = False,
) -> Iterator[Running]:
    """The sums of some groups after the other, each over all batches, in the order in which they are done.

    A cluster is used where RAY_ADDRESS names one; otherwise processes are started on this machine, and stopped in the
    end. Every process gets the program as an archive, and computes what one process alone would compute.

    Raises:
        ConfigError: Ray is not installed.
    """
    ray = _ray()
    begun = not ray.is_initialized()
    if begun and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif begun:
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        shared = [ray.put(each) for each in (_archived(program), list(batches), score)]
        share = ray.remote(_share)
        count = min(_SHARES * workers, len(pending))
        # Groups at the beginning of a program cost the most, so that each piece gets some of them.
        pieces = [[*pending][start::count] for start in range(count)]
        waiting = [
            share.remote(
                *shared,
                {name: pending[name] for name in names},
                {name: scores[name] for name in names},
                stop_loss,
                norm_axes=norm_axes,
            )
            for names in pieces
        ]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done[0])
    finally:
        if begun:
            ray.shutdown()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "workers share the work by Ray, which is not installed: pip install 'slimgraph[ray]'. Leave workers out to "
            "measure in this process."
        ) from error


def _archived(program: Program) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        save_program(program, path)
        return path.read_bytes()


def _share(
    archive: bytes,
    batches: Sequence[Batch],
    score: Metric,
    pending: Pending,
    scores: Mapping[str, Tensor],
    stop_loss: float | None,
    *,
    norm_axes: bool,
) -> Running:
    """What one process does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        path.write_bytes(archive)
        program = load_program(path)
    *_, last = measured(program, pending, scores, batches, score, Running.of(pending), stop_loss, norm_axes=norm_axes)
    return last
