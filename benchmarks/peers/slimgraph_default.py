"""Quantize an exported program with slimgraph: `slimgraph_default.py IN OUT IMAGES`."""

import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from account import report

from slimgraph.deploy.onnx import export_onnx
from slimgraph.formats import load
from slimgraph.quantization.post_training import quantize


def main() -> None:
    """Write the quantized file, and print seconds and gigabytes; the export is not counted."""
    source, target, images = sys.argv[1:]
    samples = torch.from_numpy(np.load(images))
    program = load(source)
    begun = time.perf_counter()
    quantized = quantize(program, calibration=samples.split(32))
    seconds = time.perf_counter() - begun
    export_onnx(quantized, target)
    report(seconds, version("slimgraph"))


if __name__ == "__main__":
    main()
