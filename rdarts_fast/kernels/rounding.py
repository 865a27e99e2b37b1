"""float32 tensors rounded to bfloat16, as a backward pass keeps them: each number to the nearest,
but never across the zero of the ReLU that reads it through a batch norm.

A backward pass that masked other numbers than the forward pass did would be wrong by far more than
what rounding moves a number: of the z between two stages of a convolution, 3 in 10,000 would change
sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch


def rounded(
    z: Sequence[Tensor], scale: Tensor | None = None, shift: Tensor | None = None
) -> list[Tensor]:
    """Return each z in bfloat16, channels innermost; with scale and shift so that
    scale * result + shift > 0 where that of z is.

    z: K float32 tensors [N, C, H, W] of one shape, K from 1 to 64, any strides. scale, shift: [K,
    C] float32, both or none. Not differentiable. Raises TypeError and ValueError.
    """
    _check(z, scale, shift)
    innermost = [x.detach().contiguous(memory_format=torch.channels_last) for x in z]
    shape, device = tuple(z[0].shape), z[0].device
    out = [array.empty(x, shape, torch.channels_last, torch.bfloat16) for x in innermost]
    if math.prod(shape) and device.type != "meta":
        scale, shift = map(array.contiguous, (scale, shift))
        launch(
            "rounding",
            array.addresses(innermost),
            array.addresses(out),
            math.prod(shape),
            shape[1],
            array.address(scale),
            array.address(shift),
            native.place(device),
        )
    return out


def rounded_twin(
    z: Sequence[Tensor], scale: Tensor | None = None, shift: Tensor | None = None
) -> list[Tensor]:
    """Return rounded(...) in plain torch."""
    found = [x.bfloat16() for x in z]
    if scale is None or shift is None:
        return found
    for k, (x, near) in enumerate(zip(z, found, strict=True)):
        a, b = scale[k].view(-1, 1, 1), shift[k].view(-1, 1, 1)
        wrong = (a * near.float() + b > 0) != (a * x + b > 0)
        up, bits = x > near.float(), near.view(torch.int16)
        moved = torch.where(up == (near < 0), bits - 1, bits + 1)
        moved = torch.where(near == 0, torch.where(up, 1, -(2**15) + 1), moved)
        changes = wrong & (near.float() != x)
        found[k] = torch.where(changes, moved, bits).to(torch.int16).view(torch.bfloat16)
    return found


def _check(z: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None) -> None:
    array.check_inputs(z)
    if z[0].dtype != torch.float32:
        raise TypeError(f"z: expected dtype float32, got {z[0].dtype}")
    if (scale is None) != (shift is None):
        raise ValueError("scale, shift: expected both or none, got one")
    shape = (len(z), z[0].shape[1])
    array.check_coefficients(scale, "scale", "[K, C]", shape, z[0])
    array.check_coefficients(shift, "shift", "[K, C]", shape, z[0])
