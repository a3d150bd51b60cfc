"""Sensitivity of ResNet-56 to each of its groups at nine ratios, beside a full forward for each point.

Usage: python benchmarks/sensitivity.py [--samples 1000] [--chosen 16]
"""

import argparse
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

BATCHES = (32, 128)
"""Samples at a time; `measure_sensitivity` gets the first."""


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
                for axis, kept in axes.items() if tensor is not None and tensor.dim() > 1 else ():
                    if axis == 1:
                        gone = [index for index in range(tensor.shape[1]) if index not in kept]
                        tensor[:, gone] = 0
        yield group.name, tenth / 10, masked


def _full_seconds(masked: dict[tuple[str, float], Program], data: list[Batch], whole: Sensitivity) -> tuple[float, int]:
    """Processor seconds of a point by full forwards, and by how many images its correct count is another at most."""
    evaluate(next(iter(masked.values())), data[:1])
    seconds, worst = 0.0, 0
    for (name, ratio), program in masked.items():
        began = time.process_time()
        found = evaluate(program, data)
        seconds += time.process_time() - began
        worst = max(worst, abs(round(whole.samples * (found.value - whole.ladders[name].metrics[ratio]))))
    return seconds / len(masked), worst


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--chosen", type=int, default=16, help="points that are evaluated by full forwards too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    program = RESNET56.program()
    spec = f"cifar10_test_jpeg.npz[:{options.samples}]"
    data = {batch: [*RESNET56.open(program, spec, batch)] for batch in BATCHES}
    began = time.process_time()
    whole = measure_sensitivity(program, data[BATCHES[0]], stop_loss=None)
    seconds = time.process_time() - began
    points = sum(len(ladder.metrics) for ladder in whole.ladders.values())
    chosen = set(random.Random(0).sample(range(points), options.chosen))
    masked = {(name, ratio): each for number, (name, ratio, each) in enumerate(_masked(program)) if number in chosen}
    rows = [["measure_sensitivity", BATCHES[0], points, f"{seconds:.0f}", f"{seconds / points:.2f}", "", ""]]
    for batch, given in data.items():
        each, worst = _full_seconds(masked, given, whole)
        rows.append(
            [
                f"full forwards of the folded masked program, by {options.chosen} of the points",
                batch,
                points,
                f"{each * points:.0f}",
                f"{each:.2f}",
                f"{each * points / seconds:.2f}",
                worst,
            ]
        )
    print_table(
        f"Sensitivity of ResNet-56: {len(whole.ladders)} groups × 9 ratios, {options.samples} images, one thread",
        " ".join(["python benchmarks/sensitivity.py", *sys.argv[1:]]),
        ["by", "batch", "points", "processor seconds", "a point", "× slower", "correct images apart, at most"],
        rows,
    )


if __name__ == "__main__":
    main()
