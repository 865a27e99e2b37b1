"""Memory of results on the CPU: used again when the last tensor on it has died, never before."""

import torch

from rdarts_fast import native
from rdarts_fast.kernels import array, node_sum

LIKE = torch.zeros(4, 16, 32, 32)


def fresh(samples: int = 4) -> torch.Tensor:
    return array.empty(LIKE, (samples, 16, 32, 32), torch.channels_last)


def test_memory_of_a_dead_tensor_is_used_again() -> None:
    native.extension.release_blocks()
    one = fresh()
    address = one.data_ptr()
    assert address % 64 == 0
    assert fresh().data_ptr() != address
    del one
    again = {fresh().data_ptr(), fresh().data_ptr()}
    assert address in again


def test_a_view_keeps_its_memory() -> None:
    native.extension.release_blocks()
    one = fresh()
    view = one[1:, 2].detach().view(torch.int32)
    address = one.data_ptr()
    del one
    others = [fresh() for _ in range(4)]
    assert address not in [x.data_ptr() for x in others]
    del view
    assert fresh().data_ptr() == address


def test_no_more_is_kept_than_a_quarter_above_what_was_in_use() -> None:
    native.extension.release_blocks()
    most = 64 * fresh(1).nbytes
    for samples in (64, 3, 17, 33, 5, 60):
        tensors = [fresh(samples) for _ in range(64 // samples)]
        assert native.extension.kept_bytes() + sum(x.nbytes for x in tensors) <= 1.25 * most
        del tensors
    native.extension.release_blocks()
    assert native.extension.kept_bytes() == 0


def test_memory_formats_and_types() -> None:
    for dtype in (torch.float32, torch.float64):
        like = torch.zeros(2, dtype=dtype)
        for format_ in (torch.contiguous_format, torch.channels_last):
            x = array.empty(like, (3, 5, 70, 60), format_)
            assert x.shape == (3, 5, 70, 60)
            assert x.dtype == dtype
            assert x.is_contiguous(memory_format=format_)
    assert array.empty(LIKE, (0, 5, 70, 60), torch.channels_last).shape == (0, 5, 70, 60)


def test_results_live_there() -> None:
    native.extension.release_blocks()
    z = torch.randn(64, 16, 32, 32)
    address = node_sum([z], torch.ones(1, 16)).data_ptr()  # dies at once
    assert node_sum([z], torch.ones(1, 16)).data_ptr() == address
    assert native.extension.kept_bytes() >= z.nbytes
