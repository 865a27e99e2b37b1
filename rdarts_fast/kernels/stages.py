"""Separable convolutions of G edges whole: stage after stage (sep_stage.py), the batch norms
between them and after the last as rows of a table (norm_table.py).

On the CPU a few edges at a time go through all stages, forward and backward, so that what one stage
writes is still in the cache when the next reads it; elsewhere all edges share each launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch, place_on, scratch
from rdarts_fast.kernels.norm_table import NormTable, Running
from rdarts_fast.kernels.sep_stage import Geometry


class Link(NamedTuple):
    """A stage of G separable convolutions.

    weights: G of the depthwise part, [C, 1, K, K], then G of the pointwise, [O, C, 1, 1]. first:
    the row of the first edge's z, the others follow. running: of the batch norms after it.
    """

    geometry: Geometry
    weights: Sequence[Tensor]
    first: int
    running: Sequence[Running] = ()

    def out_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape of z from that of what the stage reads."""
        n, _, h, w = shape
        stride, channels = self.geometry.stride, self.weights[-1].shape[0]
        return n, channels, (h + stride - 1) // stride, (w + stride - 1) // stride


def launch_stages(
    x: Sequence[Tensor], links: Sequence[Link], table: NormTable, rule: tuple[float, float]
) -> tuple[list[list[Tensor]], Tensor]:
    """Fill the table's rows and return the z of each stage and edge, and the scales and shifts that
    normalise them, [S, 2, G, C].

    x: G tensors [N, C, H, W]. rule: eps and momentum of the batch norms.
    """
    shapes = _shapes(x, links)
    z = [array.empties(len(x), x[0], shape, torch.channels_last) for shape in shapes]
    dtype = array.coefficient_dtype(x[0].dtype)
    maps = torch.empty(len(links), 2, len(x), shapes[0][1], dtype=dtype, device=x[0].device)
    running = [[buffer for own in link.running for buffer in own] for link in links]
    buffer = _buffer(x, _together(x), shapes, links, backward=False)
    launch(
        "stages",
        array.DTYPES[x[0].dtype],
        tuple(x[0].shape),
        array.flat(x),
        _stages(shapes, z, links, running),
        table.address(),
        rule,
        array.address(maps),
        array.address(buffer),
        place_on(x[0].device),
    )
    return z, maps


def launch_stages_backward(
    x: Sequence[Tensor],
    links: Sequence[Link],
    z: Sequence[Sequence[Tensor]],
    maps: Tensor,
    table: NormTable,
    g: Sequence[Tensor],
    factors: Tensor | None,
    dv: Sequence[Tensor | None],
    adds: Sequence[bool],
    *,
    wants_weights: bool,
) -> list[list[Tensor]]:
    """Fill dv[g], the gradient of x[g], or add to it where adds[g]; return each stage's gradients
    of the weights, in their order, if wanted.

    g, factors [G, N]: of what the edges' last z enter, whose rows of the table are filled; this
    fills the others. dv: dense, channels innermost; those of a repeated x may be one tensor.
    """
    shapes = _shapes(x, links)
    dtype, place = array.DTYPES[x[0].dtype], place_on(x[0].device)
    together = _together(x)
    between = [_between(x[0], s, shape, together) for s, shape in enumerate(shapes[:-1])]
    dweights = [
        [torch.empty_like(w) for w in link.weights] if wants_weights else [] for link in links
    ]
    buffer = _buffer(x, together, shapes, links, backward=True)
    launch(
        "stages_backward",
        dtype,
        tuple(x[0].shape),
        array.flat(x),
        _stages(shapes, z, links, dweights),
        table.address(),
        array.address(maps),
        array.flat(g),
        [array.flat(tensors) for tensors in between],
        array.flat(dv),
        adds,
        array.address(factors),
        array.address(buffer),
        place,
    )
    return dweights


def _shapes(x: Sequence[Tensor], links: Sequence[Link]) -> list[tuple[int, int, int, int]]:
    """Return the shape of each stage's z."""
    shapes: list[tuple[int, int, int, int]] = []
    for link in links:
        shapes.append(link.out_shape(shapes[-1] if shapes else x[0].shape))
    return shapes


def _stages(
    shapes: Sequence[tuple[int, int, int, int]],
    z: Sequence[Sequence[Tensor]],
    links: Sequence[Link],
    more: Sequence[Sequence[Tensor | None]],
) -> list[tuple[object, ...]]:
    return [
        (
            shape,
            array.flat(tensors),
            link.geometry,
            array.addresses(link.weights),
            link.first,
            array.addresses(others),
        )
        for shape, tensors, link, others in zip(shapes, z, links, more, strict=True)
    ]


def _together(x: Sequence[Tensor]) -> int:
    """Return how many edges the native functions take at a time."""
    dtype, place = array.DTYPES[x[0].dtype], place_on(x[0].device)
    count: int = native.extension.edges_together(dtype, tuple(x[0].shape), len(x), place)
    return count


def _buffer(
    x: Sequence[Tensor],
    together: int,
    shapes: Sequence[tuple[int, int, int, int]],
    links: Sequence[Link],
    *,
    backward: bool,
) -> Tensor:
    place, shape = place_on(x[0].device), tuple(x[0].shape)
    stages = [(out, link.geometry) for out, link in zip(shapes, links, strict=True)]
    size: int = native.extension.stages_buffer(together, shape, stages, backward, place)
    make = partial(torch.empty, size, dtype=torch.float64, device=x[0].device)
    return scratch(("stages", size), make)


def _between(like: Tensor, s: int, shape: Sequence[int], together: int) -> list[Tensor]:
    """Return room for the gradients of stage s's z, of as many edges as go together."""

    def make() -> list[Tensor]:
        return array.empties(together, like, shape, torch.channels_last)

    return scratch(("between", s, shape, together), make)
