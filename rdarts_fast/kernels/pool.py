"""The 3x3 pools of an image, with the sums that a batch norm of them needs, in one pass over it.

    max[n, c, i, j] = the largest x[n, c, h, w] of the 3x3 window around (stride i, stride j)
    avg[n, c, i, j] = the mean of those inside the image: padding is not counted

The mean is linear, and so is the maximum once its places are known: each one's derivative is the
tangent (take x where the maximum lies) or the adjoint (hand g back to there), and theirs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch, place_on

KINDS = ("max", "avg")
Kinds = tuple[str, ...]
Optional = Tensor | None


class Pooled(NamedTuple):
    """A pool's result.

    value: [N, C, ceil(H / stride), ceil(W / stride)]. sums: [3, C] float64, no gradient: over the
    pixels of value the sum of (value - pivot) and of its square, and the pivot;
    `normalized_sum(..., sums=[...])` takes them.
    """

    value: Tensor
    sums: Tensor


def pools(x: Tensor, stride: int = 1, kinds: Sequence[str] = KINDS) -> list[Pooled]:
    """Return the 3x3 pools of x, padding 1, one for each of `kinds`: "max" as torch's
    MaxPool2d(3, stride, 1), "avg" as AvgPool2d(3, stride, 1, count_include_pad=False).

    x: [N, C, H, W], any strides, N may be 0. stride: 1 or 2. Of equal maxima the first in the
    window gets the gradient; a NaN is the maximum. Differentiable, twice and more. Raises TypeError
    and ValueError.
    """
    array.check_images(x, "x")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: expected a channel and a pixel or more, got shape {tuple(x.shape)}")
    if type(stride) is not int or stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride!r}")
    chosen = tuple(kinds)
    if isinstance(kinds, str) or not chosen or sorted(set(chosen) & set(KINDS)) != sorted(chosen):
        raise ValueError(f'kinds: expected "max", "avg" or both, each once, got {kinds!r}')
    ordered = tuple(kind for kind in KINDS if kind in chosen)
    *values, sums = _Pools.apply(stride, ordered, x)
    found = dict(zip(ordered, map(Pooled, values, sums.unbind(1)), strict=True))
    return [found[kind] for kind in chosen]


def pools_twin(x: Tensor, stride: int = 1, kinds: Sequence[str] = KINDS) -> list[Pooled]:
    """Return pools(...) by torch's pools."""
    found = []
    for kind in kinds:
        if kind == "max":
            value = F.max_pool2d(x, 3, stride, 1)
        else:
            value = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        pivot = x[:1, :, 0, 0].sum(dim=0).detach().double()  # zeros where there is no sample
        centred = value.detach().double() - pivot.view(-1, 1, 1)
        rows = [centred.sum(dim=(0, 2, 3)), centred.square().sum(dim=(0, 2, 3)), pivot]
        found.append(Pooled(value, torch.stack(rows)))
    return found


def _pooled_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, -(-h // stride), -(-w // stride)


def _empty(x: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    return array.empty(x, _pooled_shape(x, stride), array.memory_format((x,)), dtype)


def _by_kind(kinds: Kinds, tensors: Sequence[Optional]) -> tuple[Optional, Optional]:
    """Return the tensors of the maximum and the mean, None where there is none."""
    found = dict(zip(kinds, tensors, strict=True))
    return found.get("max"), found.get("avg")


def launch_pools(x: Tensor, stride: int, kinds: Kinds) -> tuple[list[Tensor], Optional, Tensor]:
    """Return the pools, where the maxima lie (uint8; None without "max") and the sums, [3, K, C].

    kinds: K of KINDS, in their order.
    """
    values = [_empty(x, stride, x.dtype) for _ in kinds]
    place = _empty(x, stride, torch.uint8) if "max" in kinds else None
    shape, c, k = tuple(x.shape), x.shape[1], len(kinds)
    if x.device.type == "meta" or shape[0] == 0:
        return values, place, torch.zeros(3, k, c, dtype=torch.float64, device=x.device)
    where = place_on(x.device)
    space = native.extension.workspace(_pooled_shape(x, stride), k, 0, where)
    buffer = torch.empty(3 * k * c + space, dtype=torch.float64, device=x.device)
    launch(
        "pool",
        array.DTYPES[x.dtype],
        shape,
        stride,
        array.flat((x, *_by_kind(kinds, values), place)),
        array.address(buffer),
        where,
    )
    return values, place, buffer[: 3 * k * c].view(3, k, c)


def launch_pool_adjoint(
    g: Sequence[Optional], stride: int, kinds: Kinds, size: Sequence[int], place: Optional
) -> Tensor:
    """Return the gradient [N, C, H, W] of what was pooled; size: H and W. Not every g is None."""
    present = [gradient for gradient in g if gradient is not None]
    like = present[0]
    dx = array.empty(like, (*like.shape[:2], *size), array.memory_format(present))
    if dx.device.type != "meta":
        launch(
            "pool_adjoint",
            array.DTYPES[dx.dtype],
            tuple(dx.shape),
            stride,
            array.flat((dx, *_by_kind(kinds, g), place)),
            place_on(dx.device),
        )
    return dx


def launch_pool_tangent(x: Tensor, stride: int, kinds: Kinds, place: Optional) -> list[Tensor]:
    """Return the tangents of the pools from that of what is pooled, [N, C, H, W]."""
    values = [_empty(x, stride, x.dtype) for _ in kinds]
    if x.device.type != "meta":
        launch(
            "pool_tangent",
            array.DTYPES[x.dtype],
            tuple(x.shape),
            stride,
            array.flat((x, *_by_kind(kinds, values), place)),
            place_on(x.device),
        )
    return values


class _Pools(Function):
    @staticmethod
    def forward(ctx: Any, stride: int, kinds: Kinds, x: Tensor) -> tuple[Tensor, ...]:
        ctx.stride, ctx.kinds, ctx.size = stride, kinds, x.shape[2:]
        ctx.set_materialize_grads(False)
        values, place, sums = launch_pools(x, stride, kinds)
        ctx.save_for_backward(place)
        ctx.mark_non_differentiable(sums)
        return *values, sums

    @staticmethod
    def backward(ctx: Any, *g: Optional) -> Any:
        if all(gradient is None for gradient in g[:-1]):
            return None, None, None
        (place,) = ctx.saved_tensors
        return None, None, _PoolAdjoint.apply(ctx.stride, ctx.kinds, ctx.size, place, *g[:-1])


class _PoolAdjoint(Function):
    @staticmethod
    def forward(
        ctx: Any, stride: int, kinds: Kinds, size: torch.Size, place: Optional, *g: Optional
    ) -> Tensor:
        ctx.stride, ctx.kinds = stride, kinds
        ctx.save_for_backward(place)
        return launch_pool_adjoint(g, stride, kinds, size, place)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return None, None, None, None, *_PoolTangent.apply(ctx.stride, ctx.kinds, place, h)


class _PoolTangent(Function):
    @staticmethod
    def forward(
        ctx: Any, stride: int, kinds: Kinds, place: Optional, x: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.stride, ctx.kinds, ctx.size = stride, kinds, x.shape[2:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(place)
        return tuple(launch_pool_tangent(x, stride, kinds, place))

    @staticmethod
    def backward(ctx: Any, *g: Optional) -> Any:
        if all(gradient is None for gradient in g):
            return None, None, None, None
        (place,) = ctx.saved_tensors
        return None, None, None, _PoolAdjoint.apply(ctx.stride, ctx.kinds, ctx.size, place, *g)
