"""Convolution padded as TensorFlow's SAME: the output has ceil(size / stride) pixels, odd padding goes to the end."""

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis.

    >>> same_padding(224, 3, 2), same_padding(7, 3, 2), same_padding(5, 3, 1)
    ((0, 1), (1, 1), (1, 1))
    """
    total = max((-(size // -stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """`nn.Conv2d` with SAME padding. For an even size and stride 2 it is unequal, which `padding=` cannot say."""

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        return super().forward(F.pad(x, (left, right, top, bottom)))


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with SAME padding; at stride 1 that is a plain `padding=1`."""
    if stride == 1:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups, bias=False)
    return Conv2dSame(in_channels, out_channels, 3, stride=stride, groups=groups, bias=False)
