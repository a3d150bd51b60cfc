"""What a program would take of time with fewer indices: measured in ONNX Runtime."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from slimgraph.deploy.latency import measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.kept import plan_removal

_SECONDS = 0.5
"""Of one measurement, at least: a search makes a dozen of them."""


class MeasuredLatency:
    """The latency of a program by how many indices of its groups stay, as a part of that of the whole one.

    Both are called in turn, one sample at a time. Which indices go does not matter to the runtime, so the first ones
    do. A measurement is made once, and is never quite the same again: two programs of nearly one latency may change
    places, and what is chosen by it may lie a little beside what was wanted.
    """

    def __init__(self, groups: Groups, *, threads: int = 1) -> None:
        """Write the whole program for the runtime.

        Args:
            threads: of the runtime.
        Raises:
            ExportError: the program cannot be written as ONNX.
        """
        self._groups = groups
        self._threads = threads
        self._original = _opened(groups.traced.program, threads)
        self._measured: dict[tuple[tuple[str, int], ...], float] = {(): 1.0}

    def __call__(self, kept: Mapping[str, int]) -> float:
        """The part of the latency that is left."""
        changed = {name: count for name, count in kept.items() if count < self._groups[name].size}
        key = tuple(sorted(changed.items()))
        if key not in self._measured:
            removed = {name: tuple(range(self._groups[name].size - count)) for name, count in changed.items()}
            plan = plan_removal(self._groups, removed)
            program = apply_pruning(self._groups.traced.program, plan, groups=self._groups, proof=False)
            found = measure_latency(
                _opened(program, self._threads), against=self._original, threads=self._threads, min_seconds=_SECONDS
            )
            self._measured[key] = found.latency_ratio
        return self._measured[key]


def _opened(program: Program, threads: int) -> OnnxModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.onnx"
        export_onnx(program, path, with_tail=False)
        return OnnxModel.open(path.read_bytes(), threads=threads)
