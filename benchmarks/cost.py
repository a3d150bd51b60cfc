"""Wall time and peak memory of a whole post-training run of MobileNetV1-0.75, each in a fresh process."""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("slimgraph 256", "slimgraph 64", "slimgraph 1024", "onnxruntime MinMax", "onnxruntime Entropy")


def _run(method: str, folder: Path) -> None:
    """One run; prints its figures as one line."""
    started = time.perf_counter()
    from parts.networks import MOBILENET_V1

    program = MOBILENET_V1.program()
    spec = MOBILENET_V1.calibration
    if method.startswith("slimgraph"):
        spec = f"imagenet_val1300_224_jpeg.npz[:{method.split()[1]}]"
    source = MOBILENET_V1.open(program, spec)
    imported = time.perf_counter()
    if method.startswith("slimgraph"):
        _slimgraph(program, source, folder)
    else:
        from parts.onnxruntime_quantizer import quantize_with_onnxruntime

        from slimgraph.deploy.onnx import export_onnx

        export_onnx(program, folder / "float.onnx")
        imported = time.perf_counter()
        arrays = (next(iter(batch.inputs.values())).numpy() for batch in source)
        quantize_with_onnxruntime(folder / "float.onnx", folder / "int8.onnx", arrays, method=method.split()[1])
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{ended - started:.1f}|{ended - imported:.1f}|{peak:.2f}")


def _slimgraph(program, source, folder: Path) -> None:
    from slimgraph.deploy.check_export import check_export
    from slimgraph.deploy.onnx import export_onnx
    from slimgraph.quantization.post_training import quantize

    quantized = quantize(program, calibration=(batch.inputs for batch in source))
    export_onnx(quantized, folder / "int8.onnx")
    check_export(quantized, folder / "int8.onnx", next(iter(source)).inputs)


def _observing() -> str:
    """What observing costs over the forward passes alone, on the same 64 decoded images, in turn."""
    import torch
    from parts.networks import MOBILENET_V1

    from slimgraph.quantization.calibration import collect_statistics, values_to_observe
    from slimgraph.quantization.placement import plan_quantization
    from slimgraph.quantization.preparation import prepare

    program = MOBILENET_V1.program()
    prepared = prepare(program)
    values = values_to_observe(plan_quantization(prepared))
    batches = [batch.inputs for batch in MOBILENET_V1.open(program, "imagenet_val1300_224_jpeg.npz[:64]")]
    ratios = []
    with torch.inference_mode():
        for _ in range(7):
            begun = time.perf_counter()
            for inputs in batches:
                prepared(**inputs)
            middle = time.perf_counter()
            collect_statistics(prepared, values, batches)
            ratios.append((time.perf_counter() - middle) / (middle - begun))
    return f"{sorted(ratios)[3]:.2f}"


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
        rows.append([method, *done.stdout.strip().splitlines()[-1].split("|")])
    print_table(
        "Cost of quantizing MobileNetV1-0.75 (224², 256 images where no number stands)",
        "python benchmarks/cost.py",
        ["by", "process, s", "without imports, capture and float export, s", "peak GB"],
        rows,
    )
    print(f"Observing every value takes {_observing()} × the plain forward passes over the same batches of 32 images.")


if __name__ == "__main__":
    main()
