"""The operations of a supernet as steps that tangents and adjoints can go through: gates (ReLU),
linear maps, maxima, what kernels do of these at once, and batch norms (norm.py), which alone have a
second derivative.

Each step computes its result once (`primal`), keeps what its derivatives need, and then takes the
tangents of V directions at once, [V N, C, H, W] with the direction outermost (`tangent`), or takes
as many gradients of its result back (`adjoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.kernels.array import empty
from rdarts_fast.kernels.gated_stage import MOST_DIRECTIONS, Tangents, gated_stage
from rdarts_fast.kernels.mixing import Sources, launch_mixing, launch_mixing_backward
from rdarts_fast.kernels.pool import launch_pool_adjoint, launch_pool_tangent, launch_pools
from rdarts_fast.kernels.sep_stage import (
    Affine,
    Geometry,
    Operands,
    launch_sep_stage,
    launch_sep_stage_backward,
)
from rdarts_fast.networks.composed import pool_of
from rdarts_fast.networks.norm import Norm, Sum, by_direction
from rdarts_fast.networks.operations import FactorizedReduce
from rdarts_fast.networks.plan import depthwise_geometry, halves_of, is_factorized, is_pointwise


@dataclass
class Gathered:
    """The gradients of a state as they come together, of V directions: [V N, C, H, W]."""

    like: Tensor  # [N, C, H, W]
    directions: int
    tensor: Tensor | None = None

    def room(self) -> tuple[list[Tensor], bool]:
        """Return where to put a gradient, V tensors, and whether to add to what is there."""
        adds = self.tensor is not None
        if self.tensor is None:
            n, *rest = self.like.shape
            self.tensor = empty(self.like, (self.directions * n, *rest), torch.channels_last)
        return by_direction(self.tensor, self.like), adds

    def add(self, gradient: Tensor) -> None:
        """Add a gradient; it may be overwritten later."""
        if self.tensor is None:
            self.tensor = gradient.contiguous(memory_format=torch.channels_last)
        else:
            self.tensor += gradient

    def value(self) -> Tensor:
        """Return the sum; zeros where nothing has come."""
        if self.tensor is None:
            self.room()[0]
            assert self.tensor is not None
            self.tensor.zero_()
        return self.tensor

    def parts(self) -> list[Tensor]:
        """Return the sum of each direction."""
        return by_direction(self.value(), self.like)


class Gate:
    """ReLU."""

    def primal(self, x: Tensor) -> Tensor:
        self.open = (x > 0).to(x.dtype)
        return F.relu(x)

    def tangent(self, dx: Tensor) -> Tensor:
        n = len(self.open)
        parts = dx.view(-1, n, *dx.shape[1:])
        return (parts * self.open).view_as(dx)

    adjoint = tangent


class Linear:
    """A map that is linear as it stands."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        self._apply = self.tangent = apply

    def primal(self, x: Tensor) -> Tensor:
        self._shape = x.shape[1:]
        return self._apply(x)

    def adjoint(self, g: Tensor) -> Tensor:
        with torch.enable_grad():
            x = g.new_zeros(len(g), *self._shape).contiguous(memory_format=torch.channels_last)
            (found,) = torch.autograd.grad(self._apply(x.requires_grad_()), x, g)
        return found


