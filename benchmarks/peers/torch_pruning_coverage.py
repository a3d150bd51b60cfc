"""Torch-Pruning over the families of timm and torchvision, without hints: half of all channels, and does it still run?

A network passes where pruning ends in time, removes parameters, and forward passes at two batch sizes give one row of
classes for each picture. Its outputs are not compared with those of a masked network: nothing in Torch-Pruning tells
which channels of what were removed. Only the classifier is named to it, so that the classes stay.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch_pruning
from parts.architectures import CONVOLUTIONAL, FIXED, create, pictures
from parts.race import Result, run_each

from models.timm_networks import import_timm

RATIO = 0.5
RESULTS = Path(__file__).parents[1] / "results" / "torch_pruning_coverage.jsonl"


def _classifiers(model: nn.Module, name: str) -> list[nn.Module]:
    """The layers that make the classes, as the library names them."""
    if "/" not in name and hasattr(model, "get_classifier"):
        found = model.get_classifier()
        return [layer for layer in (found if isinstance(found, (tuple, list)) else [found]) if layer is not None]
    # torchvision: the last layer with weights
    return [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1:]


def race(name: str) -> Result:
    """Prune one network; what stands in a way is raised."""
    torch.manual_seed(0)
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
            assert shape == (batch, classes), f"the outputs for {batch} pictures are {shape}"
    assert left < 1, "nothing is removed"
    return {"left": left, "seconds": seconds}


def main() -> None:
    """Run the race, or what is left of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the list by default")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are kept")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--seconds", type=int, default=120, help="of CPU time, after which a network counts as failed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_timm()  # once, for the processes of all networks
    names = arguments.names or (*CONVOLUTIONAL, *FIXED)
    run_each(names, arguments.results, race, cpu_seconds=arguments.seconds, stands=lambda result: not arguments.again)


if __name__ == "__main__":
    main()
