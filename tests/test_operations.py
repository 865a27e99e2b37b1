"""Every candidate operation against a formula written out by hand, at both strides."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.networks.operations import (
    OPERATIONS,
    FactorizedReduce,
    apply,
    candidate,
    drop_path_factors,
    preprocess,
)

C, DRAWS = 4, Draws(5)


def images(height: int = 6, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, C, height, width, generator=generator, dtype=torch.float64)


def run(name: str, stride: int, x: Tensor) -> tuple[Tensor, nn.Module]:
    torch.manual_seed(1)
    operation = candidate(name, C, stride).double().train()
    return apply(operation, x, DRAWS), operation


def convolve(
    x: Tensor, weight: Tensor, stride: tuple[int, int], dilation: int, groups: int
) -> Tensor:
    """Cross-correlation, as sums over the kernel; zero padding keeps ceil(size / stride)."""
    kh, kw = weight.shape[2:]
    ph, pw = dilation * (kh // 2), dilation * (kw // 2)
    h, w = x.shape[2:]
    out_h, out_w = -(-h // stride[0]), -(-w // stride[1])
    padded = torch.zeros(
        *x.shape[:2], h + 2 * ph + stride[0], w + 2 * pw + stride[1], dtype=x.dtype
    )
    padded[:, :, ph : ph + h, pw : pw + w] = x
    out = torch.zeros(x.shape[0], weight.shape[0], out_h, out_w, dtype=x.dtype)
    for i, j in itertools.product(range(kh), range(kw)):
        rows = slice(i * dilation, i * dilation + out_h * stride[0], stride[0])
        columns = slice(j * dilation, j * dilation + out_w * stride[1], stride[1])
        part = padded[:, :, rows, columns]
        if groups == 1:
            out += torch.einsum("ncij,oc->noij", part, weight[:, :, i, j])
        else:
            out += part * weight[:, 0, i, j].view(1, -1, 1, 1)
    return out


def normalised(z: Tensor) -> Tensor:
    mean = z.mean((0, 2, 3), keepdim=True)
    variance = (z - mean).square().mean((0, 2, 3), keepdim=True)
    return (z - mean) / (variance + 1e-5).sqrt()


def stage(
    x: Tensor, depthwise: nn.Conv2d, pointwise: nn.Conv2d, stride: int, dilation: int
) -> Tensor:
    z = convolve(x.clamp_min(0), depthwise.weight, (stride, stride), dilation, C)
    return normalised(convolve(z, pointwise.weight, (1, 1), 1, 1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"])
def test_sep_conv(name: str, stride: int) -> None:
    x = images()
    got, m = run(name, stride, x)
    assert m[1].kernel_size == (int(name[-1]),) * 2
    expected = stage(stage(x, m[1], m[2], stride, 1), m[5], m[6], 1, 1)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["dil_conv_3x3", "dil_conv_5x5"])
def test_dil_conv(name: str, stride: int) -> None:
    x = images()
    got, m = run(name, stride, x)
    assert m[1].kernel_size == (int(name[-1]),) * 2
    torch.testing.assert_close(got, stage(x, m[1], m[2], stride, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_7x1_1x7(stride: int) -> None:
    x = images()
    got, m = run("conv_7x1_1x7", stride, x)
    z = convolve(x.clamp_min(0), m[1].weight, (1, stride), 1, 1)
    expected = normalised(convolve(z, m[2].weight, (stride, 1), 1, 1))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3"])
def test_pools_count_only_pixels_inside_and_are_normalised(name: str, stride: int) -> None:
    x = images()
    expected = torch.zeros(3, C, -(-6 // stride), -(-7 // stride), dtype=x.dtype)
    for i, j in itertools.product(range(expected.shape[2]), range(expected.shape[3])):
        top, left = max(i * stride - 1, 0), max(j * stride - 1, 0)
        window = x[:, :, top : i * stride + 2, left : j * stride + 2]
        expected[:, :, i, j] = window.amax((2, 3)) if name[0] == "m" else window.mean((2, 3))
    got, _ = run(name, stride, x)
    torch.testing.assert_close(got, normalised(expected), rtol=1e-10, atol=1e-10)
    bare = OPERATIONS[name](C, stride, True)(x)  # in the discrete network: no batch norm
    torch.testing.assert_close(bare, expected, rtol=1e-12, atol=1e-12)


def test_skip_connect_at_stride_1_is_the_identity() -> None:
    x = images()
    got, _ = run("skip_connect", 1, x)
    assert got is x


@pytest.mark.parametrize("size", [(6, 8), (7, 7), (5, 6), (1, 1)])
@pytest.mark.parametrize("channels", [(4, 4), (4, 7), (4, 1)])
def test_factorized_reduce(size: tuple[int, int], channels: tuple[int, int]) -> None:
    x = images(*size)
    torch.manual_seed(1)
    module = FactorizedReduce(*channels, affine=False).double()
    positive = x.clamp_min(0)
    h, w = -(-size[0] // 2), -(-size[1] // 2)
    shifted = torch.zeros(3, C, h, w, dtype=x.dtype)  # one pixel further, zero beyond the edge
    part = positive[:, :, 1::2, 1::2]
    shifted[:, :, : part.shape[2], : part.shape[3]] = part
    first = torch.einsum(
        "ncij,oc->noij", positive[:, :, ::2, ::2], module.conv_1.weight[:, :, 0, 0]
    )
    halves = [first]
    if module.conv_2 is not None:
        halves.append(torch.einsum("ncij,oc->noij", shifted, module.conv_2.weight[:, :, 0, 0]))
    expected = torch.cat(halves, 1)
    assert expected.shape == (3, channels[1], h, w)
    torch.testing.assert_close(module(x), normalised(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_none_is_zero(stride: int) -> None:
    got, _ = run("none", stride, images())
    assert torch.equal(
        got, torch.zeros(3, C, -(-6 // stride), -(-7 // stride), dtype=torch.float64)
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_noise_is_drawn_from_its_site_and_ignores_the_input(stride: int) -> None:
    x = images().requires_grad_()
    operation = candidate("noise", C, stride)
    operation.site = 77
    got = apply(operation, x, DRAWS)
    shape = (3, C, -(-6 // stride), -(-7 // stride))
    assert torch.equal(got, DRAWS.normal(77, shape).double())
    assert not got.requires_grad
    assert torch.equal(apply(operation.eval(), 5 * x, DRAWS), got)
    assert not torch.equal(apply(operation, x, DRAWS.at(pass_index=1)), got)


def test_preprocess_brings_channels_and_size() -> None:
    x = images(8, 8)
    torch.manual_seed(1)
    same = preprocess(C, 6, False, affine=False).double()
    z = torch.einsum("ncij,oc->noij", x.clamp_min(0), same[1].weight[:, :, 0, 0])
    torch.testing.assert_close(same(x), normalised(z), rtol=1e-10, atol=1e-10)
    assert preprocess(C, 6, True, affine=False).double()(x).shape == (3, 6, 4, 4)


def test_affine_only_where_asked() -> None:
    for name, stride in itertools.product(OPERATIONS, (1, 2)):
        for affine in (True, False):
            module = OPERATIONS[name](C, stride, affine)
            norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
            assert all(m.affine == affine and m.eps == 1e-5 and m.momentum == 0.1 for m in norms)


def test_no_operation_has_a_bias() -> None:
    for name, stride in itertools.product(OPERATIONS, (1, 2)):
        for module in candidate(name, C, stride).modules():
            assert not isinstance(module, nn.Conv2d) or module.bias is None


def test_drop_path_factors() -> None:
    x = torch.zeros(20_000, 1)
    factors = drop_path_factors(DRAWS, 3, 2, x, 0.25)
    assert factors.shape == (2, 20_000)
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (factors == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(factors[0], factors[1])


def test_relu_is_not_in_place() -> None:
    x = images()
    before = x.clone()
    for name, stride in itertools.product(OPERATIONS, (1, 2)):
        run(name, stride, x)
    assert torch.equal(x, before)
    assert F.relu(x).ne(x).any()
