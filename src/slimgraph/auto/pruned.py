"""Write a pruned program as files, with what it saves."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from slimgraph.deploy.latency import LatencyComparison, measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.files import output_directory, scratch_directory, write_text
from slimgraph.formats import save
from slimgraph.program.count import count
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import Groups
from slimgraph.pruning.plan import PruningPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a program computes for one sample, and stores."""

    macs: int
    parameters: int
    weight_bytes: int
    file_bytes: int
    """Of the ONNX file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A pruned program as files."""

    program: Program
    before: Sizes
    after: Sizes
    latency: LatencyComparison
    """Of the ONNX files in ONNX Runtime, called in turn."""
    files: dict[str, Path]

    @property
    def flops_removed(self) -> float:
        """The part of the FLOPs that is gone."""
        return 1 - self.after.macs / self.before.macs if self.before.macs else 0.0


def write_pruned(
    program: Program,
    plan: PruningPlan,
    out: str | os.PathLike[str],
    *,
    groups: Groups | None = None,
    finish: Callable[[Program], Program] | None = None,
    proof: bool = True,
    threads: int = 1,
    stage: Callable[[str], None] = lambda text: None,
) -> Pruned:
    """Apply a plan, and write model.pt2, model.onnx, plan.json and report.json into a folder.

    Args:
        groups: of this very program, where they are at hand.
        finish: what is done to the pruned program before it is written: statistics, say.
        proof: as `apply_pruning` has it.
        threads: with which latency is measured.
        stage: told what begins.
    Raises:
        ProgramError: the proof fails.
        ExportError: the ONNX file does not compute what the program computes.
        OutputError: the folder cannot be written.
    """
    folder = output_directory(out)
    stage("Removing")
    pruned = apply_pruning(program, plan, groups=groups, proof=proof)
    if finish is not None:
        pruned = finish(pruned)
    files = {name: folder / name for name in ("model.pt2", "model.onnx", "plan.json", "report.json")}
    stage("Writing the pruned program")
    save(pruned, files["model.pt2"])
    save(pruned, files["model.onnx"])
    with scratch_directory(folder) as scratch:
        original, head = scratch / "original.onnx", files["model.onnx"]
        export_onnx(program, original, with_tail=False)
        if program.tail is not None:  # post-processing is the same before and after
            head = scratch / "pruned.onnx"
            export_onnx(pruned, head, with_tail=False)
        stage("Measuring latency")
        latency = measure_latency(head, against=original, threads=threads)
        before, after = _sizes(program, original), _sizes(pruned, head)
    result = Pruned(program=pruned, before=before, after=after, latency=latency, files=files)
    write_text(files["plan.json"], plan.to_json())
    report = {
        "flops_removed": result.flops_removed,
        "before": asdict(before),
        "after": asdict(after),
        "latency": {**asdict(latency), "speedup": latency.speedup},
        "groups": {
            group.name: {"before": group.size, "after": group.size - len(group.removed)} for group in plan.groups
        },
    }
    write_text(files["report.json"], json.dumps(report, indent=1, default=str))
    return result


def _sizes(program: Program, path: Path) -> Sizes:
    counted = count(program)
    return Sizes(
        macs=counted.macs,
        parameters=counted.parameters,
        weight_bytes=counted.weight_bytes,
        file_bytes=path.stat().st_size,
    )
