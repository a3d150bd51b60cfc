"""Decide and do, step by step: one calibration pass, two algorithms, one layer left in float.

Run it with `python plan_and_apply.py`. `slimgraph.quantize` does the same in one call; the steps are for those who want
to look at a plan, change it, or try several.
"""

import torch
from torch import nn

import slimgraph
from slimgraph.quantization import (
    apply_quantization,
    choose_ranges,
    collect_statistics,
    plan_quantization,
    prepare,
    values_to_observe,
)

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
).eval()
batches = [torch.randn(16, 3, 32, 32) ** 3 for _ in range(4)]  # a few large values, as real activations have

# Batch norms are folded first: no kernel has them.
program = prepare(slimgraph.capture(network, batches[0]))

# Decide: nothing is changed and nothing is measured yet.
plan = plan_quantization(program, target="onnxruntime", skip=["7"])
print(plan.table(), "\n")

# See every value once. All algorithms read their ranges from the same statistics.
statistics = collect_statistics(program, values_to_observe(plan), batches)

for algorithm in ("abs_max", "mse"):
    ranged = choose_ranges(plan, statistics, algorithm=algorithm)
    # Do: a new program; the float one stays as it was.
    quantized = apply_quantization(program, ranged)
    worst = slimgraph.compare(program, quantized, batches).rows[0]
    low, high = ranged.ranges["input"]
    print(f"{algorithm:7}: input from {low:.1f} to {high:.1f}; worst value {worst.value!r} at {worst.snr_db:.1f} dB")