class Maximum:
    """A maximum over windows: of the tangents it takes those where the maxima lie."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        self._pool = pool

    def primal(self, x: Tensor) -> Tensor:
        p = self._pool
        self._size = x.shape[2:]
        out, self._place = F.max_pool2d(
            x, p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode, return_indices=True
        )
        return out

    def tangent(self, dx: Tensor) -> Tensor:
        found = dx.flatten(2).gather(2, self._places(dx)).view(len(dx), *self._place.shape[1:])
        return found.contiguous(memory_format=torch.channels_last)

    def adjoint(self, g: Tensor) -> Tensor:
        h, w = self._size
        found = g.new_zeros(*g.shape[:2], h * w).scatter_add_(2, self._places(g), g.flatten(2))
        return found.view(*g.shape[:2], h, w).contiguous(memory_format=torch.channels_last)

    def _places(self, x: Tensor) -> Tensor:
        return self._place.flatten(2).repeat(len(x) // len(self._place), 1, 1)


class Pool:
    """A 3x3 pool that has a kernel (kernels/pool.py)."""

    def __init__(self, kind: str, stride: int) -> None:
        self._kinds, self._stride = (kind,), stride

    def primal(self, x: Tensor) -> Tensor:
        self._like, self._size = x, x.shape[2:]
        (value,), self._place, sums = launch_pools(x, self._stride, self._kinds)
        self.sums = sums[:, 0]
        return value

    def tangent(self, dx: Tensor) -> Tensor:
        found = [
            launch_pool_tangent(part, self._stride, self._kinds, self._place)[0]
            for part in by_direction(dx, self._like)
        ]
        return _together(found)

    def adjoint(self, g: Tensor) -> Tensor:
        found = [
            launch_pool_adjoint([part], self._stride, self._kinds, self._size, self._place)
            for part in by_direction(g, self._like)
        ]
        return _together(found)


class Stage:
    """ReLU, a depthwise and a pointwise convolution (kernels/sep_stage.py, gated_stage.py)."""

    def __init__(self, geometry: Geometry, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> None:
        self._geometry = geometry
        self._weights = [module.weight.detach().contiguous() for module in (depthwise, pointwise)]

    def primal(self, x: Tensor) -> Tensor:
        self.gate = x.contiguous(memory_format=torch.channels_last)
        (z,), sums = launch_sep_stage(self._operands(1))
        self.sums = sums[:, 0]
        return z

    def tangent(self, dx: Tensor, maps: Sequence[Tensor] | None) -> Tensor:
        """Return the tangents. maps: the coefficients of the batch norm before it, whose inputs'
        tangents dx then are.
        """
        gate = self.gate
        given = (None,) * 3 if maps is None else (m.to(dx.dtype) for m in maps)
        tangents = Tangents(by_direction(dx, gate), gate, *given)
        depthwise, pointwise = self._weights
        return gated_stage(tangents, depthwise, pointwise, self._geometry)

    def adjoint(self, g: Tensor | Sum) -> tuple[Tensor, Tensor]:
        """Return the gradients of what the stage reads, and their sums and those of the gradients
        times that, [2, V, C].
        """
        into = Gathered(self.gate, _directions(g, self.gate))
        sums = self.adjoint_into(g, [into])
        return into.value(), sums

    def adjoint_into(self, g: Tensor | Sum, into: Sequence[Gathered]) -> Tensor:
        g, z, affine = g if isinstance(g, Sum) else Sum(g, None, Affine())
        parts, (out, adds) = by_direction(g, self.gate), into[0].room()
        sums = []
        for first in range(0, len(parts), MOST_DIRECTIONS):
            some = parts[first : first + MOST_DIRECTIONS]
            count = len(some)
            found, _ = launch_sep_stage_backward(
                self._operands(count),
                some,
                [z] * count,
                affine,
                out[first : first + count],
                [adds] * count,
                wants_sums=True,
                wants_weights=False,
            )
            assert found is not None
            sums.append(found)
        return torch.cat(sums, dim=1)

    def _operands(self, count: int) -> Operands:
        depthwise, pointwise = ([weight] * count for weight in self._weights)
        return Operands([self.gate] * count, depthwise, pointwise, self._geometry)


class Mixing:
    """ReLU and a 1x1 convolution, or FactorizedReduce's two of stride 2 (kernels/mixing.py), on one
    tensor or several whose channels lie side by side.
    """

    def __init__(self, halves: Sequence[nn.Conv2d], stride: int) -> None:
        self._weights = [half.weight.detach().contiguous() for half in halves]
        self._stride = stride

    def primal(self, x: Sequence[Tensor]) -> Tensor:
        self._x = list(x)
        (z,), sums = launch_mixing(self._sources())
        self.sums = sums[:, 0]
        return z

    def tangent(self, dx: Sequence[Tensor]) -> Tensor:
        """Return the tangents from those of each tensor; of what moves along fewer directions the
        rest is zero.
        """
        n, channels, h, w = self._sources().out_shape()
        directions = max(len(part) for part in dx) // n
        shape = (directions * n, channels, h, w)
        z = torch.empty(shape, dtype=dx[0].dtype, device=dx[0].device).contiguous(
            memory_format=torch.channels_last
        )
        rows = z.permute(0, 2, 3, 1).view(directions, n * h * w, channels)
        for v in range(directions):
            parts = [
                (x, part[v * n : (v + 1) * n], m)
                for m, (x, part) in enumerate(zip(self._x, dx, strict=True))
                if len(part) > v * n
            ]
            self._multiply(parts, rows[v])
        return z

    def _multiply(self, parts: Sequence[tuple[Tensor, Tensor, int]], out: Tensor) -> None:
        """Fill out, [N H' W', O], with the tangents along one direction. parts: of the tensors that
        move the tensor, its tangent, and its place.
        """
        for i, (x, dx, m) in enumerate(parts):
            y = torch.ops.aten.threshold_backward(dx, x, 0.0).permute(0, 2, 3, 1)
            c, first = x.shape[1], 0
            for shift, weight in enumerate(self._weights):
                columns = out[:, first : first + len(weight)]
                rows = _strided(y, self._stride, shift).reshape(-1, c)
                own = weight[:, m * c : (m + 1) * c, 0, 0].t()
                if i:
                    columns.addmm_(rows, own)
                elif len(self._weights) == 1:
                    torch.mm(rows, own, out=columns)
                else:
                    columns.copy_(rows @ own)
                first += len(weight)

    def adjoint(self, g: Tensor | Sum) -> Tensor:
        """Return the gradients of all channels."""
        into = [Gathered(x, _directions(g, x)) for x in self._x]
        self.adjoint_into(g, into)
        return joined([one.value() for one in into])

    def adjoint_into(self, g: Tensor | Sum, into: Sequence[Gathered]) -> None:
        g, z, affine = g if isinstance(g, Sum) else Sum(g, None, Affine())
        rooms = [one.room() for one in into]
        adds = [flag for _, flag in rooms]
        for v, part in enumerate(by_direction(g, self._x[0])):
            out = [tensors[v] for tensors, _ in rooms]
            launch_mixing_backward(
                self._sources(), [part], [z], affine, out, adds, wants_weights=False
            )

    def _sources(self) -> Sources:
        return Sources(self._x, [self._weights], self._stride)


def _strided(y: Tensor, stride: int, shift: int) -> Tensor:
    """Return every stride-th pixel of y, [N, H, W, C], from `shift` on, zeros past the edge."""
    if stride == 1:
        return y
    found = y[:, shift::stride, shift::stride]
    h, w = (size % stride if shift else 0 for size in y.shape[1:3])
    return F.pad(found, (0, 0, 0, w, 0, h)) if h or w else found


Step = Gate | Linear | Maximum | Pool | Stage | Mixing | Norm


def _directions(g: Tensor | Sum, like: Tensor) -> int:
    return 1 if isinstance(g, Sum) else len(g) // len(like)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors with their channels side by side."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def _together(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def steps_of(module: nn.Module) -> list[Step] | None:
    """Return the steps of an operation; None where one of its modules has none."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if type(module) is nn.Identity:
        return []
    if type(module) is nn.Sequential:
        parts = _parts_of(module)
        return None if None in parts else [step for part in parts if part for step in part]
    if type(module) is FactorizedReduce:
        norm = steps_of(module.bn)
        if norm is None:
            return None
        if is_factorized(module):
            return [Mixing(halves_of(module), 2), *norm]
        return [Gate(), Linear(module.convolve), *norm]
    if type(module) is nn.ReLU:
        return [Gate()]
    pool = pool_of(module)
    if pool:
        return [Pool(*pool)]
    if type(module) is nn.MaxPool2d:
        return [Maximum(module)]
    linear = type(module) is nn.AvgPool2d or (type(module) is nn.Conv2d and module.bias is None)
    if linear:
        return [Linear(module)]
    if type(module) is nn.BatchNorm2d and not module.affine and module.running_mean is not None:
        return [Norm(module)]
    return None


def _parts_of(modules: nn.Sequential) -> list[list[Step] | None]:
    """Return the steps of each module; ReLU and the convolutions that it shares a kernel with are
    one.
    """
    found: list[list[Step] | None] = []
    i = 0
    while i < len(modules):
        some = list(modules[i : i + 3])
        stage, mixing = _stage_of(some), _mixing_of(some)
        if stage:
            found.append([stage])
        else:
            found.append([mixing] if mixing else steps_of(modules[i]))
        i += 3 if stage else 2 if mixing else 1
    return found


def _stage_of(modules: Sequence[nn.Module]) -> Stage | None:
    if len(modules) < 3 or type(modules[0]) is not nn.ReLU:
        return None
    _, depthwise, pointwise = modules
    geometry = depthwise_geometry(depthwise)
    if geometry is None or not is_pointwise(pointwise):
        return None
    assert isinstance(depthwise, nn.Conv2d)
    return Stage(geometry, depthwise, pointwise)


def _mixing_of(modules: Sequence[nn.Module]) -> Mixing | None:
    if len(modules) < 2 or type(modules[0]) is not nn.ReLU or not is_pointwise(modules[1]):
        return None
    return Mixing([modules[1]], 1)
