"""Sums per channel about a pivot, and the affine map that is their derivative.

    sum[k, c]  = sum over n, h, w of (z[k] - pivot[k, c])
    sum2[k, c] = sum over n, h, w of (z[k] - pivot[k, c])^2

About a pivot, because sum of z^2 less (sum of z)^2 loses everything where the mean is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch
from rdarts_fast.kernels.node_sum import launch_affine, node_sum_dq


def channel_sums(z: Sequence[Tensor], pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of (z - pivot) and of its square over samples and pixels, each [K, C].

    z: K tensors [N, C, H, W], K from 1 to 64, any strides. pivot: [K, C], no gradient. float64 for
    float64 images, else float32, summed in float64 from short blocks. Differentiable, twice and
    more, in z. Raises TypeError and ValueError.
    """
    array.check_inputs(z)
    shape = (len(z), z[0].shape[1])
    array.check_coefficients(pivot, "pivot", "[K, C]", shape, z[0])
    array.check_constant(pivot, "pivot")
    total, square = _ChannelSums.apply(pivot, *z)
    return total, square


def channel_affine(z: Sequence[Tensor], u: Tensor, v: Tensor) -> list[Tensor]:
    """Return K tensors [N, C, H, W]: u[k, c] * z[k] + v[k, c].

    z: K tensors [N, C, H, W], K from 1 to 64, any strides. u, v: [K, C]. Differentiable, twice and
    more, in all three. Raises TypeError and ValueError.
    """
    array.check_inputs(z)
    shape = (len(z), z[0].shape[1])
    array.check_coefficients(u, "u", "[K, C]", shape, z[0])
    array.check_coefficients(v, "v", "[K, C]", shape, z[0])
    return list(_ChannelAffine.apply(u, v, *z))


def channel_sums_twin(z: Sequence[Tensor], pivot: Tensor) -> tuple[Tensor, Tensor]:
    """Return channel_sums(...) in plain torch."""
    centred = [tensor - row.view(-1, 1, 1) for tensor, row in zip(z, pivot, strict=True)]
    total = torch.stack([x.sum(dim=(0, 2, 3)) for x in centred])
    return total, torch.stack([x.square().sum(dim=(0, 2, 3)) for x in centred])


def channel_affine_twin(z: Sequence[Tensor], u: Tensor, v: Tensor) -> list[Tensor]:
    """Return channel_affine(...) in plain torch."""
    rows = zip(z, u, v, strict=True)
    return [(a.view(-1, 1, 1) * x + b.view(-1, 1, 1)).to(x.dtype) for x, a, b in rows]


class _ChannelSums(Function):
    @staticmethod
    def forward(ctx: Any, pivot: Tensor, *z: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pivot, *z)
        if pivot.device.type == "meta":
            return channel_sums_twin(z, pivot)
        shape, place = tuple(z[0].shape), native.place(pivot.device)
        pivots = array.contiguous(pivot.double())
        space = native.extension.workspace(shape, len(z), 0, place)
        sums = 2 * pivot.numel()
        buffer = torch.empty(sums + space, dtype=torch.float64, device=pivot.device)
        launch(
            "channel_sums",
            array.DTYPES[z[0].dtype],
            shape,
            array.flat(z),
            array.address(pivots),
            array.address(buffer),
            place,
        )
        total, square = buffer[:sums].to(pivot.dtype).view(2, *pivot.shape)
        return total, square

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Any:
        pivot, *z = ctx.saved_tensors
        u = 2 * b
        return None, *_ChannelAffine.apply(u, a - u * pivot, *z)


class _ChannelAffine(Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor | None, *z: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(u, *z)
        if u.device.type == "meta":
            return tuple(channel_affine_twin(z, u, torch.zeros_like(u) if v is None else v))
        out = tuple(array.empty_like(tensor) for tensor in z)
        launch_affine(None, z, out, None, u, v, None)
        return out

    @staticmethod
    def backward(ctx: Any, *h: Tensor) -> Any:
        u, *z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        du = dv = None
        if needs[0] or needs[1]:
            pairs = zip(h, z, strict=True)
            rows = [node_sum_dq(g, [tensor])[:2] for g, tensor in pairs]
            one = len(rows) == 1
            du, dv = rows[0] if one else (torch.cat(parts) for parts in zip(*rows, strict=True))
        dv = dv if needs[1] else None
        if not any(needs[2:]):
            return du, dv, *(None for _ in z)
        return du, dv, *_ChannelAffine.apply(u, None, *h)
