"""The random numbers of a training: its own while it runs, and their state."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_CPU = torch.device("cpu")


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's random numbers begin anew inside, and go on outside as if nothing had drawn any."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def random_state(device: torch.device = _CPU) -> dict[str, Any]:
    """The state of every generator that training or reading its data may draw from."""
    name, numbers, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(numbers, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words, dtype=torch.int64), spare],
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device = _CPU) -> None:
    """Let the generators go on from a state that `random_state` gave."""
    torch.set_rng_state(state["torch"])
    name, numbers, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, spare = state["python"]
    random.setstate((version, tuple(words.tolist()), spare))
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
