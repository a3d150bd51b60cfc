"""Time and memory of a quantization-aware training step against the float step: MobileNetV2, batch 16, 96², one thread.

Usage: python benchmarks/qat_step.py [--compile] [--learned] [--rounds 7]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from parts.printing import print_table
from torch import nn

from models.timm_networks import create, example_input
from slimgraph.program.capture import capture
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.qat import parameter_groups, prepare_qat
from slimgraph.quantization.quantize import prepare, quantize_with_record

_BATCH, _SIZE = 16, 96


def _step_of(module: nn.Module, groups: list[dict[str, object]], x: torch.Tensor) -> Callable[[], None]:
    labels = torch.randint(0, 1000, (len(x),), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), labels).backward()
        optimizer.step()

    return step


def _held_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that the forward pass keeps for the backward one, each storage once."""
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(held.values())


def _alternated(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile both steps with torch.compile")
    parser.add_argument("--learned", action="store_true", help="also learned step sizes")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = create("mobilenetv2_100")
    x = example_input(network, batch=_BATCH, size=_SIZE)
    program = capture(network, x)
    prepared = prepare(program)
    plan = quantize_with_record(prepared, plan_quantization(prepared), [x], bias_correction=False).plan
    programs = {"float": program.copy().train(), "moving average": prepare_qat(program, plan)}
    if options.learned:
        programs["learned steps"] = prepare_qat(
            program, plan, weight_quantize_type="lsq", activation_quantize_type="lsq"
        )
    held = {name: _held_bytes(p, x) for name, p in programs.items()}
    steps = {
        name: _step_of(torch.compile(p) if options.compile else p, parameter_groups(p, learning_rate=1e-3), x)
        for name, p in programs.items()
    }
    times = _alternated(steps, options.rounds)
    rows = []
    for name, seconds in times.items():
        ratios = [own / base for own, base in zip(seconds, times["float"], strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(seconds) * 1e3:.0f} ms",
                f"{statistics.median(ratios):.2f}",
                f"{held[name] / held['float']:.2f}",
            ]
        )
    mode = "compiled" if options.compile else "eager"
    print_table(
        f"Training step of MobileNetV2, batch {_BATCH} at {_SIZE}², one thread, {mode}",
        " ".join(["python benchmarks/qat_step.py", *sys.argv[1:]]),
        ["step", "median", "ratio to float", "eager activations kept for backward, ratio to float"],
        rows,
    )


if __name__ == "__main__":
    main()
