"""The networks that other tests rely on load the real weights, reach the known accuracy, and are not degenerate."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from models import shared_data, timm_networks, toys
from models.cifar_resnet import resnet20, resnet56
from models.mobilenet_v1 import mobilenet_v1_075
from models.mobilenet_v2 import mobilenet_v2
from models.randomize import pictures_of_noise, randomize, spread_over_samples
from models.same_padding import Conv2dSame, same_padding


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(resnet20, 269_722), (resnet56, 853_018), (mobilenet_v1_075, 2_585_560), (mobilenet_v2, 3_504_872)],
)
def test_definitions_have_the_published_number_of_parameters(build, parameters):
    model = build()
    assert parameter_count(model) == parameters
    assert not model.training


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (224, 3, 2, (0, 1)),  # even size: the single zero goes to the end
        (7, 3, 2, (1, 1)),
        (5, 3, 1, (1, 1)),
        (4, 1, 2, (0, 0)),  # the kernel already ends inside
    ],
)
def test_same_padding_by_hand(size, kernel, stride, padding):
    assert same_padding(size, kernel, stride) == padding


def test_same_convolution_gives_size_over_stride_rounded_up():
    conv = Conv2dSame(1, 1, 3, stride=2)
    assert conv(torch.zeros(1, 1, 8, 5)).shape == (1, 1, 4, 3)


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (resnet20, "cifar10_resnet20"),
        (resnet20, "cifar10_resnet20_jpegft"),
        (resnet56, "cifar10_resnet56"),
        (mobilenet_v1_075, "mobilenetv1_075"),
        (mobilenet_v2, "mobilenetv2_100_deq"),
    ],
)
def test_real_weights_match_the_definition_key_by_key(build, weights):
    shared_data.load_weights(build(), weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "weights", "expected"),
    [
        # The whole test set of 10 000 pictures gives 0.8751, 0.8103 and 0.8320; of 500, three standard errors are 0.05.
        (resnet20, "cifar10_resnet20_jpegft", 0.8751),
        (resnet20, "cifar10_resnet20", 0.8103),
        (resnet56, "cifar10_resnet56", 0.8320),
    ],
)
def test_cifar_networks_reach_the_measured_accuracy(build, weights, expected):
    model = shared_data.load_weights(build(), weights)
    images, labels = shared_data.pictures(shared_data.CIFAR_TEST, 0, 500)
    images = shared_data.normalized(images, shared_data.CIFAR_MEAN, shared_data.CIFAR_STD)
    assert shared_data.top1(model, images, labels) == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "weights", "expected"),
    [(mobilenet_v1_075, "mobilenetv1_075", 0.8310), (mobilenet_v2, "mobilenetv2_100_deq", 0.8610)],
)
def test_imagenet_networks_reach_the_measured_accuracy(build, weights, expected):
    model = shared_data.load_weights(build(), weights)
    images, labels = shared_data.pictures(shared_data.IMAGENET_SAMPLE, 0, 500)
    images = shared_data.normalized(images, shared_data.MOBILENET_MEAN, shared_data.MOBILENET_STD)
    assert shared_data.top1(model, images, labels) == pytest.approx(expected, abs=0.05)


def test_own_mobilenets_equal_those_of_timm():
    efficientnet = timm_networks.import_timm().models.efficientnet
    x = pictures_of_noise(2, 3, 65, 64)  # an odd and an even side: SAME padding differs between them
    for ours, theirs in [
        (mobilenet_v1_075(), efficientnet._gen_mobilenet_v1("mobilenetv1_100", 0.75, pad_type="same", bn_eps=1e-3)),
        (mobilenet_v2(), efficientnet.mobilenetv2_100(pad_type="same")),
    ]:
        randomize(theirs, lambda model: model(x))
        ours.load_state_dict(theirs.state_dict(), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)  # sums in another order


def leaves(output: object) -> list[torch.Tensor]:
    if dataclasses.is_dataclass(output):
        output = vars(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_answer_to_their_input_in_every_output(name):
    toy, model = toys.TOYS[name], toys.make(name)
    outputs = leaves(toys.call(model, toy.example(8)))
    assert not model.training
    assert all(spread_over_samples(output) > 0.1 for output in outputs)


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_take_a_batch_of_one(name):
    toy, model = toys.TOYS[name], toys.make(name)
    one = leaves(toys.call(model, toy.example(1)))
    assert all(output.shape[0] == 1 and output.isfinite().all() for output in one)


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_are_the_same_for_the_same_seed_and_leave_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    first, second, third = toys.make(name), toys.make(name), toys.make(name, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


def test_tied_weights_stay_one_tensor():
    model = toys.make("TiedLanguageModel")
    assert model.head.weight is model.embedding.weight


def test_randomize_gives_batch_norms_the_statistics_of_the_data_nearly():
    model = toys.make("ConvChain")
    inputs = toys.ConvChain.example(8)[0]
    seen = model.conv1(inputs)
    expected = seen.var((0, 2, 3))
    ratio = model.bn1.running_var / expected
    assert ratio.min() >= 0.7
    assert ratio.max() <= 1.3
    assert ratio.std() > 0.01  # shifted, so that folding which forgets the statistics is seen


def test_randomize_wakes_a_branch_that_starts_at_zero():
    layer = nn.BatchNorm2d(4)
    nn.init.zeros_(layer.weight)
    randomize(layer, lambda m: m(pictures_of_noise(4, 4, 8, 8)))
    assert layer.weight.min() >= 0.5


FAST_FAMILIES = ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "ghostnet_050")


@pytest.mark.parametrize(
    "name",
    [name if name in FAST_FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in timm_networks.FAMILIES],
)
def test_timm_networks_answer_to_their_input(name):
    model = timm_networks.create(name)
    with torch.no_grad():
        output = model(timm_networks.example_input(model, batch=4))
    assert output.isfinite().all()
    assert spread_over_samples(output) > 0.1
    assert output.std() < 100
