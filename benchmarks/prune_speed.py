"""Seconds that it takes to plan a structured pruning and to apply it, step by step, on one thread.

Usage: python benchmarks/prune_speed.py [resnet50 swin_tiny_patch4_window7_224 …] [--repeats 5]
"""

import argparse
import itertools
import statistics
import sys
import time

import torch
from parts.architectures import create, pictures
from parts.printing import print_table

from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import Kept
from slimgraph.pruning.prove import prove
from slimgraph.pruning.prune import MULTIPLE, plan_pruning, prune

_STEPS = ("finding them", "scores", "allocation", "application", "without proof", "proof", "slimgraph.prune")


def _steps(program: Program) -> list[float]:
    """Processor seconds of each step; the allocation is what planning takes beside the scores."""
    clock = time.process_time  # of which others on the machine take none
    times = [clock()]
    groups = find_groups(program)
    times.append(clock())
    score_groups(program, groups)
    times.append(clock())
    plan = plan_pruning(program, flops_removed=0.5, multiple_of=MULTIPLE, groups=groups)
    times.append(clock())
    pruned = apply_pruning(program, plan, proof=False, groups=groups)
    times.append(clock())
    prove(program, pruned, Kept(groups, plan), plan)
    times.append(clock())
    prune(program, flops_removed=0.5)
    times.append(clock())
    found, scored, planned, applied, proved, whole = (b - a for a, b in itertools.pairwise(times))
    return [found, scored, planned - scored, applied, found + planned + applied, proved, whole]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["resnet50", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        model = create(name).eval()
        program = capture(model, pictures(name, model, batch=1)).eval()
        operators = sum(node.op == "call_function" for node in program.graph.nodes)
        runs = [_steps(program) for _ in range(options.repeats + 1)][1:]  # the first one warms up
        medians = [f"{statistics.median(each):.2f}" for each in zip(*runs, strict=True)]
        rows.append([name, operators, len(find_groups(program).groups), *medians])
    print_table(
        f"Time to prune: processor seconds, median of {options.repeats}, one thread",
        " ".join(["python benchmarks/prune_speed.py", *sys.argv[1:]]),
        ["network", "operators", "groups", *_STEPS],
        rows,
    )


if __name__ == "__main__":
    main()
