"""What a fused cell computes, found once from its modules: which candidates share a launch, and
each tensor's row of the table (kernels/norm_table.py).

Candidates of one kind on the edges that leave a state are one launch. An operation that has no
kernel stays a module; so does one whose modules are not what operations.py builds.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeGuard

from torch import Tensor, nn

from rdarts_fast.kernels.array import MOST_INPUTS
from rdarts_fast.kernels.norm_table import Terms
from rdarts_fast.kernels.pool import KINDS
from rdarts_fast.kernels.sep_stage import KERNELS, Geometry
from rdarts_fast.networks.composed import pool_of, rule_of
from rdarts_fast.networks.operations import FactorizedReduce, Noise, Zero
from rdarts_fast.spaces import INPUTS, edges_into

Rule = tuple[float, float]  # eps and momentum of a batch norm
Kind = tuple[Any, ...]  # what candidates share that are one launch
Owner = tuple[nn.Module, str]  # a module and the name of a parameter of its own
Candidate = tuple[Kind, int, int, nn.Module]  # its edge, its index into the flattened weights


@dataclass
class Stages:
    """Separable convolutions of one shape on edges that leave a state, or either of a cell's
    inputs: one stage or two.
    """

    geometries: list[Geometry]  # of each stage
    rule: Rule
    edges: list[int]
    states: list[int]  # that each leaves
    # Of each stage:
    convolutions: list[list[nn.Module]]  # the depthwise, then the pointwise
    norms: list[list[nn.BatchNorm2d]]
    rows: list[int] = field(default_factory=list)  # the first; as many as edges follow
    parameters: list[slice] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        geometries: Sequence[Geometry],
        rule: Rule,
        edges: list[int],
        states: list[int],
        modules: Sequence[nn.Sequential],
    ) -> Stages:
        """Return the stages of candidates that `_stages_of` knows."""
        parts = [list(module) for module in modules]
        firsts = range(1, 4 * len(geometries), 4)
        convolutions = [[part[i] for i in (at, at + 1) for part in parts] for at in firsts]
        norms: list[Any] = [[part[at + 2] for part in parts] for at in firsts]
        return cls(list(geometries), rule, edges, states, convolutions, norms)

    def owners(self, stage: int) -> list[Owner]:
        """Return what owns a stage's depthwise weights, then the pointwise."""
        return [(convolution, "weight") for convolution in self.convolutions[stage]]


@dataclass
class Reduction:
    """FactorizedReduce on edges that leave a state, or before a cell's input; or, with one half and
    stride 1, the 1x1 convolution there.
    """

    stride: int
    rule: Rule
    edges: list[int] = field(default_factory=list)
    convolutions: list[list[nn.Conv2d]] = field(default_factory=list)  # a half each
    norms: list[nn.BatchNorm2d] = field(default_factory=list)
    row: int = 0
    parameters: slice = field(default_factory=lambda: slice(0))

    def owners(self) -> list[Owner]:
        """Return what owns the weights, edge by edge."""
        return [(half, "weight") for halves in self.convolutions for half in halves]

    def by_edge(self, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Return those weights, the halves of an edge together."""
        halves = len(self.convolutions[0])
        return [weights[k : k + halves] for k in range(0, len(weights), halves)]


@dataclass
class Pool:
    """A pool of a state, on several edges; each has a batch norm and a row of its own."""

    kind: str
    rule: Rule
    edges: list[int] = field(default_factory=list)
    norms: list[nn.BatchNorm2d] = field(default_factory=list)
    row: int = 0


@dataclass
class Single:
    """An operation without a kernel, on one edge."""

    module: nn.Module
    edge: int
    row: int = 0
    parameters: slice = field(default_factory=lambda: slice(0))

    def owners(self) -> list[Owner]:
        """Return what owns the module's parameters."""
        return [
            (part, name)
            for part in self.module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]


@dataclass
class Source:
    """What leaves a state."""

    stride: int
    stages: list[Stages] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)  # in the order of KINDS
    skips: list[int] = field(default_factory=list)  # edges
    skip_row: int = 0  # before it stands, of a node, a row whose by_g becomes 1
    singles: list[Single] = field(default_factory=list)


