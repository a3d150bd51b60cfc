"""Time and memory of a quantization-aware training step against the float step: MobileNetV2, batch 16, 96², one thread.

Steps alternate, and the processor's time is counted. With `--peer`, torchao's float step and its quantization-aware one
(pt2e) alternate with ours, in a process of its own; `make bench-peers` sets its environment up.

Usage: python benchmarks/qat_step.py [--compile] [--learned] [--peer] [--rounds 7]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from parts.printing import print_table
from torch import nn

from models.timm_networks import create, example_input
from slimgraph.program.capture import capture
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize_with_record
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.qat import parameter_groups, prepare_qat

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


def _alternated(steps: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            told = step()
            times[name].append(time.process_time() - start if told is None else told)
    return times


@contextmanager
def _torchao(network: nn.Module, x: torch.Tensor) -> Iterator[dict[str, Callable[[], float]]]:
    """Steps of the same network in a process of torchao's environment."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, batch = Path(folder) / "float.pt2", Path(folder) / "batch.pt"
        torch.export.save(torch.export.export(network.train(), (x,)), source)
        torch.save(x, batch)
        python = here.parent / ".venv-torchao" / "bin" / "python"
        command = [str(python), str(here / "peers" / "torchao_qat_step.py"), str(source), str(batch)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            version = process.stdout.readline().strip()

            def step(kind: str) -> float:
                process.stdin.write(f"{kind}\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            yield {
                f"torchao {version}, float": lambda: step("float"),
                f"torchao {version}, pt2e": lambda: step("qat"),
            }
            process.stdin.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile both steps with torch.compile")
    parser.add_argument("--learned", action="store_true", help="also learned step sizes")
    parser.add_argument("--peer", action="store_true", help="also torchao's step")
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
    with _torchao(network, x) if options.peer else nullcontext({}) as peers:
        times = _alternated({**steps, **peers}, options.rounds)
    rows = []
    for name, seconds in times.items():
        own_float = f"{name.partition(',')[0]}, float" if name in peers else "float"
        ratios = [own / base for own, base in zip(seconds, times[own_float], strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(seconds) * 1e3:.0f} ms",
                f"{statistics.median(ratios):.2f}",
                f"{held[name] / held['float']:.2f}" if name in held else "",
            ]
        )
    mode = "compiled" if options.compile else "eager"
    print_table(
        f"Training step of MobileNetV2, batch {_BATCH} at {_SIZE}², one thread, {mode}",
        " ".join(["python benchmarks/qat_step.py", *sys.argv[1:]]),
        [
            "step",
            "processor time, median",
            "ratio to the tool's float step",
            "kept for backward in eager mode, ratio to float",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
