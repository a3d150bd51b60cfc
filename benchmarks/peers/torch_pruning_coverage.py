"""Torch-Pruning over the families of timm and torchvision, without hints: half of all channels, and does it still run?

A network passes where pruning ends in time, removes parameters, and forward passes at two batch sizes give one row of
classes for each picture. Its outputs are not compared with those of a masked network: nothing in Torch-Pruning tells
which channels of what were removed. Only the classifier is named to it, so that the classes stay.
"""

import argparse
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch_pruning
from parts.architectures import CONVOLUTIONAL, FIXED, create, pictures

RATIO = 0.5


def _classifiers(model: nn.Module, name: str) -> list[nn.Module]:
    """The layers that make the classes, as the library names them."""
    if "/" not in name and hasattr(model, "get_classifier"):
        found = model.get_classifier()
        return [layer for layer in (found if isinstance(found, (tuple, list)) else [found]) if layer is not None]
    # torchvision: the last layer with weights
    return [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1:]


def _prune(name: str, seed: int) -> str:
    """Prune in this process; returns the line of the table."""
    torch.manual_seed(seed)
    model = create(name).eval()
    before = sum(parameter.numel() for parameter in model.parameters())
    classes = model(pictures(name, model, batch=1)).shape[1]
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        pictures(name, model, batch=1),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=_classifiers(model, name),
    )
    pruner.step()
    seconds = time.perf_counter() - start
    left = sum(parameter.numel() for parameter in model.parameters()) / before
    with torch.no_grad():
        for batch in (1, 3):
            shape = tuple(model(pictures(name, model, batch=batch)).shape)
            if shape != (batch, classes):
                return f"{left:5.2f} {seconds:6.1f}  FAILS: the outputs for {batch} pictures are {shape}"
    return f"{left:5.2f} {seconds:6.1f}  " + ("" if left < 1 else "FAILS: nothing is removed")


def _answer(name: str, seed: int, line: Connection) -> None:
    try:
        line.send(_prune(name, seed))
    except BaseException as error:  # a race counts whatever goes wrong
        line.send(f"{'':5} {'':6}  FAILS: {type(error).__name__}: {' '.join(str(error).split())[:160]}")


def main() -> None:
    """Run the race and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the list by default")
    parser.add_argument("--seconds", type=float, default=120, help="for each network, after which it counts as failed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.names or (*CONVOLUTIONAL, *FIXED)
    passed = 0
    print(f"{'network':32} {'left':>5} {'s':>6}")
    for name in names:
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_answer, args=(name, 0, sender))
        process.start()
        sender.close()
        try:
            answer = receiver.recv() if receiver.poll(arguments.seconds) else "FAILS: does not return in time"
        except EOFError:
            answer = "FAILS: the process ended"
        process.kill()
        process.join()
        passed += "FAILS" not in answer
        print(f"{name:32} {answer}", flush=True)
    print(f"{passed} of {len(names)} pass.")


if __name__ == "__main__":
    main()
