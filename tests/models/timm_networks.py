"""timm's architectures with random weights under which a comparison of outputs means something."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor, nn

from models.randomize import pictures_of_noise, randomize

FAMILIES = (
    "resnet18",
    "regnetx_002",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "densenet121",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "maxvit_rmlp_pico_rw_256",
    "ghostnet_050",
    "hrnet_w18_small",
)
"""A small member of each of twelve families."""

_registered: torch.library.Library | None = None  # operators live as long as this object


def import_timm() -> ModuleType:
    """timm, or a skipped test. A torchvision without compiled operators is given their names, or it fails to import."""
    global _registered
    if importlib.util.find_spec("timm") is None:
        importlib.import_module("pytest").skip("timm is not installed")  # benchmarks run where pytest is not
    if _registered is None and not hasattr(torch.ops.torchvision, "nms"):
        _registered = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _registered.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


def example_input(model: nn.Module, *, batch: int = 2, seed: int = 0, size: int | None = None) -> Tensor:
    """Random pictures (batch, 3, H, W) of the size that a model of `create` wants, or of another one."""
    channels, height, width = model.pretrained_cfg["input_size"]
    return pictures_of_noise(batch, channels, size or height, size or width, seed=seed)


def create(name: str, *, seed: int = 0, **options: object) -> nn.Module:
    """The architecture of that name in eval mode, all parameters and batch-norm statistics random but alive.

    The same seed gives the same network; the global random state stays as it was. `options` go to timm.
    """
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, **options)
    return randomize(model, lambda m: m(example_input(m, batch=4, seed=seed + 1)), seed=seed)
