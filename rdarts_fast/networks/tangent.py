"""The operations of a supernet as steps that a tangent can go through: a gate (ReLU), linear maps,
maxima, and batch norms, which alone have a second derivative.

Each step computes its result once (`primal`), keeps what its derivatives need, and then takes the
tangents of V directions at once, [V N, C, H, W] with the direction outermost (`tangent`). A batch
norm of batch statistics, z_hat = (z - mean) r, adds for each pair of directions j, k

    sum_c M [-a_j (l_k - m_k m1) - a_k (l_j - m_j m1)
             + m2 (3 a_j a_k - mean z'_j z'_k + m_j m_k)]

to the Hessian, with z' = r dz, and over the M numbers of a channel m = mean z', a = mean z_hat z',
l = mean lambda z', m1 = mean lambda, m2 = mean lambda z_hat, where lambda is the loss's gradient in
z_hat. Its own tangent is dz_hat = z' - m - a z_hat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.kernels.array import MOST_INPUTS, empty_like
from rdarts_fast.kernels.gated_stage import Tangents, gated_stage
from rdarts_fast.kernels.moments import tangent_moments
from rdarts_fast.kernels.node_sum import node_sum_dq
from rdarts_fast.kernels.sep_stage import Geometry
from rdarts_fast.networks.operations import FactorizedReduce
from rdarts_fast.networks.plan import depthwise_geometry, is_pointwise


class Gate:
    """ReLU."""

    def primal(self, x: Tensor) -> Tensor:
        self.open = (x.detach() > 0).to(x.dtype)
        return F.relu(x)

    def tangent(self, dx: Tensor) -> Tensor:
        n = len(self.open)
        parts = dx.view(-1, n, *dx.shape[1:])
        return (parts * self.open).view_as(dx)


class Linear:
    """A map that is linear as it stands."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        self.primal = self.tangent = apply


