"""Training images in another order at each pass, a little different every time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from slimgraph.training.batch import Batch


@dataclass
class Shuffled:
    """Batches in another order at each pass, mirrored at random, and shifted by up to an eighth."""

    batches: list[Batch]
    size: int

    def __post_init__(self) -> None:
        (self._name,) = self.batches[0].inputs
        self._images = torch.cat([batch.inputs[self._name] for batch in self.batches])
        self._labels = torch.cat([batch.labels for batch in self.batches])
        self.batches = []

    def __len__(self) -> int:
        return len(self._images) // self.size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self._images))
        for start in range(len(self)):
            chosen = order[start * self.size : (start + 1) * self.size]
            images = self._images[chosen]
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
            reach = images.shape[-1] // 8
            padded = torch.nn.functional.pad(images, (reach, reach, reach, reach))
            down, right = torch.randint(0, 2 * reach + 1, (2,)).tolist()
            side = images.shape[-1]
            yield padded[..., down : down + side, right : right + side], self._labels[chosen]
