"""A cell of the supernet on kernels: the modules, parameters and buffers of the reference.

A node is one `normalized_sum` over the candidates of all edges into it: the batch norm that a
candidate ends with is folded into the sum, noise is drawn inside it, `none` costs nothing. What
reads a state without weights (its ReLU, its pools) is computed once per state and stride, however
many edges leave it. An operation that this file does not know runs as its module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.kernels import Noise, normalized_sum
from rdarts_fast.networks import operations
from rdarts_fast.networks.operations import FactorizedReduce, Zero

Norm = nn.BatchNorm2d | None


class State:
    """A state of a cell, [N, C, H, W], and what its edges share."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._shared: dict[object, Tensor] = {}

    def once(self, key: object, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return compute(value), computed at its first use."""
        if key not in self._shared:
            self._shared[key] = compute(self.value)
        return self._shared[key]

    @property
    def relu(self) -> Tensor:
        """ReLU of the state."""
        return self.once("relu", F.relu)


def before_norm(operation: nn.Module, state: State) -> tuple[Tensor, Norm]:
    """Return what `operation` gives its last batch norm, and that; its result and None without."""
    if isinstance(operation, nn.Identity):
        return state.value, None
    if isinstance(operation, FactorizedReduce):
        return operation.convolve(state.relu), operation.bn
    parts = list(operation) if isinstance(operation, nn.Sequential) else [operation]
    norm: Norm = None
    if isinstance(parts[-1], nn.BatchNorm2d):
        norm = parts[-1]
        parts = parts[:-1]
    if len(parts) == 1 and isinstance(parts[0], nn.MaxPool2d | nn.AvgPool2d):
        return state.once((type(parts[0]), parts[0].stride), parts[0]), norm
    x = state.value
    for i, part in enumerate(parts):
        x = state.relu if i == 0 and isinstance(part, nn.ReLU) else part(x)
    return x, norm


@dataclass
class Node:
    """The terms of a node's sum."""

    z: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
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
        z, norm = before_norm(operation, state)
        self.z.append(z)
        self.norms.append(norm)
        self.weights.append(weight)
        self.edges.append(edge)

    def sum(self, like: Tensor, draws: Draws, factors: Tensor | None, training: bool) -> Tensor:
        """Return the node, shaped and laid out as `like`; factors [E, N] are drop path's."""
        noise = None
        if self.sites:
            rows = None if factors is None else factors[self.noise_edges]
            noise = Noise(draws, self.sites, torch.stack(self.noise_weights), rows)
        if not self.z:  # nothing but zeros and noise
            self.z, self.norms = [torch.zeros_like(like)], [None]
            self.weights, self.edges = [like.new_zeros(())], [0]
        for norm in self.norms:
            if norm is not None and training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
        return normalized_sum(
            self.z,
            torch.stack(self.weights),
            [norm is not None for norm in self.norms],
            [_running(norm) for norm in self.norms],
            None if factors is None else factors[self.edges],
            noise,
            training=training,
        )


def _running(norm: Norm) -> tuple[Tensor, Tensor] | None:
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return None
    return norm.running_mean, norm.running_var
