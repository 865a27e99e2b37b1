"""What is measured of a supernet on the alphas' data: its score, and the batch of the Hessian."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rdarts_fast import bilevel, training
from rdarts_fast.config import SearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.metrics import Sums
from rdarts_fast.networks import SearchNetwork
from rdarts_fast.regularisation import Regularisation
from rdarts_fast.tasks import Batch, Carry, Task

NOTHING: Carry = {}  # carried into the first batch of a pass over a set


def drop_path_probability(
    settings: SearchConfig, regularisation: Regularisation, epoch: int
) -> float:
    """Return the probability of dropping an edge in an epoch (ScheduledDropPath; paper, C.1)."""
    return training.linear(epoch, settings.epochs - 1, regularisation.drop_path_prob)


def cutout_probability(settings: SearchConfig, regularisation: Regularisation, epoch: int) -> float:
    """Return the probability of cutout in an epoch: only beside drop path; constant as the code
    ran, or linear.
    """
    if regularisation.drop_path_prob == 0.0:
        return 0.0
    if settings.cutout_schedule == "constant":
        return settings.cutout_prob
    return training.linear(epoch, settings.epochs - 1, settings.cutout_prob)


@torch.no_grad()
def validate(
    task: Task,
    supernet: SearchNetwork,
    weights: Mapping[str, Tensor],
    draws: Draws,
    epoch: int,
    cutout: float = 0.0,
    *,
    batch_statistics: bool = False,
) -> Sums:
    """Return the loss and score of a supernet under the operations' weights [E, O] on the alphas'
    part of the data, augmented as published; the same batches in each call for an epoch.

    In eval mode, or with batch norms over each batch, which leave no trace. Afterwards the supernet
    is in train mode.
    """
    sums, carry, drop_path_prob = Sums(), NOTHING, supernet.drop_path_prob
    supernet.train(batch_statistics)
    supernet.drop_path_prob = 0.0
    with bilevel.unchanged(list(supernet.buffers())):
        for b, rows in enumerate(task.validation_batches()):
            key = draws.at(step=(epoch << 16) | b, pass_index=training.EVALUATION_PASS)
            batch = task.training_batch(rows, key, cutout, validation=True)
            outcome = task.run_supernet(supernet, batch, weights, key, carry)
            sums.add(outcome)
            carry = outcome.carry
    supernet.train()
    supernet.drop_path_prob = drop_path_prob
    return sums


def curvature_batch(
    task: Task, draws: Draws, epoch: int, steps: int, cutout: float
) -> tuple[Batch, Draws]:
    """Return batch and key of the pass that an epoch's Hessian is taken of: the last batch
    that the alphas saw in its `steps` steps (paper, section 2.2).
    """
    last = draws.at(step=epoch * steps + steps - 1)
    batch = task.training_batch(task.validation_rows(last), last, cutout, validation=True)
    return batch, last.at(pass_index=training.CURVATURE_PASS)