@dataclass
class Node:
    """What a node sums: the terms, each one's edge, and the noise."""

    terms: Terms
    edges: list[int]
    sites: tuple[int, ...]
    drawn: list[int]  # indices into the flattened weights
    drawn_edges: list[int]


class Plan:
    """The plan of a cell of `nodes` nodes. edges: [E], the candidates of each.

    `whole` says whether the kernels can compute the cell. rows: R of the table; the first two are
    those of the preprocessing. weighs_all: whether every weight has a gradient. owners: the
    module and name of every parameter. norms: every batch norm that the kernels compute.
    alike_skips: the edges of the skips that leave the first input, then of those that leave the
    second, where they enter the same nodes, their rows follow one another and nothing else comes
    back to the inputs but by convolutions; else none.
    """

    def __init__(
        self,
        nodes: int,
        preprocess: Sequence[nn.Module],
        edges: Sequence[Sequence[nn.Module]],
        strides: Sequence[int],
    ) -> None:
        self._made_of = [*preprocess, *(module for candidates in edges for module in candidates)]
        found = [_preprocessing(module) for module in preprocess]
        self.inputs = [reduction for reduction in found if reduction is not None]
        for row, reduction in enumerate(self.inputs):
            reduction.row = row
        self.sources = [Source(1) for _ in range(INPUTS + nodes)]
        self.rows = INPUTS
        self._terms: list[list[tuple[int, int, int, bool]]] = [[] for _ in edges]
        self._drawn: list[list[tuple[int, int]]] = [[] for _ in edges]
        leaving = _together_at_inputs(self._candidates(nodes, edges, strides))
        for source, candidates in zip(self.sources, leaving, strict=True):
            # Sorting is stable: within a kind, the edges stay in order.
            ordered = sorted(candidates, key=lambda candidate: str(candidate[0]))
            for kind, group in groupby(ordered, lambda candidate: candidate[0]):
                self._add(source, kind, list(group))
            source.pools.sort(key=lambda pool: KINDS.index(pool.kind))
        self.nodes = [self._node(edges_into(node)) for node in range(nodes)]
        terms = sum(len(node.edges) + len(node.sites) for node in self.nodes)
        self.weighs_all = terms == sum(map(len, edges))
        self.whole = len(self.inputs) == INPUTS and all(
            0 < len(node.edges) <= MOST_INPUTS and len(node.sites) <= MOST_INPUTS
            for node in self.nodes
        )
        self.alike_skips = self._alike_skips()
        self.owners = self._place_parameters()
        self.norms = self._found_norms()

    def fits(self, preprocess: Sequence[nn.Module], edges: Sequence[Sequence[nn.Module]]) -> bool:
        """Say whether this is the plan of these very modules."""
        modules = [*preprocess, *(module for candidates in edges for module in candidates)]
        same = map(operator.is_, modules, self._made_of)
        return len(modules) == len(self._made_of) and all(same)

    def _candidates(
        self, nodes: int, edges: Sequence[Sequence[nn.Module]], strides: Sequence[int]
    ) -> list[list[Candidate]]:
        """Return what has a tensor on the edges that leave each state; noise goes to its edge."""
        found: list[list[Candidate]] = [[] for _ in self.sources]
        for node in range(nodes):
            for source, e in enumerate(edges_into(node)):
                self.sources[source].stride = strides[e]
                for o, module in enumerate(edges[e]):
                    weight = e * len(edges[e]) + o
                    if isinstance(module, Noise):
                        self._drawn[e].append((module.site, weight))
                    elif not isinstance(module, Zero):
                        found[source].append((_kind(module), e, weight, module))
        return found

    def _add(self, source: Source, kind: Kind, group: Sequence[Candidate]) -> None:
        edges = [e for _, e, _, _ in group]
        modules: list[Any] = [module for _, _, _, module in group]
        if kind[0] == "skip" and any(source is node for node in self.sources[INPUTS:]):
            self.rows += 1
        row = self._rows_of(group)
        if kind[0] == "stages":
            _, geometries, rule = kind
            stages = Stages.of(geometries, rule, edges, [state_left(e) for e in edges], modules)
            stages.rows.append(row)
            for _ in geometries[1:]:
                row = self._rows_of(group)
                stages.rows.append(row)
            source.stages.append(stages)
        elif kind[0] == "reduction":
            halves = [halves_of(module) for module in modules]
            norms = [module.bn for module in modules]
            source.reductions.append(Reduction(2, kind[1], edges, halves, norms, row))
        elif kind[0] == "pool":
            norms = [module[1] for module in modules]
            source.pools.append(Pool(kind[1], kind[2], edges, norms, row))
        elif kind[0] == "skip":
            source.skips, source.skip_row = edges, row
        else:
            source.singles += [Single(modules[i], e, row + i) for i, e in enumerate(edges)]
        normalised = kind[0] in ("stages", "reduction", "pool")
        for i, (_, e, weight, _) in enumerate(group):
            self._terms[e].append((row + i, weight, e, normalised))

    def _rows_of(self, group: Sequence[Candidate]) -> int:
        """Return the first of as many new rows as the group has candidates."""
        first = self.rows
        self.rows += len(group)
        return first

    def _node(self, edges: Sequence[int]) -> Node:
        terms = [term for e in edges for term in self._terms[e]]
        drawn = [(*pair, e) for e in edges for pair in self._drawn[e]]
        return Node(
            Terms(
                [row for row, _, _, _ in terms],
                [weight for _, weight, _, _ in terms],
                [normalised for _, _, _, normalised in terms],
            ),
            [e for _, _, e, _ in terms],
            tuple(site for site, _, _ in drawn),
            [weight for _, weight, _ in drawn],
            [e for _, _, e in drawn],
        )

    def _alike_skips(self) -> list[int]:
        first, second = self.sources[:INPUTS]
        others = any(source.pools or source.singles for source in (first, second))
        entered = [list(map(node_entered, source.skips)) for source in (first, second)]
        follow = second.skip_row == first.skip_row + len(first.skips)
        alike = entered[0] == entered[1] and follow and not others
        return [*first.skips, *second.skips] if alike else []

    def _place_parameters(self) -> list[Owner]:
        """Return what owns each parameter, and tell each part where its own stand."""
        owners: list[Owner] = []

        def place(own: Sequence[Owner]) -> slice:
            owners.extend(own)
            return slice(len(owners) - len(own), len(owners))

        for reduction in self.inputs:
            reduction.parameters = place(reduction.owners())
        for source in self.sources:
            for stages in source.stages:
                stages.parameters = [place(stages.owners(s)) for s in range(len(stages.rows))]
            for reduction in source.reductions:
                reduction.parameters = place(reduction.owners())
            for single in source.singles:
                single.parameters = place(single.owners())
        return owners

    def one_of(self, state: int) -> int:
        """Return the row whose by_g is to be 1, where a node's own gradient is summed with those of
        the skips that leave it; -1 where there is none.
        """
        source = self.sources[state]
        return source.skip_row - 1 if state >= INPUTS and source.skips else -1

    def parameters(self) -> list[Tensor]:
        """Return every weight."""
        found: list[Any] = [module._parameters[name] for module, name in self.owners]
        return found

    def _found_norms(self) -> list[nn.BatchNorm2d]:
        found = [norm for reduction in self.inputs for norm in reduction.norms]
        for source in self.sources:
            for stages in source.stages:
                for norms in stages.norms:
                    found += norms
            for reduction in source.reductions:
                found += reduction.norms
            for pool in source.pools:
                found += pool.norms
        return found


