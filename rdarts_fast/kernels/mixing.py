"""1x1 convolutions below a ReLU: a cell's preprocessing and FactorizedReduce, as in DARTS.

    y = relu(scale * x + shift)                               or relu(x), the channels of M sources
    z[g] = the first half of its channels from weights[g][0] y, the second from weights[g][1] of y
           shifted by one pixel down and right; at stride 1 all of them from weights[g][0]

G edges share the sources; z's sums for the next batch norm come from the same pass.
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
from rdarts_fast.kernels.sep_stage import Affine


class Sources(NamedTuple):
    """What forward and backward take alike.

    x: M tensors [N, C, H, W], any strides. weights: for each of G edges one [O, M C, 1, 1], or two
    whose O add up, the first the larger. scale, shift: [M, C], both or none.
    """

    x: Sequence[Tensor]
    weights: Sequence[Sequence[Tensor]]
    stride: int
    scale: Tensor | None = None
    shift: Tensor | None = None

    def out_shape(self) -> tuple[int, int, int, int]:
        """Return (N, O, H', W')."""
        n, _, h, w = self.x[0].shape
        channels = sum(half.shape[0] for half in self.weights[0])
        return (
            n,
            channels,
            (h + self.stride - 1) // self.stride,
            (w + self.stride - 1) // self.stride,
        )


def mixing(
    x: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    *,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> list[Tensor]:
    """Return G tensors z[g], [N, O, ceil(H / stride), ceil(W / stride)], channels innermost.

    x: M tensors [N, C, H, W], M from 1 to 64, any strides. weights: for each edge [O, M C, 1, 1],
    or, at stride 2, two such whose O are half and half (the first has one more where O is odd), the
    second for pixels shifted by (1, 1), zeros past the edge. stride: 1 or 2. scale, shift: [M, C],
    both or none. float32, float64, on CUDA bfloat16 too, whose weights, scale and shift are
    float32. Differentiable, twice and more, in all tensors. Raises TypeError and ValueError.
    """
    _check(x, weights, stride, scale, shift)
    halves = len(weights[0])
    flat = [half.contiguous() for edge in weights for half in edge]
    maps = map(array.contiguous, (scale, shift))
    return list(_Mixing.apply(stride, halves, len(x), *maps, *x, *flat))


def mixing_twin(sources: Sources) -> list[Tensor]:
    """Return mixing(...) in plain torch."""
    x = list(sources.x)
    if sources.scale is not None and sources.shift is not None:
        rows = zip(x, sources.scale, sources.shift, strict=True)
        x = [one * a.view(-1, 1, 1) + b.view(-1, 1, 1) for one, a, b in rows]
    y = F.relu(torch.cat(x, dim=1)).to(sources.weights[0][0].dtype)  # float32 for bfloat16
    moved = F.pad(y, (0, 1, 0, 1))[:, :, 1:, 1:]  # zeros past the edge
    y, moved = (part[:, :, :: sources.stride, :: sources.stride] for part in (y, moved))
    results = []
    for edge in sources.weights:
        halves = zip((y, moved), edge, strict=False)
        # Not conv2d, which takes no empty half.
        parts = [torch.einsum("oc,nchw->nohw", half[:, :, 0, 0], part) for part, half in halves]
        results.append(torch.cat(parts, dim=1).to(sources.x[0].dtype))
    return results


def launch_mixing(sources: Sources, rows: Any = None) -> tuple[list[Tensor], Tensor]:
    """Return z and its sums about a pivot, of squares, and the pivots: [3, G, O], float64.

    rows: those of a table that the sums fill as well, as NormTable.rows_at returns them.
    """
    return launch_mixings([sources], [rows])[0]


def launch_mixings(
    calls: Sequence[Sources], rows: Sequence[Any]
) -> list[tuple[list[Tensor], Tensor]]:
    """Return launch_mixing(...) of each; on a GPU two share a launch."""
    given, results = [], []
    for sources, own in zip(calls, rows, strict=True):
        x, shape, edges = sources.x, sources.out_shape(), len(sources.weights)
        z = array.empties(edges, x[0], shape, torch.channels_last)
        buffer = _buffer(sources, backward=False)
        given.append((_at(sources, buffer), array.flat(z), own))
        results.append((z, buffer[: 3 * edges * shape[1]].view(3, edges, shape[1])))
    x = calls[0].x
    launch("mixing", array.DTYPES[x[0].dtype], given, place_on(x[0].device))
    return results


class MixingGradients(NamedTuple):
    """What the backward of a mixing takes.

    g: G gradients [N, O, H', W'], any strides. z: G, with affine what makes the gradient of z. dv:
    dense, channels innermost, to be filled or, where adds[m], added to.
    """

    sources: Sources
    g: Sequence[Tensor]
    z: Sequence[Tensor | None]
    affine: Affine
    dv: Sequence[Tensor | None]
    adds: Sequence[bool]


def launch_mixing_backward(
    sources: Sources,
    g: Sequence[Tensor],
    z: Sequence[Tensor | None],
    affine: Affine,
    dv: Sequence[Tensor | None],
    adds: Sequence[bool],
    *,
    wants_weights: bool,
) -> list[Tensor]:
    """Fill dv[m], the gradient of scale * x + shift below the ReLU, or add to it where adds[m].

    The arguments are those of MixingGradients. Return the gradients of the weights, if wanted, in
    their order.
    """
    call = MixingGradients(sources, g, z, affine, dv, adds)
    return launch_mixings_backward([call], wants_weights=wants_weights)[0]


def launch_mixings_backward(
    calls: Sequence[MixingGradients], *, wants_weights: bool
) -> list[list[Tensor]]:
    """Return launch_mixing_backward(...) of each; on a GPU two share a launch. None may fill what
    another reads.
    """
    given, results = [], []
    buffers = [_buffer(call.sources, backward=True) for call in calls]
    for (sources, g, z, affine, dv, adds), buffer in zip(calls, buffers, strict=True):
        weights = [half for edge in sources.weights for half in edge]
        dweights = [torch.empty_like(half) for half in weights] if wants_weights else []
        given.append(
            (
                _at(sources, buffer),
                array.flat((*g, *z)),
                tuple(array.addresses(affine)),
                array.flat(dv),
                adds,
                array.addresses(dweights),
            )
        )
        results.append(dweights)
    x = calls[0].sources.x
    launch("mixing_backward", array.DTYPES[x[0].dtype], given, place_on(x[0].device))
    return results


def _at(sources: Sources, buffer: Tensor) -> tuple[Any, ...]:
    """Return what the native functions take of sources."""
    return (
        tuple(sources.x[0].shape),
        array.flat(sources.x),
        sources.out_shape(),
        sources.stride,
        array.addresses([half for edge in sources.weights for half in edge]),
        array.address(sources.scale),
        array.address(sources.shift),
        array.address(buffer),
    )


def _buffer(sources: Sources, *, backward: bool) -> Tensor:
    x = sources.x[0]
    size = native.extension.mixing_buffer(
        len(sources.weights),
        len(sources.x),
        len(sources.weights[0]),
        tuple(x.shape),
        sources.out_shape(),
        backward,
        place_on(x.device),
    )
    return torch.empty(size, dtype=torch.float64, device=x.device)


def _check(
    x: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor]],
    stride: int,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    array.check_inputs(x, "x")
    m, c = len(x), x[0].shape[1]
    if stride not in (1, 2):
        raise ValueError(f"stride: expected 1 or 2, got {stride}")
    if not weights or any(isinstance(edge, Tensor) or len(edge) not in (1, 2) for edge in weights):
        raise ValueError("weights: expected one or two tensors for each edge")
    first = weights[0]
    for e, edge in enumerate(weights):
        if len(edge) != len(first):
            raise ValueError(
                f"weights[{e}]: expected {len(first)} tensors as weights[0], got {len(edge)}"
            )
        for i, half in enumerate(edge):
            shape = (first[i].shape[0], m * c, 1, 1)
            array.check_coefficients(half, f"weights[{e}][{i}]", "[O, M C, 1, 1]", shape, x[0])
    if len(first) == 2 and first[0].shape[0] - first[1].shape[0] not in (0, 1):
        got = f"{first[0].shape[0]} and {first[1].shape[0]}"
        raise ValueError(f"weights[0]: expected two halves of the channels, got {got}")
    if len(first) == 2 and stride == 1:
        raise ValueError("weights: expected one tensor for each edge at stride 1, got two")
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: expected both or none, got one")
    array.check_coefficients(scale, "scale", "[M, C]", (m, c), x[0])
    array.check_coefficients(shift, "shift", "[M, C]", (m, c), x[0])


class _Mixing(Function):
    @staticmethod
    def forward(
        ctx: Any,
        stride: int,
        halves: int,
        count: int,
        scale: Tensor | None,
        shift: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.settings = stride, halves, count
        ctx.save_for_backward(scale, shift, *tensors)
        sources = _sources(ctx.settings, scale, shift, tensors)
        if tensors[0].device.type == "meta":
            return tuple(tensors[0].new_empty(sources.out_shape()) for _ in sources.weights)
        return tuple(launch_mixing(sources)[0])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        scale, shift, *tensors = ctx.saved_tensors
        sources = _sources(ctx.settings, scale, shift, tensors)
        nothing = (None, None, None)
        needs = ctx.needs_input_grad[len(nothing) :]
        if torch.is_grad_enabled():  # create_graph: derivatives that have their own
            pairs = zip((scale, shift, *tensors), needs, strict=True)
            inputs = [t for t, need in pairs if need]
            twin = mixing_twin(sources)
            found = iter(torch.autograd.grad(twin, inputs, g, create_graph=True))
            return *nothing, *(next(found) if need else None for need in needs)
        if tensors[0].device.type == "meta":
            return *nothing, scale, shift, *tensors
        x = sources.x
        of_x, of_weights = any(needs[: 2 + len(x)]), any(needs[2 + len(x) :])
        dv: list[Any] = [None] * len(x)
        if of_x:
            dv = [array.empty(one, one.shape, torch.channels_last) for one in x]
        if of_x and g[0].numel() == 0:  # no launch fills them
            dv = [one.zero_() for one in dv]
        adds = [False] * len(x)
        given = launch_mixing_backward(sources, g, g, Affine(), dv, adds, wants_weights=of_weights)
        dweights: Sequence[Any] = given if of_weights else [None] * (len(tensors) - len(x))
        if scale is None or not of_x:
            return *nothing, None, None, *dv, *dweights
        rows = [node_sum_dq(one, [tensor]) for one, tensor in zip(dv, x, strict=True)]
        dscale, dshift = (torch.cat([row[i] for row in rows]) for i in (0, 1))
        dx = [one * row.view(-1, 1, 1) for one, row in zip(dv, scale, strict=True)]
        return *nothing, dscale, dshift, *dx, *dweights


def _sources(
    settings: tuple[int, int, int],
    scale: Tensor | None,
    shift: Tensor | None,
    tensors: Sequence[Tensor],
) -> Sources:
    stride, halves, count = settings
    flat = tensors[count:]
    weights = [flat[i : i + halves] for i in range(0, len(flat), halves)]
    return Sources(tensors[:count], weights, stride, scale, shift)