class Stage:
    """ReLU, a depthwise and a pointwise convolution (kernels/gated_stage.py)."""

    def __init__(self, geometry: Geometry, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> None:
        self._geometry, self._convolutions = geometry, (depthwise, pointwise)

    def primal(self, x: Tensor) -> Tensor:
        depthwise, pointwise = self._convolutions
        self.gate = x.detach().contiguous(memory_format=torch.channels_last)
        z: Tensor = pointwise(depthwise(F.relu(x)))
        return z

    def tangent(self, dx: Tensor, maps: Sequence[Tensor] | None) -> Tensor:
        """Return the tangents. maps: the coefficients of the batch norm before it, whose inputs'
        tangents dx then are.
        """
        gate = self.gate
        given = (None,) * 3 if maps is None else (m.to(dx.dtype) for m in maps)
        tangents = Tangents(dx.split(len(gate)), gate, *given)
        depthwise, pointwise = (module.weight for module in self._convolutions)
        return gated_stage(tangents, depthwise, pointwise, self._geometry)


class Maximum:
    """A maximum over windows: of the tangents it takes those where the maxima lie."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        self._pool = pool

    def primal(self, x: Tensor) -> Tensor:
        p = self._pool
        out, self._place = F.max_pool2d(
            x, p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode, return_indices=True
        )
        return out

    def tangent(self, dx: Tensor) -> Tensor:
        place = self._place.flatten(2).repeat(len(dx) // len(self._place), 1, 1)
        found = dx.flatten(2).gather(2, place).view(len(dx), *self._place.shape[1:])
        return found.contiguous(memory_format=torch.channels_last)


class Norm:
    """A batch norm without affine. In train mode by batch statistics, and the buffers stay."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self._norm, self.training = norm, norm.training
        self.still = False  # whether nothing that moves comes in
        self.gradient: Tensor | None = None  # lambda [N, C, H, W]

    def primal(self, z: Tensor) -> Tensor:
        self.still = not z.requires_grad
        norm, buffers = self._norm, (self._norm.running_mean, self._norm.running_var)
        assert buffers[0] is not None and buffers[1] is not None
        if self.training:
            given = (z, None, None, None, None, True, 0.0, norm.eps)
            out, _, self.rstd = torch.native_batch_norm(*given)
        else:
            self.rstd = (buffers[1] + norm.eps).rsqrt()
            shift = -buffers[0] * self.rstd
            out = z * self.rstd.view(-1, 1, 1) + shift.view(-1, 1, 1)
        self.result = out.detach().contiguous(memory_format=torch.channels_last)
        return out

    def take(self, gradient: Tensor) -> None:
        """Take lambda."""
        self.gradient = gradient.contiguous(memory_format=torch.channels_last)
        if not self.training:
            return
        self.count = gradient[:, 0].numel()
        self.m1 = self.gradient.double().sum(dim=(0, 2, 3)) / self.count
        self.m2 = products(self.result, [self.gradient])[0] / self.count

    def measure(self, dz: Tensor) -> None:
        """Take the tangents of z: what they add to the Hessian, `curvature` [V, V], the sums of
        lambda dz_hat, `along` [V], and the means that dz_hat is made with, m and a [V, C].
        """
        assert self.gradient is not None
        rstd, self.directions = self.rstd.double(), len(dz) // len(self.result)
        if not self.training:
            by_gradient = products(self.gradient, dz.split(len(self.result)))
            self.along = (by_gradient * rstd).sum(dim=1)
            self.curvature = rstd.new_zeros(self.directions, self.directions)
            return
        m1, m2 = self.m1, self.m2
        found = tangent_moments(dz, self.result, self.gradient, m2 * rstd**2)
        scale = rstd / self.count
        m, a, means = (x * scale for x in (found.totals, found.by_result, found.by_gradient))
        cross = a @ (means - m * m1).t()
        squares = 3.0 * (a * m2) @ a.t() + (m * m2) @ m.t()
        self.curvature = self.count * (squares - cross - cross.t()) - found.pairs
        self.along = self.count * (means - a * m2 - m * m1).sum(dim=1)
        self.m, self.a = m, a

    def tangent(self, dz: Tensor) -> Tensor:
        """Return dz_hat; `measure` has taken dz."""
        rstd = self.rstd.view(-1, 1, 1)
        out = empty_like(dz)
        torch.mul(dz, rstd, out=out)
        if not self.training:
            return out
        parts = out.view(self.directions, -1, *dz.shape[1:])  # [V, N, C, H, W]
        a, m = (x.to(dz.dtype)[:, None, :, None, None] for x in (self.a, self.m))
        return parts.sub_(m).addcmul_(a, self.result, value=-1.0).view_as(dz)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dz_hat as by_dz * dz + by_result * z_hat + constant, [V, C] each."""
        if not self.training:
            rows = self.rstd.double().expand(self.directions, -1)
            return rows, torch.zeros_like(rows), torch.zeros_like(rows)
        return self.rstd.double().expand_as(self.m), -self.a, -self.m


Step = Gate | Linear | Maximum | Stage | Norm


def products(g: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums over n, h, w of g times each tensor, [K, C] float64."""
    found = [
        node_sum_dq(g, tensors[k : k + MOST_INPUTS])[0] for k in range(0, len(tensors), MOST_INPUTS)
    ]
    return torch.cat(found).double()


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
        return None if norm is None else [Gate(), Linear(module.convolve), *norm]
    if type(module) is nn.ReLU:
        return [Gate()]
    if type(module) is nn.MaxPool2d:
        return [Maximum(module)]
    linear = type(module) is nn.AvgPool2d or (type(module) is nn.Conv2d and module.bias is None)
    if linear:
        return [Linear(module)]
    if type(module) is nn.BatchNorm2d and not module.affine and module.running_mean is not None:
        return [Norm(module)]
    return None


def _parts_of(modules: nn.Sequential) -> list[list[Step] | None]:
    """Return the steps of each module; ReLU and the convolutions of a stage are one."""
    found: list[list[Step] | None] = []
    i = 0
    while i < len(modules):
        stage = _stage_of(list(modules[i : i + 3]))
        found.append([stage] if stage else steps_of(modules[i]))
        i += 3 if stage else 1
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
