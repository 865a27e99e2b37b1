"""Half a separable convolution of G edges at once (DARTS, section 2.1).

    y[g] = relu(scale[g, c] * x[g] + shift[g, c])                    or relu(x[g])
    d[g] = y[g] convolved with depthwise[g], channel by channel      K x K, dilated, strided
    z[g][n, o, h, w] = sum_c pointwise[g][o, c] * d[g][n, c, h, w]

ReLU and a batch norm (a scale and a shift) happen as x is read, and the sums that the next batch
norm needs as z is written; the backward computes d again. Two stages make a sep_conv, one a
dil_conv.
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
from rdarts_fast.kernels.node_sum import node_sum_dq

KERNELS = (3, 5, 7)


class Geometry(NamedTuple):
    """Of the depthwise part; its padding is dilation * (kernel // 2)."""

    kernel: int
    dilation: int
    stride: int


class Operands(NamedTuple):
    """What forward and backward take alike: G inputs, which may repeat, and the weights of G edges.

    x: [N, C, H, W] each, any strides. depthwise: [C, 1, K, K] each. pointwise: [O, C, 1, 1] each.
    scale, shift: [G, C], both or none.
    """

    x: Sequence[Tensor]
    depthwise: Sequence[Tensor]
    pointwise: Sequence[Tensor]
    geometry: Geometry
    scale: Tensor | None = None
    shift: Tensor | None = None

    def out_shape(self) -> tuple[int, int, int, int]:
        """Return (N, O, H', W')."""
        n, _, h, w = self.x[0].shape
        stride = self.geometry.stride
        return n, self.pointwise[0].shape[0], (h + stride - 1) // stride, (w + stride - 1) // stride


class Affine(NamedTuple):
    """The gradient of z[g] as factors[g, n] * by_g[g, o] * g[g] + by_z[g, o] * z[g] + constant[g,
    o].
    """

    by_g: Tensor | None = None  # [G, O]
    by_z: Tensor | None = None
    constant: Tensor | None = None
    factors: Tensor | None = None  # [G, N]


def sep_stage(
    x: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    *,
    stride: int = 1,
    dilation: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> list[Tensor]:
    """Return G tensors z[g], [N, O, ceil(H / stride), ceil(W / stride)], channels innermost.

    x: G tensors [N, C, H, W], G from 1 to 64, any strides; one may stand there several times.
    depthwise: G of [C, 1, K, K], K = 3, 5 or 7. pointwise: G of [O, C, 1, 1]. stride, dilation: 1
    or 2. scale, shift: [G, C], both or none. float32, float64, on CUDA bfloat16 too, whose
    weights, scale and shift are float32. Differentiable, twice and more, in all tensors. Raises
    TypeError and ValueError.
    """
    _check(x, depthwise, pointwise, stride, dilation, scale, shift)
    geometry = Geometry(depthwise[0].shape[2], dilation, stride)
    maps = map(array.contiguous, (scale, shift))
    weights = (w.contiguous() for w in (*depthwise, *pointwise))
    return list(_SepStage.apply(geometry, *maps, *x, *weights))


def sep_stage_twin(operands: Operands) -> list[Tensor]:
    """Return sep_stage(...) in plain torch."""
    results = []
    kernel, dilation, stride = operands.geometry
    for g, x in enumerate(operands.x):
        if operands.scale is not None and operands.shift is not None:
            x = x * operands.scale[g].view(-1, 1, 1) + operands.shift[g].view(-1, 1, 1)
        padding = dilation * (kernel // 2)
        d = F.conv2d(
            F.relu(x).to(operands.depthwise[g].dtype),  # float32 for bfloat16
            operands.depthwise[g],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=x.shape[1],
        )
        results.append(F.conv2d(d, operands.pointwise[g]).to(operands.x[g].dtype))
    return results


def launch_sep_stage(operands: Operands) -> tuple[list[Tensor], Tensor]:
    """Return z and its sums about a pivot, of squares, and the pivots: [3, G, O], float64."""
    x, shape = operands.x, operands.out_shape()
    z = array.empties(len(x), x[0], shape, torch.channels_last)
    buffer = _buffer(operands, backward=False)
    launch(
        "sep_stage",
        array.DTYPES[x[0].dtype],
        tuple(x[0].shape),
        array.flat(x),
        shape,
        array.flat(z),
        operands.geometry,
        _addresses(operands),
        array.address(operands.scale),
        array.address(operands.shift),
        array.address(buffer),
        place_on(x[0].device),
    )
    return z, buffer[: 3 * len(x) * shape[1]].view(3, len(x), shape[1])


def launch_sep_stage_backward(
    operands: Operands,
    g: Sequence[Tensor],
    z: Sequence[Tensor | None],
    affine: Affine,
    dv: Sequence[Tensor | None],
    adds: Sequence[bool],
    *,
    wants_sums: bool,
    wants_weights: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Fill dv[g], the gradient of scale * x + shift below the ReLU, or add to it where adds[g].

    g: G gradients [N, O, H', W'], any strides. dv: dense, channels innermost. Return its sums and
    those of dv * y, [2, G, C] float64, if wanted, and the gradients of depthwise and pointwise, if
    wanted.
    """
    x, buffer = operands.x, _buffer(operands, backward=True)
    weights = [*operands.depthwise, *operands.pointwise]
    dweights = [torch.empty_like(w) for w in weights] if wants_weights else []
    launch(
        "sep_stage_backward",
        array.DTYPES[x[0].dtype],
        tuple(x[0].shape),
        array.flat(x),
        operands.out_shape(),
        array.flat((*g, *z)),
        operands.geometry,
        _addresses(operands),
        array.address(operands.scale),
        array.address(operands.shift),
        tuple(array.addresses(affine)),
        array.flat(dv),
        adds,
        wants_sums,
        array.addresses(dweights),
        array.address(buffer),
        place_on(x[0].device),
    )
    size = 2 * len(x) * x[0].shape[1]
    sums = buffer[:size].view(2, len(x), x[0].shape[1]) if wants_sums else None
    return sums, dweights


def _buffer(operands: Operands, *, backward: bool) -> Tensor:
    x = operands.x[0]
    size = native.extension.stage_buffer(
        len(operands.x),
        tuple(x.shape),
        operands.out_shape(),
        operands.geometry,
        backward,
        place_on(x.device),
    )
    return torch.empty(size, dtype=torch.float64, device=x.device)


def _addresses(operands: Operands) -> list[int]:
    return array.addresses((*operands.depthwise, *operands.pointwise))


def _check(
    x: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    stride: int,
    dilation: int,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    array.check_inputs(x, "x")
    c = x[0].shape[1]
    for name, weights in (("depthwise", depthwise), ("pointwise", pointwise)):
        if isinstance(weights, Tensor) or len(weights) != len(x):
            got = "a tensor" if isinstance(weights, Tensor) else str(len(weights))
            raise ValueError(f"{name}: expected G = {len(x)} tensors, got {got}")
    if depthwise[0].dim() != 4 or depthwise[0].shape[2] not in KERNELS:
        got = str(tuple(depthwise[0].shape))
        raise ValueError(f"depthwise[0]: expected shape [C, 1, K, K] with K of 3, 5, 7, got {got}")
    k = depthwise[0].shape[2]
    if pointwise[0].dim() != 4 or pointwise[0].shape[0] < 1:
        got = str(tuple(pointwise[0].shape))
        raise ValueError(f"pointwise[0]: expected shape [O, C, 1, 1], got {got}")
    o = pointwise[0].shape[0]
    for e, (d, p) in enumerate(zip(depthwise, pointwise, strict=True)):
        array.check_coefficients(d, f"depthwise[{e}]", "[C, 1, K, K]", (c, 1, k, k), x[0])
        array.check_coefficients(p, f"pointwise[{e}]", "[O, C, 1, 1]", (o, c, 1, 1), x[0])
    for name, value in (("stride", stride), ("dilation", dilation)):
        if value not in (1, 2):
            raise ValueError(f"{name}: expected 1 or 2, got {value}")
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: expected both or none, got one")
    array.check_coefficients(scale, "scale", "[G, C]", (len(x), c), x[0])
    array.check_coefficients(shift, "shift", "[G, C]", (len(x), c), x[0])


class _SepStage(Function):
    @staticmethod
    def forward(
        ctx: Any, geometry: Geometry, scale: Tensor | None, shift: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.geometry = geometry
        ctx.save_for_backward(scale, shift, *tensors)
        count = len(tensors) // 3
        x, depthwise, pointwise = (tensors[i * count : (i + 1) * count] for i in range(3))
        operands = Operands(x, depthwise, pointwise, geometry, scale, shift)
        if x[0].device.type == "meta":
            return tuple(x[0].new_empty(operands.out_shape()) for _ in x)
        return tuple(launch_sep_stage(operands)[0])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        scale, shift, *tensors = ctx.saved_tensors
        count, needs = len(g), ctx.needs_input_grad[1:]
        x, depthwise, pointwise = (tensors[i * count : (i + 1) * count] for i in range(3))
        operands = Operands(x, depthwise, pointwise, ctx.geometry, scale, shift)
        if torch.is_grad_enabled():  # create_graph: derivatives that have their own
            pairs = zip((scale, shift, *tensors), needs, strict=True)
            inputs = [t for t, need in pairs if need]
            twin = sep_stage_twin(operands)
            found = iter(torch.autograd.grad(twin, inputs, g, create_graph=True))
            return None, *(next(found) if need else None for need in needs)
        if x[0].device.type == "meta":
            return None, scale, shift, *tensors
        of_x, of_weights = any(needs[: 2 + count]), any(needs[2 + count :])
        dv: list[Any] = [None] * count
        if of_x:
            dv = [array.empty(tensor, tensor.shape, torch.channels_last) for tensor in x]
        adds, wants = [False] * count, {"wants_sums": False, "wants_weights": of_weights}
        _, given = launch_sep_stage_backward(operands, g, g, Affine(), dv, adds, **wants)
        dweights: Sequence[Any] = given if of_weights else [None] * 2 * count
        if scale is None or not of_x:
            return None, None, None, *dv, *dweights
        rows = [node_sum_dq(one, [tensor]) for one, tensor in zip(dv, x, strict=True)]
        dscale, dshift = (torch.cat([row[i] for row in rows]) for i in (0, 1))
        dx = [one * row.view(-1, 1, 1) for one, row in zip(dv, scale, strict=True)]
        return None, dscale, dshift, *dx, *dweights
