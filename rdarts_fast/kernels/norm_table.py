"""The batch norms of a cell in one table, and the sums that read it.

A row stands for one tensor z of [N, C, H, W] that a node sums or a further stage reads: its mean
and rstd per channel, and in the backward what its gradient is made of,

    dz = by_g[row, c] * f g + by_z[row, c] * z + constant[row, c]

with g the gradient of what z enters. Whoever forms dz does so as it reads z (`Affine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch, place_on
from rdarts_fast.kernels.node_sum import Key, native_noise
from rdarts_fast.kernels.sep_stage import Affine

# Of a batch norm: running mean and variance [C], batches counted [] int64; training moves them.
Running = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Terms:
    """The terms of a node: out = sum_k weights[weight[k]] * factors[k, n] * (z_k - mean) * rstd.

    rows: K rows of the table. weights: K indices into the flattened weights. normalised: K flags;
    where False, mean is 0 and rstd 1.
    """

    rows: Sequence[int]
    weights: Sequence[int]
    normalised: Sequence[bool]


@dataclass(frozen=True)
class Drawn:
    """A node's noise: its key, the weights [J] and factors [J, N] or None, and the J indices of the
    former into the flattened weights.

    numbers: float32 [J, N, C H W] or None: where, on the CPU, a forward pass leaves what it draws
    for the backward.
    """

    key: Key
    weights: Tensor
    factors: Tensor | None
    indices: Sequence[int]
    numbers: Tensor | None = None

    def native(self, backward: bool) -> Any:
        """Return what the native functions take."""
        weights = None if backward else self.weights
        return native_noise(self.key, weights, self.factors, self.numbers)


class NormTable:
    """The rows of a cell whose tensors have the dtype and device of `like`.

    statistics: [2, R, C] float64, mean and rstd. gradients: [3, R, C], by_g, by_z and constant, in
    the coefficients' dtype; None until the backward.
    """

    def __init__(self, rows: int, channels: int, like: Tensor, training: bool) -> None:
        self.dtype, self.device, self.training = like.dtype, like.device, training
        self.statistics = torch.empty(2, rows, channels, dtype=torch.float64, device=like.device)
        self.gradients: Tensor | None = None

    @classmethod
    def for_backward(cls, statistics: Tensor, like: Tensor, training: bool) -> NormTable:
        """Return the table of a forward pass, with room for the gradients."""
        table = cls(0, 0, like, training)
        table.statistics = statistics
        shape, dtype = (3, *statistics.shape[1:]), array.coefficient_dtype(like.dtype)
        table.gradients = torch.empty(shape, dtype=dtype, device=like.device)
        return table

    def fill(
        self,
        first: int,
        shape: Sequence[int],
        sums: Sequence[tuple[Tensor, int]],
        running: Sequence[Running],
        rule: tuple[float, float],
    ) -> None:
        """Fill G rows from `first` on.

        shape: of the tensors. sums: for each of them [3, G', C] as the stages give them and its
        place among the G'; unread in eval mode. running: their buffers. rule: eps and momentum.
        """
        channels = shape[1]
        launch(
            "batch_norms",
            array.DTYPES[self.dtype],
            tuple(shape),
            self.address(),
            first,
            [
                n
                for rows, g in sums
                for n in (array.address(rows) + 8 * g * channels, rows.stride(0))
            ],
            array.addresses([buffer for own in running for buffer in own]),
            rule,
            place_on(self.device),
        )

    def rows_at(
        self,
        first: int,
        running: Sequence[Running],
        rule: tuple[float, float],
        maps: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Any:
        """Return what a launch that leaves sums takes to fill the rows of its tensors, from `first`
        on: their buffers, eps and momentum, and where the scales and shifts go, [G, C] each, that
        normalise them.
        """
        buffers = array.addresses([buffer for own in running for buffer in own])
        return self.address(), first, buffers, rule, *array.addresses(maps)

    def node(
        self,
        z: Sequence[Tensor],
        terms: Terms,
        weights: Tensor | None,
        factors: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the node, channels innermost, and what its backward needs.

        weights: [E, O] or None for ones. factors: [K, N] or None.
        """
        shape = tuple(z[0].shape)
        out = array.empty(z[0], shape, torch.channels_last)
        kept = torch.empty(3, len(z), shape[1], dtype=torch.float64, device=self.device)
        launch(
            "node",
            array.DTYPES[self.dtype],
            shape,
            array.flat((out, *z)),
            self.address(),
            (terms.rows, terms.weights, terms.normalised, array.address(weights)),
            array.address(factors),
            None if drawn is None else drawn.native(backward=False),
            array.address(kept),
            place_on(self.device),
        )
        return out, kept[0]

    def node_backward(
        self,
        g: Tensor,
        z: Sequence[Tensor],
        terms: Terms,
        weights: Tensor | None,
        kept: Tensor,
        dweights: Tensor | None,
        factors: Tensor | None = None,
        drawn: Drawn | None = None,
        one: int = -1,
    ) -> None:
        """Fill the terms' rows and their entries of dweights [E, O], from the gradient of the node.

        kept: as `node` returned it. one: a row whose by_g is to be 1, below 0 for none.
        """
        shape, place = tuple(g.shape), place_on(self.device)
        sites = 0 if drawn is None else len(drawn.indices)
        size = sites + native.extension.workspace(shape, len(z), sites, place)
        buffer = torch.empty(size, dtype=torch.float64, device=self.device)
        launch(
            "node_backward",
            array.DTYPES[self.dtype],
            shape,
            array.flat((g, *z)),
            self.address(),
            (terms.rows, terms.weights, terms.normalised, array.address(weights)),
            () if drawn is None else drawn.indices,
            array.address(factors),
            None if drawn is None else drawn.native(backward=True),
            array.address(kept),
            array.address(dweights),
            one,
            array.address(buffer),
            place,
        )

    def norms_backward(self, g: Sequence[Tensor], z: Sequence[Tensor], first: int) -> None:
        """Fill K rows from `first` on, from the gradients of the normalised z."""
        shape, place = tuple(z[0].shape), place_on(self.device)
        space = native.extension.workspace(shape, len(z), 0, place)
        buffer = torch.empty(space, dtype=torch.float64, device=self.device)
        launch(
            "norms_backward",
            array.DTYPES[self.dtype],
            shape,
            array.flat((*g, *z)),
            self.address(),
            first,
            array.address(self.statistics[0, first]),
            array.address(buffer),
            place,
        )

    def affine(self, first: int, count: int, factors: Tensor | None = None) -> Affine:
        """Return the gradients of `count` rows from `first` on; factors [count, N]."""
        by_g, by_z, constant = self.rows(first, count)
        if not self.training:
            return Affine(by_g, None, None, factors)
        return Affine(by_g, by_z, constant, factors)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return by_g, by_z and constant of `count` rows from `first` on, [count, C] each."""
        assert self.gradients is not None
        by_g, by_z, constant = self.gradients[:, first : first + count].unbind()
        return by_g, by_z, constant

    def address(self) -> tuple[int, int, int, bool]:
        """Return what the native functions take."""
        rows = self.statistics.shape[1]
        return array.address(self.statistics), array.address(self.gradients), rows, self.training
