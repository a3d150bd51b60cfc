"""What `fit` costs beside a bare PyTorch loop: ResNet-20, batches of 128 images of 32², one thread.

The steps of both alternate one by one, and the processor's time is counted, so that others on the machine
matter less.

Usage: python benchmarks/fit.py [--steps 40] [--batch 128]
"""

import argparse
import statistics
import sys
import time

import torch
from parts.printing import print_table
from torch import nn

from models.cifar_resnet import resnet20
from slimgraph.program.capture import capture
from slimgraph.training.loop import Hook, Run, fit

_WARM_UP = 2
_OPTIMIZER = ("SGD", {"lr": 1e-3, "momentum": 0.9})


class _Alternate(Hook):
    """Does a step of a bare loop between two of `fit`, and counts all time that is not its own as that of `fit`."""

    def __init__(self, program: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._program, self._batches = program, batches
        self._optimizer = torch.optim.SGD(program.parameters(), lr=1e-3, momentum=0.9)
        self._left = 0.0
        self.bare: list[float] = []
        self.fit: list[float] = []

    def epoch_begin(self, run: Run) -> None:
        self._left = time.process_time()

    def step_end(self, run: Run) -> None:
        begun = time.process_time()
        self.fit.append(begun - self._left)
        x, labels = self._batches[run.step - 1]
        self._optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._program(x), labels)
        loss.backward()
        self._optimizer.step()
        loss.item()  # whoever trains looks at it
        self._left = time.process_time()
        self.bare.append(self._left - begun)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, size = options.steps + _WARM_UP, options.batch
    batches = [(torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))) for _ in range(count)]
    program = capture(resnet20(), batches[0][0][:2])
    watch = _Alternate(program.copy().train(), batches)
    idle = [Hook() for _ in range(8)]
    fit(
        program,
        batches,
        loss="cross_entropy",
        optimizer=_OPTIMIZER,
        schedule="cosine",
        epochs=1,
        hooks=[*idle, watch],
    )
    own, bare = watch.fit[_WARM_UP:], watch.bare[_WARM_UP:]
    ratios = sorted(a / b for a, b in zip(own, bare, strict=True))
    middle = f"{ratios[len(ratios) // 4]:.3f} to {ratios[len(ratios) * 3 // 4]:.3f}"
    rows = [
        ["bare loop", f"{statistics.median(bare) * 1e3:.1f} ms", "1"],
        [
            "`fit`: every batch checked, a schedule, eight idle hooks",
            f"{statistics.median(own) * 1e3:.1f} ms",
            f"{statistics.median(ratios):.3f} (half of them {middle})",
        ],
    ]
    print_table(
        f"A training step through `fit`: ResNet-20, batch {size} at 32², one thread",
        " ".join(["python benchmarks/fit.py", *sys.argv[1:]]),
        ["loop", "processor time of a step, median", "ratio of neighbouring steps, median"],
        rows,
    )


if __name__ == "__main__":
    main()
