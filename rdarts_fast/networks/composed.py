"""A cell of the supernet composed of kernels that have derivatives of every order, and of modules:
what fused.py differentiates twice, and the cells that it cannot compute.

The modules, parameters and buffers are the reference's. A node is one `normalized_sum` over the
candidates of all edges into it: the batch norm that a candidate ends with is folded into the sum,
noise is drawn inside it, `none` costs nothing. What reads a state without weights (its ReLU, its
pools) is computed once per state and stride, however many edges leave it. An operation that this
file does not know runs as its module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.kernels import Noise, Pooled, normalized_sum, pools
from rdarts_fast.kernels.array import chosen
from rdarts_fast.networks import operations
from rdarts_fast.networks.operations import FactorizedReduce, Zero
from rdarts_fast.spaces import INPUTS, edges_into

Norm = nn.BatchNorm2d | None
RULE = (1e-5, 0.1)  # eps and momentum of the batch norms that a node folds in


def composed_cell(
    cell: Any,
    inputs: Sequence[Sequence[Tensor]],
    weights: Tensor,
    draws: Draws,
    factors: Tensor | None,
) -> list[Tensor]:
    """Return the nodes of a SearchCell; see fused_cell."""
    pairs = zip((cell.preprocess0, cell.preprocess1), inputs, strict=True)
    values = [preprocess(joined(tensors)) for preprocess, tensors in pairs]
    states = [State(x, cell.leaving(source)) for source, x in enumerate(values)]
    rows = [row.unbind() for row in weights.unbind()]  # one node of the graph, not E x O
    like = values[0][:, :, ::2, ::2] if cell.kind == "reduce" else values[0]
    for node in range(cell.nodes):
        terms = Node()
        for source, e in enumerate(edges_into(node)):
            for weight, operation in zip(rows[e], cell.edges[e].operations, strict=True):
                terms.add(operation, states[source], weight, e)
        value = terms.sum(like, draws, factors, cell.training)
        states.append(State(value, cell.leaving(len(states))))
    return [state.value for state in states[INPUTS:]]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one, channels side by side."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


class State:
    """A state of a cell, [N, C, H, W], and what its edges share.

    operations: all candidates on the edges that leave it.
    """

    def __init__(self, value: Tensor, operations: Sequence[nn.Module] = ()) -> None:
        self.value = value
        self._pools = {pool for pool in map(pool_of, operations) if pool is not None}
        self._shared: dict[object, Any] = {}

    def once(self, key: object, compute: Callable[[Tensor], Any]) -> Any:
        """Return compute(value), computed at its first use."""
        if key not in self._shared:
            self._shared[key] = compute(self.value)
        return self._shared[key]

    def pool(self, kind: str, stride: int) -> Pooled:
        """Return that pool; all kinds of a stride are computed in one pass."""
        kinds = sorted({k for k, s in self._pools if s == stride} | {kind})
        found = self.once(stride, lambda x: dict(zip(kinds, pools(x, stride, kinds), strict=True)))
        pooled: Pooled = found[kind]
        return pooled

    @property
    def relu(self) -> Tensor:
        """ReLU of the state."""
        relu: Tensor = self.once("relu", F.relu)
        return relu


def pool_of(operation: nn.Module) -> tuple[str, int] | None:
    """Return kind and stride where `operation` begins with a pool that has a kernel."""
    pool = operation[0] if isinstance(operation, nn.Sequential) and operation else operation
    if type(pool) is nn.MaxPool2d:
        own = (pool.kernel_size, pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
        kind, plain = "max", own == (3, 1, 1, False, False)
    elif type(pool) is nn.AvgPool2d:
        counts = (pool.ceil_mode, pool.count_include_pad, pool.divisor_override)
        kind = "avg"
        plain = (pool.kernel_size, pool.padding, *counts) == (3, 1, False, False, None)
    else:
        return None
    return (kind, int(pool.stride)) if plain and pool.stride in (1, 2) else None


def before_norm(operation: nn.Module, state: State) -> tuple[Tensor, Norm, Tensor | None]:
    """Return what `operation` gives its last batch norm, and that; its result and None without.
    Third come the channel sums of the former, where they are known.
    """
    if isinstance(operation, nn.Identity):
        return state.value, None, None
    if isinstance(operation, FactorizedReduce) and rule_of(operation.bn) == RULE:
        return operation.convolve(state.relu), operation.bn, None
    parts = list(operation) if isinstance(operation, nn.Sequential) else [operation]
    norm: Norm = None
    last = parts[-1]
    if isinstance(last, nn.BatchNorm2d) and rule_of(last) == RULE:
        norm, parts = last, parts[:-1]
    pool = pool_of(operation)
    if pool is not None and len(parts) == 1:
        return state.pool(*pool).value, norm, state.pool(*pool).sums
    x = state.value
    for i, part in enumerate(parts):
        x = state.relu if i == 0 and isinstance(part, nn.ReLU) else part(x)
    return x, norm, None


def rule_of(norm: nn.Module) -> tuple[float, float] | None:
    """Return eps and momentum of a batch norm that the kernels know: without affine, with running
    buffers.
    """
    if type(norm) is not nn.BatchNorm2d or norm.affine or norm.running_mean is None:
        return None
    return None if norm.momentum is None else (norm.eps, norm.momentum)


@dataclass
class Node:
    """The terms of a node's sum."""

    z: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    channel_sums: list[Tensor | None] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    sites: list[int] = field(default_factory=list)
    noise_weights: list[Tensor] = field(default_factory=list)
    noise_edges: list[int] = field(default_factory=list)

    def add(self, operation: nn.Module, state: State, weight: Tensor, edge: int) -> None:
        """Add a candidate of an edge under its weight (a scalar)."""
        if isinstance(operation, Zero):
            return
        if isinstance(operation, operations.Noise):
            self.sites.append(operation.site)
            self.noise_weights.append(weight)
            self.noise_edges.append(edge)
            return
        z, norm, sums = before_norm(operation, state)
        self.z.append(z)
        self.norms.append(norm)
        self.channel_sums.append(sums)
        self.weights.append(weight)
        self.edges.append(edge)

    def sum(self, like: Tensor, draws: Draws, factors: Tensor | None, training: bool) -> Tensor:
        """Return the node, shaped and laid out as `like`; factors [E, N] are drop path's."""
        noise = None
        if self.sites:
            rows = None if factors is None else chosen(factors, self.noise_edges)
            noise = Noise(draws, self.sites, torch.stack(self.noise_weights), rows)
        if not self.z:  # nothing but zeros and noise
            self.z, self.norms, self.channel_sums = [torch.zeros_like(like)], [None], [None]
            self.weights, self.edges = [like.new_zeros(())], [0]
        for norm in self.norms:
            if norm is not None and training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        return normalized_sum(
            self.z,
            torch.stack(self.weights),
            [norm is not None for norm in self.norms],
            [_running(norm) for norm in self.norms],
            None if factors is None else chosen(factors, self.edges),
            noise,
            sums=self.channel_sums,
            training=training,
        )


def _running(norm: Norm) -> tuple[Tensor, Tensor] | None:
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return None
    return norm.running_mean, norm.running_var
