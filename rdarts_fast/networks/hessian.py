"""The Hessian of a supernet's loss over the alphas, without a tangent's backward pass.

With the loss's gradients at every state and batch norm known from one backward pass, the Hessian is
a sum over what is not linear (edge pushing; Gower and Mello, 2012): batch norms (tangent.py), the
nodes' sums of p f, softmax, and the head. So one forward pass of tangents for each direction gives
all of it. Softmax does not see a shift of an edge's alphas: of the O directions of an edge only
O - 1 are computed, the first operation's column is minus the sum of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast import bilevel
from rdarts_fast.curvature import HessianOperator, Operator
from rdarts_fast.curvature.operators import check_vectors, flat
from rdarts_fast.draws import Draws
from rdarts_fast.networks.chain import State
from rdarts_fast.networks.tangent import Norm
from rdarts_fast.networks.tangent_cell import CellParts
from rdarts_fast.spaces import CELL_TYPES, INPUTS

DIRECTIONS_A_PRODUCT = 12.0  # that cost about as much as one product by differentiating twice


class SupernetPasses:
    """A supernet's primal pass on one batch, and the Hessian along given directions.

    parts: what `parts_of` found. alphas: cell type -> [E, O].
    """

    def __init__(
        self,
        supernet: Any,
        parts: Sequence[CellParts],
        alphas: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        draws: Draws,
    ) -> None:
        self._parts, self._classifier = parts, supernet.classifier
        leaves = {k: a.detach().softmax(dim=-1).requires_grad_() for k, a in alphas.items()}
        inner: list[tuple[Norm, Tensor]] = []
        with torch.no_grad():
            first = [State(_still(supernet.stem, images))]
        before = [first, first]
        nodes: list[Tensor] = []
        with torch.enable_grad():
            for cell in parts:
                out = cell.primal(
                    before, leaves[cell.cell.kind], draws, supernet.drop_path_prob, inner
                )
                nodes += [state.value for state in out]
                before = [before[1], out]
            pooled = torch.cat([state.value.mean(dim=(2, 3)) for state in before[1]], dim=1)
            logits = self._classifier(pooled)
            self.loss = F.cross_entropy(logits, labels)
            wanted = [*leaves.values(), *nodes, *(x for _, x in inner)]
            found = torch.autograd.grad(self.loss, wanted, materialize_grads=True)
        self.loss, self._out = self.loss.detach(), before[1]
        self.probabilities = logits.detach().softmax(dim=1)
        count = len(leaves)
        self.weights = {kind: leaf.detach() for kind, leaf in leaves.items()}
        self.dweights = dict(zip(leaves, found[:count], strict=True))
        gradients = iter(found[count:])
        for cell in parts:
            cell.take([next(gradients) for _ in cell.nodes])
        for (norm, _), gradient in zip(inner, gradients, strict=True):
            norm.take(gradient)
        for cell in parts:
            for state in cell.states:
                state.value = state.value.detach()

    def bytes_a_direction(self) -> int:
        """Return about how much memory a direction takes: the tangents of a cell's states, of those
        that make up its inputs, and of the terms of its largest node with one stage's beside them.
        """
        most = 0
        for part in self._parts:
            states = [*part.states, *(state for states in part.before for state in states)]
            terms = max(len(candidates) for candidates in part.nodes) + 2
            tensors = [*(state.value for state in states), *[part.states[-1].value] * terms]
            most = max(most, sum(x.numel() * x.element_size() for x in tensors))
        return most

    def gradient(self) -> dict[str, Tensor]:
        """Return the loss's gradient in the alphas: cell type -> [E, O]."""
        found = {}
        for kind, p in self.weights.items():
            g = self.dweights[kind]
            found[kind] = p * (g - (p * g).sum(dim=-1, keepdim=True))
        return found

    @torch.no_grad()
    def along(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Return V H V^T, [V, V] float64.

        directions: cell type -> [V, E, O] float64. It is least work where those that move early
        edges stand first, the normal cells' before the others.
        """
        dp, along = {}, {}
        for kind, d in directions.items():
            p = self.weights[kind].double()
            dp[kind] = p * (d - (p * d).sum(dim=-1, keepdim=True))
            along[kind] = torch.zeros_like(d)
        total = len(directions["normal"])
        hessian = torch.zeros(total, total, dtype=torch.float64, device=self.loss.device)
        for cell in self._parts:
            kind = cell.cell.kind
            cell.tangent(self.weights[kind], dp[kind], along[kind], hessian)
            for state in cell.states[:INPUTS]:
                state.tangent = None
        hessian += self._head(total)
        for kind, d in directions.items():
            hessian += self._softmax(kind, d, dp[kind], along[kind])
        for cell in self._parts:
            for state in cell.states:
                state.tangent = None
        return hessian

    def _head(self, directions: int) -> Tensor:
        """Return what cross entropy adds: mean of dl_j (diag q - q q^T) dl_k."""
        means = []
        for state in self._out:
            n, channels = state.value.shape[:2]
            mean = state.value.new_zeros(directions * n, channels)
            if state.tangent is not None:
                mean[: len(state.tangent)] = state.tangent.mean(dim=(2, 3))
            means.append(mean)
        q = self.probabilities.double()
        dl = torch.cat(means, dim=1) @ self._classifier.weight.t()
        dl = dl.double().view(directions, *q.shape)  # [V, N, classes]
        dq = q * (dl - (q * dl).sum(dim=-1, keepdim=True)) / len(q)
        found: Tensor = dq.flatten(1) @ dl.flatten(1).t()
        return found

    def _softmax(self, kind: str, d: Tensor, dp: Tensor, along: Tensor) -> Tensor:
        """Return what the nodes' sums of p f and softmax itself add."""
        p, g = self.weights[kind].double(), self.dweights[kind].double()
        pairs = dp.flatten(1) @ along.flatten(1).t()
        w = p * (g - (p * g).sum(dim=-1, keepdim=True))
        by_p, by_w = (d * p).sum(dim=-1), (d * w).sum(dim=-1)
        squares = (d * w).flatten(1) @ d.flatten(1).t() - by_p @ by_w.t() - by_w @ by_p.t()
        return pairs + pairs.t() + squares


def _still(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x), with its buffers as they were."""
    saved = [buffer.clone() for buffer in module.buffers()]
    result: Tensor = module(x).contiguous(memory_format=torch.channels_last)
    for buffer, before in zip(module.buffers(), saved, strict=True):
        buffer.copy_(before)
    return result


def parts_of(supernet: Any) -> list[CellParts] | None:
    """Return the parts of all cells; None where an operation has no steps."""
    found = [CellParts.of(cell) for cell in supernet.cells]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(found) else None


class SupernetHessian:
    """The Hessian of the cross entropy of a supernet on one batch over its alphas, [P, P]; P counts
    the alphas of the normal cells, then of the reduction cells, flattened. See
    `Supernet.hessian_operator`.

    `value` is the loss, `gradient` its gradient [P]. A product differentiates twice; once `dense`
    has been computed, it is a product with that.
    """

    def __init__(
        self, passes: SupernetPasses, memory: int, by_differentiating: Callable[[], Operator]
    ) -> None:
        self._passes, self._memory, self._differentiate = passes, memory, by_differentiating
        self._matrix: Tensor | None = None
        self._operator: Operator | None = None
        self.value, self.gradient = passes.loss, flat(list(passes.gradient().values()))

    @property
    def shape(self) -> tuple[int, int]:
        """[P, P]."""
        return self.gradient.numel(), self.gradient.numel()

    @property
    def dense_products(self) -> float:
        """What the whole matrix costs, in products."""
        passed = sum(len(block) for block in self._blocks())
        return passed / DIRECTIONS_A_PRODUCT

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with `v`, [P] or [P, V]. Raises ValueError where it does not fit."""
        check_vectors(self, v)
        if self._matrix is not None:
            return self._matrix.to(v) @ v
        if self._operator is None:
            self._operator = self._differentiate()
        return self._operator @ v

    def dense(self) -> Tensor:
        """Return the whole matrix, [P, P] float64."""
        if self._matrix is None:
            basis = self._basis()
            found = basis.new_zeros(len(basis), len(basis))
            for block in self._blocks():
                found[block[:, None], block] = self._along(basis[block])
            spread = self._spread()
            self._matrix = spread.t() @ found @ spread
        return self._matrix

    def _along(self, directions: Tensor) -> Tensor:
        shapes = self._shapes()
        parts = directions.split([edges * operations for edges, operations in shapes], dim=1)
        named = zip(self._passes.weights, parts, shapes, strict=True)
        return self._passes.along({kind: part.view(-1, *shape) for kind, part, shape in named})

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


def hessian_operator(
    supernet: Any,
    alphas: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    draws: Draws,
    memory: int,
) -> SupernetHessian | HessianOperator:
    """Return the operator; see `Supernet.hessian_operator`."""
    alphas = {kind: alphas[kind] for kind in CELL_TYPES}
    parameters = list(supernet.parameters())
    # Copies, which a pass may move: what is differentiated later must stay as it is.
    buffers = {name: buffer.clone() for name, buffer in supernet.named_buffers()}

    def loss() -> Tensor:
        weights = {kind: alpha.softmax(dim=-1) for kind, alpha in alphas.items()}
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
    return SupernetHessian(passes, memory, by_differentiating)
