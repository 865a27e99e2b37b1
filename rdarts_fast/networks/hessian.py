"""The Hessian of a supernet's loss over the alphas: products, and the whole matrix without a
tangent's backward pass.

With the loss's gradients at every state and batch norm known from one backward pass, the Hessian is
a sum over what is not linear (edge pushing; Gower and Mello, 2012): batch norms (tangent.py), the
nodes' sums of p f, softmax, and the head. So one forward pass of tangents for each direction gives
all of it. Softmax does not see a shift of an edge's alphas: of the O directions of an edge only
O - 1 are computed, the first operation's column is minus the sum of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast import bilevel
from rdarts_fast.curvature import HessianOperator
from rdarts_fast.curvature.operators import check_vectors, flat
from rdarts_fast.draws import Draws
from rdarts_fast.networks.passes import SupernetPasses, parts_of
from rdarts_fast.networks.precision import in_float32
from rdarts_fast.recording import Recorded, Recorder
from rdarts_fast.spaces import CELL_TYPES

DIRECTIONS_A_PRODUCT = 3.0  # of the dense matrix, that cost about as much as one product


class SupernetHessian:
    """The Hessian of the cross entropy of a supernet on one batch over its alphas, [P, P]; P counts
    the alphas of the normal cells, then of the reduction cells, flattened. See
    `Supernet.hessian_operator`.

    `value` is the loss, `gradient` its gradient [P]. A product lets tangents through the
    network forward and back (passes.py); once `dense` has been computed, it is one with that.
    recorder: records products with one vector, as lambda_max takes them; None: nothing is recorded.
    """

    def __init__(
        self, passes: SupernetPasses, memory: int, recorder: Recorder | None = None
    ) -> None:
        self._passes, self._memory = passes, memory
        self._alone = None if recorder is None else Recorded(self._times, recorder)
        self._matrix: Tensor | None = None
        self.value, self.gradient = passes.loss, flat(list(passes.gradient().values()))

    @property
    def shape(self) -> tuple[int, int]:
        """[P, P]."""
        return self.gradient.numel(), self.gradient.numel()

    @property
    def dense_products(self) -> float:
        """What the whole matrix costs, in products: measured, it is 2 to 4 directions for each. So
        lambda_max comes from the matrix in S5 (8 directions), from Lanczos' 5 to 10 products in S1,
        S2 and S4 (28), S3 (56) and darts (196).
        """
        passed = sum(len(block) for block in self._blocks())
        return passed / DIRECTIONS_A_PRODUCT

    @in_float32
    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with `v`, [P] or [P, V]. Raises ValueError where it does not fit."""
        check_vectors(self, v)
        if self._matrix is not None:
            return self._matrix.to(v) @ v
        if v.numel() == 0:
            return torch.zeros_like(v)
        columns = v.reshape(len(v), -1).t().to(self.gradient.device, torch.float64)
        fit = max(1, self._memory // self._passes.bytes_a_product())
        alone = self._times if self._alone is None else self._alone
        times = alone if len(columns) == 1 else self._times
        found = [times(some) for some in columns.split(fit)]
        return torch.cat(found).t().reshape(v.shape).to(v)

    @in_float32
    def dense(self) -> Tensor:
        """Return the whole matrix, [P, P] float64."""
        if self._matrix is None:
            basis = self._basis()
            found = basis.new_zeros(len(basis), len(basis))
            for block in self._blocks():
                found[block[:, None], block] = self._passes.along(self._named(basis[block]))
            spread = self._spread()
            self._matrix = spread.t() @ found @ spread
        return self._matrix

    def _times(self, directions: Tensor) -> Tensor:
        found = self._passes.times(self._named(directions))
        return torch.cat([part.flatten(1) for part in found.values()], dim=1)

    def _named(self, directions: Tensor) -> dict[str, Tensor]:
        """Return directions [V, P] by cell type, [V, E, O] each."""
        shapes = self._shapes()
        parts = directions.split([edges * operations for edges, operations in shapes], dim=1)
        named = zip(self._passes.weights, parts, shapes, strict=True)
        return {kind: part.reshape(-1, *shape) for kind, part, shape in named}

    def _basis(self) -> Tensor:
        """Return the directions of all operations but the first of each edge, [R, P]."""
        rows = [
            torch.eye(operations, dtype=torch.float64)[1:]
            for edges, operations in self._shapes()
            for _ in range(edges)
        ]
        found: Tensor = torch.block_diag(*rows).to(self.gradient.device)
        return found

    def _spread(self) -> Tensor:
        """Return what makes a Hessian of that basis the whole, [R, P]: of each edge the first
        column is minus the sum of the others.
        """
        rows = [
            torch.cat([-torch.ones(operations - 1, 1), torch.eye(operations - 1)], dim=1).double()
            for edges, operations in self._shapes()
            for _ in range(edges)
        ]
        found: Tensor = torch.block_diag(*rows).to(self.gradient.device)
        return found

    def _blocks(self) -> list[Tensor]:
        """Return directions that go through together, so that each pair does once: all, or, where
        memory is short, each two of several parts.
        """
        count = sum(edges * (operations - 1) for edges, operations in self._shapes())
        fit = max(2, self._memory // self._passes.bytes_a_direction())
        if count <= fit:
            return [torch.arange(count)]
        parts = torch.arange(count).split(fit // 2)
        pairs = itertools.combinations(parts, 2)
        return [torch.cat(pair) for pair in pairs]

    def _shapes(self) -> list[tuple[int, int]]:
        return [(p.shape[0], p.shape[1]) for p in self._passes.weights.values()]


@in_float32
def hessian_operator(
    supernet: Any,
    alphas: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    memory: int,
    recorder: Recorder | None,
) -> SupernetHessian | HessianOperator:
    """Return the operator; see `Supernet.hessian_operator`. Whatever the supernet's precision, it
    is computed in float32.
    """
    alphas = {kind: alphas[kind] for kind in CELL_TYPES}
    parameters = list(supernet.parameters())
    # Copies, which a pass may move: what is differentiated later must stay as it is.
    buffers = {name: buffer.clone() for name, buffer in supernet.named_buffers()}

    def loss() -> Tensor:
        weights = {kind: alpha.softmax(dim=-1) for kind, alpha in alphas.items()}
        with supernet.in_float32():
            logits = torch.func.functional_call(supernet, buffers, (images, weights, draws))
        return F.cross_entropy(logits, labels)

    def by_differentiating() -> HessianOperator:
        with bilevel.frozen(parameters):
            return HessianOperator(loss, list(alphas.values()))

    known = supernet.backend == "fused" and images.dtype in (torch.float32, torch.float64)
    parts = parts_of(supernet) if known else None
    if parts is None:
        return by_differentiating()
    with bilevel.frozen(parameters):
        passes = SupernetPasses(supernet, parts, alphas, images, labels, draws)
    return SupernetHessian(passes, memory, recorder)
