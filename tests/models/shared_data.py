"""The real pictures and weights that the folder in SLIMGRAPH_DATA holds; tests without it are skipped."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

CIFAR_TEST = "cifar10_test_jpeg.npz"
CIFAR_TRAIN = "cifar10_train_jpeg.npz"
IMAGENET_SAMPLE = "imagenet_sample1000_224_jpeg.npz"
IMAGENET_VAL = "imagenet_val1300_224_jpeg.npz"

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOBILENET_MEAN, MOBILENET_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""x / 127.5 - 1"""


def shared(name: str) -> Path:
    """Path of a file in the shared data; the calling test is skipped where it is not at hand."""
    root = os.environ.get("SLIMGRAPH_DATA")
    if not root:
        pytest.skip("SLIMGRAPH_DATA is not set: it names the folder with the real pictures and weights")
    path = Path(root) / name
    if not path.exists():
        pytest.skip(f"{path} does not exist (folder named by SLIMGRAPH_DATA)")
    return path


def load_weights(model: nn.Module, name: str) -> nn.Module:
    """`model` with the weights `weights/<name>.safetensors`, every key matched, in eval mode."""
    model.load_state_dict(load_file(shared(f"weights/{name}.safetensors")), strict=True)
    return model.eval()


def pictures(pack: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, H, W) uint8 and labels (N,) int64 of a JPEG pack, decoded one by one in the plainest way."""
    with np.load(shared(pack)) as arrays:
        data, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"]
    chosen = range(*slice(start, stop).indices(len(labels)))
    decoded = [Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB") for i in chosen]
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in decoded]))
    return stacked.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[chosen.start : chosen.stop]).long()


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 pictures (N, 3, H, W) as float32, (x / 255 - mean) / std per channel."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape)


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 50) -> float:
    """Fraction of normalized pictures whose greatest logit is at the label, by the plainest loop."""
    hits = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        hits += int((model(x).argmax(dim=1) == y).sum())
    return hits / len(labels)
