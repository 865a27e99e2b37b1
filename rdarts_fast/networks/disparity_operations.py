"""The operations of a disparity network: AutoDispNet's, which are DARTS's with other modules
(operations/cell_ops.py of its code).

A convolution has a bias and is followed by a leaky ReLU of slope 0.1, then, where asked for, by a
batch norm: in the other order than an image classifier's. The released networks have no batch norm
at all. Padding is half the kernel on both sides; TensorFlow's `same` puts more of it at the end
where the stride is 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

from rdarts_fast.networks.operations import Noise, Zero

SLOPE = 0.1
Affine = bool | None  # None: no batch norms; else whether they have weights and biases


def he(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Return it with weights from N(0, 2 / fan-in) and biases of 0.

    The fan-in is as TensorFlow counts it in the published code: that of a depthwise convolution
    counts all channels, that of a transposed one its results'. Without batch norms this keeps the
    values of a fresh network small.
    """
    height, width = convolution.kernel_size
    transposed = isinstance(convolution, nn.ConvTranspose2d)
    channels = convolution.out_channels if transposed else convolution.in_channels
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / (height * width * channels)))
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


def batch_norm(channels: int, affine: bool) -> nn.BatchNorm2d:
    """Return a batch norm as AutoDispNet has it: eps 1e-3, momentum 0.1."""
    return nn.BatchNorm2d(channels, eps=1e-3, affine=affine)


def _activated(channels: int, affine: Affine, *convolutions: nn.Module) -> list[nn.Module]:
    norms = [] if affine is None else [batch_norm(channels, affine)]
    return [*convolutions, nn.LeakyReLU(SLOPE), *norms]


def convolution(
    channels_in: int, channels_out: int, kernel: int, stride: int, affine: Affine
) -> nn.Sequential:
    """k x k convolution, leaky ReLU, batch norm or none."""
    convolve = he(nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2))
    return nn.Sequential(*_activated(channels_out, affine, convolve))


def upsampling(channels_in: int, channels_out: int, affine: Affine) -> nn.Sequential:
    """4x4 transposed convolution that doubles height and width, leaky ReLU, batch norm or none."""
    convolve = he(nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1))
    return nn.Sequential(*_activated(channels_out, affine, convolve))


def _separable(
    channels: int, kernel: int, stride: int, dilation: int, affine: Affine
) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels)
    return _activated(channels, affine, he(depthwise), he(nn.Conv2d(channels, channels, 1)))


def sep_conv(channels: int, stride: int, affine: Affine, kernel: int) -> nn.Module:
    """(depthwise k x k, 1x1, leaky ReLU, batch norm or none) twice, the stride in the first."""
    stages = _separable(channels, kernel, stride, 1, affine)
    return nn.Sequential(*stages, *_separable(channels, kernel, 1, 1, affine))


def dil_conv(channels: int, stride: int, affine: Affine, kernel: int) -> nn.Module:
    """Depthwise k x k of dilation 2, 1x1, leaky ReLU, batch norm or none.

    AutoDispNet has none of stride 2, because TensorFlow does not; here a reduction cell has.
    """
    return nn.Sequential(*_separable(channels, kernel, stride, 2, affine))


def conv_7x1_1x7(channels: int, stride: int, affine: Affine) -> nn.Module:
    """1x7 of stride (1, s), 7x1 of stride (s, 1), leaky ReLU, batch norm or none."""
    across = he(nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3)))
    down = he(nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0)))
    return nn.Sequential(*_activated(channels, affine, across, down))


def skip_connect(channels: int, stride: int, affine: Affine) -> nn.Module:
    """The identity at stride 1, else a 3x3 convolution of that stride."""
    return nn.Identity() if stride == 1 else convolution(channels, channels, 3, stride, affine)


# name -> (channels, stride, affine) -> module
OPERATIONS: Mapping[str, Callable[[int, int, Affine], nn.Module]] = {
    "none": lambda c, s, a: Zero(s),
    "skip_connect": skip_connect,
    "max_pool_3x3": lambda c, s, a: nn.MaxPool2d(3, s, 1),
    "avg_pool_3x3": lambda c, s, a: nn.AvgPool2d(3, s, 1, count_include_pad=False),
    "sep_conv_3x3": lambda c, s, a: sep_conv(c, s, a, 3),
    "sep_conv_5x5": lambda c, s, a: sep_conv(c, s, a, 5),
    "sep_conv_7x7": lambda c, s, a: sep_conv(c, s, a, 7),
    "dil_conv_3x3": lambda c, s, a: dil_conv(c, s, a, 3),
    "dil_conv_5x5": lambda c, s, a: dil_conv(c, s, a, 5),
    "conv_7x1_1x7": conv_7x1_1x7,
    "noise": lambda c, s, a: Noise(s),
}


def candidate(name: str, channels: int, stride: int) -> nn.Module:
    """Return operation `name` as a candidate of a supernet without batch norms."""
    return OPERATIONS[name](channels, stride, None)


def normalized_candidate(name: str, channels: int, stride: int) -> nn.Module:
    """Return operation `name` as a candidate of a supernet with batch norms: without affine, and
    pools are followed by one.
    """
    operation = OPERATIONS[name](channels, stride, False)
    if "pool" in name:
        return nn.Sequential(operation, batch_norm(channels, affine=False))
    return operation
