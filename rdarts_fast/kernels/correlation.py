"""The correlation of two images along their rows, by which a disparity network compares its views.

    out[n, i, y, x] = 1/C sum over c of left[n, c, y, x] right[n, c, y, x + first + i]

for i from 0 to count - 1; outside the image right is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def displacements(most: int, one_sided: bool = False) -> tuple[int, int]:
    """Return (first, count) of the displacements up to `most` pixels: -most .. most, or with
    `one_sided` -most .. 0, where the right view of a scene has what the left one shows at x.
    """
    if most < 0:
        raise ValueError(f"most: expected 0 or more, got {most}")
    return -most, most + 1 if one_sided else 2 * most + 1


def correlation_twin(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    """Return correlation(...) in plain torch, by one product of unfolded rows."""
    c, w = left.shape[1], left.shape[3]
    before, after = max(0, -first), max(0, first + count - 1)
    padded = F.pad(right, (before, after))
    windows = padded.unfold(3, w, 1)[:, :, :, first + before :][:, :, :, :count]
    return torch.einsum("nchw,nchiw->nihw", left, windows) / c  # [N, count, H, W]
