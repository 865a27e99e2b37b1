"""The sums of a batch norm's tangents against plain torch."""

import pytest
import torch

from rdarts_fast.kernels.moments import Moments, tangent_moments, tangent_moments_twin
from tests.conftest import device_of
from tests.tolerances import assert_equal


def operands(
    directions: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    n, c, h, w = shape
    tensors = normal(directions * n, c, h, w), normal(*shape), normal(*shape)
    inner = [x.contiguous(memory_format=torch.channels_last) for x in tensors]
    return *inner, normal(c)  # weights of either sign


def assert_moments_equal(got: Moments, expected: Moments, dtype: torch.dtype) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float64
        assert_equal(ours, theirs, dtype, times=4.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("directions", "shape"),
    [
        (28, (2, 16, 8, 8)),
        (1, (1, 1, 1, 1)),
        (3, (2, 5, 3, 7)),  # channels that fill no vector
        (9, (17, 24, 4, 4)),  # more samples than chunks; a block of one direction
        (70, (2, 64, 5, 5)),
        (4, (1, 3, 40, 50)),  # several tiles
        (33, (1, 6, 9, 31)),  # a run that ends within a piece; one direction in a block's rest
    ],
)
def test_they_equal_the_twin(
    directions: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backend: str,
) -> None:
    given = operands(directions, shape, dtype, device_of(backend))
    exact = tangent_moments_twin(*(x.double() for x in given))
    got = tangent_moments(*given)
    assert_moments_equal(got, exact, dtype)
    assert torch.equal(got.pairs, got.pairs.t())


def test_bad_input() -> None:
    dz, result, gradient, weights = operands(3, (2, 4, 3, 5), torch.float64)
    for given, message in (
        ((dz[:5], result, gradient, weights), "dz: expected whole multiples of result's"),
        ((dz.float(), result, gradient, weights), "dz: expected whole multiples of result's"),
        ((dz[:, :3], result, gradient, weights), "dz: expected whole multiples of result's"),
        ((dz, result, gradient[:1], weights), "gradient"),
        ((dz, result, gradient, weights[:3]), r"weights: expected shape \(4,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tangent_moments(*given)
    with pytest.raises(TypeError, match="gradient"):
        tangent_moments(dz, result, gradient.float(), weights)
    nothing = tangent_moments(dz[:0], result, gradient, weights)
    assert nothing.pairs.shape == (0, 0) and nothing.totals.shape == (0, 4)


def test_another_layout_is_copied() -> None:
    dz, result, gradient, weights = operands(3, (2, 4, 3, 5), torch.float64)
    got = tangent_moments(dz.contiguous(), result.contiguous(), gradient, weights)
    expected = tangent_moments_twin(dz, result, gradient, weights)
    assert_moments_equal(got, expected, torch.float64)


def test_the_bits_do_not_depend_on_the_threads() -> None:
    given = operands(5, (33, 16, 8, 8), torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(tangent_moments(*given))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
