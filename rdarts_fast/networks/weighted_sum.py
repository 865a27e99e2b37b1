"""Weighted sums of any number of tensors, by the kernel of the nodes (kernels/node_sum.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rdarts_fast.kernels.array import MOST_INPUTS, coefficient_dtype, empty
from rdarts_fast.kernels.node_sum import launch_node_sum


class Term(NamedTuple):
    """factors[n] * (scale[c] * tensor + shift[c]).

    tensor: [N, C, H, W]. scale, shift: [C]; None for no shift. factors: [N] or None for ones.
    """

    tensor: Tensor
    scale: Tensor
    factors: Tensor | None = None
    shift: Tensor | None = None


def sum_of(terms: Sequence[Term], out: Tensor | None = None) -> Tensor:
    """Return the sum of one term or more, in `out` where it is given, channels innermost."""
    like = terms[0].tensor
    scale = torch.stack([term.scale for term in terms])
    shift = factors = None
    if any(term.shift is not None for term in terms):
        none = torch.zeros_like(scale[0])
        shift = torch.stack([none if term.shift is None else term.shift for term in terms])
    if any(term.factors is not None for term in terms):
        ones = like.new_ones(len(like))
        factors = torch.stack([ones if term.factors is None else term.factors for term in terms])
    if out is None:
        out = empty(like, like.shape, torch.channels_last)
    sum_into(out, [term.tensor for term in terms], scale, factors, shift)
    return out


def sum_into(
    out: Tensor,
    z: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor | None,
    shift: Tensor | None = None,
) -> None:
    """Fill `out` with the weighted sum of z, K tensors. scale, shift: [K, C]. factors: [K, N]."""
    if not z:
        out.zero_()
    dtype = coefficient_dtype(out.dtype)
    scale, others = scale.to(dtype), [None if x is None else x.to(dtype) for x in (factors, shift)]
    for k in range(0, len(z), MOST_INPUTS):
        some, rows = z[k : k + MOST_INPUTS], scale[k : k + MOST_INPUTS]
        f, s = (None if x is None else x[k : k + MOST_INPUTS] for x in others)
        if k:
            found = launch_node_sum(None, rows, s, f, None, None, some)
            out += found
        else:
            launch_node_sum(None, rows, s, f, None, None, some, out)
