"""The networks of the pruning race: one or two of every family in timm and torchvision, with random weights."""

import importlib
from typing import Any

from torch import Tensor, nn

from models.randomize import pictures_of_noise
from models.timm_networks import example_input, import_timm

# fmt: off
CONVOLUTIONAL = (
    "test_mambaout", "regnetx_002", "regnety_002", "regnetz_005", "mobilenetv3_small_050", "lcnet_050", "mnasnet_050",
    "mobilenetv2_050", "tinynet_e", "efficientnet_b0", "efficientnet_lite0", "mixnet_s", "fbnetc_100", "spnasnet_100",
    "hardcorenas_a", "ghostnet_050", "ghostnetv2_100", "ghostnetv3_050", "repghostnet_050", "starnet_s050",
    "convnext_atto", "convnextv2_atto", "rexnet_100", "rexnetr_100", "fasternet_t0", "lcnetv2_small", "resnet10t",
    "resnet18", "resnext26ts", "seresnext26t_32x4d", "ecaresnet26t", "resnetblur18", "resnetaa34d", "resnetrs50",
    "resnetv2_18", "resnetv2_50x1_bit", "resnest14d", "res2net50_14w_8s", "skresnet18", "legacy_seresnet18",
    "densenet121", "dla34", "dla46x_c", "dpn48b", "cspresnext50", "cs3darknet_s", "darknet53", "cspnext_tiny",
    "hrnet_w18_small", "vovnet39a", "ese_vovnet19b_slim_dw", "selecsls42b", "hgnetv2_b0", "nf_regnet_b0",
    "eca_nfnet_l0", "gernet_s", "repvgg_a0", "mobileone_s0", "inception_next_atto", "xception41", "legacy_xception",
    "gcresnext26ts", "lambda_resnet26t", "rdnet_tiny", "tresnet_m", "vgg11_bn", "poolformer_s12", "convformer_s18",
    "efficientvit_b0", "repvit_m0_9", "shvit_s1", "mobilenetv4_conv_small", "edgenext_xx_small", "swiftformer_xs",
    "iformer_t", "lowformer_b0", "focalnet_tiny_srf", "inception_v3", "inception_v4", "convmixer_768_32",
    "inception_resnet_v2", "nasnetalarge", "pnasnet5large", "cpubone_nano", "csatv2", "mobilenetv5_base",
    "torchvision/alexnet", "torchvision/convnext_tiny", "torchvision/densenet121", "torchvision/efficientnet_b0",
    "torchvision/efficientnet_v2_s", "torchvision/googlenet", "torchvision/inception_v3", "torchvision/mnasnet0_5",
    "torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small", "torchvision/regnet_x_400mf",
    "torchvision/regnet_y_400mf", "torchvision/resnet18", "torchvision/resnext50_32x4d",
    "torchvision/shufflenet_v2_x0_5", "torchvision/shufflenet_v2_x1_0", "torchvision/squeezenet1_0",
    "torchvision/squeezenet1_1", "torchvision/vgg11", "torchvision/vgg11_bn", "torchvision/wide_resnet50_2",
)
"""Take pictures of any size: a small one tells as much."""
FIXED = (
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224", "test_vit_relpos", "mixer_s32_224",
    "gmlp_ti16_224", "resmlp_12_224", "gmixer_12_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny", "convit_tiny", "crossvit_9_240",
    "davit_tiny", "efficientformer_l1", "efficientformerv2_s0", "efficientvit_m0", "eva02_tiny_patch14_224",
    "fastvit_t8", "gcvit_xxtiny", "hiera_tiny_224", "levit_128s", "levit_conv_128s", "maxvit_rmlp_pico_rw_256",
    "coatnet_pico_rw_224", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "pit_ti_224", "pvt_v2_b0", "sequencer2d_s", "tiny_vit_5m_224", "tnt_s_patch16_224", "twins_svt_small",
    "twins_pcpvt_small", "visformer_tiny", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p16_224",
    "samvit_base_patch16_224", "beit_base_patch16_224", "botnet26t_256", "halonet26t", "caformer_s18",
    "efficientvim_m1", "vit_small_r26_s32_224", "sam2_hiera_tiny", "naflexvit_base_patch16_gap", "qwen3_vit_88m",
    "deepseek_vit_412m", "gemma4_vit_167m",
    "torchvision/maxvit_t", "torchvision/swin_t", "torchvision/swin_v2_t", "torchvision/vit_b_16",
)
"""Want pictures of the size that they were made for."""
# fmt: on

# Where the smallest of a family is large, fewer of its equal blocks tell as much.
_OPTIONS: dict[str, dict[str, Any]] = {
    "naflexvit_base_patch16_gap": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "torchvision/googlenet": {"init_weights": False},
    "torchvision/inception_v3": {"init_weights": False},
}
_SMALL = 96
_TORCHVISION = 224


def create(name: str) -> nn.Module:
    """The architecture of that name, initialized as its library does."""
    timm = import_timm()  # torchvision needs what this registers
    library, _, plain = name.rpartition("/")
    options = _OPTIONS.get(name, {})
    made: nn.Module = (
        importlib.import_module("torchvision.models").get_model(plain, weights=None, **options)
        if library
        else timm.create_model(plain, pretrained=False, **options)
    )
    return made


def pictures(name: str, model: nn.Module, *, batch: int, seed: int = 0) -> Tensor:
    """Random pictures (batch, 3, H, W) for it."""
    size = _SMALL if name in CONVOLUTIONAL else _TORCHVISION if "/" in name else None
    if "/" in name:
        return pictures_of_noise(batch, 3, size, size, seed=seed)
    return example_input(model, batch=batch, seed=seed, size=size)
