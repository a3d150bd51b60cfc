"""Quantize a PyTorch module to int8, write it as ONNX, run it, and see how close it came.

Run it with `python quantize_a_module.py`; it writes two files into the current folder.
"""

import onnxruntime
import torch
from torch import nn

import slimgraph

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
).eval()
images = torch.randn(64, 3, 32, 32)  # in earnest: some hundred samples of what the network will see

# The batch is free in the program, although the example has one sample.
program = slimgraph.capture(network, images[:1])
print(f"Captured: {program.signature}")

quantized = slimgraph.quantize(program, calibration=images.split(16))
slimgraph.save(program, "float.onnx")
slimgraph.save(quantized, "int8.onnx")

# The file is standard ONNX: what runs it needs no slimgraph.
session = onnxruntime.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])
(scores,) = session.run(None, {"input": images[:8].numpy()})
with torch.no_grad():
    error = (torch.from_numpy(scores) - network(images[:8])).abs().max().item()
print(f"Largest difference to the module: {error:.4f}\n")

# Which layer lost most? The worst comes first; every 6 dB less is twice the error.
print(slimgraph.compare(program, quantized, [images]).table(), "\n")

print(f"int8 is {slimgraph.measure_latency('int8.onnx', against='float.onnx')}")
