"""The recurrent supernet's cell, put together of functions that torch differentiates: where the
gradients of recurrent_cell.py are differentiated, they come from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast.kernels.recurrent_node import BATCH_NORM, recurrent_node

FIRST = (1.0, 0.0, 0.0, 0.0)  # s_0 is a node that reads the hidden state, through tanh


@dataclass(frozen=True)
class Cell:
    """What a window's steps have in common."""

    curved: bool  # whether a node has tanh or sigmoid
    norm: int  # BATCH_NORM or RUNNING_NORM
    eps: float
    momentum: float
    mean: Tensor  # [H], the running ones
    var: Tensor
    keeps: bool  # what a backward needs


def composed_cell(
    x: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    w0: Tensor,
    ws: Sequence[Tensor],
    mix: Tensor,
    cell: Cell,
    statistics: Tensor,
) -> Tensor:
    """Return recurrent_cell(...), a function of torch or a node at a time, moving no buffer.

    statistics: [2, H], mean and rstd where they are the running ones.
    """
    size = hidden.shape[1]
    first = mix.new_tensor([FIRST])
    wall = torch.cat(list(ws), dim=1)

    def normalised(node: Tensor) -> Tensor:
        if cell.norm == BATCH_NORM:
            return F.batch_norm(node, None, None, training=True, eps=cell.eps)
        return (node - statistics[0]) * statistics[1]

    raw = []
    for word in x:
        seen = hidden if mask is None else hidden * mask
        gates = torch.cat([word, seen], dim=1) @ w0
        states = [normalised(recurrent_node([hidden], [gates], first))]
        products: list[Sequence[Tensor]] = []
        for i in range(len(ws)):
            seen = states[i] if mask is None else states[i] * mask
            products.append((seen @ wall[:, 2 * size * i :]).split(2 * size, dim=1))
            read = [products[j][i - j] for j in range(i + 1)]
            rows = mix[i * (i + 1) // 2 :][: i + 1]
            states.append(normalised(recurrent_node(states, read, rows, curved=cell.curved)))
        hidden = torch.stack(states[1:]).mean(dim=0)
        raw.append(hidden)
    return torch.stack(raw)


def differentiable_gradients(
    cell: Cell,
    inputs: Sequence[Tensor],
    mask: Tensor | None,
    graw: Tensor,
    statistics: Tensor,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Return the gradients of x, hidden, w0, mix and ws, with a graph of their own; None where
    `needs` (which counts the mask as the third) says so.
    """
    wanted = [need for i, need in enumerate(needs) if i != 2]  # not the mask's
    with torch.enable_grad():
        views = [x.view_as(x) for x in inputs]  # so that no input is another's ancestor
        x, hidden, w0, mix, *ws = views
        raw = composed_cell(x, hidden, mask, w0, ws, mix, cell, statistics.to(x.dtype))
        asked = [view for view, need in zip(views, wanted, strict=True) if need]
        found = iter(
            torch.autograd.grad(raw, asked, graw, create_graph=True, materialize_grads=True)
        )
    return [next(found) if need else None for need in wanted]
