"""A small network for 8×8 handwritten digits, and its training: what the demo compresses."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.training.data import open_data

EPOCHS = 5
BATCH = 64


class _Block(nn.Module):
    """Two convolutions and what they were given: the residual block of ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class DigitsNet(nn.Module):
    """Scores of ten classes for grey pictures of 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 48, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(48)
        self.block1 = _Block(48)
        self.widen = nn.Conv2d(48, 96, 3, stride=2, padding=1)
        self.block2 = _Block(96)
        self.drop = nn.Dropout(0.2)
        self.classify = nn.Linear(96, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Scores (N, 10) of pictures (N, 1, 8, 8)."""
        x = self.block1(F.relu(self.bn(self.stem(image))))
        x = self.block2(F.relu(self.widen(x)))
        scores: Tensor = self.classify(self.drop(x.mean((2, 3))))
        return scores


def train_digits(*, seed: int, progress: Callable[[str, int, int], None]) -> Program:
    """`DigitsNet` as a program, trained on `digits:train` in a few seconds.

    Args:
        seed: of weights, order and dropout.
        progress: called with what is going on, and how many pictures were seen of how many.
    """
    torch.manual_seed(seed)
    program = capture(DigitsNet(), torch.zeros(1, 1, 8, 8))
    batches = list(open_data("digits:train", program.signature))
    images = torch.cat([batch.inputs["image"] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    optimizer = torch.optim.AdamW(program.parameters(), weight_decay=0.01)
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
    program.train()
    seen = 0
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            loss = F.cross_entropy(program(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # PyTorch has no types there
            optimizer.step()
            schedule.step()
            seen += len(chosen)
            progress("Training", seen, EPOCHS * len(images))
    return program.eval()
