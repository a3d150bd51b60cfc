"""Quantization-aware training in a loop of your own: ResNet-20 on CIFAR-10 with weights of 4 bits.

Run it with `python qat_resnet20.py`; SLIMGRAPH_DATA names the folder that holds the packed CIFAR-10 images and
`weights/cifar10_resnet20_jpegft.safetensors`. It writes one file into the current folder. `slimgraph.train_quantized`
does all of this in one call; this is for those whose training is a loop already.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import slimgraph
from slimgraph.quantization import (
    apply_quantization,
    calibrate,
    freeze,
    freeze_ranges_,
    freeze_statistics_,
    parameter_groups,
    plan_quantization,
    prepare,
    prepare_qat,
)
from slimgraph.training.data import ImageOptions, open_data

if "SLIMGRAPH_DATA" not in os.environ:
    sys.exit("This example needs SLIMGRAPH_DATA, the folder with the CIFAR-10 images and the weights of ResNet-20.")
folder = Path(os.environ["SLIMGRAPH_DATA"])

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--images", type=int, default=20000, help="for training")
parser.add_argument("--test-images", type=int, default=2000)
options = parser.parse_args()
torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride, self.added = (1, 0) if before == channels else (2, (channels - before) // 2)
        self.conv1 = nn.Conv2d(before, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(y + x)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


network = ResNet20()
network.load_state_dict(load_file(folder / "weights" / "cifar10_resnet20_jpegft.safetensors"))
program = slimgraph.capture(network.eval(), torch.zeros(1, 3, 32, 32))

pictures = ImageOptions(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
training = list(
    open_data(str(folder / f"cifar10_train_jpeg.npz[:{options.images}]"), program.signature, image=pictures)
)
test = list(
    open_data(str(folder / f"cifar10_test_jpeg.npz[:{options.test_images}]"), program.signature, image=pictures)
)


def accuracy(candidate: slimgraph.Program) -> float:
    return slimgraph.evaluate(candidate, test).value


# Decide what becomes integers, and see the ranges of values once. Plans speak of the program with batch norms folded.
folded = prepare(program)
plan = plan_quantization(folded, weight_bits=4)
plan = calibrate(folded, plan, [batch.inputs for batch in training[:8]])
best = apply_quantization(folded, plan)
best_accuracy = accuracy(best)
print(f"float {accuracy(program):.4f}, quantized {best_accuracy:.4f}")

# The same plan makes a program that trains: batch norms are alive, and rounding lets gradients through. It begins where
# post-training quantization ends.
qat = prepare_qat(program, plan)
optimizer = torch.optim.AdamW(parameter_groups(qat, learning_rate=3e-4), lr=3e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
for step in range(options.steps):
    if step == options.steps * 3 // 4:  # late in training, what is only followed holds still
        freeze_ranges_(qat)
        freeze_statistics_(qat)
    batches = [training[number] for number in torch.randint(len(training), (2,))]
    images = torch.cat([batch.inputs["x"] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    optimizer.zero_grad()
    loss = F.cross_entropy(qat(images), labels)
    loss.backward()
    optimizer.step()
    schedule.step()
    if (step + 1) % 100 == 0 or step + 1 == options.steps:
        # What it has come to so far, from a copy: training goes on.
        frozen = freeze(qat)
        candidate = apply_quantization(frozen.program, frozen.plan)
        reached = accuracy(candidate)
        print(f"step {step + 1}: loss {loss.item():.3f}, quantized {reached:.4f}")
        if reached > best_accuracy:
            best, best_accuracy = candidate, reached

slimgraph.save(best, "resnet20_int4.onnx")
print(f"resnet20_int4.onnx: {best_accuracy:.4f}, {Path('resnet20_int4.onnx').stat().st_size:,} bytes")