def node_entered(edge: int) -> int:
    """Return the node that an edge enters."""
    node = 0
    while edge not in edges_into(node):
        node += 1
    return node


def state_left(edge: int) -> int:
    """Return the state that an edge leaves."""
    return list(edges_into(node_entered(edge))).index(edge)


def _together_at_inputs(leaving: Sequence[list[Candidate]]) -> list[list[Candidate]]:
    """Return what leaves each state, with the stages that leave any of a cell's inputs at the last:
    the inputs are there at once, so those of a kind are one launch.
    """
    inputs, nodes = leaving[:INPUTS], leaving[INPUTS:]
    staged = [[c for c in some if c[0][0] == "stages"] for some in inputs]
    others = [[c for c in some if c[0][0] != "stages"] for some in inputs]
    return [*others[:-1], [c for some in staged for c in some] + others[-1], *nodes]


def _kind(module: nn.Module) -> Kind:
    """Return what candidates must share to be one launch."""
    if type(module) is nn.Identity:
        return ("skip",)
    if is_factorized(module) and (rule := rule_of(module.bn)):
        return ("reduction", rule)
    if type(module) is nn.Sequential:
        pool = pool_of(module)
        if pool and len(module) == 2 and (rule := rule_of(module[1])):
            return ("pool", pool[0], rule)
        stages = _stages_of(module)
        if stages:
            return ("stages", *stages)
    return ("single",)


