"""The forward pass of a fused cell, state by state: the convolution stages of all edges that leave
it, its pools, and the next node as one sum of what its candidates give their last batch norms (z),
normalised as it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rdarts_fast import native
from rdarts_fast.draws import Draws
from rdarts_fast.kernels.array import chosen, coefficient_dtype, empty
from rdarts_fast.kernels.launches import at_once, together
from rdarts_fast.kernels.mixing import Sources, launch_mixing, launch_mixings
from rdarts_fast.kernels.node_sum import launch_scaled
from rdarts_fast.kernels.norm_table import Drawn, NormTable, Running
from rdarts_fast.kernels.pool import KINDS, launch_pools
from rdarts_fast.kernels.stages import Link, launch_stages
from rdarts_fast.networks.plan import Plan, Reduction, Rule, Single, Source, Stages
from rdarts_fast.spaces import INPUTS


@dataclass(frozen=True)
class Setting:
    """What a cell computes with beside tensors that have gradients."""

    cell: Any  # a SearchCell
    plan: Plan
    draws: Draws
    factors: Tensor | None  # [E, N], drop path's
    counts: Sequence[int]  # tensors that make up each input
    training: bool  # the cell's mode
    recorded: bool  # whether there may be a backward
    narrow: bool = False  # whether the backward has bfloat16
    again: bool = False  # whether the backward computes the forward again
    passes: bool = False  # whether the second input's tensors are results, too

    def split(self, tensors: Sequence[Any]) -> tuple[list[list[Any]], list[Any]]:
        """Return those of the two inputs, and those of the parameters."""
        first, second = self.counts
        inputs = [list(tensors[:first]), list(tensors[first : first + second])]
        return inputs, list(tensors[first + second :])


@dataclass
class Kept:
    """What the backward needs of the forward. Rows and states are numbered as in the plan."""

    z: dict[int, Tensor] = field(default_factory=dict)  # of each row
    states: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)  # first row -> [S, 2, G, C]
    places: dict[int, Tensor] = field(default_factory=dict)  # state -> where its maxima lie
    means: dict[int, Tensor] = field(default_factory=dict)  # state -> of its terms, [K, C]
    noise: dict[int, Tensor] = field(default_factory=dict)  # state -> drawn numbers
    table: dict[int, Tensor] = field(default_factory=dict)  # 0 -> the statistics [2, R, C]
    # row -> x and the result: of operations without kernels, whose graph it holds
    singles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def _parts(self) -> list[dict[int, Tensor]]:
        parts = [self.z, self.states, self.maps, self.places, self.means, self.noise]
        return [*parts, self.table]

    def taken(self) -> tuple[Kept, list[Tensor]]:
        """Return this without its tensors, and those, to be saved for the backward: an output that
        its own function held otherwise would be a cycle.
        """
        tensors = [tensor for part in self._parts() for tensor in part.values()]
        emptied: list[Any] = [dict.fromkeys(part) for part in self._parts()]
        return self._with(emptied), tensors

    def restored(self, tensors: Sequence[Tensor]) -> Kept:
        """Return what was taken, from the saved tensors."""
        rest = iter(tensors)
        kept = self._with([{key: next(rest) for key in part} for part in self._parts()])
        for row, z in kept.z.items():  # dense as they were, whatever hooks have made of them
            kept.z[row] = z.contiguous(memory_format=torch.channels_last)
        return kept

    def _with(self, parts: list[dict[int, Tensor]]) -> Kept:
        kept = Kept(*parts)
        kept.singles = self.singles
        return kept


class CellPass:
    """What both passes share: the operands, by what the plan calls them."""

    def __init__(self, setting: Setting, weights: Tensor, tensors: Sequence[Tensor]) -> None:
        self.cell, self.plan, self.weights = setting.cell, setting.plan, weights
        self.inputs, parameters = setting.split(tensors)
        self.own_parameters: list[Tensor] = parameters
        self.parameters: list[Tensor] = [weight.contiguous() for weight in parameters]
        self.like: Tensor = self.inputs[0][0]
        self.draws, self.factors = setting.draws, setting.factors
        self.training = setting.training
        if self.factors is not None:
            self.factors = self.factors.to(coefficient_dtype(self.like.dtype))

    def factors_of(self, edges: Sequence[int]) -> Tensor | None:
        """Return drop path's factors of some edges, [len(edges), N]."""
        return None if self.factors is None else chosen(self.factors, edges)

    def inputs_together(self) -> list[range]:
        """Return the cell's inputs in groups that share launches: on a GPU both; on the CPU each is
        one, so that what a kernel leaves in the cache is read next.
        """
        if native.place(self.like.device).device >= 0:
            return [range(INPUTS)]
        return [range(i, i + 1) for i in range(INPUTS)]

    def links(self, stages: Stages, *, running: bool) -> list[Link]:
        """Return the stages of some separable convolutions."""
        return [
            Link(
                geometry,
                self.parameters[stages.parameters[s]],
                stages.rows[s],
                buffers_of(stages.norms[s]) if running else (),
            )
            for s, geometry in enumerate(stages.geometries)
        ]

    def drawn(self, node: int, numbers: Tensor | None) -> Drawn | None:
        """Return a node's noise."""
        found = self.plan.nodes[node]
        if not found.sites:
            return None
        weights = chosen(self.weights.view(-1), found.drawn)
        factors = self.factors_of(found.drawn_edges)
        return Drawn((self.draws, found.sites), weights, factors, found.drawn, numbers)


