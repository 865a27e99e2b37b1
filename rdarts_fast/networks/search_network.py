"""What all supernets have in common: a space, alphas, weights of the operations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rdarts_fast.draws import SITE_ALPHAS, Draws
from rdarts_fast.errors import UserError, unknown
from rdarts_fast.networks.operations import Probability
from rdarts_fast.networks.precision import BF16, FP32, PRECISIONS
from rdarts_fast.spaces import Space

ALPHA_SCALE = 1e-3

Weights = Mapping[str, Tensor]  # cell type -> [E, O]


def softmax_weights(alphas: Weights) -> dict[str, Tensor]:
    """Return the operations' weights, softmax over the candidates of each edge: cell type -> [E,
    O].
    """
    return {kind: torch.softmax(alpha, dim=-1) for kind, alpha in alphas.items()}


class SearchNetwork(nn.Module):
    """A network in which every edge computes the weighted sum of all its candidate operations.

    `drop_path_prob` is the probability of dropping an edge per sample, in train mode only; the
    search sets it each epoch, a recorded step makes it a tensor on the device. `precision` is one
    of networks/precision.py.
    """

    has: Collection[str] = ()  # of --precision bf16 and --checkpoint-cells

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        self.drop_path_prob: Probability = 0.0
        self.precision, self.checkpoint_cells = FP32, False

    def compute(self, precision: str = FP32, checkpoint_cells: bool = False) -> None:
        """Compute by networks/precision.py and, with `checkpoint_cells`, each cell's forward pass
        again in its backward. Raises UserError for what the network does not have.
        """
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        asked = {"--precision bf16": precision == BF16, "--checkpoint-cells": checkpoint_cells}
        for name, wanted in asked.items():
            if wanted and name not in self.has:
                raise UserError(f"{name}: not for the space {self.space.name}")
        self.precision, self.checkpoint_cells = precision, checkpoint_cells

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 inside the block."""
        precision = self.precision
        self.compute(FP32, self.checkpoint_cells)
        try:
            yield
        finally:
            self.compute(precision, self.checkpoint_cells)

    def initial_alphas(self, seed: int) -> dict[str, Tensor]:
        """Return the alphas at the start, 1e-3 x N(0, 1) drawn from `seed`: cell type -> [E, O],
        requiring gradients.
        """
        draws, parameter = Draws(seed), next(self.parameters())
        alphas = {}
        for i, (kind, shape) in enumerate(self._shapes().items()):
            normal = draws.at(step=i).normal(SITE_ALPHAS, shape).to(parameter)
            alphas[kind] = (ALPHA_SCALE * normal).requires_grad_()
        return alphas

    def restricted(self, weights: Weights) -> SearchNetwork:
        """Return what computes no candidate whose weight is 0, where a supernet has such a form;
        else itself.
        """
        return self

    def check_weights(self, weights: Weights) -> None:
        """Raise ValueError where the operations' weights do not fit the space."""
        for kind, expected in self._shapes().items():
            got = tuple(weights[kind].shape) if kind in weights else None
            if got != expected:
                raise ValueError(f"weights[{kind!r}]: expected shape {expected}, got {got}")

    def _shapes(self) -> dict[str, tuple[int, int]]:
        space = self.space
        return {kind: (space.edges(kind), space.operations(kind)) for kind in space.cells}
