"""Wall time and peak memory of a whole post-training run of MobileNetV1-0.75, each in a fresh process."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("slimgraph", "slimgraph 1000 images", "slimgraph 64 images", "onnxruntime MinMax", "onnxruntime Entropy")


def _run(method: str, folder: Path) -> None:
    """One run; prints its figures as one line."""
    started = time.perf_counter()
    from parts.networks import MOBILENET_V1

    program = MOBILENET_V1.program()
    spec = MOBILENET_V1.calibration
    if method.endswith("images"):
        spec = f"imagenet_sample1000_224_jpeg.npz[:{method.split()[1]}]"
    source = MOBILENET_V1.open(program, spec)
    imported = time.perf_counter()
    note = ""
    if method.startswith("slimgraph"):
        note = _slimgraph(program, source, folder)
    else:
        from parts.onnxruntime_quantizer import quantize_with_onnxruntime

        from slimgraph.deploy.onnx import export_onnx

        export_onnx(program, folder / "float.onnx")
        imported = time.perf_counter()
        arrays = (next(iter(batch.inputs.values())).numpy() for batch in source)
        quantize_with_onnxruntime(folder / "float.onnx", folder / "int8.onnx", arrays, method=method.split()[1])
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{ended - started:.1f}|{ended - imported:.1f}|{peak:.2f}|{note}")


def _slimgraph(program, source, folder: Path) -> str:
    import torch

    from slimgraph.deploy.check_export import check_export
    from slimgraph.deploy.onnx import export_onnx
    from slimgraph.quantization.calibrate import collect_statistics, values_to_observe
    from slimgraph.quantization.plan import plan_quantization
    from slimgraph.quantization.quantize import prepare, quantize

    batches = (batch.inputs for batch in source)
    first = next(iter(source)).inputs
    quantized = quantize(program, calibration=batches)
    export_onnx(quantized, folder / "int8.onnx")
    check_export(quantized, folder / "int8.onnx", first)
    if source.samples != 256:
        return ""
    # Afterwards and apart: what observing costs over the forward passes alone, on batches that are already decoded.
    prepared = prepare(program)
    values = values_to_observe(plan_quantization(prepared))
    kept = [batch.inputs for _, batch in zip(range(2), source, strict=False)]
    forward, observed = [], []
    with torch.inference_mode():
        for _ in range(5):
            begun = time.perf_counter()
            for inputs in kept:
                prepared(**inputs)
            forward.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            collect_statistics(prepared, values, kept)
            observed.append(time.perf_counter() - begun)
    return f"{sorted(observed)[2] / sorted(forward)[2]:.2f}"


def main() -> None:
    """Print the table; with an argument, be one of the processes."""
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as folder:
            _run(sys.argv[1], Path(folder))
        return
    from parts.printing import print_table

    rows = []
    for method in METHODS:
        done = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, check=True)
        wall, work, peak, ratio = done.stdout.strip().splitlines()[-1].split("|")
        rows.append([method, wall, work, peak, ratio])
    print_table(
        "Cost of quantizing MobileNetV1-0.75 (224², 256 images unless said)",
        "python benchmarks/cost.py",
        ["by", "process, s", "without imports and capture, s", "peak GB", "observing ÷ forward"],
        rows,
    )


if __name__ == "__main__":
    main()
