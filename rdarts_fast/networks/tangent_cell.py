"""A cell of the supernet as chains (chain.py): its primal pass, and the tangents of V directions of
the alphas through it. adjoint_cell.py takes gradients back through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rdarts_fast.draws import Draws
from rdarts_fast.kernels.array import chosen, empty
from rdarts_fast.networks.chain import Chain, State
from rdarts_fast.networks.norm import Norm, products
from rdarts_fast.networks.operations import Noise, Probability, Zero, drop_path_factors, drops
from rdarts_fast.networks.tangent import steps_of
from rdarts_fast.networks.weighted_sum import sum_into
from rdarts_fast.spaces import INPUTS, edges_into


@dataclass
class Candidate:
    """A term of a node: its edge and place there, its chain, or its noise."""

    edge: int
    operation: int
    source: int
    chain: Chain | None
    result: Tensor | None = None  # what the weight multiplies
    gradient: Tensor | None = None  # of the node, with drop path's factors: [N, C, H, W]

    @property
    def last(self) -> Norm | None:
        """The batch norm that the candidate ends with."""
        return None if self.chain is None else self.chain.last


@dataclass
class CellParts:
    """A cell as chains, and what its passes keep."""

    cell: Any  # a SearchCell
    inputs: list[Chain]
    nodes: list[list[Candidate]]
    factors: Tensor | None = None  # [E, N]
    states: list[State] = field(default_factory=list)
    before: list[list[State]] = field(default_factory=list)  # the cell's two inputs

    @classmethod
    def of(cls, cell: Any) -> CellParts | None:
        """Return the parts of a cell; None where an operation has no steps."""
        inputs = [steps_of(module) for module in (cell.preprocess0, cell.preprocess1)]
        nodes: list[list[Candidate]] = []
        for node in range(cell.nodes):
            nodes.append([])
            for source, e in enumerate(edges_into(node)):
                for o, module in enumerate(cell.edges[e].operations):
                    if isinstance(module, Zero):
                        continue
                    chain = None
                    if not isinstance(module, Noise):
                        steps = steps_of(module)
                        if steps is None:
                            return None
                        chain = Chain(steps)
                    nodes[-1].append(Candidate(e, o, source, chain))
        found = [Chain(steps) for steps in inputs if steps]
        if len(found) != INPUTS or any(chain.last is None for chain in found):
            return None
        return cls(cell, found, nodes)

    def primal(
        self, before: list[list[State]], weights: Tensor, draws: Draws, drop_path: Probability
    ) -> list[State]:
        """Compute the cell; return the states that make up its output. weights: [E, O]."""
        cell, self.before = self.cell, before
        like = before[0][0].value
        if drops(drop_path) and cell.training:
            self.factors = drop_path_factors(draws, cell.site, len(cell.edges), like, drop_path)
        self.states = []
        for chain, states in zip(self.inputs, before, strict=True):
            self.states.append(State(chain.primal(states), any(s.moves for s in states)))
        for candidates in self.nodes:
            for candidate in candidates:
                candidate.result = self._result(candidate, draws)
            self.states.append(State(self._sum(candidates, weights), True))
        return self.states[INPUTS:]

    def _result(self, candidate: Candidate, draws: Draws) -> Tensor:
        state = self.states[candidate.source]
        if candidate.chain is None:
            module = self.cell.edges[candidate.edge].operations[candidate.operation]
            x: Tensor = module(state.value, draws)
        else:
            x = candidate.chain.primal([state])
        return x.contiguous(memory_format=torch.channels_last)

    def _sum(self, candidates: Sequence[Candidate], weights: Tensor) -> Tensor:
        """Return a node from its candidates' results."""
        if not candidates:
            stride = 2 if self.cell.kind == "reduce" else 1
            none = torch.zeros_like(self.states[0].value[:, :, ::stride, ::stride])
            return none.contiguous(memory_format=torch.channels_last)
        z = [c.result for c in candidates if c.result is not None]
        out = empty(z[0], z[0].shape, torch.channels_last)
        scale = torch.stack([weights[c.edge, c.operation].expand(out.shape[1]) for c in candidates])
        sum_into(out, z, scale, self.factors_of(candidates))
        return out

    def factors_of(self, candidates: Sequence[Candidate]) -> Tensor | None:
        """Return drop path's factors of some candidates, [K, N]."""
        edges = [c.edge for c in candidates]
        return None if self.factors is None else chosen(self.factors, edges)

    def tangent(
        self, weights: Tensor, dweights: Tensor, along: Tensor, hessian: Tensor | None
    ) -> None:
        """Let the tangents of V directions through the cell.

        weights: [E, O]. dweights: theirs, [V, E, O]. along: [V, E, O], to which the sums of the
        gradients with each candidate's tangents are added. hessian: [V, V], likewise; without one
        all is kept that the way back needs.
        """
        for i, (chain, states) in enumerate(zip(self.inputs, self.before, strict=True)):
            dz = chain.tangent(states, hessian)
            if dz is not None:
                assert chain.last is not None
                if hessian is not None:
                    d = chain.last.directions
                    hessian[:d, :d] += chain.last.curvature
                dz = chain.last.tangent(dz)
            self.states[i].tangent = dz
        for node, candidates in enumerate(self.nodes):
            terms = [self._tangent_of(c, weights, along, hessian) for c in candidates]
            state = self.states[INPUTS + node]
            static = hessian is None
            state.tangent = self._node(candidates, terms, weights, dweights, state.value, static)

    def norms(self) -> list[Norm]:
        """Return all batch norms."""
        chains = [c.chain for node in self.nodes for c in node if c.chain is not None]
        steps = [step for chain in (*self.inputs, *chains) for step in chain.steps]
        return [step for step in steps if isinstance(step, Norm)]

    def forget(self) -> None:
        """Drop all tangents."""
        for norm in self.norms():
            norm.forget()
        for state in self.states:
            state.tangent = None

    def _tangent_of(
        self, c: Candidate, weights: Tensor, along: Tensor, hessian: Tensor | None
    ) -> Tensor | None:
        """Return the tangents of a candidate, before its last batch norm where it has one."""
        if c.chain is None:
            return None
        dz = c.chain.tangent([self.states[c.source]], hessian)
        if dz is None:
            return None
        last = c.last
        if last is not None:
            d, p = last.directions, weights[c.edge, c.operation].double()
            if hessian is not None:
                hessian[:d, :d] += p * last.curvature
            along[:d, c.edge, c.operation] += last.along
        else:
            assert c.gradient is not None
            found = products(c.gradient, dz.split(len(c.gradient)))
            along[: len(found), c.edge, c.operation] += found.sum(dim=1)
        return dz

    def _node(
        self,
        candidates: Sequence[Candidate],
        terms: Sequence[Tensor | None],
        weights: Tensor,
        dweights: Tensor,
        like: Tensor,
        static: bool,
    ) -> Tensor | None:
        """Return the tangents of a node: sum of p dz_hat + dp z_hat, with drop path's factors; of
        as many directions as move it, or, `static`, of all, whatever their values.
        """
        if not candidates:
            return None
        n, channels = like.shape[:2]
        rows = [dweights[:, c.edge, c.operation] for c in candidates]
        dp = torch.stack(rows, dim=1).double()  # [V, K]
        directions = (
            len(dp) if static else _moving(dp, [len(t) // n for t in terms if t is not None])
        )
        if directions == 0:
            return None
        dp = dp[:directions]
        # of the tangents, the results and 1, [V, K, C] each
        by_dz, constant = (dp.new_zeros(*dp.shape, channels) for _ in range(2))
        by_result = dp[:, :, None].repeat(1, 1, channels)
        for k, (c, dz) in enumerate(zip(candidates, terms, strict=True)):
            if dz is None:
                continue
            d, p = len(dz) // n, weights[c.edge, c.operation].double()
            by_dz[:d, k] = p
            if c.last is not None:
                own = c.last.coefficients()
                by_dz[:d, k] = p * own[0]
                by_result[:d, k] += p * own[1]
                constant[:d, k] = p * own[2]
        out = empty(like, (directions * n, *like.shape[1:]), torch.channels_last)
        shift = None
        if static or bool(constant.any()):
            shift = self._shift(candidates, constant)
        # Directions that a result stands in.
        reads = None if static else by_result.any(dim=2).tolist()
        scales = torch.stack([by_dz, by_result], dim=2).to(like.dtype)  # [V, K, 2, C]
        for v, part in enumerate(out.split(n)):
            z, at = [], []
            for k, (c, dz) in enumerate(zip(candidates, terms, strict=True)):
                if dz is not None and v * n < len(dz):
                    z.append(dz[v * n : (v + 1) * n])
                    at.append(2 * k)
                if reads is None or reads[v][k]:
                    assert c.result is not None
                    z.append(c.result)
                    at.append(2 * k + 1)
            factors = None
            if self.factors is not None:
                factors = chosen(self.factors, [candidates[i // 2].edge for i in at])
            sum_into(part, z, chosen(scales[v].flatten(0, 1), at), factors)
            if shift is not None:
                part += shift[v].to(part.dtype)[..., None, None]
        return out

    def _shift(self, candidates: Sequence[Candidate], constant: Tensor) -> Tensor:
        """Return the sum of the constants, [V, N or 1, C]."""
        if self.factors is None:
            return constant.sum(dim=1, keepdim=True)
        factors = chosen(self.factors, [c.edge for c in candidates]).double()  # [K, N]
        return torch.einsum("vkc,kn->vnc", constant, factors)


def _moving(dp: Tensor, of_terms: Sequence[int]) -> int:
    """Return how many directions, the first, move a node: by weights that move, or by its terms."""
    moved = dp.any(dim=1).nonzero()
    return max([int(moved.max()) + 1 if len(moved) else 0, *of_terms])
