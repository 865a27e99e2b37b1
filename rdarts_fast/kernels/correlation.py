"""The correlation of two images along their rows, by which a disparity network compares its views.

    out[n, i, y, x] = 1/C sum over c of left[n, c, y, x] right[n, c, y, x + first + i]

for i from 0 to count - 1; outside the image right is 0. It is bilinear, and so are its adjoints in
left and in right: each of the three has the other two for its derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch

FARTHEST = 1024  # displacement, in pixels: rows are copied with that many zeros beside them


def displacements(most: int, one_sided: bool = False) -> tuple[int, int]:
    """Return (first, count) of the displacements up to `most` pixels: -most .. most, or with
    `one_sided` -most .. 0, where the right view of a scene has what the left one shows at x.
    """
    if most < 0:
        raise ValueError(f"most: expected 0 or more, got {most}")
    return -most, most + 1 if one_sided else 2 * most + 1


def correlation(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    """Return the correlation [N, count, H, W] of left and right, [N, C, H, W] each, any strides;
    float32 or float64.

    The displacements are first .. first + count - 1, all between -1024 and 1024. Differentiable,
    twice and more, forward too. Raises TypeError and ValueError.
    """
    array.check_images(left, "left")
    array.check_alike(right, "right", left, "left")
    if left.dtype == torch.bfloat16:
        raise TypeError("left: expected dtype float32 or float64, got bfloat16")
    if right.layout != torch.strided:
        raise TypeError(f"right: expected a dense (strided) tensor, got {right.layout}")
    if left.shape[1] == 0:
        raise ValueError(f"left: expected a channel or more, got shape {tuple(left.shape)}")
    if type(first) is not int or type(count) is not int or count < 1:
        raise ValueError(
            f"first and count: expected whole numbers, 1 or more, got {first}, {count}"
        )
    if max(-first, first + count - 1) > FARTHEST:
        raise ValueError(
            f"displacements: expected -{FARTHEST} to {FARTHEST}, got {first} to {first + count - 1}"
        )
    out: Tensor = _Correlation.apply(left, right, first, count)
    return out


def correlation_twin(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    """Return correlation(...) in plain torch, by one product of unfolded rows."""
    c, w = left.shape[1], left.shape[3]
    before, after = max(0, -first), max(0, first + count - 1)
    padded = F.pad(right, (before, after))
    windows = padded.unfold(3, w, 1)[:, :, :, first + before :][:, :, :, :count]
    return torch.einsum("nchw,nchiw->nihw", left, windows) / c  # [N, count, H, W]


def _launch(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    shape = (left.shape[0], count, *left.shape[2:])
    out = array.empty(left, shape, array.memory_format((left, right)))
    if out.device.type != "meta":
        launch(
            "correlation",
            array.DTYPES[out.dtype],
            tuple(left.shape),
            first,
            count,
            array.flat((left, right, out)),
            native.place(out.device),
        )
    return out


def _launch_adjoint(g: Tensor, other: Tensor, first: int, to_right: bool) -> Tensor:
    out = array.empty_like(other)
    if out.device.type != "meta":
        launch(
            "correlation_adjoint",
            array.DTYPES[out.dtype],
            tuple(out.shape),
            first,
            g.shape[1],
            to_right,
            array.flat((g, other, out)),
            native.place(out.device),
        )
    return out


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Correlation(Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
        ctx.first, ctx.count = first, count
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)
        return _launch(left, right, first, count)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        left, right = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dleft = _Adjoint.apply(g, right, ctx.first, False) if needs[0] else None
        dright = _Adjoint.apply(g, left, ctx.first, True) if needs[1] else None
        return dleft, dright, None, None

    @staticmethod
    def jvp(ctx: Any, dleft: Tensor | None, dright: Tensor | None, *_: None) -> Any:
        left, right = ctx.saved_tensors
        return _sum(
            None if dleft is None else _launch(dleft, right, ctx.first, ctx.count),
            None if dright is None else _launch(left, dright, ctx.first, ctx.count),
        )


class _Adjoint(Function):
    """The gradient in left, of right and g, or with `to_right` that in right, of left and g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, other: Tensor, first: int, to_right: bool) -> Tensor:
        ctx.first, ctx.to_right = first, to_right
        ctx.save_for_backward(g, other)
        ctx.save_for_forward(g, other)
        return _launch_adjoint(g, other, first, to_right)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, other = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dg = dother = None
        if needs[0]:
            left, right = (other, h) if ctx.to_right else (h, other)
            dg = _Correlation.apply(left, right, ctx.first, g.shape[1])
        if needs[1]:
            dother = _Adjoint.apply(g, h, ctx.first, not ctx.to_right)
        return dg, dother, None, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dother: Tensor | None, *_: None) -> Any:
        g, other = ctx.saved_tensors
        return _sum(
            None if dg is None else _launch_adjoint(dg, other, ctx.first, ctx.to_right),
            None if dother is None else _launch_adjoint(g, dother, ctx.first, ctx.to_right),
        )
