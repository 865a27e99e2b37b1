"""The backward pass of a fused cell, from its last node: one pass over a node's terms z gives the
gradients of the edges' weights and the coefficients that make the gradient of each z, which the
stages form from those as they read. What leaves a state adds to one gradient of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdarts_fast.kernels.array import chosen, coefficient_dtype, empty
from rdarts_fast.kernels.mixing import Sources, launch_mixing_backward
from rdarts_fast.kernels.node_sum import launch_node_sum
from rdarts_fast.kernels.norm_table import NormTable
from rdarts_fast.kernels.pool import KINDS, launch_pool_adjoint
from rdarts_fast.kernels.stages import launch_stages_backward
from rdarts_fast.networks.cell_forward import CellPass, Kept, Setting, own_term
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

    def compute(self, g: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the weights, the inputs' tensors and the parameters."""
        dweights = torch.zeros_like(self.weights)
        for node in reversed(range(len(self.plan.nodes))):
            found, state = self.plan.nodes[node], node + INPUTS
            own = _dense(g[node].to(self.like.dtype))  # float32's in bfloat16, by the setting
            self.ds[state] = self.gradient_of(state, own)
            self.table.node_backward(
                self.ds[state],
                [self.kept.z[row] for row in found.terms.rows],
                found.terms,
                self.weights,
                self.kept.means[state],
                dweights,
                self.factors_of(found.edges),
                self.drawn(node, self.kept.noise.get(state)),
            )
        dinputs = [self.preprocess_backward(*pair) for pair in enumerate(self.plan.inputs)]
        return [dweights, *(dv for found in dinputs for dv in found), *self.dparameters]

    def preprocess_backward(self, i: int, reduction: Reduction) -> list[Tensor | None]:
        """Return the gradients of an input's tensors."""
        tensors = self.inputs[i]
        dv: list[Tensor | None] = [None] * len(tensors)
        if self.wants_inputs[i]:
            dv = [empty(x, x.shape, torch.channels_last) for x in tensors]
        elif not self.wants_parameters:
            return dv
        ds, z = self.gradient_of(i, None), self.kept.z[i]
        self.table.node_backward(ds, [z], own_term(i), None, self.kept.means[i], None)
        weights = reduction.by_edge(self.parameters[reduction.parameters])
        dweights = launch_mixing_backward(
            Sources(tensors, weights, reduction.stride),
            [ds],
            [z],
            self.table.affine(i, 1),
            dv,
            [False] * len(dv),
            wants_weights=self.wants_parameters,
        )
        self.keep(dweights, reduction.parameters)
        return dv

    def gradient_of(self, i: int, g: Tensor | None) -> Tensor:
        """Return the gradient of state i: g, and what comes back along the edges that leave it."""
        source, state = self.plan.sources[i], self.kept.states[i]
        ds = self.plain(i, source, g)
        adds = ds is not None
        if ds is None:
            ds = empty(state, state.shape, torch.channels_last)
        for stages in source.stages:
            self.convolve_backward(state, stages, ds, adds)
            adds = True
        for reduction in source.reductions:
            self.reduce_backward(state, reduction, ds, adds)
            adds = True
        return ds if adds else ds.zero_()

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
        dtype = coefficient_dtype(like.dtype)
        scales = [like.new_ones(count, like.shape[1], dtype=dtype)] if count else []
        factors = None
        if source.skips:
            scales.append(self.table.rows(source.skip_row, len(source.skips))[0])
            if self.factors is not None:
                factors = chosen(self.factors, source.skips)
                if count:
                    whole = like.new_ones(count, like.shape[0], dtype=dtype)
                    factors = torch.cat([whole, factors])
        scale = scales[0] if len(scales) == 1 else torch.cat(scales)
        terms += self.gradients_into(source.skips)
        out = empty(like, like.shape, torch.channels_last)
        return launch_node_sum(None, scale, None, factors, None, None, terms, out)

    def gradients_into(self, edges: Sequence[int]) -> list[Tensor]:
        """Return the gradients of the states that some edges enter."""
        return [self.ds[self.cell.targets[e]] for e in edges]

    def keep(self, gradients: Sequence[Tensor], place: slice) -> None:
        """Put the gradients of some parameters in their place, where they are wanted."""
        if self.wants_parameters:
            self.dparameters[place] = gradients

    def convolve_backward(self, state: Tensor, stages: Stages, ds: Tensor, adds: bool) -> None:
        """Go back through all stages of some separable convolutions, to the state's gradient."""
        count = len(stages.edges)
        dweights = launch_stages_backward(
            [state] * count,
            self.links(stages, running=False),
            [self.z_of(first, count) for first in stages.rows],
            self.kept.maps[stages.rows[0]],
            self.table,
            self.gradients_into(stages.edges),
            self.factors_of(stages.edges),
            [ds] * count,
            [adds, *[True] * (count - 1)],
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
        g = launch_node_sum(None, by_g, None, factors, None, None, ds).to(result.dtype)
        parameters = self.own_parameters[single.parameters]
        wanted = [p for p in parameters if p.requires_grad and self.wants_parameters]
        if not result.requires_grad:
            return torch.zeros_like(x, dtype=self.like.dtype)
        dx, *found = torch.autograd.grad(
            result, [x, *wanted], g, retain_graph=True, allow_unused=True
        )
        by_parameter = dict(zip(map(id, wanted), found, strict=True))
        self.dparameters[single.parameters] = [by_parameter.get(id(p)) for p in parameters]
        return (torch.zeros_like(x) if dx is None else dx).to(self.like.dtype)


def _dense(g: Tensor) -> Tensor:
    """Return g, copied where its elements do not lie densely (a mean's gradient)."""
    dense = g.is_contiguous(memory_format=torch.channels_last) or g.is_contiguous()
    return g if dense else g.contiguous(memory_format=torch.channels_last)
