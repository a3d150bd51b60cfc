"""MobileNetV2 (Sandler et al., 2018) with TensorFlow's padding, parameters named as in timm."""

from torch import Tensor, nn

from models.same_padding import conv3x3

STAGES = ((6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, blocks, stride of the first block; the unexpanded first stage comes before them."""


class SeparableBlock(nn.Module):
    """The first stage: a depthwise convolution with ReLU6 and a linear pointwise one, no shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_dw = conv3x3(in_channels, in_channels, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU6()
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(self.act1(self.bn1(self.conv_dw(x)))))


class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, project without activation; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv_pw = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.ReLU6()
        self.conv_dw = conv3x3(hidden, hidden, stride=stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2 = nn.ReLU6()
        self.conv_pwl = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.act2(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """Stem, 17 blocks in seven stages, a 1280-channel head, global mean, classifier."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem = conv3x3(3, 32, stride=2)
        self.bn1 = nn.BatchNorm2d(32)
        self.act1 = nn.ReLU6()
        stages, channels = [nn.Sequential(SeparableBlock(32, 16))], 16
        for expansion, out_channels, depth, first_stride in STAGES:
            blocks = []
            for i in range(depth):
                blocks.append(InvertedResidual(channels, out_channels, expansion, first_stride if i == 0 else 1))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.act2 = nn.ReLU6()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.act2(self.bn2(self.conv_head(x)))
        return self.classifier(self.global_pool(x).flatten(1))


def mobilenet_v2() -> MobileNetV2:
    """MobileNetV2 at width 1.0: 3 504 872 parameters, input 3x224x224."""
    return MobileNetV2().eval()
