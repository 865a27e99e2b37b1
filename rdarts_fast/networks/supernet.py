"""The supernet: every edge computes the weighted sum of all its candidate operations (DARTS,
section 2.2).

`backend="reference"` is the published network: one torch module per candidate, `sum(w * op(x))`.
`backend="fused"` has the same modules, parameters and buffers, and computes cells on kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from rdarts_fast.curvature import HessianOperator
from rdarts_fast.draws import SITE_NETWORK, Draws
from rdarts_fast.errors import UserError, unknown
from rdarts_fast.networks.checkpointed import checkpointed
from rdarts_fast.networks.composed import composed_cell, joined
from rdarts_fast.networks.fused import fused_cell, fused_stem
from rdarts_fast.networks.hessian import SupernetHessian, hessian_operator
from rdarts_fast.networks.operations import (
    Noise,
    Probability,
    Zero,
    apply,
    candidate,
    drop_path_factors,
    drops,
    preprocess,
    stem,
)
from rdarts_fast.networks.plan import Plan
from rdarts_fast.networks.precision import BF16, FP32
from rdarts_fast.networks.search_network import SearchNetwork, Weights
from rdarts_fast.recording import Recorder
from rdarts_fast.spaces import INPUTS, Space, edges_into, load_space

BACKENDS = ("reference", "fused")
STEM_MULTIPLIER = 3
SITES_PER_CELL = 4096  # a cell's draws: drop path at its first site, then one site a candidate
SITES_PER_EDGE = 16

States = Sequence[Tensor]
Parts = Callable[[Sequence[States], Tensor, Draws, Tensor | None], list[Tensor]]


def is_reduction(cell: int, layers: int) -> bool:
    """Whether cell number `cell` of `layers` halves the size: those at a third and two thirds."""
    return cell in (layers // 3, 2 * layers // 3)


M = TypeVar("M", bound=nn.Module)


def sharing(module: M) -> M:
    """Return a copy of `module` with the same children, of which others can take the place."""
    part = copy.copy(module)
    part._modules = dict(module._modules)
    return part


class MixedOp(nn.Module):
    """An edge of the supernet: all candidates on one input, summed under the edge's weights.

    make: (name, channels, stride) -> the candidate's module.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        channels: int,
        stride: int,
        site: int,
        make: Callable[[str, int, int], nn.Module] = candidate,
    ) -> None:
        super().__init__()
        self.operations = nn.ModuleList(make(name, channels, stride) for name in names)
        for o, operation in enumerate(self.operations):
            if isinstance(operation, Noise):
                operation.site = site + o

    def forward(self, x: Tensor, weights: Tensor, draws: Draws) -> Tensor:  # weights: [O]
        pairs = zip(weights, self.operations, strict=True)
        terms = [weight * apply(operation, x, draws) for weight, operation in pairs]
        total: Tensor = sum(terms[1:], terms[0])
        return total

    def restricted(self, weights: Sequence[float], stride: int) -> MixedOp:
        """Return this edge with `none` for every candidate of weight 0; weights: [O]."""
        part = sharing(self)
        pairs = zip(weights, self.operations, strict=True)
        part.operations = nn.ModuleList(op if weight else Zero(stride) for weight, op in pairs)
        return part


