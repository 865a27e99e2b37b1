"""float32 rounded to bfloat16 without crossing a ReLU's zero."""

import pytest
import torch

from rdarts_fast.kernels.rounding import rounded, rounded_twin
from tests.conftest import device_of

SHAPES = [(2, 8, 3, 4), (1, 3, 5, 7), (3, 1, 1, 1), (2, 16, 1, 3), (0, 4, 2, 2)]


def tensors(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = [torch.randn(shape, generator=generator) for _ in range(count)]
    if z[0].numel() > 8:
        z[0].view(-1)[:8] = torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, 1e-40, -1e-40, 1.0, -1.0])
    return z


def same_bits(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(got, expected, strict=True)
    return all(torch.equal(a.cpu().view(torch.int16), b.view(torch.int16)) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("innermost", [True, False])
def test_the_nearest(backend: str, shape: tuple[int, ...], innermost: bool) -> None:
    z = tensors(shape, 3)
    if innermost:
        z = [x.contiguous(memory_format=torch.channels_last) for x in z]
    got = rounded([x.to(device_of(backend)) for x in z])
    assert same_bits(got, [x.bfloat16() for x in z])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in got)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_number_crosses_the_zero(backend: str, shape: tuple[int, ...]) -> None:
    z, c = tensors(shape, 3), shape[1]
    scale = torch.randn(3, c)
    # The zero lies where numbers are, closer than bfloat16 can tell.
    at = torch.stack([x.mean(dim=(0, 2, 3)) if x.numel() else torch.zeros(c) for x in z])
    at[1] = z[1].flatten(2)[0, :, 0] * (1 + 2e-4) if z[1].numel() else at[1]
    shift = -scale * at
    device = device_of(backend)
    got = rounded([x.to(device) for x in z], scale.to(device), shift.to(device))
    assert same_bits(got, rounded_twin(z, scale, shift))
    for k, (x, found) in enumerate(zip(z, got, strict=True)):
        a, b = scale[k].view(-1, 1, 1), shift[k].view(-1, 1, 1)
        assert torch.equal(a * found.cpu().float() + b > 0, a * x + b > 0)
        error = (found.cpu().float() - x).abs()[x.abs() < 1e38]
        assert bool((error <= 2.0**-7 * x.abs()[x.abs() < 1e38] + 1e-38).all())


def test_the_nearest_would_cross_it() -> None:
    """What the kernel is for: plain rounding changes some sides, and its twin none."""
    z = [torch.randn(4, 8, 16, 16)]
    scale, shift = torch.ones(1, 8), torch.full((1, 8), -0.7)
    sides = z[0] - 0.7 > 0
    near = z[0].bfloat16().float()
    assert bool(((near - 0.7 > 0) != sides).any())
    assert torch.equal(rounded(z, scale, shift)[0].float() - 0.7 > 0, sides)


def test_numbers_that_are_not_finite_stay() -> None:
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).view(1, 4, 1, 1)
    got = rounded([z], torch.ones(1, 4), torch.zeros(1, 4))[0].float().flatten()
    assert got[0].isnan() and got[1:].tolist() == [float("inf"), -float("inf"), 1.0]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda z, a: rounded([z.double()]), TypeError, "expected dtype float32"),
        (lambda z, a: rounded([z], a), ValueError, "both or none"),
        (lambda z, a: rounded([z], a[:, :2], a), ValueError, r"scale: expected shape \[K, C\]"),
        (lambda z, a: rounded([z], a, a.double()), TypeError, "shift: expected dtype"),
    ],
)
def test_bad_arguments(change, error, text: str) -> None:
    with pytest.raises(error, match=text):
        change(torch.zeros(1, 3, 2, 2), torch.ones(1, 3))
