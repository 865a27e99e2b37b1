from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdarts_fast.data import epoch_batches, validation_batch
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError


def some_indices(count: int) -> Tensor:
    return torch.arange(count) * 3 + 7


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (256, 64, [64, 64, 64, 64]),
        (168, 64, [64, 64, 40]),
        (130, 64, [64, 64, 2]),
        (129, 64, [64, 65]),
        (65, 64, [65]),
        (64, 64, [64]),
        (5, 64, [5]),
        (1, 64, [1]),
        (3, 2, [3]),
        (3, 1, [1, 1, 1]),
        (0, 64, []),
    ],
)
def test_an_epoch_visits_every_index_once(count: int, batch_size: int, sizes: list[int]) -> None:
    batches = epoch_batches(some_indices(count), batch_size, Draws(1, step=4))
    assert [len(batch) for batch in batches] == sizes
    visited = sorted(index for batch in batches for index in batch.tolist())
    assert visited == some_indices(count).tolist()


def test_an_epoch_of_cifar_has_391_steps_the_last_of_40_images() -> None:
    batches = epoch_batches(torch.arange(25000), 64, Draws(1))
    assert len(batches) == 391
    assert len(batches[-1]) == 40


def test_the_order_is_random_and_depends_on_seed_branch_and_epoch() -> None:
    indices = some_indices(500)

    def order(draws: Draws) -> list[int]:
        return [index for batch in epoch_batches(indices, 64, draws) for index in batch.tolist()]

    orders = [order(draws) for draws in (Draws(1), Draws(2), Draws(1, step=1), Draws(1, branch=1))]
    assert orders[0] == order(Draws(1))
    assert indices.tolist() not in orders
    assert len({tuple(one) for one in orders}) == 4


@pytest.mark.parametrize(("count", "expected"), [(500, 64), (64, 64), (65, 64), (63, 63), (1, 1)])
def test_a_validation_batch_has_distinct_indices_of_the_half(count: int, expected: int) -> None:
    indices = some_indices(count)
    batch = validation_batch(indices, 64, Draws(1, step=9))
    assert batch.dtype == torch.int64
    assert len(batch) == expected
    assert len(set(batch.tolist())) == expected
    assert set(batch.tolist()) <= set(indices.tolist())


def test_a_validation_batch_depends_on_seed_branch_and_step() -> None:
    indices = some_indices(500)
    keys = (Draws(1), Draws(2), Draws(1, step=1), Draws(1, branch=1))
    batches = {tuple(validation_batch(indices, 64, draws).tolist()) for draws in keys}
    assert len(batches) == 4
    assert tuple(validation_batch(indices, 64, Draws(1)).tolist()) in batches


def test_validation_batches_take_every_index_equally_often() -> None:
    indices = torch.arange(50)
    drawn = torch.cat([validation_batch(indices, 10, Draws(3, step=s)) for s in range(1000)])
    counts = torch.bincount(drawn, minlength=50)
    # Each step takes an index with probability 1/5: 5 standard deviations
    assert (counts - 200).abs().max() < 5 * (1000 * 0.2 * 0.8) ** 0.5


def test_equal_random_numbers_are_told_apart_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def equal_bits(self: Draws, site: int, count: int, device: object = "cpu") -> Tensor:
        return torch.full((count,), 2**32 - 1)

    monkeypatch.setattr(Draws, "bits", equal_bits)
    assert validation_batch(some_indices(300), 5, Draws(1)).tolist() == [7, 10, 13, 16, 19]


def test_a_batch_is_on_the_device_of_the_indices() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    indices = some_indices(300).to(device)
    assert validation_batch(indices, 64, Draws(1)).device == indices.device
    assert all(b.device == indices.device for b in epoch_batches(indices, 64, Draws(1)))
    assert torch.equal(
        validation_batch(indices, 64, Draws(1)).cpu(),
        validation_batch(indices.cpu(), 64, Draws(1)),
    )


@pytest.mark.parametrize("batches", [epoch_batches, validation_batch])
@pytest.mark.parametrize("batch_size", [0, -1])
def test_refuses_an_empty_batch(batches: object, batch_size: int) -> None:
    assert callable(batches)
    with pytest.raises(UserError, match=f"at least 1, found {batch_size}"):
        batches(some_indices(10), batch_size, Draws(1))