class SearchCell(nn.Module):
    """A cell of the supernet: two inputs, `space.nodes` intermediate nodes, output their
    concatenation.
    """

    def __init__(
        self,
        space: Space,
        kind: str,
        inputs: tuple[int, int],
        channels: int,
        shrunk: bool,
        site: int,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.nodes, self.site, self.fused = kind, space.nodes, site, fused
        self.narrow = self.again = False  # see fused_cell
        self.preprocess0 = preprocess(inputs[0], channels, shrunk, affine=False)
        self.preprocess1 = preprocess(inputs[1], channels, False, affine=False)
        self.edges = nn.ModuleList()
        self.strides: list[int] = []
        for node in range(space.nodes):
            for source, e in enumerate(edges_into(node)):
                stride = 2 if kind == "reduce" and source < INPUTS else 1
                names = space.cells[kind][e]
                first = site + 1 + e * SITES_PER_EDGE
                self.edges.append(MixedOp(names, channels, stride, first))
                self.strides.append(stride)

        self.targets = [node + INPUTS for node in range(space.nodes) for _ in edges_into(node)]
        self._plan: Plan | None = None  # of the modules, made at the first forward pass

    def forward(
        self,
        s0: States,
        s1: States,
        weights: Tensor,
        draws: Draws,
        drop_path: Probability,
        *,
        passes: bool = False,
    ) -> list[Tensor]:
        """Return the tensors whose channels make up the cell's output; with `passes` those of s1
        follow, for the next cell: what comes back to them is then added by this one's kernels, in
        place, so that nothing else may hold those gradients.

        s0, s1: likewise of the cell before the last and of the last. weights: [E, O].
        """
        factors = None
        if drops(drop_path) and self.training:
            like = s0[0]
            factors = drop_path_factors(
                draws, self.site, len(self.edges), like, drop_path
            )  # [E, N]
        plan = self.plan() if self.fused else None
        # Modules, too, where some batch norms are held still.
        still = plan and any(norm.training is not self.training for norm in plan.norms)
        if plan and not still and plan.whole and s0[0].device.type != "meta":
            ways = {"narrow": self.narrow, "again": self.again, "passes": passes}
            return fused_cell(self, plan, (s0, s1), weights, draws, factors, **ways)
        compute = self._reference if plan is None or still else partial(composed_cell, self)
        nodes = self._by_parts(compute, s0, s1, weights, draws, factors)
        return [*nodes, *s1] if passes else nodes

    def _by_parts(
        self,
        compute: Parts,
        s0: States,
        s1: States,
        weights: Tensor,
        draws: Draws,
        factors: Tensor | None,
    ) -> list[Tensor]:
        """Return what a way of computing the cell gives that autograd can look into."""
        if not (self.again and self.training and torch.is_grad_enabled()):
            return compute((s0, s1), weights, draws, factors)

        def of_tensors(weights: Tensor, *tensors: Tensor) -> list[Tensor]:
            inputs = tensors[: len(s0)], tensors[len(s0) :]
            return compute(inputs, weights, draws, factors)

        return checkpointed(self, of_tensors, [weights, *s0, *s1])

    def _reference(
        self,
        inputs: Sequence[States],
        weights: Tensor,
        draws: Draws,
        factors: Tensor | None,
    ) -> list[Tensor]:
        s0, s1 = map(joined, inputs)
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(self.nodes):
            terms = []
            for source, e in enumerate(edges_into(node)):
                term = self.edges[e](states[source], weights[e], draws)
                terms.append(term if factors is None else term * factors[e].view(-1, 1, 1, 1))
            states.append(sum(terms[1:], terms[0]))
        return [torch.cat(states[INPUTS:], dim=1)]

    def plan(self) -> Plan:
        """Return what the kernels compute of this cell.

        A candidate that is replaced is seen; modules inside of one must not be once it has been
        used.
        """
        edges = [edge for edge in self.edges if isinstance(edge, MixedOp)]
        operations = [list(edge.operations._modules.values()) for edge in edges]
        preprocessing = (self.preprocess0, self.preprocess1)
        if self._plan is None or not self._plan.fits(preprocessing, operations):
            self._plan = Plan(self.nodes, preprocessing, operations, self.strides)
        return self._plan

    def restricted(self, weights: Tensor) -> SearchCell:
        """Return this cell with `none` for every candidate of weight 0; weights: [E, O]."""
        part = sharing(self)
        part._plan = None
        part.edges = nn.ModuleList()
        for edge, row, stride in zip(self.edges, weights.tolist(), self.strides, strict=True):
            assert isinstance(edge, MixedOp)
            part.edges.append(edge.restricted(row, stride))
        return part

    def leaving(self, source: int) -> list[nn.Module]:
        """Return all operations on the edges that leave a state."""
        operations: list[nn.Module] = []
        for node in range(max(0, source - INPUTS + 1), self.nodes):  # those that may read it
            edge = self.edges[edges_into(node)[source]]
            assert isinstance(edge, MixedOp)
            operations += edge.operations
        return operations


class Supernet(SearchNetwork):
    """The search network of DARTS over `space` (paper, section 2.1; 8 cells of 16 channels as
    published).

    space: a Space or the name of one. channels: of the first cells, doubled at each of the two
    reductions. `drop_path_prob` is the probability of dropping an edge per sample, in train mode
    only; the search sets it each epoch. Raises UserError for an unknown backend.
    """

    has = ("--precision bf16", "--checkpoint-cells")

    def __init__(
        self,
        space: Space | str,
        channels: int = 16,
        layers: int = 8,
        classes: int = 10,
        backend: str = "fused",
        image_channels: int = 3,
    ) -> None:
        super().__init__(load_space(space) if isinstance(space, str) else space)
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        if min(channels, layers, classes, image_channels) < 1:
            raise ValueError("channels, layers, classes and image_channels need to be at least 1")
        self.backend = backend
        self.stem = stem(image_channels, STEM_MULTIPLIER * channels)
        inputs = (STEM_MULTIPLIER * channels, STEM_MULTIPLIER * channels)
        self.cells = nn.ModuleList()
        shrunk = False
        for i in range(layers):
            kind = "reduce" if is_reduction(i, layers) else "normal"
            channels *= 2 if kind == "reduce" else 1
            site = SITE_NETWORK + i * SITES_PER_CELL
            fused = backend == "fused"
            cell = SearchCell(self.space, kind, inputs, channels, shrunk, site, fused)
            self.cells.append(cell)
            inputs = (inputs[1], self.space.nodes * channels)
            shrunk = kind == "reduce"
        self.classifier = nn.Linear(inputs[1], classes)

    def compute(self, precision: str = FP32, checkpoint_cells: bool = False) -> None:
        super().compute(precision, checkpoint_cells)
        if precision == BF16 and self.backend != "fused":
            raise UserError(f"--precision bf16: the {self.backend} backend has float32 alone")
        for cell in self.cells:
            assert isinstance(cell, SearchCell)
            cell.narrow, cell.again = precision == BF16, checkpoint_cells

    def forward(self, images: Tensor, weights: Weights, draws: Draws | None = None) -> Tensor:
        """Return the logits [N, classes] of images [N, C, H, W] under the operations' weights.

        weights: cell type -> [E, O], softmax of the alphas, one-hot or anything else;
        differentiable. draws: the key of noise and drop path; without one, a fresh key from torch's
        generator. Raises ValueError where a shape does not fit.
        """
        self.check_weights(weights)
        if draws is None:
            draws = Draws(seed=int(torch.randint(2**62, ())))
        s0 = s1 = [fused_stem(self.stem, images) if self.backend == "fused" else self.stem(images)]
        for cell in self.cells:
            assert isinstance(cell, SearchCell)
            # What has no gradient is not passed on: it would get one by the alphas' alone.
            passes = any(x.requires_grad for x in s1)
            found = cell(s0, s1, weights[cell.kind], draws, self.drop_path_prob, passes=passes)
            s0, s1 = (found[-len(s1) :], found[: -len(s1)]) if passes else (s1, found)
        logits: Tensor = self.classifier(joined(s1).mean(dim=(2, 3)))
        return logits

    def restricted(self, weights: Weights) -> Supernet:
        """Return this supernet with `none` for every candidate whose weight is 0: it computes the
        others alone, on the same modules.

        Under these weights it is the same function, but that in train mode the batch norms of what
        is left away stand still. Its mode is this one's. Raises ValueError where a shape does not
        fit.
        """
        self.check_weights(weights)
        part = sharing(self)
        part.cells = nn.ModuleList()
        for cell in self.cells:
            assert isinstance(cell, SearchCell)
            part.cells.append(cell.restricted(weights[cell.kind]))
        return part

    def hessian_operator(
        self,
        alphas: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        draws: Draws | None = None,
        *,
        memory: int = 4 << 30,
        recorder: Recorder | None = None,
    ) -> SupernetHessian | HessianOperator:
        """Return the Hessian of the mean cross entropy over the alphas, for rdarts_fast.curvature.

        alphas: cell type -> [E, O]. images: [N, C, H, W], labels: [N]. In the supernet's present
        mode, with its drop path; draws fix noise and masks. Buffers and gradients stay as they are.
        memory: bytes that the tangents of the dense matrix may take, about. The reference backend,
        and a supernet with operations that tangent.py does not know, get an operator that
        differentiates twice. recorder: records products with one vector (recording.py), which
        replayed are the same.
        """
        self.check_weights(alphas)
        if draws is None:
            draws = Draws(seed=int(torch.randint(2**62, ())))
        return hessian_operator(self, alphas, images, labels, draws, memory, recorder)
