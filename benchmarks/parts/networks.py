"""The networks with real weights, and the images that each is calibrated and judged on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from models import cifar_resnet, mobilenet_v1, mobilenet_v2
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.training.data import Batch, DataSource, ImageOptions, open_data


def data_folder() -> Path:
    """The folder with weights and images; the benchmark ends with a sentence where there is none."""
    if "SLIMGRAPH_DATA" not in os.environ:
        raise SystemExit("This benchmark needs SLIMGRAPH_DATA, the folder with real weights and images.")
    return Path(os.environ["SLIMGRAPH_DATA"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A trained network with the packs that belong to it."""

    title: str
    build: Callable[[], nn.Module]
    weights: str
    size: int
    images: ImageOptions
    calibration: str
    """Data specification of 256 images."""
    evaluation: tuple[str, ...]
    """Images that were not calibrated on."""

    def module(self) -> nn.Module:
        """The network in evaluation mode."""
        model = self.build()
        model.load_state_dict(load_file(data_folder() / "weights" / f"{self.weights}.safetensors"))
        return model.eval()

    def program(self) -> Program:
        """The network as a program."""
        return capture(self.module(), torch.zeros(1, 3, self.size, self.size)).eval()

    def open(self, program: Program, spec: str, batch_size: int = 32) -> DataSource:
        """Images of a specification as batches for the program."""
        return open_data(str(data_folder() / spec), program.signature, batch_size=batch_size, image=self.images)

    def evaluation_batches(self, program: Program) -> list[Batch]:
        """All images that the network is judged on."""
        return [batch for spec in self.evaluation for batch in self.open(program, spec, 50)]


_CIFAR = ImageOptions(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_TENSORFLOW = ImageOptions(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_CIFAR_SPECS = ("cifar10_train_jpeg.npz[:256]", ("cifar10_test_jpeg.npz",))
_IMAGENET_SPECS = (
    "imagenet_sample1000_224_jpeg.npz[:256]",
    ("imagenet_sample1000_224_jpeg.npz[256:]", "imagenet_val1300_224_jpeg.npz"),
)


def _cifar(title: str, build: Callable[[], nn.Module], weights: str) -> Network:
    calibration, evaluation = _CIFAR_SPECS
    return Network(
        title=title,
        build=build,
        weights=weights,
        size=32,
        images=_CIFAR,
        calibration=calibration,
        evaluation=evaluation,
    )


def _imagenet(title: str, build: Callable[[], nn.Module], weights: str) -> Network:
    calibration, evaluation = _IMAGENET_SPECS
    return Network(
        title=title,
        build=build,
        weights=weights,
        size=224,
        images=_TENSORFLOW,
        calibration=calibration,
        evaluation=evaluation,
    )


RESNET20 = _cifar("ResNet-20", cifar_resnet.resnet20, "cifar10_resnet20_jpegft")
RESNET56 = _cifar("ResNet-56", cifar_resnet.resnet56, "cifar10_resnet56")
MOBILENET_V1 = _imagenet("MobileNetV1-0.75", mobilenet_v1.mobilenet_v1_075, "mobilenetv1_075")
MOBILENET_V2 = _imagenet("MobileNetV2", mobilenet_v2.mobilenet_v2, "mobilenetv2_100_deq")
NETWORKS = (RESNET20, RESNET56, MOBILENET_V1, MOBILENET_V2)