def buffers_of(norms: Sequence[nn.BatchNorm2d]) -> list[Running]:
    """Return the running means and variances, and the numbers of batches."""
    buffers: list[Any] = [norm._buffers for norm in norms]
    return [
        (found["running_mean"], found["running_var"], found["num_batches_tracked"])
        for found in buffers
    ]


def check_single(single: Single, source: Source, state: Tensor, result: Tensor) -> None:
    """Raise TypeError or ValueError unless a module gave what its edge needs."""
    n, c, h, w = state.shape
    expected = (n, c, -(-h // source.stride), -(-w // source.stride))
    name = f"edge {single.edge}: {type(single.module).__name__}"
    if tuple(result.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(result.shape)}")
    if result.dtype != state.dtype or result.device != state.device:
        got = f"{result.dtype} on {result.device}"
        raise TypeError(f"{name}: expected {state.dtype} on {state.device}, got {got}")


class CellForward(CellPass):
    """A forward pass; `kept` is what its backward needs."""

    def __init__(self, setting: Setting, weights: Tensor, tensors: Sequence[Tensor]) -> None:
        super().__init__(setting, weights, tensors)
        self.kept, self.recorded = Kept(), setting.recorded
        channels = sum(half.out_channels for half in self.plan.inputs[0].convolutions[0])
        self.table = NormTable(self.plan.rows, channels, self.like, self.training)
        self.kept.table[0], self.channels = self.table.statistics, channels

    def compute(self) -> list[Tensor]:
        """Return the nodes."""
        nodes = []
        with together(self.like.device):
            self.preprocess()
            for i, source in enumerate(self.plan.sources):
                self.leave(i, source)
                node = i - INPUTS + 1  # all that enters it has left the states up to i
                if 0 <= node < len(self.plan.nodes):
                    nodes.append(self.enter(node))
        return nodes

    def preprocess(self) -> None:
        """Make the inputs of the cell its first states."""
        dtype = coefficient_dtype(self.like.dtype)
        shape = (2, INPUTS, 1, self.channels)
        scale, shift = torch.empty(shape, dtype=dtype, device=self.like.device)
        sources, rows = [], []
        for i, reduction in enumerate(self.plan.inputs):
            buffers, maps = buffers_of(reduction.norms), (scale[i], shift[i])
            sources.append(self.sources_of(reduction, self.inputs[i]))
            rows.append(self.table.rows_at(i, buffers, reduction.rule, maps))
        first, second = (one.out_shape() for one in sources)
        if first != second:
            raise ValueError(f"inputs: expected two of one size, got {first} and {second}")
        for some in self.inputs_together():
            pairs = launch_mixings([sources[i] for i in some], [rows[i] for i in some])
            z, among = [one for (one,), _ in pairs], slice(some.start, some.stop)
            self.kept.z.update(zip(some, z, strict=True))
            states = launch_scaled(z, scale[among], shift[among])
            self.kept.states.update(zip(some, states, strict=True))

    def enter(self, node: int) -> Tensor:
        """Return a node, which becomes the next state."""
        found, state = self.plan.nodes[node], node + INPUTS
        z = [self.kept.z[row] for row in found.terms.rows]
        factors = self.factors_of(found.edges)
        if found.sites and self.recorded and self.like.device.type == "cpu":
            n, c, h, w = z[0].shape
            shape = (len(found.sites), n, c, h * w)
            self.kept.noise[state] = empty(self.like, shape, torch.contiguous_format, torch.float32)
        drawn = self.drawn(node, self.kept.noise.get(state))
        out, means = self.table.node(z, found.terms, self.weights, factors, drawn)
        self.kept.states[state], self.kept.means[state] = out, means
        return out

    def leave(self, i: int, source: Source) -> None:
        """Compute the candidates on the edges that leave state i, up to their last batch norms."""
        state = self.kept.states[i]
        for stages in source.stages:
            self.convolve(stages)
        for reduction in source.reductions:
            self.mix(reduction, state)
        if source.pools:
            self.pool(i, source)
        for g in range(len(source.skips)):
            self.kept.z[source.skip_row + g] = state
        for single in source.singles:
            with at_once(), torch.set_grad_enabled(self.recorded):
                x = state.detach().requires_grad_(self.recorded)
                result = single.module(x)
            check_single(single, source, state, result)
            if self.recorded:
                self.kept.singles[single.row] = x, result
            self.kept.z[single.row] = result.detach()

    def convolve(self, stages: Stages) -> None:
        """Compute all stages of some separable convolutions."""
        x, links = [self.kept.states[i] for i in stages.states], self.links(stages, running=True)
        z, maps = launch_stages(x, links, self.table, stages.rule)
        for tensors, first in zip(z, stages.rows, strict=True):
            self.kept.z.update(enumerate(tensors, first))
        self.kept.maps[stages.rows[0]] = maps

    def sources_of(self, reduction: Reduction, tensors: Sequence[Tensor]) -> Sources:
        """Return what FactorizedReduce or the 1x1 convolution of an input computes with."""
        weights = reduction.by_edge(self.parameters[reduction.parameters])
        return Sources(tensors, weights, reduction.stride)

    def mix(self, reduction: Reduction, state: Tensor) -> None:
        """Compute FactorizedReduce."""
        rows = self.table.rows_at(reduction.row, buffers_of(reduction.norms), reduction.rule)
        z, _ = launch_mixing(self.sources_of(reduction, [state]), rows)
        self.kept.z.update(enumerate(z, reduction.row))

    def pool(self, i: int, source: Source) -> None:
        """Compute the pools of state i."""
        kinds = tuple(kind for kind in KINDS if any(pool.kind == kind for pool in source.pools))
        values, place, sums = launch_pools(self.kept.states[i], source.stride, kinds)
        if place is not None:
            self.kept.places[i] = place
        for pool in source.pools:
            k, count = kinds.index(pool.kind), len(pool.edges)
            z = [values[k]] * count
            self.normalise(pool.row, z, sums, pool.norms, pool.rule, [k] * count)

    def normalise(
        self,
        first: int,
        z: Sequence[Tensor],
        sums: Tensor,
        norms: Sequence[nn.BatchNorm2d],
        rule: Rule,
        places: Sequence[int],
    ) -> None:
        """Give each z its row, from `first` on.

        sums: [3, G', C]. places: of each z among the G'.
        """
        self.kept.z.update(enumerate(z, first))
        pairs = [(sums, g) for g in places]
        self.table.fill(first, z[0].shape, pairs, buffers_of(norms), rule)
