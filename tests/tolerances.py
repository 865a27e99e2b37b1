"""How close is equal: the one table of tolerances, relative to the largest number of the expected
tensor.
"""

import torch

TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def assert_equal(
    got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, times: float = 1.0
) -> None:
    """Compare, by the tolerance of `dtype`, in which numbers were stored; `times` loosens."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return
    error = (got.double() - expected.double()).abs().max().item()
    size = expected.double().abs().max().item()
    assert error <= times * TOLERANCES[dtype] * (1e-3 + size), (error, size)
