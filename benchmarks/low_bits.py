"""Accuracy of weights in few bits, rounded to the nearest and as was learned, judged in ONNX Runtime."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from parts.networks import RESNET20, RESNET56, Network
from parts.printing import print_table

from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.program.program import Program
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import correct_bias
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.reach import with_best_reach
from slimgraph.quantization.reconstruction import reconstruct
from slimgraph.training.evaluate import evaluate, paired_difference

WEIGHT_BITS = 4
LEARNING = "cifar10_train_jpeg.npz[:1024]"

Way = Callable[[], tuple[Program, QuantizationPlan]]


def _ways(prepared: Program, plan: QuantizationPlan, images: list) -> dict[str, Way]:
    reached = with_best_reach(prepared, plan)
    return {
        "nearest, range by largest magnitude": lambda: (prepared, plan),
        "nearest, range by largest magnitude, biases corrected": lambda: (correct_bias(prepared, plan, images), plan),
        "nearest, range by squared error": lambda: (prepared, reached),
        "nearest, range by squared error, biases corrected": lambda: (correct_bias(prepared, reached, images), reached),
        "learned by layers (AdaRound)": lambda: reconstruct(prepared, plan, images, regions="layer"),
        "learned by blocks (BRECQ)": lambda: reconstruct(prepared, plan, images),
        "learned by blocks, drop=0.5 (QDrop)": lambda: reconstruct(prepared, plan, images, drop=0.5),
    }


def _rows(network: Network, folder: Path) -> list[list[str]]:
    program = network.program()
    prepared = prepare(program)
    calibration = [batch.inputs for batch in network.open(program, network.calibration)]
    images = [batch.inputs for batch in network.open(program, LEARNING)]
    judged = network.evaluation_batches(program)
    float_path = folder / "float.onnx"
    export_onnx(program, float_path)
    before = evaluate(OnnxModel.open(float_path, threads=1), judged)
    plan = plan_quantization(prepared, weight_bits=WEIGHT_BITS)
    plan = choose_ranges(plan, collect_statistics(prepared, values_to_observe(plan), calibration))
    rows = []
    for number, (name, way) in enumerate(_ways(prepared, plan, images).items()):
        began = time.process_time()
        found, grids = way()
        cost = time.process_time() - began
        path = folder / f"{number}.onnx"
        export_onnx(apply_quantization(found, grids), path)
        after = evaluate(OnnxModel.open(path, threads=1), judged)
        change, low, high = paired_difference(before.correct, after.correct, seed=0)
        rows.append(
            [
                network.title,
                f"{100 * before.value:.2f}",
                name,
                f"{100 * change:+.2f} ({100 * low:+.2f} … {100 * high:+.2f})",
                f"{cost:.0f}",
            ]
        )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print the table; arguments choose networks by their title."""
    rows = []
    for network in (RESNET20, RESNET56):
        if not sys.argv[1:] or network.title in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                rows += _rows(network, Path(folder))
    print_table(
        f"Weights of {WEIGHT_BITS} bits, activations of 8",
        "OMP_NUM_THREADS=1 python benchmarks/low_bits.py",
        ["network", "float top-1 %", "weights rounded", "change in points (95 %)", "CPU seconds"],
        rows,
    )


if __name__ == "__main__":
    main()
