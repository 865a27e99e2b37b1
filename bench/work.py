"""The least that the kernels of a supernet's forward and backward pass read, write and compute.

Each call of a kernel is counted by itself: every input read once, every output written once,
nothing found in a cache. Left out is what is small beside that (weights, coefficients, sums, labels
and the optimisers), and the arithmetic of noise, which is not the network's. A multiplication and
an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench.contenders import CLASSES, Setup
from rdarts_fast.networks import Supernet
from rdarts_fast.networks.plan import Plan, Reduction, Source, Stages
from rdarts_fast.networks.supernet import STEM_MULTIPLIER, SearchCell
from rdarts_fast.spaces import INPUTS, load_space


@dataclass
class Work:
    """What all calls of a kernel at a shape come to."""

    kernel: str
    shape: str  # of what it makes
    calls: int = 1
    numbers: float = 0.0  # read and written: elements of activations
    vector: float = 0.0  # operations that have no matrix product
    matrix: float = 0.0  # operations of the 1x1 convolutions

    def __iadd__(self, other: Work) -> Work:
        self.calls += other.calls
        self.numbers += other.numbers
        self.vector += other.vector
        self.matrix += other.matrix
        return self


@dataclass(frozen=True)
class Images:
    """A tensor [batch, channels, size, size]."""

    batch: int
    channels: int
    size: int

    @property
    def pixels(self) -> int:
        return self.batch * self.size**2

    @property
    def numbers(self) -> int:
        return self.channels * self.pixels

    def __str__(self) -> str:
        return f"C{self.channels} {self.size}x{self.size}"


def forward_backward(setup: Setup) -> list[Work]:
    """Return the work of one forward and backward, a row a kernel and shape."""
    return merged(_all(setup))


def merged(works: Iterable[Work]) -> list[Work]:
    """Return the works, those of one kernel and shape as one."""
    rows: dict[tuple[str, str], Work] = {}
    for work in works:
        key = work.kernel, work.shape
        if key in rows:
            rows[key] += work
        else:
            rows[key] = work
    return list(rows.values())


def _all(setup: Setup) -> Iterator[Work]:
    with torch.device("meta"):
        supernet = Supernet(load_space(setup.space), setup.channels, setup.layers, CLASSES)
    made = Images(setup.batch, STEM_MULTIPLIER * setup.channels, setup.size)
    yield from stem(Images(setup.batch, 3, setup.size), made)
    before = last = [made]
    for cell in supernet.cells:
        assert isinstance(cell, SearchCell)
        walk = CellWork(cell.plan(), before, last)
        yield from walk.all()
        before, last = last, walk.states[INPUTS:]


def stem(images: Images, made: Images) -> Iterator[Work]:
    """Yield the work of the 3x3 convolution and batch norm that make the first state."""
    operations = 2.0 * 9 * images.channels * made.numbers
    yield Work("stem", str(made), 1, images.numbers + 3 * made.numbers, 0.0, operations)
    # The norm's gradient and its sums, then the weights' gradient; images have none.
    yield Work("stem backward", str(made), 1, images.numbers + 5 * made.numbers, 0.0, operations)


@dataclass
class CellWork:
    """The work of a cell, given the tensors that its two inputs are made of."""

    plan: Plan
    before: list[Images]
    last: list[Images]
    states: list[Images] = field(default_factory=list)

    def all(self) -> Iterator[Work]:
        """Yield the work of every launch."""
        for reduction, tensors in zip(self.plan.inputs, (self.before, self.last), strict=True):
            (convolutions,) = reduction.convolutions
            channels = sum(half.out_channels for half in convolutions)
            made = shrunk(tensors[0], reduction.stride, channels)
            yield from mixing(reduction, tensors, 1, made)
            yield from summed(1, 0, made)  # its batch norm
            self.states.append(made)
        for i, source in enumerate(self.plan.sources):
            state = self.states[i]
            made = shrunk(state, source.stride, state.channels)
            yield from self.leaving(source, state, made, node=i >= INPUTS)
            node = i - INPUTS + 1
            if 0 <= node < len(self.plan.nodes):
                found = self.plan.nodes[node]
                yield from summed(len(set(found.terms.rows)), len(found.sites), made)
                self.states.append(made)

    @staticmethod
    def leaving(source: Source, state: Images, made: Images, node: bool) -> Iterator[Work]:
        """Yield the work of the candidates on the edges that leave a state.

        node: whether the state is one, whose own gradient is among those that are summed.
        """
        for stages in source.stages:
            yield from convolutions(stages, state)
        for reduction in source.reductions:
            yield from mixing(reduction, [state], len(reduction.edges), made)
        if source.pools:
            kinds = len(source.pools)
            numbers = state.numbers + kinds * made.numbers
            yield Work("pool", str(made), 1, numbers, 10.0 * made.numbers)
            yield Work("pool backward", str(made), 1, numbers, 10.0 * state.numbers)
        for _ in source.singles:
            yield Work("module of torch", str(made), 1, 2 * (state.numbers + made.numbers))
        others = len(source.skips) + bool(source.pools) + len(source.singles)
        terms = others + node
        if others or (node and (source.stages or source.reductions)):
            numbers = (terms + 1) * state.numbers
            yield Work("sum of gradients", str(state), 1, numbers, 2.0 * terms * state.numbers)


def shrunk(x: Images, stride: int, channels: int) -> Images:
    """Return what a stride makes of images, with these channels."""
    return Images(x.batch, channels, -(-x.size // stride))


def summed(terms: int, sites: int, made: Images) -> Iterator[Work]:
    """Yield the work of a node: its sum, and backward the sums that its gradients are made of."""
    operations = 2.0 * (terms + sites) * made.numbers
    yield Work("node_sum", str(made), 1, (terms + 1) * made.numbers, operations)
    yield Work("node_sum_dq", str(made), 1, (terms + 1) * made.numbers, 2 * operations)


def mixing(reduction: Reduction, x: list[Images], edges: int, made: Images) -> Iterator[Work]:
    """Yield the work of 1x1 convolutions of the same tensors on so many edges."""
    read, written = sum(one.numbers for one in x), edges * made.numbers
    product = 2.0 * sum(one.channels for one in x) * written
    yield Work("mixing", str(made), 1, read + written, read, product)
    # Reads g, z and x; the products with the weights and with x.
    yield Work("mixing_backward", str(made), 1, 2 * read + 2 * written, 3.0 * written, 2 * product)


def convolutions(stages: Stages, state: Images) -> Iterator[Work]:
    """Yield the work of all stages of separable convolutions that leave a state."""
    edges = len(stages.edges)
    x, tensors = state, len(set(stages.states))  # what a stage reads: states, or a tensor an edge
    for kernel, dilation, stride in stages.geometries:
        made = shrunk(x, stride, x.channels)
        shape = f"{made}, {kernel}x{kernel}" + " dilated" * (dilation > 1) + "/2" * (stride > 1)
        read, written = tensors * x.numbers, edges * made.numbers
        depthwise, pointwise = 2.0 * kernel**2 * written, 2.0 * made.channels * written
        yield Work("sep_stage", shape, 1, read + written, depthwise, pointwise)
        # Reads g, z and x and writes dv; computes d again, then the gradients of d, of v and of
        # both weights.
        numbers = 2 * read + 2 * written
        yield Work("sep_stage_backward", shape, 1, numbers, 3 * depthwise, 2 * pointwise)
        x, tensors = made, edges
