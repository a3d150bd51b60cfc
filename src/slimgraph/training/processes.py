"""The processes and devices that train, by Hugging Face Accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from slimgraph.errors import ConfigError, closest

MixedPrecision: TypeAlias = Literal["no", "bf16", "fp16"]


@contextmanager
def one_process(mixed_precision: MixedPrecision = "no") -> Iterator[Accelerator]:
    """An accelerator for this process alone: on the first device where there is one, otherwise on the CPU.

    Raises:
        ConfigError: the process is one of several, there is no such precision here, or the user's own accelerator has
            another one.
    """
    if mixed_precision not in get_args(MixedPrecision):
        raise ConfigError(
            f"mixed_precision is {mixed_precision!r}. {closest(mixed_precision, get_args(MixedPrecision))}"
        )
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"This process is one of {processes} (WORLD_SIZE), and training runs in one: each of them would train a "
            "model of its own. Start it without a launcher."
        )
    has_device = torch.accelerator.is_available()
    if mixed_precision == "fp16" and not has_device:
        raise ConfigError("fp16 needs an accelerator, and there is none here. On the CPU there is bf16.")
    # All accelerators of a process share what the first one set, its precision too. So what was set here is forgotten
    # at the end, and what somebody else set is kept.
    states = (GradientState, AcceleratorState, PartialState)
    ours = [state for state in states if not state._shared_state]
    if AcceleratorState not in ours and (theirs := AcceleratorState().mixed_precision) != mixed_precision:
        raise ConfigError(
            f"mixed_precision is {mixed_precision!r}, but this process has an Accelerator with {theirs!r}. "
            "Give the same, or make yours after training."
        )
    try:
        yield Accelerator(cpu=not has_device, mixed_precision=mixed_precision)
    finally:
        for state in ours:
            state._reset_state()
