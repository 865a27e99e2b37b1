"""Sums over the tangents of V directions that the second derivative of a batch norm is made of.

pairs[j, k] = sum over n, h, w, c of weights[c] * dz[j] * dz[k]
by_result[v, c] = sum over n, h, w of result * dz[v]
by_gradient[v, c] = that of gradient * dz[v]
totals[v, c] = that of dz[v]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch

_COLUMNS = 1 << 13  # numbers a direction that the twin's product takes at a time


class Moments(NamedTuple):
    """The sums, float64: [V, V], and [V, C] thrice."""

    pairs: Tensor
    by_result: Tensor
    by_gradient: Tensor
    totals: Tensor


def tangent_moments(dz: Tensor, result: Tensor, gradient: Tensor, weights: Tensor) -> Moments:
    """Return the sums; not differentiable.

    dz: [V N, C, H, W], the direction outermost. result, gradient: [N, C, H, W]. weights: [C].
    Raises TypeError and ValueError.
    """
    array.check_images(dz, "dz")
    array.check_alike(gradient, "gradient", result, "result")
    n, channels = result.shape[:2]
    if n == 0 or len(dz) % n or dz.shape[1:] != result.shape[1:] or dz.dtype != result.dtype:
        shape, found = tuple(result.shape), tuple(dz.shape)
        expected = f"whole multiples of result's {shape}, {result.dtype}"
        raise ValueError(f"dz: expected {expected}, got {found}, {dz.dtype}")
    if tuple(weights.shape) != (channels,):
        raise ValueError(f"weights: expected shape ({channels},), got {tuple(weights.shape)}")
    inner = torch.channels_last
    dz, result, gradient = (x.contiguous(memory_format=inner) for x in (dz, result, gradient))
    directions, channels = len(dz) // len(result), result.shape[1]
    weights = weights.to(array.coefficient_dtype(dz.dtype)).contiguous()
    place, size = native.place(dz.device), directions * channels
    given = array.DTYPES[dz.dtype], directions, tuple(result.shape)
    doubles = native.extension.moments_buffer(*given, place)
    buffer = torch.empty(doubles, dtype=torch.float64, device=dz.device)
    addresses = array.addresses((dz, result, gradient, weights))
    launch("tangent_moments", *given, addresses, array.address(buffer), place)
    sums = buffer[: directions**2 + 3 * size]
    pairs, *rest = sums.split([directions**2, size, size, size])
    return Moments(
        pairs.view(directions, directions), *(x.view(directions, channels) for x in rest)
    )


def tangent_moments_twin(dz: Tensor, result: Tensor, gradient: Tensor, weights: Tensor) -> Moments:
    """Return tangent_moments(...) in plain torch."""
    directions, channels = len(dz) // len(result), result.shape[1]
    rows = dz.permute(0, 2, 3, 1).reshape(directions, -1)  # [V, N H W C]
    step = max(1, _COLUMNS // channels) * channels
    pattern = weights.to(dz.dtype).repeat(step // channels)
    pairs = torch.zeros(directions, directions, dtype=torch.float64, device=dz.device)
    for part in rows.split(step, dim=1):
        pairs += ((part * pattern[: part.shape[1]]) @ part.t()).double()
    parts = dz.split(len(result))
    by_result = torch.stack([(x * result).double().sum(dim=(0, 2, 3)) for x in parts])
    by_gradient = torch.stack([(x * gradient).double().sum(dim=(0, 2, 3)) for x in parts])
    totals = torch.stack([x.double().sum(dim=(0, 2, 3)) for x in parts])
    return Moments(pairs, by_result, by_gradient, totals)
