"""Accuracy and latency of ResNet-56 on CIFAR-10 with 2.1 times fewer multiply–accumulates, by criterion.

Usage: python benchmarks/pruned_accuracy.py [all] [criteria] [training] [latency] [--flops-removed 0.524]
           [--images 2000] [--steps 250] [--batch 128] [--trained fisher/global random/uniform] [--judged 10000]
           [--results FILE] [--whole-shortcuts] [--criteria taylor random]
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from parts.networks import RESNET56
from parts.printing import print_table
from parts.shuffled import Shuffled

from slimgraph.deploy.latency import LatencyComparison, summarize_pairs, time_calls
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError
from slimgraph.program.count import count
from slimgraph.program.program import Program
from slimgraph.pruning.allocate import Strategy
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.batch_norm import reestimate_batch_norm
from slimgraph.pruning.groups import Groups, find_groups
from slimgraph.pruning.prune import plan_pruning
from slimgraph.training.batch import Batch
from slimgraph.training.evaluate import evaluate
from slimgraph.training.loop import fit
from slimgraph.training.paired import paired_difference

_TEST = "cifar10_test_jpeg.npz"
_TRAINING = "cifar10_train_jpeg.npz"
_WITH_DATA = ("taylor", "fisher")
_CRITERIA = ("l1_norm", "l2_norm", "geometry_median", "bn_scale", *_WITH_DATA, "random")
_ALLOCATIONS: tuple[Strategy, ...] = ("global", "uniform")
_MULTIPLES = (1, 4, 8, 16)
_CURVE = 5
"""Points of a training curve after its first."""
_WHOLE = "not pruned"


class _Pruner:
    """ResNet-56, its groups, and what it was before."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.original = RESNET56.program()
        self.groups: Groups = find_groups(self.original)
        self.removed: float = options.flops_removed
        streams = [group.name for group in self.groups.groups if len(group.makers) > 1]
        self.skip = streams if options.whole_shortcuts else []
        self.scoring = self.images(RESNET56.calibration, options.batch)

    def images(self, spec: str, batch: int) -> list[Batch]:
        return list(RESNET56.open(self.original, spec, batch))

    def prune(self, criterion: str, allocation: Strategy, multiple_of: int = 1) -> Program:
        reads = {"data": self.scoring, "loss": "cross_entropy"} if criterion in _WITH_DATA else {}
        plan = plan_pruning(
            self.original,
            flops_removed=self.removed,
            criterion=criterion,
            allocation=allocation,
            multiple_of=multiple_of,
            skip=self.skip,
            groups=self.groups,
            **reads,
        )
        return apply_pruning(self.original, plan, groups=self.groups, proof=False)

    def sizes(self, program: Program) -> list[str]:
        before, after = count(self.original), count(program)
        return [
            f"{after.macs / 1e6:.1f} ({before.macs / after.macs:.2f}×)",
            f"{after.parameters / 1e3:.0f} ({before.parameters / after.parameters:.2f}×)",
        ]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _change(before: torch.Tensor, after: torch.Tensor) -> str:
    found = paired_difference(before, after)
    return f"{100 * found.difference:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"


def _add(rows: list[list[str]], row: Sequence[str]) -> None:
    rows.append([*row])
    print(row, file=sys.stderr, flush=True)


