"""Quantize an ONNX file with NNCF, in NNCF's own environment: `nncf_onnx.py default|full_bias IN OUT IMAGES`."""

import sys
import time

import nncf
import numpy as np
import onnx
from account import report

nncf.set_log_level(40)


def main() -> None:
    """Write the quantized file, and print seconds and gigabytes."""
    mode, source, target, images = sys.argv[1:]
    samples = np.load(images)
    model = onnx.load(source)
    name = model.graph.input[0].name
    dataset = nncf.Dataset([{name: sample[None]} for sample in samples])
    begun = time.perf_counter()
    quantized = nncf.quantize(
        model,
        dataset,
        subset_size=len(samples),
        fast_bias_correction=mode != "full_bias",
        target_device=nncf.TargetDevice.CPU,
    )
    seconds = time.perf_counter() - begun
    onnx.save(quantized, target)
    report(seconds, nncf.__version__)


if __name__ == "__main__":
    main()
