"""What writing a checkpoint of 100 MB costs, beside writing as many bytes."""

import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from parts.printing import print_table
from torch import nn

import slimgraph
from slimgraph.training.checkpoint import Checkpoints, read_state
from slimgraph.training.engine import Engine
from slimgraph.training.loop import fit

WIDTH = 5120


def _written(folder: Path, content: bytes) -> float:
    """Seconds of writing bytes to a new file until they are on the disk."""
    begun = time.perf_counter()
    with open(folder / "bytes", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    (folder / "bytes").unlink()
    return seconds


def main() -> None:
    """Checkpoints of a linear layer after each of seven steps of plain descent; the first is not counted."""
    program = slimgraph.capture(nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.zeros(1, WIDTH))
    data = [(torch.zeros(1, WIDTH), torch.zeros(1, WIDTH))] * 7
    took, beside, content = [], [], os.urandom(4 * WIDTH * (WIDTH + 1))
    write = Engine.write

    def timed(self: Engine, *arguments: object) -> None:
        begun = time.perf_counter()
        write(self, *arguments)  # type: ignore[arg-type]
        took.append(time.perf_counter() - begun)
        beside.append(_written(folder, content))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Engine.write = timed  # type: ignore[method-assign]
        fit(
            program,
            data,
            loss="mse",
            optimizer=("SGD", {"lr": 0.0}),
            epochs=1,
            checkpoints=Checkpoints(folder / "checkpoints", every=1),
        )
        newest = max((folder / "checkpoints").iterdir())
        begun = time.perf_counter()
        read_state(newest)
        reading, size = time.perf_counter() - begun, newest.stat().st_size
    ratios = [own / plain for own, plain in zip(took[1:], beside[1:], strict=True)]
    print_table(
        "Writing a checkpoint",
        "python benchmarks/checkpoint.py",
        ["MB", "checkpoint, s", "as many bytes, s", "ratio", "reading and checking, s"],
        [
            [
                f"{size / 1e6:.0f}",
                f"{median(took[1:]):.2f}",
                f"{median(beside[1:]):.2f}",
                f"{median(ratios):.2f}",
                f"{reading:.2f}",
            ]
        ],
    )


if __name__ == "__main__":
    main()
