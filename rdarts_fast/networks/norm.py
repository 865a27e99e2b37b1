"""A batch norm without affine as a step of a chain, with its second derivative.

Of batch statistics, z_hat = (z - mean) r. With lambda the loss's gradient in z_hat, and over the M
numbers of a channel m1 = mean lambda, m2 = mean lambda z_hat, the gradient in z is

    lambda_z = r (lambda - m1 - m2 z_hat)

A direction that moves z by dz moves z_hat by dz_hat = z' - m - a z_hat and r by -r a, where
z' = r dz, m = mean z', a = mean z_hat z'. For each pair of directions j, k this adds

    sum_c M [-a_j (l_k - m_k m1) - a_k (l_j - m_j m1)
             + m2 (3 a_j a_k - mean z'_j z'_k + m_j m_k)]

to the Hessian, with l = mean lambda z'; and it moves lambda_z by

    -a lambda_z + r (dlambda - dm1 - m2 dz_hat - dm2 z_hat)

with dm1 = mean dlambda and dm2 = mean dlambda z_hat + mean lambda dz_hat. That is a weighted sum of
dlambda, lambda, z_hat, dz and 1, whose coefficients are linear in a channel's sums (`_make_table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rdarts_fast.kernels import channel_sums
from rdarts_fast.kernels.array import MOST_INPUTS, coefficient_dtype, empty, empty_like
from rdarts_fast.kernels.moments import tangent_moments
from rdarts_fast.kernels.node_sum import launch_node_sum_dq
from rdarts_fast.kernels.sep_stage import Affine
from rdarts_fast.networks.weighted_sum import Term, sum_into, sum_of


class Sum(NamedTuple):
    """by_g * g + by_z * z + constant, which some read as it stands. g, z: [N, C, H, W]."""

    g: Tensor
    z: Tensor | None
    affine: Affine  # [1, C] each

    def whole(self) -> Tensor:
        """Return it as a tensor."""
        by_g, by_z, constant, _ = self.affine
        assert by_g is not None
        terms = [Term(self.g, by_g[0])]
        if self.z is not None and by_z is not None and constant is not None:
            terms.append(Term(self.z, by_z[0], shift=constant[0]))
        return sum_of(terms)


class Norm:
    """A batch norm. In train mode by batch statistics, and the buffers stay."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self._norm, self.training = norm, norm.training
        self.gradient: Tensor | None = None  # lambda [N, C, H, W]
        self.forget()

    def forget(self) -> None:
        """Drop the tangents: along no direction anything moves."""
        self.directions = 0
        self.dz: Tensor | None = None

    def primal(self, z: Tensor, sums: Tensor | None = None) -> Tensor:
        """Return z_hat. sums: [3, C] of z as the stages give them, if known."""
        norm = self._norm
        self.count = z[:, 0].numel()
        if self.training:
            mean, variance = _statistics(z, sums)
        else:
            assert norm.running_mean is not None and norm.running_var is not None
            mean, variance = norm.running_mean.double(), norm.running_var.double()
        self.rstd = (variance + norm.eps).rsqrt()
        self.result = sum_of([Term(z, self.rstd, shift=-mean * self.rstd)])
        return self.result

    def take(self, gradient: Tensor, totals: Tensor | None = None, p: Tensor | None = None) -> None:
        """Take lambda; the gradient in z_hat is p lambda. totals: the sums of lambda and of lambda
        z_hat, [2, C], if known. p: [] or None for 1.
        """
        self.gradient = gradient.contiguous(memory_format=torch.channels_last)
        self._p = torch.ones_like(self.rstd[0]) if p is None else p
        self._by_gradient = self._p * self.rstd
        if not self.training:
            return
        if totals is None:
            totals = totals_of([self.gradient], self.result)[:, 0]
        self.m1, self.m2 = totals.double() / self.count
        self._table = self._make_table()

    def _make_table(self) -> Tensor:
        """Return how the tangents of the gradient in z, with that in z_hat p f g + dp lambda, are
        made: [8, 7, C].

        Rows: what f g, lambda, z_hat and dz are multiplied by, then the constants beside them.
        Columns: what to multiply by the sums of dz, z_hat dz, lambda dz, f g and f g z_hat, by dp
        and by 1.
        """
        r, p, m1, m2 = self.rstd, self._p, self.m1, self.m2
        each = p * r / self.count
        u = each * r
        table = r.new_zeros(8, 7, len(r))
        table[0, 6] = p * r
        table[1, 1], table[1, 5] = -u, r
        table[2, :6] = torch.stack([u * m1, 3.0 * u * m2, -u, torch.zeros_like(u), -each, -r * m2])
        table[3, 6] = -p * r**2 * m2
        table[6, :6] = torch.stack([u * m2, u * m1, 0.0 * u, -each, 0.0 * u, -r * m1])
        return table

    def adjoint(self) -> Sum:
        """Return the gradient in z."""
        assert self.gradient is not None
        dtype = coefficient_dtype(self.result.dtype)
        by_gradient = self._by_gradient
        if not self.training:
            return Sum(self.gradient, None, Affine(by_gradient.to(dtype)[None]))
        rows = torch.stack([by_gradient, -by_gradient * self.m2, -by_gradient * self.m1])
        return Sum(self.gradient, self.result, Affine(*rows.to(dtype)[:, None]))

    def measure(self, dz: Tensor) -> None:
        """Take the tangents of z: what they add to the Hessian, `curvature` [V, V], the sums of
        lambda dz_hat, `along` [V], and the means that dz_hat is made with, m and a [V, C].
        """
        assert self.gradient is not None
        self.directions = dz.shape[0] // self.result.shape[0]
        if not self.training:
            self._follow_still(dz)
            self.curvature = self.rstd.new_zeros(self.directions, self.directions)
            return
        found = tangent_moments(dz, self.result, self.gradient, self.m2 * self.rstd**2)
        self._follow(torch.stack([found.totals, found.by_result, found.by_gradient]))
        m, a = self.m, self.a
        by_gradient = self._sums[2] * (self.rstd / self.count)
        cross = a @ (by_gradient - m * self.m1).t()
        squares = 3.0 * (a * self.m2) @ a.t() + (m * self.m2) @ m.t()
        self.curvature = self.count * (squares - cross - cross.t()) - found.pairs

    def follow(self, dz: Tensor) -> None:
        """Take the tangents of z as `measure` does, without curvature, and keep them."""
        assert self.gradient is not None
        parts = by_direction(dz, self.result)
        self.directions, self.dz = len(parts), dz
        if not self.training:
            self._follow_still(dz)
            return
        known = [self.result, self.gradient]
        found = [launch_node_sum_dq(part, known, None)[0] for part in parts]  # [2, 2, C] each
        self._follow(torch.stack([torch.stack([f[1, 0], *f[0]]) for f in found], dim=1))

    def _follow(self, sums: Tensor) -> None:
        """Take the sums of dz, of z_hat dz and of lambda dz, [3, V, C]."""
        self._sums = sums
        self.m, self.a = sums[:2] * (self.rstd / self.count)
        # of lambda dz_hat
        own = self.rstd * sums[2] - self.count * (self.a * self.m2 + self.m * self.m1)
        self.along = own.sum(dim=1)

    def _follow_still(self, dz: Tensor) -> None:
        assert self.gradient is not None
        by_gradient = products(self.gradient, by_direction(dz, self.result))
        self.along = (by_gradient * self.rstd).sum(dim=1)

    def tangent(self, dz: Tensor) -> Tensor:
        """Return dz_hat; `measure` or `follow` has taken dz."""
        out = empty_like(dz)
        by_dz, by_result, constant = self.coefficients()
        parts = zip(by_direction(out, self.result), by_direction(dz, self.result), strict=True)
        for v, (part, x) in enumerate(parts):
            terms = [Term(x, by_dz[v])]
            if self.training:
                terms.append(Term(self.result, by_result[v], shift=constant[v]))
            sum_of(terms, part)
        return out

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return dz_hat as by_dz * dz + by_result * z_hat + constant, [V, C] each."""
        if not self.training:
            rows = self.rstd.expand(self.directions, -1)
            return rows, torch.zeros_like(rows), torch.zeros_like(rows)
        return self.rstd.expand_as(self.m), -self.a, -self.m

    def adjoint_tangent(
        self,
        g: Sequence[Tensor],
        totals: Tensor | None = None,
        dp: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Return the tangents of the gradient in z where those in z_hat are p f g + dp lambda, [V
        N, C, H, W].

        g: V tensors [N, C, H, W]. totals: the sums of f g and of f g z_hat, [2, V, C]; unread in
        eval mode. dp: the tangents of p, [V], or None for zeros. factors: f [N] or None for ones.
        """
        assert self.gradient is not None
        tensors, scale, shift = [self.gradient], *self._coefficients(g, totals, dp, factors)
        if self.training:
            tensors.append(self.result)
        dz = [] if self.dz is None else by_direction(self.dz, self.result)
        n, *shape = self.result.shape
        out = empty(self.result, (len(g) * n, *shape), torch.channels_last)
        for v, part in enumerate(by_direction(out, self.result)):
            some = [g[v], *tensors, *(dz[v : v + 1] if self.training else ())]
            rows = None
            if factors is not None:
                rows = torch.ones(len(some), n, dtype=out.dtype, device=out.device)
                rows[0] = factors
            own = None if shift is None else shift[v, : len(some)]
            sum_into(part, some, scale[v, : len(some)], rows, own)
        return out

    def _coefficients(
        self,
        g: Sequence[Tensor],
        totals: Tensor | None,
        dp: Tensor | None,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the tangents of `adjoint_tangent` are made with, [V, 4, C] and the constants;
        in eval mode [V, 2, C] and none.
        """
        dtype, count = coefficient_dtype(self.result.dtype), len(g)
        moved = self.rstd.new_zeros(count) if dp is None else dp.double()
        if not self.training:
            by_gradient = moved[:, None] * self.rstd
            rows = [self._by_gradient.expand_as(by_gradient), by_gradient]
            return torch.stack(rows, dim=1).to(dtype), None
        given = self.rstd.new_zeros(7, count, len(self.rstd))
        if self.directions:
            given[:3, : self.directions] = self._sums
        given[3:5] = totals_of(g, self.result, factors) if totals is None else totals
        given[5] = moved[:, None]
        given[6].fill_(1.0)  # not set: that would bring a number from the host
        found = torch.einsum("rkc,kvc->vrc", self._table, given).to(dtype)
        return found[:, :4], found[:, 4:]


def _statistics(z: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, [C] float64."""
    if sums is None:
        pivot = z[0, :, 0, 0].clone()
        total, square = channel_sums([z], pivot[None])
        sums = torch.stack([total[0], square[0], pivot])
    total, square, pivot = sums.double()
    count = z[:, 0].numel()
    off = total / count
    return pivot + off, (square / count - off**2).clamp_min(0.0)


def totals_of(g: Sequence[Tensor], result: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return the sums of each f g and of each f g * result, [2, V, C]. factors: f [N]."""
    rows = None if factors is None else factors[None]
    found = [launch_node_sum_dq(one, [result], rows)[0] for one in g]
    return torch.cat(found, dim=1).flip(0)


def products(g: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums over n, h, w of g times each tensor, [K, C] float64."""
    found = [
        launch_node_sum_dq(g, tensors[k : k + MOST_INPUTS], None)[0][0]
        for k in range(0, len(tensors), MOST_INPUTS)
    ]
    return torch.cat(found)


def by_direction(x: Tensor, like: Tensor) -> list[Tensor]:
    """Return the tensors of each direction of x, [V N, C, H, W]. like: [N, C, H, W]."""
    n = like.shape[0]
    return [x] if x.shape[0] == n else list(x.split(n))
