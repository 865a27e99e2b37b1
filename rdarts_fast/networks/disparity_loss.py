"""The loss and the metrics of disparity: end-point errors over the pixels whose disparity is known.

A pixel's end-point error (EPE) is |predicted - true disparity|. A target's unknown pixels are not
finite: they count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast.networks.disparity import Disparities

# Of the levels from 1/64 to 1/4 of the size, and of the final disparity: DispNet's of the same
# sizes. Whether AutoDispNet used them is not known.
LEVEL_WEIGHTS = (1 / 16, 1 / 16, 1 / 16, 1 / 8, 1 / 4)
FINAL_WEIGHT = 1.0
BAD_PIXELS = (1.0, 3.0)  # errors in pixels above which a pixel is bad


def resized_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return [N, h, w], in unchanged pixels: the mean of the known disparities in each rectangle of
    target [N, H, W], inf where none is known.
    """
    known = target.isfinite()
    if tuple(target.shape[1:]) == tuple(size):
        return torch.where(known, target, torch.inf)
    # The share of known pixels of a rectangle, whatever its size, and their sum's.
    both = torch.stack([known.to(target.dtype), torch.where(known, target, 0.0)], dim=1)
    share, mean = F.adaptive_avg_pool2d(both, (size[0], size[1])).unbind(1)
    return torch.where(share > 0, mean / share, torch.inf)


def mean_error(disparity: Tensor, target: Tensor) -> Tensor:
    """Return the mean EPE over the known pixels, a scalar; 0 where there are none.

    disparity: [N, h, w]; target: [N, H, W], brought to that size.
    """
    target = resized_target(target, disparity.shape[1:])
    known = target.isfinite()
    error = (disparity - torch.where(known, target, 0.0)).abs() * known
    return error.sum() / known.sum().clamp(min=1)


def multiscale_loss(
    found: Disparities,
    target: Tensor,
    level_weights: Sequence[float] = LEVEL_WEIGHTS,
    final_weight: float = FINAL_WEIGHT,
) -> Tensor:
    """Return the mean EPE of every level at its own size and of the final disparity, summed under
    their weights: a scalar, differentiable.

    target: [N, H, W]. level_weights: from coarse to fine, those that the network does not have are
    not used. Raises ValueError where there are fewer than levels.
    """
    if len(level_weights) < len(found.levels):
        raise ValueError(
            f"level_weights: expected {len(found.levels)} or more, got {len(level_weights)}"
        )
    pairs = zip(found.levels, level_weights, strict=False)
    loss = final_weight * mean_error(found.final, target)
    for level, weight in pairs:
        loss = loss + weight * mean_error(level, target)
    return loss


def disparity_sums(disparity: Tensor, target: Tensor) -> Tensor:
    """Return float64 [2 + len(BAD_PIXELS)], to be added over batches: the number of known pixels,
    the sum of their errors, how many are off by more than 1 and by more than 3 pixels.

    disparity, target: [N, H, W]. Divided by the first, the others are the mean EPE and the shares
    of bad pixels.
    """
    known = target.isfinite()
    error = (disparity.detach() - target)[known].abs().double()
    bad = [(error > most).sum().double() for most in BAD_PIXELS]
    return torch.stack([known.sum().double(), error.sum(), *bad])
