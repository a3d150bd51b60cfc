"""Latency of int8 against float in ONNX Runtime, one thread, with ONNX Runtime's own quantizer in the same run."""

import tempfile
from pathlib import Path

import torch
from parts.onnxruntime_quantizer import quantize_with_onnxruntime
from parts.printing import print_table

from models.timm_networks import create, example_input
from slimgraph.deploy.latency import measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.program.capture import capture
from slimgraph.quantization.post_training import quantize


def _row(title: str, target: str, module: torch.nn.Module, folder: Path) -> list[str]:
    batches = [example_input(module, batch=8, seed=seed) for seed in range(2)]
    program = capture(module, batches[0]).eval()
    float_path, ours, theirs = folder / "float.onnx", folder / "ours.onnx", folder / "theirs.onnx"
    export_onnx(program, float_path)
    export_onnx(quantize(program, calibration=batches), ours)
    quantize_with_onnxruntime(float_path, theirs, [batch.numpy() for batch in batches])
    mine = measure_latency(ours, against=float_path, min_seconds=8.0)
    other = measure_latency(theirs, against=float_path, min_seconds=8.0)
    sizes = [path.stat().st_size / 1e6 for path in (float_path, ours)]
    return [
        title,
        f"{mine.latency_ratio:.2f} ({1 / mine.latency_ratio:.2f}×)",
        target,
        f"{other.latency_ratio:.2f} ({1 / other.latency_ratio:.2f}×)",
        f"{sizes[0]:.1f} → {sizes[1]:.1f}",
    ]


def main() -> None:
    """Print the table."""
    networks = [
        ("ResNet-50", "2.8×", create("resnet50")),
        ("MobileNetV2", "1.8×", create("mobilenetv2_100")),
        ("ViT-tiny", "1.3×", create("vit_tiny_patch16_224")),
    ]
    rows = []
    for title, target, module in networks:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(title, target, module, Path(folder)))
    print_table(
        "Latency of int8, batch 1, one thread",
        "python benchmarks/latency.py",
        ["network (224²)", "slimgraph: ratio (speedup)", "wanted", "ONNX Runtime MinMax", "MB float → int8"],
        rows,
    )


if __name__ == "__main__":
    main()
