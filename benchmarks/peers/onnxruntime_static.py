"""Quantize an ONNX file with ONNX Runtime: `onnxruntime_static.py MinMax|Entropy|Percentile IN OUT IMAGES`."""

import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from account import report
from parts.onnxruntime_quantizer import quantize_with_onnxruntime


def main() -> None:
    """Write the quantized file, and print seconds and gigabytes."""
    method, source, target, images = sys.argv[1:]
    samples = np.load(images)
    begun = time.perf_counter()
    batches = (samples[start : start + 32] for start in range(0, len(samples), 32))
    quantize_with_onnxruntime(Path(source), Path(target), batches, method=method)
    seconds = time.perf_counter() - begun
    report(seconds, version("onnxruntime"))


if __name__ == "__main__":
    main()
