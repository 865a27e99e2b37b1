"""The cells of a disparity network, as searched and as a genotype has them (AutoDispNet's
operations/genotype_cell.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks.disparity_operations import (
    OPERATIONS,
    Affine,
    candidate,
    convolution,
    normalized_candidate,
    upsampling,
)
from rdarts_fast.networks.operations import Noise, Probability, apply, drop_path_factors
from rdarts_fast.networks.supernet import SITES_PER_EDGE, MixedOp, sharing
from rdarts_fast.spaces import CELLS, INPUTS, Space

FIRST_INPUT = ("same", "larger", "smaller")  # the size of c_{k-2}, as c_{k-1}'s


class DisparityCell(nn.Module):
    """What both kinds of cells do: bring the inputs to the cell's channels and size, add up the
    edges into each node.

    inputs: the channels of each input. first: whether c_{k-2} has the size of c_{k-1}, twice or
    half of it. An upsampling cell's prediction has c_{k-1}'s size, its encoder features the
    result's, twice that.
    """

    def __init__(
        self,
        kind: str,
        inputs: Sequence[int],
        channels: int,
        first: str,
        site: int,
        affine: Affine,
    ) -> None:
        super().__init__()
        if len(inputs) != len(CELLS[kind].inputs):
            raise ValueError(f"inputs: expected {len(CELLS[kind].inputs)}, got {len(inputs)}")
        if first not in FIRST_INPUT:
            raise ValueError(f"first: expected one of {FIRST_INPUT}, got {first!r}")
        self.kind, self.site = kind, site
        self.preprocess = nn.ModuleList()
        for i, count in enumerate(inputs):
            if i == 0 and first == "smaller":
                self.preprocess.append(upsampling(count, channels, affine))
            elif i == 0 and first == "larger":
                self.preprocess.append(convolution(count, channels, 3, 2, affine))
            else:
                self.preprocess.append(convolution(count, channels, 1, 1, affine))
        self.upsample = nn.ModuleList()
        if kind == "upsample":
            self.upsample.extend(upsampling(channels, channels, affine) for _ in range(INPUTS))

    def states(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the cell's inputs in its channels, all of the size that its operations take."""
        given = list(inputs)
        if self.kind == "upsample":
            given[2] = F.interpolate(given[2], scale_factor=2.0, mode="bilinear")
        pairs = zip(self.preprocess, given, strict=True)
        states = [module(tensor) for module, tensor in pairs]
        for i, module in enumerate(self.upsample):
            states[i] = module(states[i])
        return states

    def stride(self, source: int) -> int:
        """Return the stride of an edge from `source`: 2 from the inputs of a reduction cell."""
        return 2 if self.kind == "reduce" and source < INPUTS else 1


class DisparitySearchCell(DisparityCell):
    """A cell of the supernet: each edge a mixed op; output the concatenation of the nodes."""

    def __init__(
        self,
        space: Space,
        kind: str,
        inputs: Sequence[int],
        channels: int,
        first: str,
        site: int,
        batch_norm: bool,
    ) -> None:
        super().__init__(kind, inputs, channels, first, site, False if batch_norm else None)
        self.into = [space.edges_into(kind, node) for node in range(space.nodes)]
        self.edges = nn.ModuleList()
        self.strides: list[int] = []
        make = normalized_candidate if batch_norm else candidate
        for edges in self.into:
            for source, e in enumerate(edges):
                self.strides.append(self.stride(source))
                names, at = space.cells[kind][e], site + 1 + e * SITES_PER_EDGE
                self.edges.append(MixedOp(names, channels, self.strides[-1], at, make))

    def forward(
        self, inputs: Sequence[Tensor], weights: Tensor, draws: Draws, factors: Tensor | None
    ) -> Tensor:
        """Return [N, nodes x channels, H, W]. weights: [E, O]; factors: drop path's, [E, N]."""
        states = self.states(inputs)
        for edges in self.into:
            terms = []
            for source, e in enumerate(edges):
                term = self.edges[e](states[source], weights[e], draws)
                terms.append(term if factors is None else term * factors[e].view(-1, 1, 1, 1))
            states.append(sum(terms[1:], terms[0]))
        return torch.cat(states[len(inputs) :], dim=1)

    def restricted(self, weights: Tensor) -> DisparitySearchCell:
        """Return this cell with `none` for every candidate of weight 0; weights: [E, O]."""
        part = sharing(self)
        part.edges = nn.ModuleList()
        for edge, row, stride in zip(self.edges, weights.tolist(), self.strides, strict=True):
            assert isinstance(edge, MixedOp)
            part.edges.append(edge.restricted(row, stride))
        return part


class DisparityDiscreteCell(DisparityCell):
    """A cell with the genotype's operations only; batch norms, where there are any, with affine."""

    def __init__(
        self,
        genotype: Genotype,
        kind: str,
        inputs: Sequence[int],
        channels: int,
        first: str,
        site: int,
        batch_norm: bool,
    ) -> None:
        affine = True if batch_norm else None
        super().__init__(kind, inputs, channels, first, site, affine)
        self.sources = [[source for _, source in node] for node in genotype.cells[kind]]
        self.edges = nn.ModuleList()
        for e, (source, _, name) in enumerate(genotype.edges(kind)):
            operation = OPERATIONS[name](channels, self.stride(source), affine)
            if isinstance(operation, Noise):
                operation.site = site + 1 + e
            self.edges.append(operation)

    def forward(
        self, inputs: Sequence[Tensor], draws: Draws | None, factors: Tensor | None
    ) -> Tensor:
        """Return [N, nodes x channels, H, W]. factors: drop path's, [E, N]; an identity has
        none.
        """
        states = self.states(inputs)
        e = 0
        for sources in self.sources:
            terms = []
            for source in sources:
                operation = self.edges[e]
                term = apply(operation, states[source], draws)
                if factors is not None and not isinstance(operation, nn.Identity):
                    term = term * factors[e].view(-1, 1, 1, 1)
                terms.append(term)
                e += 1
            states.append(sum(terms[1:], terms[0]))
        return torch.cat(states[len(inputs) :], dim=1)


def cell_factors(
    cell: DisparitySearchCell | DisparityDiscreteCell,
    views: Tensor,
    draws: Draws,
    probability: Probability,
    times: int,
) -> Tensor | None:
    """Return drop path's factors of a batch, [E, times N]; None where there are none.

    times: a cell that sees both views of a sample drops the same edges in both.
    """
    if probability == 0.0 or not cell.training:
        return None
    return drop_path_factors(draws, cell.site, len(cell.edges), views, probability).repeat(1, times)
