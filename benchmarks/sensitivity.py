"""Sensitivity of ResNet-56 to each of its groups at nine ratios, beside a full forward for each point."""

import itertools
import random
import sys
import time
from collections.abc import Iterator

import torch
from parts.networks import RESNET56
from parts.printing import print_table

from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.program import Program
from slimgraph.pruning.allocate import count_removed, lowest
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.measure_sensitivity import measure_sensitivity
from slimgraph.pruning.sensitivity import Sensitivity
from slimgraph.training.batch import Batch
from slimgraph.training.evaluate import evaluate

SAMPLES = 1000
BATCH = 32
"""At which plain forwards are the fastest: they take 5 ms an image at 128, 3 ms at 32."""
FULL = 24
"""Points that are evaluated by full forwards too."""
STOP_LOSS = 0.2


def _masked(program: Program) -> Iterator[tuple[str, float, Program]]:
    """Each point as the folded program in which the channels that go are zeros for whoever reads them."""
    groups = find_groups(program)
    scores = score_groups(program, groups)
    folded = fold_batch_norm(program)
    for group, tenth in itertools.product(groups.groups, range(1, 10)):
        plan = plan_removal(groups, {group.name: lowest(scores[group.name], count_removed(group.size, tenth / 10))})
        masked = folded.copy()
        with torch.no_grad():
            for name, axes in plan.kept.items():
                tensor = masked.state_dict().get(name)
                for axis, kept in axes.items() if tensor is not None and tensor.dim() == 4 else ():
                    if axis == 1:
                        gone = [index for index in range(tensor.shape[1]) if index not in kept]
                        tensor[:, gone] = 0
        yield group.name, tenth / 10, masked


def _full(program: Program, data: list[Batch], whole: Sensitivity) -> tuple[float, int]:
    """Seconds of some points by full forwards, and by how many images their correct counts are different at most."""
    points = list(range(9 * len(whole.ladders)))
    chosen = set(random.Random(0).sample(points, FULL))
    seconds, worst = 0.0, 0
    for number, (name, ratio, masked) in enumerate(_masked(program)):
        if number not in chosen:
            continue
        began = time.perf_counter()
        found = evaluate(masked, data)
        seconds += time.perf_counter() - began
        worst = max(worst, abs(round(SAMPLES * (found.value - whole.ladders[name].metrics[ratio]))))
        print(name, ratio, found.value, whole.ladders[name].metrics[ratio], file=sys.stderr, flush=True)
    return seconds, worst


def _measured(program: Program, data: list[Batch], stop_loss: float | None) -> tuple[Sensitivity, float, int]:
    began = time.perf_counter()
    found = measure_sensitivity(program, data, stop_loss=stop_loss)
    seconds = time.perf_counter() - began
    points = sum(len(ladder.metrics) for ladder in found.ladders.values())
    print(stop_loss, points, seconds, file=sys.stderr, flush=True)
    return found, seconds, points


def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    program = RESNET56.program()
    data = [*RESNET56.open(program, f"cifar10_test_jpeg.npz[:{SAMPLES}]", BATCH)]
    whole, seconds, points = _measured(program, data, None)
    full, worst = _full(program, data, whole)
    _, ended, tried = _measured(program, data, STOP_LOSS)
    all_full = full / FULL * points
    rows = [
        [f"a full forward for each point, by {FULL} of them", points, f"{all_full:.0f}", "1", ""],
        ["measure_sensitivity, every point", points, f"{seconds:.0f}", f"{all_full / seconds:.1f}", f"±{worst}"],
        [
            f"measure_sensitivity, ladders end at a loss of {STOP_LOSS:.0%}",
            tried,
            f"{ended:.0f}",
            f"{all_full / ended:.1f}",
            "the same",
        ],
    ]
    print_table(
        f"Sensitivity of ResNet-56: {len(whole.ladders)} groups × 9 ratios, {SAMPLES} CIFAR-10 images",
        "python benchmarks/sensitivity.py",
        ["by", "points", "seconds", "× faster", "correct images beside full forwards"],
        rows,
    )


if __name__ == "__main__":
    main()
