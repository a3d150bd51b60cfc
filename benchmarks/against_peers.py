"""Int8 by slimgraph and by other tools, same images, same judge: accuracy, latency, kernels, time, memory.

`make bench-peers` sets up an environment for each tool and runs this.

Usage: python benchmarks/against_peers.py [network …] [--subsets 5]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from parts.networks import NETWORKS, Network
from parts.printing import print_table

from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.latency import measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.program.archive import save_program
from slimgraph.program.reexport import reexport
from slimgraph.training.evaluate import Evaluation, evaluate, paired_difference

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A quantizer that runs in a process of its own."""

    title: str
    python: str
    """Interpreter of its environment."""
    script: tuple[str, ...]
    source: str
    """The form of the float model that it reads."""


def _environment(name: str) -> str:
    return str(ROOT / f".venv-{name}" / "bin" / "python")


SLIMGRAPH = Tool(title="slimgraph", python=sys.executable, script=("slimgraph_default.py",), source="float.pt2")
PEERS = (
    *(
        Tool(
            title=f"ONNX Runtime {method}",
            python=sys.executable,
            script=("onnxruntime_static.py", method),
            source="float.onnx",
        )
        for method in ("MinMax", "Entropy", "Percentile")
    ),
    Tool(title="NNCF ONNX", python=_environment("nncf"), script=("nncf_onnx.py", "default"), source="float.onnx"),
    Tool(
        title="NNCF ONNX, full bias correction",
        python=_environment("nncf"),
        script=("nncf_onnx.py", "full_bias"),
        source="float.onnx",
    ),
    Tool(title="torchao pt2e", python=_environment("torchao"), script=("torchao_pt2e.py",), source="exported.pt2"),
)


def _quantized(tool: Tool, folder: Path, target: Path, images: Path) -> dict[str, float] | None:
    """Seconds and gigabytes of a run, or None where it did not end well."""
    script, *mode = tool.script
    command = [tool.python, str(HERE / "peers" / script), *mode, str(folder / tool.source), str(target), str(images)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        print(f"{tool.title} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def _rows(network: Network, folder: Path, count: int) -> list[list[str]]:
    program = network.program()
    export_onnx(program, folder / "float.onnx")
    save_program(program, folder / "float.pt2")
    torch.export.save(reexport(program), folder / "exported.pt2")
    judged = network.evaluation_batches(program)
    before = evaluate(OnnxModel.open(folder / "float.onnx", threads=2), judged)
    images = _subsets(network, program, folder, count)
    found: dict[str, list[Evaluation]] = {}
    rows: dict[str, list[str]] = {}
    for tool in (SLIMGRAPH, *PEERS):
        # Who takes gigabytes for it is asked once; whoever is compared closely, for each subset.
        subsets = images if tool.title in ("slimgraph", "ONNX Runtime MinMax") or "NNCF" in tool.title else images[:1]
        for index, pack in enumerate(subsets):
            target = folder / "int8.onnx"
            cost = _quantized(tool, folder, target, pack)
            if cost is None:
                break
            found.setdefault(tool.title, []).append(evaluate(OnnxModel.open(target, threads=2), judged))
            if index:
                continue
            kernels = count_kernels(target)
            ratio = measure_latency(target, against=folder / "float.onnx", min_seconds=4.0).latency_ratio
            rows[tool.title] = [
                f"{ratio:.2f}",
                f"{kernels.convolutions_integer} of {kernels.convolutions_integer + kernels.convolutions_float}",
                f"{cost['seconds']:.1f}",
                f"{cost['peak_gb']:.2f}",
            ]
    return [
        [network.title, title, *_accuracy(before, found[title], found["slimgraph"]), *figures]
        for title, figures in rows.items()
    ]


def _subsets(network: Network, program: object, folder: Path, count: int) -> list[Path]:
    """Calibration images, 256 a file: different ones for each."""
    pack, _, _ = network.calibration.partition("[")
    step = 256 if pack.startswith("cifar") else 48  # the pack of ImageNet has 256 images for calibration only
    files = []
    for index in range(count):
        spec = f"{pack}[{index * step}:{index * step + 256}]" if step == 256 else network.calibration
        array = np.concatenate([next(iter(b.inputs.values())).numpy() for b in network.open(program, spec)])
        if step != 256 and index:  # other halves of the same images
            array = array[np.random.default_rng(index).permutation(len(array))[:128]]
        files.append(folder / f"images-{index}.npy")
        np.save(files[-1], array)
    return files


def _accuracy(before: Evaluation, found: list[Evaluation], ours: list[Evaluation]) -> list[str]:
    """Mean change over the subsets, and how far ours is above, with the interval of the paired difference."""
    change = np.mean([100 * (one.value - before.value) for one in found])
    pairs = list(zip(ours, found, strict=False))
    mine = torch.stack([one.correct.double() for one, _ in pairs]).mean(dim=0)
    theirs = torch.stack([other.correct.double() for _, other in pairs]).mean(dim=0)
    difference, low, high = (100 * number for number in paired_difference(theirs, mine, seed=0))
    lead = "" if found is ours else f"{difference:+.2f} ({low:+.2f} … {high:+.2f})"
    return [f"{change:+.2f} ({len(found)})", lead]


def main() -> None:
    """Print the table; arguments choose networks by the start of their title."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="starts of their titles; all by default")
    parser.add_argument("--subsets", type=int, default=5, help="sets of calibration images")
    given = parser.parse_args()
    chosen = [n for n in NETWORKS if not given.networks or any(map(n.title.startswith, given.networks))]
    rows = []
    for network in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows += _rows(network, Path(folder), given.subsets)
    print_table(
        "Int8 by slimgraph and by others",
        "make bench-peers",
        [
            *("network", "by", "change in points (calibration subsets)", "slimgraph above it (95 %)", "latency ratio"),
            *("integer convolutions", "quantizing, s", "peak GB"),
        ],
        rows,
    )


if __name__ == "__main__":
    main()
