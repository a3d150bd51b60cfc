"""Quantize an exported program with torchao's pt2e, in torchao's own environment: `torchao_pt2e.py IN OUT IMAGES`."""

import sys
import time
import warnings
from importlib.metadata import version

import numpy as np
import torch
from account import report
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

warnings.simplefilter("ignore")


def main() -> None:
    """Write the quantized program as ONNX, and print seconds and gigabytes; the export is not counted."""
    source, target, images = sys.argv[1:]
    samples = torch.from_numpy(np.load(images))
    module = torch.export.load(source).module()
    begun = time.perf_counter()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for batch in samples.split(32):
            prepared(batch)
    quantized = convert_pt2e(prepared)
    seconds = time.perf_counter() - begun
    batch = torch.export.Dim("batch")
    exported = torch.export.export(quantized, (samples[:2],), dynamic_shapes=({0: batch},))
    torch.onnx.export(exported, f=target, dynamo=True, opset_version=21, verbose=False, external_data=False)
    report(seconds, version("torchao"))


if __name__ == "__main__":
    main()
