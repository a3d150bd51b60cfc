"""Structured pruning over the families of timm and torchvision: half of every group goes, the rest computes the same.

`make bench-pruning` also runs Torch-Pruning on them, in its own environment.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from parts.architectures import CONVOLUTIONAL, FIXED, create, pictures

from models.randomize import randomize
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ExportError
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.kept import Kept, plan_removal
from slimgraph.pruning.prove import TOLERANCE, largest_difference


@dataclass(slots=True)
class Run:
    """What became of a network."""

    name: str
    groups: int = 0
    left: float = 1.0
    error: float = float("nan")
    seconds: float = 0.0
    unknown: Sequence[str] = field(default_factory=tuple)
    remark: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything ran and the masked program was met."""
        return not self.failure and self.error <= TOLERANCE


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


def _exports(program: Program, path: Path) -> bool:
    try:
        export_onnx(program, path)
    except ExportError:
        return False
    return True


def prune_half(name: str, program: Program, *, norm_axes: bool, export: bool) -> Run:
    """Half of every group removed, proved, run with one and with three samples, and exported if wanted."""
    run = Run(name=name)
    start = time.perf_counter()
    groups = find_groups(program, norm_axes=norm_axes)
    run.groups, run.unknown = len(groups.groups), sorted(set(groups.unknown.values()))
    plan = plan_removal(groups, half(groups), norm_axes=norm_axes)
    pruned = apply_pruning(program, plan, proof=False, groups=groups)
    run.seconds = time.perf_counter() - start
    before = sum(parameter.numel() for parameter in program.parameters())
    run.left = sum(parameter.numel() for parameter in pruned.parameters()) / before
    run.error = largest_difference(program, pruned, Kept(groups, plan))
    shape = program.signature.inputs[0].sized({"batch": 1})
    with torch.inference_mode():
        for batch in (1, 3):
            output = pruned(torch.randn(batch, *shape[1:]))
            assert isinstance(output, torch.Tensor)
            assert output.shape[0] == batch
    if export:
        _export(program, pruned, torch.randn(3, *shape[1:]), run)
    return run


def main() -> None:
    """Run the race and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the list by default")
    parser.add_argument("--export", action="store_true", help="also export, and compare with ONNX Runtime")
    arguments = parser.parse_args()
    names = arguments.names or (*CONVOLUTIONAL, *FIXED)
    torch.set_num_threads(1)
    passed = 0
    print(f"{'network':32} {'norm axes':9} {'groups':>6} {'left':>5} {'error':>8} {'s':>5}  ")
    for name in names:
        try:
            program = random_program(name)
        except Exception as error:
            print(f"{name:32} is not a program: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        runs: list[Run] = []
        has_norms = any(group.normed for group in find_groups(program, norm_axes=True).groups)
        for norm_axes in (False, True) if has_norms else (False,):
            try:
                export = arguments.export and norm_axes == has_norms  # of two, the one of which more goes
                run = prune_half(name, program, norm_axes=norm_axes, export=export)
            except Exception as error:  # a race counts whatever goes wrong
                run = Run(name=name, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            runs.append(run)
            notes = run.failure or (run.remark if run.passed else "DIFFERS")
            notes += f" no rule: {', '.join(run.unknown)}" if run.unknown else ""
            print(
                f"{name:32} {'with' if norm_axes else 'without':9} {run.groups:6} {run.left:5.2f} {run.error:8.0e} "
                f"{run.seconds:5.1f}  {notes}",
                flush=True,
            )
        passed += all(run.passed for run in runs)
    print(f"{passed} of {len(names)} pass both with and without norm axes.")


if __name__ == "__main__":
    main()
