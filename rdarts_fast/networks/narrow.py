"""What a fused cell keeps for its backward pass, in bfloat16 (networks/precision.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rdarts_fast.kernels.array import MOST_INPUTS
from rdarts_fast.kernels.rounding import rounded
from rdarts_fast.networks.cell_forward import Kept
from rdarts_fast.networks.plan import Plan

Rounded = Mapping[int, Tensor]  # id of a tensor -> its rounded copy


def narrowed(kept: Kept, plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Round what a forward pass keeps, of float32; return the cell's inputs, rounded too.

    What a stage reads through a batch norm and a ReLU stays on its side of the zero.
    """
    found: dict[int, Tensor] = {}
    for source in plan.sources:
        for stages in source.stages:
            maps = kept.maps[stages.rows[0]]  # [S, 2, G, C]
            for (scale, shift), first in zip(maps[:-1], stages.rows, strict=False):
                z = [kept.z[row] for row in range(first, first + len(stages.edges))]
                found |= _copies(z, scale, shift)
    rest = [*inputs, *kept.states.values(), *kept.z.values()]
    for some in _alike([x for x in rest if id(x) not in found]):
        found |= _copies(some)
    for part in (kept.z, kept.states):
        for key, tensor in part.items():
            part[key] = found[id(tensor)]
    return [found[id(x)] for x in inputs]


def _copies(z: Sequence[Tensor], *maps: Tensor) -> Rounded:
    return dict(zip(map(id, z), rounded(z, *maps), strict=True))


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors, each once, by shape, as many as a launch takes."""
    by_shape: dict[torch.Size, dict[int, Tensor]] = {}
    for x in tensors:
        by_shape.setdefault(x.shape, {})[id(x)] = x
    groups = [list(some.values()) for some in by_shape.values()]
    return [g[k : k + MOST_INPUTS] for g in groups for k in range(0, len(g), MOST_INPUTS)]
