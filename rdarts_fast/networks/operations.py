"""The candidate operations of every space, one torch module each (DARTS, section 2.1; DARTS's
operations.py).

All keep the number of channels and map H x W to ceil(H / stride) x ceil(W / stride); no convolution
has a bias. To add an operation: one entry in `OPERATIONS` here, its name in `spaces.OPERATIONS`,
one row in its test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws

Probability = float | Tensor  # a tensor, float64 [], is above 0


def batch_norm(channels: int, affine: bool) -> nn.BatchNorm2d:
    """Return the batch norm used everywhere: eps 1e-5, momentum 0.1."""
    return nn.BatchNorm2d(channels, affine=affine)


class Zero(nn.Module):
    """none: zeros of the strided shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Noise(nn.Module):
    """noise: N(0, 1) of the strided shape, independent of the input, active in eval mode too, no
    gradient.

    `site` is the operation's place in the network, set by the cell: it keys the draw.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.site = 0

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        n, c, h, w = x[:, :, :: self.stride, :: self.stride].shape
        return draws.normal(self.site, (n, c, h, w), x.device, 0).to(x.dtype)


class FactorizedReduce(nn.Module):
    """skip_connect at stride 2: ReLU, two 1x1 convolutions of stride 2 side by side, the second
    shifted by one pixel.

    An odd height or width gets one zero row or column at its end, so that both halves have the same
    size.
    """

    def __init__(self, channels_in: int, channels_out: int, affine: bool) -> None:
        super().__init__()
        half = channels_out // 2
        self.conv_1 = nn.Conv2d(channels_in, channels_out - half, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(channels_in, half, 1, stride=2, bias=False) if half else None
        self.bn = batch_norm(channels_out, affine)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.bn(self.convolve(F.relu(x)))
        return z

    def convolve(self, x: Tensor) -> Tensor:
        """Return what the batch norm takes, from ReLU's result."""
        z: Tensor = self.conv_1(x)
        if self.conv_2 is not None:
            padded = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            z = torch.cat([z, self.conv_2(padded[:, :, 1:, 1:])], dim=1)
        return z


def _stage(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(
        channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
    )
    return [
        nn.ReLU(),
        depthwise,
        nn.Conv2d(channels, channels, 1, bias=False),
        batch_norm(channels, affine),
    ]


def sep_conv(channels: int, stride: int, affine: bool, kernel: int) -> nn.Module:
    """(ReLU, depthwise k x k, 1x1, batch norm) twice, the stride in the first."""
    stages = _stage(channels, kernel, stride, 1, affine) + _stage(channels, kernel, 1, 1, affine)
    return nn.Sequential(*stages)


def dil_conv(channels: int, stride: int, affine: bool, kernel: int) -> nn.Module:
    """ReLU, depthwise k x k of dilation 2, 1x1, batch norm."""
    return nn.Sequential(*_stage(channels, kernel, stride, 2, affine))


def conv_7x1_1x7(channels: int, stride: int, affine: bool) -> nn.Module:
    """ReLU, 1x7 of stride (1, s), 7x1 of stride (s, 1), batch norm."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
        batch_norm(channels, affine),
    )


def max_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    """3x3 maximum, padding 1."""
    return nn.MaxPool2d(3, stride, 1)


def avg_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    """3x3 mean over the pixels inside the image, padding 1 not counted."""
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def skip_connect(channels: int, stride: int, affine: bool) -> nn.Module:
    """The identity at stride 1, FactorizedReduce at stride 2."""
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


# name -> (channels, stride, affine) -> module
OPERATIONS: Mapping[str, Callable[[int, int, bool], nn.Module]] = {
    "none": lambda c, s, a: Zero(s),
    "skip_connect": skip_connect,
    "max_pool_3x3": max_pool,
    "avg_pool_3x3": avg_pool,
    "sep_conv_3x3": lambda c, s, a: sep_conv(c, s, a, 3),
    "sep_conv_5x5": lambda c, s, a: sep_conv(c, s, a, 5),
    "sep_conv_7x7": lambda c, s, a: sep_conv(c, s, a, 7),
    "dil_conv_3x3": lambda c, s, a: dil_conv(c, s, a, 3),
    "dil_conv_5x5": lambda c, s, a: dil_conv(c, s, a, 5),
    "conv_7x1_1x7": conv_7x1_1x7,
    "noise": lambda c, s, a: Noise(s),
}


def candidate(name: str, channels: int, stride: int) -> nn.Module:
    """Return operation `name` as a candidate of the supernet: batch norms without affine, pools
    followed by one.
    """
    operation = OPERATIONS[name](channels, stride, False)
    if "pool" in name:
        return nn.Sequential(operation, batch_norm(channels, affine=False))
    return operation


def relu_conv_bn(channels_in: int, channels_out: int, affine: bool) -> nn.Module:
    """ReLU, 1x1 convolution, batch norm: how a cell brings its inputs to its own channels."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        batch_norm(channels_out, affine),
    )


def preprocess(channels_in: int, channels_out: int, reduce: bool, affine: bool) -> nn.Module:
    """Return the module before a cell's input; `reduce` where that input is twice as large as the
    other.
    """
    if reduce:
        return FactorizedReduce(channels_in, channels_out, affine)
    return relu_conv_bn(channels_in, channels_out, affine)


def stem(image_channels: int, channels: int) -> nn.Module:
    """3x3 convolution and batch norm (with affine, in the supernet too)."""
    return nn.Sequential(
        nn.Conv2d(image_channels, channels, 3, padding=1, bias=False),
        batch_norm(channels, affine=True),
    )


def apply(operation: nn.Module, x: Tensor, draws: Draws | None) -> Tensor:
    """Return operation(x); a noise operation also gets the draws."""
    result: Tensor = operation(x, draws) if isinstance(operation, Noise) else operation(x)
    return result


def drops(probability: Probability) -> bool:
    """Whether anything can be dropped."""
    return isinstance(probability, Tensor) or probability > 0.0


def drop_path_factors(
    draws: Draws, site: int, edges: int, images: Tensor, probability: Probability
) -> Tensor:
    """Return [E, N] factors: 0 with `probability`, else 1 / keep (ScheduledDropPath; paper,
    appendix C.1).

    One factor an edge and sample, on the device and in the dtype of `images`.
    """
    keep = 1.0 - probability
    if not isinstance(keep, Tensor):  # a number would divide with other bits on a GPU
        keep = images.new_full((), keep, dtype=torch.float64)
    uniform = draws.uniform(site, (edges, images.shape[0]), images.device, 1)
    return (uniform < keep).to(images.dtype) / keep
