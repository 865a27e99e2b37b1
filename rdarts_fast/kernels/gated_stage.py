"""A stage of a separable convolution (sep_stage.py) on the tangents of V directions.

    y[v] = scale[v, c] * dx[v] + by_gate[v, c] * gate + shift[v, c]   where gate > 0, else 0
    dz[v] = pointwise (y[v] convolved with depthwise, channel by channel)

ReLU is a gate that the stage's own input opens; before it stands a batch norm, whose tangent is
made of the tangent before it and of its result, the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch
from rdarts_fast.kernels.sep_stage import Geometry

MOST_DIRECTIONS = 64  # of a launch


class Tangents(NamedTuple):
    """What a stage reads of V directions: dx, V tensors [N, C, H, W], and the maps, [V, C] each or
    none.
    """

    dx: Sequence[Tensor]
    gate: Tensor  # [N, C, H, W]
    scale: Tensor | None = None
    by_gate: Tensor | None = None
    shift: Tensor | None = None

    def some(self, first: int, last: int) -> Tangents:
        """Return those of directions [first, last)."""
        maps = (
            None if m is None else m[first:last] for m in (self.scale, self.by_gate, self.shift)
        )
        return Tangents(self.dx[first:last], self.gate, *maps)


def gated_stage(
    tangents: Tangents, depthwise: Tensor, pointwise: Tensor, geometry: Geometry
) -> Tensor:
    """Return dz, [V N, O, H', W'] with the direction outermost and channels innermost. Not
    differentiable.

    depthwise: [C, 1, K, K]. pointwise: [O, C, 1, 1]. Raises TypeError and ValueError.
    """
    _check(tangents, depthwise, pointwise, geometry)
    n, _, h, w = tangents.gate.shape
    directions, stride = len(tangents.dx), geometry.stride
    shape = (directions * n, pointwise.shape[0], -(-h // stride), -(-w // stride))
    dz = array.empty(tangents.gate, shape, torch.channels_last)
    for first in range(0, directions, MOST_DIRECTIONS):
        last = min(first + MOST_DIRECTIONS, directions)
        out = dz[first * n : last * n]
        _launch(tangents.some(first, last), depthwise, pointwise, geometry, out)
    return dz


def gated_stage_twin(
    tangents: Tangents, depthwise: Tensor, pointwise: Tensor, geometry: Geometry
) -> Tensor:
    """Return gated_stage(...) in plain torch."""
    kernel, dilation, stride = geometry
    gate, found = tangents.gate, []
    for v, dx in enumerate(tangents.dx):
        y = dx
        if tangents.scale is not None:
            assert tangents.by_gate is not None and tangents.shift is not None
            a, b, c = (
                m[v].view(-1, 1, 1) for m in (tangents.scale, tangents.by_gate, tangents.shift)
            )
            y = a * dx + b * gate + c
        y = torch.where(gate > 0, y, torch.zeros_like(y))
        padding = dilation * (kernel // 2)
        d = F.conv2d(y, depthwise, None, stride, padding, dilation, y.shape[1])
        found.append(F.conv2d(d, pointwise))
    return torch.cat(found).contiguous(memory_format=torch.channels_last)


def _check(tangents: Tangents, depthwise: Tensor, pointwise: Tensor, geometry: Geometry) -> None:
    """Raise TypeError or ValueError unless the kernel can read what it is given."""
    gate, channels = tangents.gate, tangents.gate.shape[1]
    if not tangents.dx:
        raise ValueError("dx: expected at least one direction")
    array.check_images(gate, "gate")
    for v, x in enumerate(tangents.dx):
        array.check_alike(x, f"dx[{v}]", gate, "gate")
    maps = zip(("scale", "by_gate", "shift"), tangents[2:], strict=True)
    for name, rows in maps:
        array.check_coefficients(rows, name, "[V, C]", (len(tangents.dx), channels), gate)
    absent = [rows is None for rows in tangents[2:]]
    if any(absent) != all(absent):
        raise ValueError("scale, by_gate, shift: expected all or none")
    k = geometry.kernel
    expected = {"depthwise": (channels, 1, k, k), "pointwise": (pointwise.shape[0], channels, 1, 1)}
    for (name, shape), weight in zip(expected.items(), (depthwise, pointwise), strict=True):
        if tuple(weight.shape) != shape or weight.dtype != gate.dtype:
            got = f"{tuple(weight.shape)}, {weight.dtype}"
            raise ValueError(f"{name}: expected shape {shape}, {gate.dtype}, got {got}")


def _launch(
    tangents: Tangents, depthwise: Tensor, pointwise: Tensor, geometry: Geometry, out: Tensor
) -> None:
    count, gate = len(tangents.dx), tangents.gate
    z = list(out.split(len(gate)))
    place, shape, out_shape = native.place(gate.device), tuple(gate.shape), tuple(z[0].shape)
    size = native.extension.stage_buffer(count, shape, out_shape, geometry, False, place)
    buffer = torch.empty(size, dtype=torch.float64, device=gate.device)
    coefficient = array.coefficient_dtype(gate.dtype)
    weights = [w.to(coefficient).contiguous() for w in (depthwise, pointwise)]
    maps = [array.contiguous(m) for m in (tangents.scale, tangents.by_gate, tangents.shift)]
    launch(
        "sep_stage_gated",
        array.DTYPES[gate.dtype],
        shape,
        array.flat(tangents.dx),
        array.flat([gate]),
        out_shape,
        array.flat(z),
        geometry,
        array.addresses([weight for weight in weights for _ in range(count)]),
        *array.addresses(maps),
        array.address(buffer),
        place,
    )
