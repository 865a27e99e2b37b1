"""Which images a step sees: index tensors drawn from the run's counter-based numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from rdarts_fast.draws import SITE_ORDER, SITE_VALIDATION_BATCH, Draws
from rdarts_fast.errors import UserError

_POSITION_BITS = 31


def epoch_batches(indices: Tensor, batch_size: int, draws: Draws) -> list[Tensor]:
    """Return one epoch's training batches: a random order of `indices` [N], split.

    `draws` has the epoch as its step. The last, smaller batch is kept, as published; a rest of one
    image joins the batch before it, because batch norm needs more than one value per channel.
    Raises UserError for a batch size below 1.
    """
    _check_batch_size(batch_size)
    count = indices.shape[0]
    order = indices[draws.permutation(SITE_ORDER, count, indices.device)]
    batches = list(torch.split(order, batch_size)) if count else []
    if len(batches) > 1 and batch_size > 1 and batches[-1].shape[0] == 1:
        batches[-2:] = [order[-batch_size - 1 :]]
    return batches


def validation_batch(indices: Tensor, batch_size: int, draws: Draws) -> Tensor:
    """Return a random full batch of `indices` [N] without replacement: [min(batch_size, N)].

    `draws` has the global step as its step, so every step draws afresh: the published first batch
    of a freshly shuffled loader. Raises UserError for a batch size below 1.
    """
    _check_batch_size(batch_size)
    count = indices.shape[0]
    # The positions of the smallest of N random numbers; a position in the low bits makes the
    # numbers distinct, so that every device picks the same ones.
    keys = draws.bits(SITE_VALIDATION_BATCH, count, indices.device) << _POSITION_BITS
    keys |= torch.arange(count, device=indices.device)
    smallest = torch.topk(keys, min(batch_size, count), largest=False).indices
    return indices[smallest]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch size must be at least 1, found {batch_size}")
