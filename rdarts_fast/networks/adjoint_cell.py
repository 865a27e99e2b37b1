"""Gradients back through a cell as chains (tangent_cell.py): the loss's, and their tangents along V
directions of the alphas.

State by state from the last: its gradient is whole once all edges that leave it have been passed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from rdarts_fast.kernels.array import MOST_INPUTS
from rdarts_fast.kernels.node_sum import launch_node_sum_dq
from rdarts_fast.networks.chain import State
from rdarts_fast.networks.norm import Norm, Sum, by_direction
from rdarts_fast.networks.tangent import Gathered
from rdarts_fast.networks.tangent_cell import Candidate, CellParts
from rdarts_fast.networks.weighted_sum import Term, sum_of
from rdarts_fast.spaces import INPUTS


class Backward(ABC):
    """A way back through a cell, of V gradients at once.

    weights: [E, O], and found: [V, E, O] float64, to which the sums of the nodes' gradients with
    each candidate's result are added.
    """

    def __init__(self, part: CellParts, weights: Tensor, found: Tensor) -> None:
        self.part, self.weights, self.found = part, weights.double(), found
        self.directions = len(found)

    def run(self) -> None:
        """Go from the gradients of the cell's output, gathered by its states, to those of its
        inputs.
        """
        part = self.part
        for i in reversed(range(len(part.states))):
            if part.states[i].moves:
                self._gather(i)
            if i >= INPUTS:
                self._enter(part.nodes[i - INPUTS], part.states[i])
        for chain, states, own in zip(part.inputs, part.before, part.states, strict=False):
            if own.moves:
                assert chain.last is not None
                g = self.last(chain.last, self.gathered(own).value())
                chain.adjoint(g, [self.gathered(state) for state in states], self.inner)
            own.gathered = None

    def gathered(self, state: State) -> Gathered:
        """Return where a state's gradients come together."""
        if state.gathered is None:
            state.gathered = Gathered(state.value, self.directions)
        return state.gathered

    def _gather(self, i: int) -> None:
        """Add to state i's gradient what comes back along the edges that leave it."""
        into = self.gathered(self.part.states[i])
        nodes = self.part.nodes[max(0, i - INPUTS + 1) :]
        leaving = [c for candidates in nodes for c in candidates if c.source == i and c.chain]
        skips = [c for c in leaving if c.chain is not None and not c.chain.steps]
        if skips:
            out, adds = into.room()
            for v, part in enumerate(out):
                terms = [term for c in skips for term in self.terms(c, v)]
                if adds:
                    terms.append(Term(part, torch.ones_like(terms[0].scale)))
                sum_of(terms, part)
        for c in leaving:
            if c.chain is not None and c.chain.steps:
                g = self.of_norm(c) if c.last is not None else self.of_result(c)
                c.chain.adjoint(g, [into], self.inner)

    def of_result(self, c: Candidate) -> Tensor:
        """Return the gradients of a candidate's result."""
        return torch.cat([sum_of(self.terms(c, v)) for v in range(self.directions)])

    def _enter(self, candidates: Sequence[Candidate], state: State) -> None:
        """Take the gradient of a node, which is whole: to its candidates and to `found`."""
        g = self.gathered(state).parts()
        for first in range(0, len(candidates), MOST_INPUTS):
            some = candidates[first : first + MOST_INPUTS]
            results = [c.result for c in some if c.result is not None]
            sums = []
            for one in g:
                found, _ = launch_node_sum_dq(one, results, self.part.factors_of(some))
                sums.append(found.flip(0))
            totals = torch.stack(sums, dim=2)  # [2, K, V, C]
            products = totals[1].sum(dim=2)  # [K, V]
            for k, c in enumerate(some):
                self.found[:, c.edge, c.operation] += products[k]
                self.take(c, state, totals[:, k])
        state.gathered = None

    @abstractmethod
    def take(self, c: Candidate, state: State, totals: Tensor) -> None:
        """Take the gradient of the node that the candidate enters, and with drop path's factors its
        sums and those of it times the candidate's result, [2, V, C].
        """

    @abstractmethod
    def terms(self, c: Candidate, v: int) -> list[Term]:
        """Return what a candidate's result has as gradient along direction v."""

    @abstractmethod
    def of_norm(self, c: Candidate) -> Tensor | Sum:
        """Return the gradients of what a candidate's last batch norm takes."""

    @abstractmethod
    def last(self, norm: Norm, g: Tensor) -> Tensor | Sum:
        """Return the gradients of what a state's batch norm takes, from those of the state."""

    @abstractmethod
    def inner(self, norm: Norm, g: Tensor, totals: Tensor | None) -> Tensor | Sum:
        """Return the gradients of what a batch norm takes from those of its result."""


class Gradients(Backward):
    """The loss's gradients: they stay in the candidates and the batch norms."""

    def __init__(self, part: CellParts, weights: Tensor, found: Tensor) -> None:
        super().__init__(part, weights, found)
        self._masked: dict[int, Tensor] = {}  # edge -> its node's gradient with its factors

    def take(self, c: Candidate, state: State, totals: Tensor) -> None:
        g = self.gathered(state).value()
        if self.part.factors is not None:
            if c.edge not in self._masked:
                self._masked[c.edge] = g * self.part.factors[c.edge].view(-1, 1, 1, 1)
            g = self._masked[c.edge]
        c.gradient = g
        if c.last is not None:
            c.last.take(g, totals[:, 0], self.weights[c.edge, c.operation])

    def terms(self, c: Candidate, v: int) -> list[Term]:
        assert c.gradient is not None
        p = self.weights[c.edge, c.operation]
        return [Term(c.gradient, p.expand(c.gradient.shape[1]))]

    def of_norm(self, c: Candidate) -> Sum:
        assert c.last is not None
        return c.last.adjoint()

    def last(self, norm: Norm, g: Tensor) -> Sum:
        return self.inner(norm, g, None)

    def inner(self, norm: Norm, g: Tensor, totals: Tensor | None) -> Sum:
        norm.take(g, None if totals is None else totals[:, 0])
        return norm.adjoint()


class GradientTangents(Backward):
    """The tangents of those gradients. dweights: those of the weights, [V, E, O] float64."""

    def __init__(self, part: CellParts, weights: Tensor, found: Tensor, dweights: Tensor) -> None:
        super().__init__(part, weights, found)
        self.dweights = dweights
        self._of: dict[int, tuple[list[Tensor], Tensor]] = {}  # id -> of the node; its sums

    def take(self, c: Candidate, state: State, totals: Tensor) -> None:
        self._of[id(c)] = self.gathered(state).parts(), totals

    def terms(self, c: Candidate, v: int) -> list[Term]:
        g, p = self._of[id(c)][0][v], self.weights[c.edge, c.operation]
        dp, channels = self.dweights[v, c.edge, c.operation], g.shape[1]
        assert c.gradient is not None
        return [
            Term(g, p.expand(channels), self._factors(c)),
            Term(c.gradient, dp.expand(channels)),
        ]

    def of_norm(self, c: Candidate) -> Tensor:
        assert c.last is not None
        g, totals = self._of[id(c)]
        dp = self.dweights[:, c.edge, c.operation]
        return c.last.adjoint_tangent(g, totals, dp, self._factors(c))

    def _factors(self, c: Candidate) -> Tensor | None:
        return None if self.part.factors is None else self.part.factors[c.edge]

    def last(self, norm: Norm, g: Tensor) -> Tensor:
        return self.inner(norm, g, None)

    def inner(self, norm: Norm, g: Tensor, totals: Tensor | None) -> Tensor:
        return norm.adjoint_tangent(by_direction(g, norm.result), totals)
