"""Look into a network: what it computes and stores, layers by name, a part of it alone.

Run it with `python inspect_layers.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgraph
from slimgraph.program.count import count
from slimgraph.program.extract import extract
from slimgraph.program.select import select


class Separable(nn.Module):
    """A depthwise convolution and a pointwise one: the block of MobileNet."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu(self.depthwise(x))))


torch.manual_seed(0)
network = nn.Sequential()
network.add_module("stem", nn.Conv2d(3, 16, 3, stride=2, padding=1))
network.add_module("block1", Separable(16, 32))
network.add_module("block2", Separable(32, 64))
network.add_module("pool", nn.AdaptiveAvgPool2d(1))
network.add_module("flat", nn.Flatten())
network.add_module("head", nn.Linear(64, 10))

image = torch.randn(1, 3, 64, 64)
program = slimgraph.capture(network.eval(), image)

print(count(program).table(), "\n")

print("All convolutions:     ", *select(program, "op:conv2d"))
print("Everything in block2: ", *select(program, "block2"))
print("All pointwise layers: ", *select(program, "*.pointwise"), "\n")

# A part of the network is a program of its own, with the values at its borders as inputs and outputs.
block2 = extract(program, inputs=["block2.depthwise"], outputs=["block2.pointwise"])
print(f"A part: {block2.signature}")
