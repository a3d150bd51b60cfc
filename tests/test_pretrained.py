"""Compression of networks with real weights: integers all the way, little lost, and a result that is whole."""

import pytest
import torch

from models import shared_data
from models.cifar_resnet import resnet20, resnet56
from models.mobilenet_v1 import mobilenet_v1_075
from models.mobilenet_v2 import mobilenet_v2
from slimgraph.auto.pipeline import FILES, compress
from slimgraph.deploy.kernels import count_kernels
from slimgraph.program.capture import capture
from slimgraph.training.data import ImageOptions, open_data

LARGEST_DROP = 0.025
"""On 300 to 500 images, where each point is 3 to 5 of them: far below what a layer that is quantized wrongly costs."""

CIFAR = (
    32,
    ImageOptions(mean=shared_data.CIFAR_MEAN, std=shared_data.CIFAR_STD),
    (shared_data.CIFAR_TRAIN, "[:256]"),
    (shared_data.CIFAR_TEST, "[:500]"),
)
IMAGENET = (
    224,
    ImageOptions(mean=shared_data.MOBILENET_MEAN, std=shared_data.MOBILENET_STD),
    (shared_data.IMAGENET_SAMPLE, "[:256]"),
    (shared_data.IMAGENET_VAL, "[:300]"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "weights", "domain"),
    [
        pytest.param(resnet20, "cifar10_resnet20_jpegft", CIFAR, id="ResNet-20"),
        pytest.param(resnet56, "cifar10_resnet56", CIFAR, id="ResNet-56"),
        pytest.param(mobilenet_v1_075, "mobilenetv1_075", IMAGENET, id="MobileNetV1-0.75"),
        pytest.param(mobilenet_v2, "mobilenetv2_100_deq", IMAGENET, id="MobileNetV2"),
    ],
)
def test_a_trained_network_becomes_an_int8_file_that_still_works(build, weights, domain, tmp_path):
    size, images, *packs = domain
    model = shared_data.load_weights(build(), weights)
    program = capture(model, torch.zeros(1, 3, size, size)).eval()
    calibration, evaluation = (
        open_data(f"{shared_data.shared(pack)}{part}", program.signature, image=images) for pack, part in packs
    )
    result = compress(program, calibration, eval_data=evaluation, out=tmp_path, max_drop=LARGEST_DROP)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    kernels = count_kernels(result.files["model.onnx"])
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert (kernels.convolutions_integer, kernels.convolutions_float) == (convolutions, 0)
    assert result.report.metric.drop < LARGEST_DROP
    assert not result.drop_exceeded
