"""Accuracy of every range algorithm on every network with real weights, judged in ONNX Runtime on unseen images."""

import sys
import tempfile
from pathlib import Path

from parts.networks import NETWORKS, Network
from parts.onnxruntime_quantizer import quantize_with_onnxruntime
from parts.printing import print_table

from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.latency import measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import correct_bias
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, RANGE_ALGORITHMS
from slimgraph.training.evaluate import evaluate, paired_difference


def _rows(network: Network, folder: Path, algorithms: list[str]) -> list[list[str]]:
    program = network.program()
    prepared = prepare(program)
    calibration = [batch.inputs for batch in network.open(program, network.calibration)]
    judged = network.evaluation_batches(program)
    float_path = folder / "float.onnx"
    export_onnx(program, float_path)
    before = evaluate(OnnxModel.open(float_path, threads=2), judged)
    plan = plan_quantization(prepared)
    statistics = collect_statistics(prepared, values_to_observe(plan), calibration)

    def row(name: str, path: Path, *, timed: bool) -> list[str]:
        after = evaluate(OnnxModel.open(path, threads=2), judged)
        change, low, high = paired_difference(before.correct, after.correct, seed=0)
        kernels = count_kernels(path)
        convolutions = kernels.convolutions_integer + kernels.convolutions_float
        ratio = f"{measure_latency(path, against=float_path, min_seconds=4.0).latency_ratio:.2f}" if timed else ""
        return [
            network.title,
            f"{100 * before.value:.2f}",
            name,
            f"{100 * change:+.2f} ({100 * low:+.2f} … {100 * high:+.2f})",
            ratio,
            f"{kernels.convolutions_integer} of {convolutions}",
        ]

    rows = []
    for algorithm in algorithms:
        ranged = choose_ranges(plan, statistics, algorithm=algorithm)
        for corrected in (True, False) if algorithm == DEFAULT_ALGORITHM else (True,):
            source = correct_bias(prepared, ranged, calibration) if corrected else prepared
            quantized = apply_quantization(source, ranged)
            path = folder / f"{algorithm}-{corrected}.onnx"
            export_onnx(quantized, path)
            check_export(quantized, path, judged[0].inputs)
            default = algorithm == DEFAULT_ALGORITHM and corrected
            name = f"**slimgraph, default ({algorithm})**" if default else f"slimgraph {algorithm}"
            rows.append(row(name if corrected else f"{name}, biases not corrected", path, timed=default))
    theirs = folder / "theirs.onnx"
    images = [next(iter(inputs.values())).numpy() for inputs in calibration]
    quantize_with_onnxruntime(float_path, theirs, images)
    return [*rows, row("ONNX Runtime MinMax", theirs, timed=True)]


def main() -> None:
    """Print the table; arguments choose networks by the start of their title."""
    chosen = [n for n in NETWORKS if not sys.argv[1:] or any(n.title.startswith(a) for a in sys.argv[1:])]
    algorithms = sorted(RANGE_ALGORITHMS, key=lambda name: name != DEFAULT_ALGORITHM)
    rows = []
    for network in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows += _rows(network, Path(folder), algorithms)
    print_table(
        "Accuracy after int8 quantization",
        "python benchmarks/accuracy.py",
        ["network", "float top-1 %", "int8 by", "change in points (95 %)", "latency ratio", "integer convolutions"],
        rows,
    )


if __name__ == "__main__":
    main()
