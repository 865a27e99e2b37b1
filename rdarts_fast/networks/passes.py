"""The passes of a supernet on one batch that its second derivatives over the alphas are made of:
the loss with its gradients at every state and batch norm, tangents along directions of the alphas,
and the tangents of the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast.draws import Draws
from rdarts_fast.networks.adjoint_cell import Gradients, GradientTangents
from rdarts_fast.networks.chain import State
from rdarts_fast.networks.checkpointed import BuffersAside
from rdarts_fast.networks.fused import fused_stem
from rdarts_fast.networks.tangent import Gathered
from rdarts_fast.networks.tangent_cell import CellParts
from rdarts_fast.spaces import INPUTS


class SupernetPasses:
    """A supernet's primal pass on one batch, and the Hessian along given directions.

    parts: what `parts_of` found. alphas: cell type -> [E, O].
    """

    @torch.no_grad()
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
        self.weights = {kind: alpha.detach().softmax(dim=-1) for kind, alpha in alphas.items()}
        with BuffersAside(supernet.stem):
            first = [State(fused_stem(supernet.stem, images), moves=False)]
        before = [first, first]
        for cell in parts:
            weights = self.weights[cell.cell.kind]
            before = [before[1], cell.primal(before, weights, draws, supernet.drop_path_prob)]
        self._out = before[1]
        pooled = torch.cat([state.value.mean(dim=(2, 3)) for state in self._out], dim=1)
        logits = self._classifier(pooled)
        self.loss = F.cross_entropy(logits, labels)
        self.probabilities = logits.softmax(dim=1)
        wrong = self.probabilities - F.one_hot(labels, logits.shape[1])
        self._start((wrong / len(labels))[None])
        found = {kind: w.new_zeros(1, *w.shape).double() for kind, w in self.weights.items()}
        for cell in reversed(parts):
            kind = cell.cell.kind
            Gradients(cell, self.weights[kind], found[kind]).run()
        self.dweights = {kind: g[0].to(self.weights[kind]) for kind, g in found.items()}

    def _start(self, dlogits: Tensor) -> None:
        """Begin the way back from the gradients of the logits, [V, N, classes]."""
        of_pooled = dlogits.to(self.loss.dtype) @ self._classifier.weight
        channels = [state.value.shape[1] for state in self._out]
        for state, g in zip(self._out, of_pooled.split(channels, dim=2), strict=True):
            h, w = state.value.shape[2:]
            spread = (g / (h * w)).flatten(0, 1)[..., None, None].expand(-1, -1, h, w)
            state.gathered = Gathered(state.value, len(dlogits))
            state.gathered.add(spread)

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

    def bytes_a_product(self) -> int:
        """Return about how much memory a direction takes there and back: what batch norms keep of
        their inputs' tangents, and what `bytes_a_direction` counts.
        """
        kept = sum(norm.result.numel() for part in self._parts for norm in part.norms())
        return kept * self.loss.element_size() + self.bytes_a_direction()

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
        dp = self._of_weights(directions)
        total = len(directions["normal"])
        hessian = torch.zeros(total, total, dtype=torch.float64, device=self.loss.device)
        along = self._forward(dp, hessian)
        dlogits, dq = self._head(total)
        hessian += dq.flatten(1) @ dlogits.flatten(1).t()
        for kind, d in directions.items():
            hessian += self._softmax(kind, d, dp[kind], along[kind])
        self._forget()
        return hessian

    @torch.no_grad()
    def times(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return H V; directions and products: cell type -> [V, E, O] float64."""
        dp = self._of_weights(directions)
        found = self._forward(dp, None)
        self._start(self._head(len(directions["normal"]))[1])
        for cell in reversed(self._parts):
            kind = cell.cell.kind
            GradientTangents(cell, self.weights[kind], found[kind], dp[kind]).run()
        self._forget()
        return {kind: self._product(kind, dp[kind], dg) for kind, dg in found.items()}

    def _of_weights(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tangents of the weights: cell type -> [V, E, O]."""
        dp = {}
        for kind, d in directions.items():
            p = self.weights[kind].double()
            dp[kind] = p * (d - (p * d).sum(dim=-1, keepdim=True))
        return dp

    def _forward(self, dp: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, Tensor]:
        """Let tangents through the cells; return the sums of the gradients with each candidate's,
        cell type -> [V, E, O].
        """
        along = {kind: torch.zeros_like(d) for kind, d in dp.items()}
        for cell in self._parts:
            kind = cell.cell.kind
            cell.tangent(self.weights[kind], dp[kind], along[kind], hessian)
            for state in cell.states[:INPUTS]:
                state.tangent = None
        return along

    def _forget(self) -> None:
        """Drop the tangents."""
        for cell in self._parts:
            cell.forget()

    def _head(self, directions: int) -> tuple[Tensor, Tensor]:
        """Return the tangents of the logits and of the loss's gradient in them, [V, N, classes]."""
        means = []
        for state in self._out:
            n, channels = state.value.shape[:2]
            mean = state.value.new_zeros(directions * n, channels)
            if state.tangent is not None:
                mean[: len(state.tangent)] = state.tangent.mean(dim=(2, 3))
            means.append(mean)
        q = self.probabilities.double()
        dl = torch.cat(means, dim=1) @ self._classifier.weight.t()
        dl = dl.double().view(directions, *q.shape)
        return dl, q * (dl - (q * dl).sum(dim=-1, keepdim=True)) / len(q)

    def _softmax(self, kind: str, d: Tensor, dp: Tensor, along: Tensor) -> Tensor:
        """Return what the nodes' sums of p f and softmax itself add."""
        p, g = self.weights[kind].double(), self.dweights[kind].double()
        pairs = dp.flatten(1) @ along.flatten(1).t()
        w = p * (g - (p * g).sum(dim=-1, keepdim=True))
        by_p, by_w = (d * p).sum(dim=-1), (d * w).sum(dim=-1)
        squares = (d * w).flatten(1) @ d.flatten(1).t() - by_p @ by_w.t() - by_w @ by_p.t()
        return pairs + pairs.t() + squares

    def _product(self, kind: str, dp: Tensor, dg: Tensor) -> Tensor:
        """Return the tangents of the gradient in the alphas, from those of that in the weights, dg.

        All [V, E, O].
        """
        p, g = self.weights[kind].double(), self.dweights[kind].double()
        moved = (dp * g + p * dg).sum(dim=-1, keepdim=True)
        return dp * (g - (p * g).sum(dim=-1, keepdim=True)) + p * (dg - moved)


def parts_of(supernet: Any) -> list[CellParts] | None:
    """Return the parts of all cells; None where an operation has no steps."""
    found = [CellParts.of(cell) for cell in supernet.cells]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(found) else None