def _criteria(pruner: _Pruner, options: argparse.Namespace, command: str) -> None:
    test = pruner.images(f"{_TEST}[:{options.images}]", 50)
    rows: list[list[str]] = []
    before = _percent(evaluate(pruner.original, test).value)
    _add(rows, [_WHOLE, "", *pruner.sizes(pruner.original), before, ""])
    for criterion, allocation in itertools.product(options.criteria, _ALLOCATIONS):
        pruned = pruner.prune(criterion, allocation)
        restored = reestimate_batch_norm(pruned, pruner.scoring)
        tops = [_percent(evaluate(each, test).value) for each in (pruned, restored)]
        _add(rows, [criterion, allocation, *pruner.sizes(pruned), *tops])
    print_table(
        f"ResNet-56 pruned by criterion, {options.images} test images, not trained",
        command,
        ["criterion", "allocation", "million MACs", "thousand parameters", "top-1 %", "batch norms re-estimated"],
        rows,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """What became of one network, as it stands in the file of results."""

    name: str
    recipe: str
    """Results of another recipe are others."""
    sizes: list[str]
    curve: list[float]
    right: str
    """A digit for each test image: 1 where the answer is right."""

    @property
    def correct(self) -> torch.Tensor:
        return torch.tensor([digit == "1" for digit in self.right])


def _results(options: argparse.Namespace) -> dict[str, _Trained]:
    path = Path(options.results)
    lines = path.read_text().splitlines() if path.exists() else []
    found = [_Trained(**json.loads(line)) for line in lines]
    return {each.name: each for each in found if each.recipe == _recipe(options)}


def _recipe(options: argparse.Namespace) -> str:
    shortcuts = ["whole_shortcuts"] if options.whole_shortcuts else []
    return str(
        [getattr(options, name) for name in ("flops_removed", "steps", "batch", "rate", "curve", "judged", *shortcuts)]
    )


def _train(pruner: _Pruner, name: str, options: argparse.Namespace) -> _Trained:
    spec = f"{_TRAINING}[:{min(options.steps * options.batch, 50000)}]"
    test = pruner.images(f"{_TEST}[:{options.judged}]", 50)
    curve = test[: options.curve // 50]
    start = pruner.original
    if name != _WHOLE:
        criterion, _, allocation = name.partition("/")
        start = reestimate_batch_norm(pruner.prune(criterion, allocation), pruner.scoring)
    fitted = fit(
        start.to(memory_format=torch.channels_last),  # half as fast again
        Shuffled(pruner.images(spec, options.batch), options.batch),
        loss="cross_entropy",
        optimizer=("SGD", {"lr": options.rate, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
        schedule="cosine",
        steps=options.steps,
        evaluate=lambda program: evaluate(program, curve),
        evaluate_every=max(1, options.steps // _CURVE),
        keep_best=False,  # test images choose nothing
    )
    return _Trained(
        name=name,
        recipe=_recipe(options),
        sizes=pruner.sizes(start),
        curve=[value for _, value in fitted.evaluations],
        right="".join(str(int(right)) for right in evaluate(fitted.program, test).correct),
    )


def _training(pruner: _Pruner, options: argparse.Namespace, command: str) -> None:
    """What the file of results has is not trained again, so that a run goes on where one has ended."""
    rows: list[list[str]] = []
    for name in dict.fromkeys([_WHOLE, *options.trained]):
        if name not in _results(options):
            made = _train(pruner, name, options)
            with Path(options.results).open("a") as file:
                file.write(json.dumps(dataclasses.asdict(made)) + "\n")
        found = _results(options)
        result, whole = found[name], found[_WHOLE]
        told = " ".join(f"{100 * value:.1f}" for value in result.curve)
        top = _percent(float(result.correct.double().mean()))
        _add(rows, [name, *result.sizes, told, top, _change(whole.correct, result.correct)])
    print_table(
        f"ResNet-56 trained after pruning, {options.steps} steps of {options.batch} images",
        command,
        [
            "pruned by",
            "million MACs",
            "thousand parameters",
            f"top-1 % of {options.curve} images, every {max(1, options.steps // _CURVE)} steps from 0",
            f"top-1 % of {options.judged} images",
            "less the unpruned one, trained alike (95 %)",
        ],
        rows,
    )


def _opened(program: Program) -> OnnxModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.onnx"
        export_onnx(program, path)
        return OnnxModel.open(path.read_bytes(), threads=1)


def _compared(original: OnnxModel, pruned: OnnxModel, seconds: float) -> LatencyComparison:
    """In turn, as `measure_latency` does it, but by processor time: others on the machine take none of that."""
    image = original.prepare(torch.randn(1, 3, RESNET56.size, RESNET56.size))
    calls = [lambda: original.run(image), lambda: pruned.run(image)]
    found = time_calls(calls, warmup=5, repeats=30, min_seconds=seconds, clock=time.process_time)
    return summarize_pairs(found[:, 0], found[:, 1], threads=1, batch=1)


def _latency(pruner: _Pruner, options: argparse.Namespace, command: str) -> None:
    rows: list[list[str]] = []
    original = _opened(pruner.original)
    for allocation, multiple_of in itertools.product(reversed(_ALLOCATIONS), _MULTIPLES):
        try:
            program = pruner.prune("l2_norm", allocation, multiple_of)
        except ConfigError:
            _add(rows, [allocation, str(multiple_of), "cannot be reached", *[""] * 3])
            continue
        found = _compared(original, _opened(program), options.seconds)
        times = [f"{each.median_ms:.2f}" for each in (found.original, found.compressed)]
        speedups = (1 / found.latency_ratio, 1 / found.latency_ratio_high, 1 / found.latency_ratio_low)
        middle = "{:.2f}× ({:.2f} to {:.2f})".format(*speedups)
        _add(rows, [allocation, str(multiple_of), *pruner.sizes(program), " → ".join(times), middle])
    print_table(
        "Latency of the pruned ResNet-56 in ONNX Runtime, batch 1, one thread, by width",
        command,
        [
            "allocation",
            "channels a multiple of",
            "million MACs",
            "thousand parameters",
            "processor ms",
            "times faster (half of the pairs)",
        ],
        rows,
    )


_TABLES = {"criteria": _criteria, "training": _training, "latency": _latency}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[*_TABLES, "all"], default="all")
    parser.add_argument("--flops-removed", type=float, default=0.524)
    parser.add_argument("--whole-shortcuts", action="store_true", help="prune the first convolutions of blocks only")
    parser.add_argument("--criteria", nargs="*", choices=_CRITERIA, default=_CRITERIA, help="to compare")
    parser.add_argument("--images", type=int, default=2000, help="of the test set, to compare criteria")
    parser.add_argument("--trained", nargs="*", default=["geometry_median/global", "l2_norm/uniform", "random/uniform"])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--curve", type=int, default=1000, help="test images for the training curve")
    parser.add_argument("--judged", type=int, default=10000, help="test images after training")
    parser.add_argument("--results", default="pruned_accuracy.jsonl", help="what was trained; a run goes on from there")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of latency")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pruner = _Pruner(options)
    for table in _TABLES if "all" in options.tables else options.tables:
        _TABLES[table](pruner, options, " ".join(["python benchmarks/pruned_accuracy.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
