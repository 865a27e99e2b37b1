"""The backward pass of a fused cell, from its last node: one pass over a node's terms z gives the
gradients of the edges' weights and the coefficients that make the gradient of each z, which the
stages form from those as they read. What leaves a state adds to one gradient of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdarts_fast.kernels.array import chosen, coefficient_dtype, empties, empty
from rdarts_fast.kernels.launches import at_once, run_waiting, together
from rdarts_fast.kernels.mixing import (
    MixingGradients,
    Sources,
    launch_mixing_backward,
    launch_mixings_backward,
)
from rdarts_fast.kernels.node_sum import launch_node_sum, launch_node_sums
from rdarts_fast.kernels.norm_table import NormTable
from rdarts_fast.kernels.pool import KINDS, launch_pool_adjoint
from rdarts_fast.kernels.stages import launch_stages_backward
from rdarts_fast.networks.cell_forward import CellPass, Kept, Setting
from rdarts_fast.networks.plan import Pool, Reduction, Single, Source, Stages
from rdarts_fast.spaces import INPUTS


class CellBackward(CellPass):
    """A backward pass. needs: which of the weights, the inputs' tensors and the parameters have
    gradients.
    """

    def __init__(
        self,
        setting: Setting,
        weights: Tensor,
        tensors: Sequence[Tensor],
        kept: Kept,
        needs: Sequence[bool],
    ) -> None:
        super().__init__(setting, weights, tensors)
        of_inputs, of_parameters = setting.split(needs[1:])
        self.wants_inputs = [any(flags) for flags in of_inputs]
        self.wants_parameters = any(of_parameters)
        self.kept = kept
        self.table = NormTable.for_backward(kept.table[0], self.like, self.training)
        self.ds: dict[int, Tensor] = {}  # the gradient of each state
        self.dparameters: list[Tensor | None] = [None] * len(self.parameters)

    def compute(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of the weights, the inputs' tensors and the parameters.

        given: those of the nodes and, where the cell passes them on, of the second input's tensors;
        to these it adds in place.
        """
        nodes = len(self.plan.nodes)
        g = _dense([None if one is None else one.to(self.like.dtype) for one in given])
        self.passed = g[nodes:]
        dweights = (torch.empty_like if self.plan.weighs_all else torch.zeros_like)(self.weights)
        with together(self.like.device):
            for node in reversed(range(nodes)):
                found, state = self.plan.nodes[node], node + INPUTS
                own = g[node]
                if own is None:
                    z = self.kept.states[state]
                    own = torch.zeros_like(z, dtype=self.like.dtype)
                self.gradients_of([state], own)
                self.table.node_backward(
                    self.ds[state],
                    [self.kept.z[row] for row in found.terms.rows],
                    found.terms,
                    self.weights,
                    self.kept.means[state],
                    dweights,
                    self.factors_of(found.edges),
                    self.drawn(node, self.kept.noise.get(state)),
                    self.plan.one_of(state - 1),
                )
            dv = self.preprocess_backward()
        return [dweights, *dv[0], *dv[1], *self.dparameters]

    def preprocess_backward(self) -> list[list[Tensor | None]]:
        """Return the gradients of the tensors of both inputs, which share launches."""
        dv: list[list[Tensor | None]] = [[None] * len(tensors) for tensors in self.inputs]
        wanted = [i for i in range(INPUTS) if self.wants_inputs[i] or self.wants_parameters]
        if not wanted:
            return dv
        self.gradients_of(range(INPUTS), None)
        for some in self.inputs_together():
            ds, z = ([part[i] for i in some] for part in (self.ds, self.kept.z))
            self.table.norms_backward(ds, z, some.start)
            inputs = [i for i in some if i in wanted]
            calls, wants = [self.input_backward(i) for i in inputs], self.wants_parameters
            found = launch_mixings_backward(calls, wants_weights=wants) if calls else []
            for i, call, dweights in zip(inputs, calls, found, strict=True):
                dv[i] = list(call.dv)
                self.keep(dweights, self.plan.inputs[i].parameters)
        return dv

    def input_backward(self, i: int) -> MixingGradients:
        """Return what gives the gradients of an input's tensors."""
        reduction, tensors = self.plan.inputs[i], self.inputs[i]
        dv, adds = self.room_for(i)
        weights = reduction.by_edge(self.parameters[reduction.parameters])
        sources = Sources(tensors, weights, reduction.stride)
        rows = self.table.affine(i, 1)
        return MixingGradients(sources, [self.ds[i]], [self.kept.z[i]], rows, dv, adds)

    def room_for(self, i: int) -> tuple[list[Tensor | None], list[bool]]:
        """Return where the gradients of an input's tensors go, if wanted, and which are there to be
        added to.
        """
        if not self.wants_inputs[i]:
            return [None for _ in self.inputs[i]], [False for _ in self.inputs[i]]
        passed = self.passed if i == 1 and self.passed else [None] * len(self.inputs[i])
        room: list[Tensor | None] = [
            empty(x, x.shape, torch.channels_last) if g is None else _inner(g)
            for x, g in zip(self.inputs[i], passed, strict=True)
        ]
        return room, [g is not None for g in passed]

    def gradients_of(self, states: Sequence[int], g: Tensor | None) -> None:
        """Make the gradients of states: g, and what comes back along the edges that leave them."""
        begun = set()  # those that are there to be added to
        both = self.plan.alike_skips if len(states) == INPUTS else []
        plains = (
            self.skips_backward(both)
            if both
            else [self.plain(i, self.plan.sources[i], g) for i in states]
        )
        for i, plain in zip(states, plains, strict=True):
            state = self.kept.states[i]
            self.ds[i] = empty(state, state.shape, torch.channels_last) if plain is None else plain
            if plain is not None:
                begun.add(i)
        sources = [(i, self.plan.sources[i]) for i in states]
        for stages in [stages for _, source in sources for stages in source.stages]:
            self.convolve_backward(stages, begun)
        for i, reduction in [(i, reduction) for i, s in sources for reduction in s.reductions]:
            self.reduce_backward(self.kept.states[i], reduction, self.ds[i], i in begun)
            begun.add(i)
        for i in set(states) - begun:
            self.ds[i].zero_()

    def plain(self, i: int, source: Source, g: Tensor | None) -> Tensor | None:
        """Return the part of a state's gradient that no convolution adds; None where there is none.

        It is g itself only where nothing is added to it.
        """
        terms = [] if g is None else [g]
        if source.pools:
            terms.append(self.pool_backward(i, source))
        terms += [self.single_backward(single) for single in source.singles]
        if not terms and not source.skips:
            return None
        alone = len(terms) == 1 and not (source.skips or source.stages or source.reductions)
        if g is not None and alone:
            return g
        like, count = self.kept.states[i], len(terms)
        factors = None
        if source.skips and self.factors is not None:
            factors = chosen(self.factors, source.skips)
            if count:
                whole = like.new_ones(count, like.shape[0], dtype=factors.dtype)
                factors = torch.cat([whole, factors])
        scale = self.scale_of(source, count, own=g is not None)
        terms += self.gradients_into(source.skips)
        out = empty(like, like.shape, torch.channels_last)
        return launch_node_sum(None, scale, None, factors, None, None, terms, out)

    def skips_backward(self, both: Sequence[int]) -> list[Tensor]:
        """Return what comes back along the skips that leave the inputs: edges of the first, then as
        many of the second, to the same nodes.
        """
        count, first = len(both) // INPUTS, self.plan.sources[0].skip_row
        scale, _, _ = self.table.rows(first, len(both))
        terms, like = self.gradients_into(both[:count]), self.kept.states[0]
        out = empties(INPUTS, like, like.shape, torch.channels_last)
        return launch_node_sums(scale, self.factors_of(both), terms, out)

    def scale_of(self, source: Source, count: int, *, own: bool) -> Tensor:
        """Return what multiplies `count` gradients, of which a node's own is one or not, and those
        of the skips in a state's gradient, [count + skips, C].
        """
        skips = len(source.skips)
        if skips and count <= own:
            return self.table.rows(source.skip_row - count, count + skips)[0]
        dtype, channels = coefficient_dtype(self.like.dtype), self.table.statistics.shape[2]
        ones = self.like.new_ones(count, channels, dtype=dtype)
        if not skips:
            return ones
        run_waiting()
        return torch.cat([ones, self.table.rows(source.skip_row, skips)[0]])

    def gradients_into(self, edges: Sequence[int]) -> list[Tensor]:
        """Return the gradients of the states that some edges enter."""
        return [self.ds[self.cell.targets[e]] for e in edges]

    def keep(self, gradients: Sequence[Tensor], place: slice) -> None:
        """Put the gradients of some parameters in their place, where they are wanted."""
        if self.wants_parameters:
            self.dparameters[place] = gradients

    def convolve_backward(self, stages: Stages, begun: set[int]) -> None:
        """Go back through all stages of some separable convolutions, to their states' gradients, of
        which some have begun.
        """
        count, adds = len(stages.edges), []
        for i in stages.states:
            adds.append(i in begun)
            begun.add(i)
        dweights = launch_stages_backward(
            [self.kept.states[i] for i in stages.states],
            self.links(stages, running=False),
            [self.z_of(first, count) for first in stages.rows],
            self.kept.maps[stages.rows[0]],
            self.table,
            self.gradients_into(stages.edges),
            self.factors_of(stages.edges),
            [self.ds.get(i) for i in stages.states],
            adds,
            wants_weights=self.wants_parameters,
        )
        for place, found in zip(stages.parameters, dweights, strict=True):
            self.keep(found, place)

    def z_of(self, first: int, count: int) -> list[Tensor]:
        """Return the tensors of `count` rows from `first` on."""
        return [self.kept.z[row] for row in range(first, first + count)]

    def reduce_backward(self, state: Tensor, reduction: Reduction, ds: Tensor, adds: bool) -> None:
        """Go back through FactorizedReduce, to the state's gradient."""
        count, place, edges = len(reduction.edges), reduction.parameters, reduction.edges
        dweights = launch_mixing_backward(
            Sources([state], reduction.by_edge(self.parameters[place]), reduction.stride),
            self.gradients_into(edges),
            self.z_of(reduction.row, count) if self.training else [None] * count,
            self.table.affine(reduction.row, count, self.factors_of(edges)),
            [ds],
            [adds],
            wants_weights=self.wants_parameters,
        )
        self.keep(dweights, place)

    def pool_backward(self, i: int, source: Source) -> Tensor:
        """Return what comes back through the pools of state i."""
        kinds = tuple(kind for kind in KINDS if any(pool.kind == kind for pool in source.pools))
        g = [self.gradient_of_pool([p for p in source.pools if p.kind == kind]) for kind in kinds]
        size, place = self.kept.states[i].shape[2:], self.kept.places.get(i)
        return launch_pool_adjoint(g, source.stride, kinds, size, place)

    def gradient_of_pool(self, pools: Sequence[Pool]) -> Tensor:
        """Return the gradient of one pool of a state, from all edges that use it."""
        edges = [e for pool in pools for e in pool.edges]
        terms, factors = self.gradients_into(edges), self.factors_of(edges)
        rows = [self.table.rows(pool.row, len(pool.edges)) for pool in pools]
        run_waiting()
        scale, by_z, constant = (torch.cat(parts) for parts in zip(*rows, strict=True))
        shift = None
        if self.training:  # z, once for all edges
            terms.append(self.kept.z[pools[0].row])
            scale = torch.cat([scale, by_z.sum(dim=0, keepdim=True)])
            shift = torch.cat([torch.zeros_like(constant), constant.sum(dim=0, keepdim=True)])
            if factors is not None:
                factors = torch.cat([factors, torch.ones_like(factors[:1])])
        return launch_node_sum(None, scale, shift, factors, None, None, terms)

    def single_backward(self, single: Single) -> Tensor:
        """Return what comes back through an operation that is a module."""
        x, result = self.kept.singles[single.row]
        (by_g, _, _), factors = self.table.rows(single.row, 1), self.factors_of([single.edge])
        ds = self.gradients_into([single.edge])
        parameters = self.own_parameters[single.parameters]
        wanted = [p for p in parameters if p.requires_grad and self.wants_parameters]
        if not result.requires_grad:
            return torch.zeros_like(x, dtype=self.like.dtype)
        with at_once():
            g = launch_node_sum(None, by_g, None, factors, None, None, ds).to(result.dtype)
            dx, *found = torch.autograd.grad(
                result, [x, *wanted], g, retain_graph=True, allow_unused=True
            )
        by_parameter = dict(zip(map(id, wanted), found, strict=True))
        self.dparameters[single.parameters] = [by_parameter.get(id(p)) for p in parameters]
        return (torch.zeros_like(x) if dx is None else dx).to(self.like.dtype)


def _inner(g: Tensor) -> Tensor:
    """Return g with its channels innermost, as what kernels add to lies."""
    return g.contiguous(memory_format=torch.channels_last)


def _dense(g: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return g, copied where elements do not lie densely (a mean's gradient), at once where several
    of one size do not.
    """
    by_size: dict[torch.Size, dict[int, Tensor]] = {}
    for i, one in enumerate(g):
        dense = one is None or one.is_contiguous(memory_format=torch.channels_last)
        if one is not None and not (dense or one.is_contiguous()):
            by_size.setdefault(one.shape, {})[i] = one
    found = list(g)
    for some in by_size.values():
        copies = torch.stack([one.permute(0, 2, 3, 1) for one in some.values()])
        for i, copy in zip(some, copies.permute(0, 1, 4, 2, 3), strict=True):
            found[i] = copy
    return found