def _stages_of(module: nn.Sequential) -> tuple[tuple[Geometry, ...], Rule] | None:
    """Return the geometries and the batch norms' rule of a module that is made of stages."""
    if len(module) not in (4, 8):
        return None
    geometries, rules = [], set()
    for first in range(0, len(module), 4):
        relu, depthwise, pointwise, norm = module[first : first + 4]
        geometry = depthwise_geometry(depthwise)
        if type(relu) is not nn.ReLU or geometry is None or not is_pointwise(pointwise):
            return None
        geometries.append(geometry)
        rules.add(rule_of(norm))
    rule = rules.pop()
    return None if rule is None or rules else (tuple(geometries), rule)


def depthwise_geometry(module: nn.Module) -> Geometry | None:
    """Return the geometry of a depthwise convolution that has a kernel."""
    if not _is_plain(module) or not isinstance(module.padding, tuple):
        return None
    kernel, dilation, stride = module.kernel_size[0], module.dilation[0], module.stride[0]
    plain = (
        module.groups == module.in_channels == module.out_channels
        and module.padding_mode == "zeros"
        and module.kernel_size == (kernel, kernel)
        and module.dilation == (dilation, dilation)
        and module.stride == (stride, stride)
        and module.padding == (dilation * (kernel // 2),) * 2
    )
    if not plain or kernel not in KERNELS or dilation not in (1, 2) or stride not in (1, 2):
        return None
    return Geometry(kernel, dilation, stride)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution is its weight and nothing else: no bias, hook or reparametrisation."""
    if type(module) is not nn.Conv2d or module.bias is not None:
        return False
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return "weight" in module._parameters and not hooks


def is_pointwise(module: nn.Module, stride: int = 1) -> TypeGuard[nn.Conv2d]:
    if not _is_plain(module) or module.groups != 1:
        return False
    found = (module.kernel_size, module.stride, module.padding, module.dilation)
    return found == ((1, 1), (stride, stride), (0, 0), (1, 1))


def is_factorized(module: nn.Module) -> TypeGuard[FactorizedReduce]:
    if type(module) is not FactorizedReduce:
        return False
    return all(is_pointwise(half, 2) for half in halves_of(module))


def halves_of(module: FactorizedReduce) -> list[nn.Conv2d]:
    return [half for half in (module.conv_1, module.conv_2) if half is not None]


def _preprocessing(module: nn.Module) -> Reduction | None:
    """Return what brings a cell's input to its channels; None where it has no kernel."""
    if is_factorized(module) and (rule := rule_of(module.bn)):
        return Reduction(2, rule, [], [halves_of(module)], [module.bn])
    if type(module) is not nn.Sequential or len(module) != 3:
        return None
    relu, convolution, norm = module
    rule = rule_of(norm)
    if type(relu) is not nn.ReLU or not is_pointwise(convolution) or rule is None:
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    return Reduction(1, rule, [], [[convolution]], [norm])
