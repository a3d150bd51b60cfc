"""Structured pruning over the families of timm and torchvision: half of every group goes, the rest computes the same.

Results are added to a file, so that a run that was ended goes on. `make bench-pruning` also runs Torch-Pruning on the
networks, in its own environment, and `--publish` writes what became of both into docs/benchmarks.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parts.architectures import CONVOLUTIONAL, FIXED, create, pictures
from parts.coverage_page import is_exported, publish
from parts.race import Result, run_each, said

from models.randomize import randomize
from models.timm_networks import import_timm
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ExportError
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.kept import Kept, plan_removal
from slimgraph.pruning.prove import TOLERANCE, largest_difference

RESULTS = Path(__file__).parent / "results" / "prune_coverage.jsonl"
OF_TORCH_PRUNING = RESULTS.with_name("torch_pruning_coverage.jsonl")
CPU_SECONDS = 600


@dataclass(slots=True)
class Run:
    """What became of a network, once without and once with the axes that a norm runs over."""

    norm_axes: bool
    groups: int = 0
    left: float = 1.0
    error: float | None = None
    seconds: float = 0.0
    exported: bool = False
    """To ONNX, where outputs agree; tried for the run of which more is removed."""
    unknown: Sequence[str] = field(default_factory=tuple)
    remark: str = ""
    failure: str = ""


def random_program(name: str) -> Program:
    """An architecture with random weights and statistics that are alive."""
    torch.manual_seed(0)
    model = create(name)
    randomize(model, lambda m: m(pictures(name, m, batch=2, seed=1)))
    return capture(model, pictures(name, model, batch=1)).eval()


def half(groups: Groups) -> dict[str, tuple[int, ...]]:
    """Half of the indices of every group, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    return {
        group.name: tuple(sorted(torch.randperm(group.size, generator=generator)[: group.size // 2].tolist()))
        for group in groups.groups
    }


def _export(program: Program, pruned: Program, batch: torch.Tensor, run: Run) -> None:
    """Export, and compare with ONNX Runtime; what cannot be exported whole is no fault of the pruning, and is told."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        try:
            export_onnx(pruned, path)
        except ExportError:
            if _exports(program, path):
                raise
            run.remark = "not even the original exports"
        else:
            check_export(pruned, path, batch)
            run.exported = True


def _exports(program: Program, path: Path) -> bool:
    try:
        export_onnx(program, path)
    except ExportError:
        return False
    return True


def prune_half(program: Program, run: Run, *, export: bool) -> None:
    """Half of every group removed, proved, run with one and with three samples, and exported if wanted."""
    start = time.perf_counter()
    groups = find_groups(program, norm_axes=run.norm_axes)
    run.groups, run.unknown = len(groups.groups), sorted(set(groups.unknown.values()))
    plan = plan_removal(groups, half(groups), norm_axes=run.norm_axes)
    pruned = apply_pruning(program, plan, proof=False, groups=groups)
    run.seconds = time.perf_counter() - start
    before = sum(parameter.numel() for parameter in program.parameters())
    run.left = sum(parameter.numel() for parameter in pruned.parameters()) / before
    run.error = largest_difference(program, pruned, Kept(groups, plan))
    assert run.error <= TOLERANCE, f"differs from the masked program by {run.error:.0e} of the range"
    shape = program.signature.inputs[0].sized({"batch": 1})
    with torch.inference_mode():
        for batch in (1, 3):
            output = pruned(torch.randn(batch, *shape[1:]))
            assert isinstance(output, torch.Tensor)
            assert output.shape[0] == batch
    if export:
        _export(program, pruned, torch.randn(3, *shape[1:]), run)


def race(name: str, *, export: bool) -> Result:
    """What becomes of one network."""
    program = random_program(name)
    has_norms = any(group.normed for group in find_groups(program, norm_axes=True).groups)
    runs = []
    for norm_axes in (False, True) if has_norms else (False,):
        runs.append(run := Run(norm_axes=norm_axes))
        try:  # of two, the one of which more goes is exported
            prune_half(program, run, export=export and norm_axes == has_norms)
        except Exception as error:  # a race counts whatever goes wrong
            run.failure = said(error)
    return {"runs": [asdict(run) for run in runs]}


def main() -> None:
    """Run the race, or what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the list by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are kept")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--without-export", action="store_true", help="leave ONNX to a later run, which takes longer")
    parser.add_argument("--publish", action="store_true", help="run nothing, and write the results into the docs")
    arguments = parser.parse_args()
    if arguments.publish:
        publish(arguments.results, OF_TORCH_PRUNING)
        return
    torch.set_num_threads(1)
    import_timm()  # once, for the processes of all networks
    names = arguments.names or (*CONVOLUTIONAL, *FIXED)
    export = not arguments.without_export

    def stands(result: Result) -> bool:
        return not arguments.again and (not export or "failure" in result or is_exported(result))

    run_each(names, arguments.results, partial(race, export=export), cpu_seconds=CPU_SECONDS, stands=stands)


if __name__ == "__main__":
    main()
