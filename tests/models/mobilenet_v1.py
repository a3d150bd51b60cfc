"""MobileNetV1 (Howard et al., 2017) with TensorFlow's padding and batch-norm epsilon, parameters named as in timm."""

from torch import Tensor, nn

from models.same_padding import conv3x3

EPS = 1e-3
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
"""Output channels at full width, blocks, stride of the first block."""


class SeparableBlock(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one, each with batch norm and ReLU6."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = conv3x3(in_channels, in_channels, stride=stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels, eps=EPS)
        self.act1 = nn.ReLU6()
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=EPS)
        self.act2 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_dw(x)))
        return self.act2(self.bn2(self.conv_pw(x)))


class MobileNetV1(nn.Module):
    """Stem, 13 separable blocks, global mean, classifier; every channel count is multiplied by `width`."""

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv_stem = conv3x3(3, channels, stride=2)
        self.bn1 = nn.BatchNorm2d(channels, eps=EPS)
        self.act1 = nn.ReLU6()
        stages = []
        for full_channels, depth, first_stride in STAGES:
            blocks = []
            for i in range(depth):
                out_channels = int(full_channels * width)
                blocks.append(SeparableBlock(channels, out_channels, first_stride if i == 0 else 1))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        return self.classifier(self.global_pool(x).flatten(1))


def mobilenet_v1_075() -> MobileNetV1:
    """MobileNetV1 at width 0.75: 2 585 560 parameters, input 3x224x224."""
    return MobileNetV1(width=0.75).eval()
