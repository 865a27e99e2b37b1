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

with dm1 = mean dlambda and dm2 = mean dlambda z_hat + mean lambda dz_hat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rdarts_fast.kernels import channel_sums
from rdarts_fast.kernels.array import MOST_INPUTS, coefficient_dtype, empty, empty_like
from rdarts_fast.kernels.moments import tangent_moments
from rdarts_fast.kernels.node_sum import node_sum_dq
from rdarts_fast.kernels.sep_stage import Affine
from rdarts_fast.networks.weighted_sum import Term, sum_of


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
        self.directions, self.dz = 0, None

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

    def take(self, gradient: Tensor, totals: Tensor | None = None) -> None:
        """Take lambda. totals: the sums of lambda and of lambda z_hat, [2, C], if known."""
        self.gradient = gradient.contiguous(memory_format=torch.channels_last)
        if not self.training:
            return
        if totals is None:
            totals = totals_of([self.gradient], self.result)[:, 0]
        self.m1, self.m2 = totals.double() / self.count

    def adjoint(self, p: Tensor) -> Sum:
        """Return the gradient in z where that in z_hat is p lambda; p: []."""
        assert self.gradient is not None
        dtype = coefficient_dtype(self.result.dtype)
        by_gradient = p * self.rstd
        if not self.training:
            return Sum(self.gradient, None, Affine(by_gradient.to(dtype)[None]))
        rows = torch.stack([by_gradient, -by_gradient * self.m2, -by_gradient * self.m1])
        return Sum(self.gradient, self.result, Affine(*rows.to(dtype)[:, None]))

    def measure(self, dz: Tensor) -> None:
        """Take the tangents of z: what they add to the Hessian, `curvature` [V, V], the sums of
        lambda dz_hat, `along` [V], and the means that dz_hat is made with, m and a [V, C].
        """
        assert self.gradient is not None
        self.directions = len(dz) // len(self.result)
        if not self.training:
            self._follow_still(dz)
            self.curvature = self.rstd.new_zeros(self.directions, self.directions)
            return
        found = tangent_moments(dz, self.result, self.gradient, self.m2 * self.rstd**2)
        self._follow(found.totals, found.by_result, found.by_gradient)
        m, a = self.m, self.a
        cross = a @ (self._by_gradient - m * self.m1).t()
        squares = 3.0 * (a * self.m2) @ a.t() + (m * self.m2) @ m.t()
        self.curvature = self.count * (squares - cross - cross.t()) - found.pairs

    def follow(self, dz: Tensor) -> None:
        """Take the tangents of z as `measure`, but no curvature, and keep them for their way back."""
        assert self.gradient is not None
        self.directions, self.dz = len(dz) // len(self.result), dz
        if not self.training:
            self._follow_still(dz)
            return
        known = [self.result, self.gradient]
        found = [node_sum_dq(part, known) for part in dz.split(len(self.result))]
        by_result, by_gradient = torch.stack([dscale for dscale, _, _ in found], dim=1).double()
        totals = torch.stack([dshift[0] for _, dshift, _ in found]).double()
        self._follow(totals, by_result, by_gradient)

    def _follow(self, totals: Tensor, by_result: Tensor, by_gradient: Tensor) -> None:
        """Take the sums of dz, of z_hat dz and of lambda dz, [V, C] each."""
        scale = self.rstd / self.count
        self.m, self.a, self._by_gradient = (x * scale for x in (totals, by_result, by_gradient))
        # mean of lambda dz_hat
        self._means = self._by_gradient - self.a * self.m2 - self.m * self.m1
        self.along = self.count * self._means.sum(dim=1)

    def _follow_still(self, dz: Tensor) -> None:
        assert self.gradient is not None
        by_gradient = products(self.gradient, dz.split(len(self.result)))
        self.along = (by_gradient * self.rstd).sum(dim=1)

    def tangent(self, dz: Tensor) -> Tensor:
        """Return dz_hat; `measure` or `follow` has taken dz."""
        out = empty_like(dz)
        n, (by_dz, by_result, constant) = len(self.result), self.coefficients()
        for v, (part, x) in enumerate(zip(out.split(n), dz.split(n), strict=True)):
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
        p: float | Tensor = 1.0,
        dp: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """Return the tangents of the gradient in z where those in z_hat are p f g + dp lambda, [V
        N, C, H, W].

        g: V tensors [N, C, H, W]. totals: the sums of f g and of f g z_hat, [2, V, C]; unread in
        eval mode. p: the weight, dp: its tangents [V]. factors: f [N] or None for ones.
        """
        assert self.gradient is not None
        count, r, n = len(g), self.rstd, len(self.result)
        moved = r.new_zeros(count, 1) if dp is None else dp.double()[:, None]
        by_gradient = moved * r
        if self.training:
            if totals is None:
                totals = totals_of(g, self.result, factors)
            by_gradient, by_result, constant = self._moved(totals.double(), p, moved)
        parts: list[Tensor] = [] if self.dz is None else list(self.dz.split(n))
        out = empty(self.result, (count * n, *self.result.shape[1:]), torch.channels_last)
        by_gradients = bool(by_gradient.any())
        for v, part in enumerate(out.split(n)):
            terms = [Term(g[v], p * r, factors)]
            if by_gradients:
                terms.append(Term(self.gradient, by_gradient[v]))
            if self.training:
                terms.append(Term(self.result, by_result[v], shift=constant[v]))
                if v < len(parts):
                    terms.append(Term(parts[v], -p * r**2 * self.m2))
            sum_of(terms, part)
        return out

    def _moved(
        self, totals: Tensor, p: float | Tensor, dp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what lambda and z_hat stand with in the tangents of lambda_z, and the constant, [V,
        C] each. dp: [V, 1].
        """
        dm1, dm2 = p * totals / self.count
        dm1, dm2 = dm1 + dp * self.m1, dm2 + dp * self.m2
        a, m = torch.zeros_like(dm1), torch.zeros_like(dm1)
        if self.directions:
            a[: self.directions], m[: self.directions] = self.a, self.m
            dm2[: self.directions] += p * self._means
        r, m2 = self.rstd, p * self.m2
        return (
            r * (dp - p * a),
            r * (2.0 * a * m2 - dm2),
            r * (p * a * self.m1 + m2 * m - dm1),
        )


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
    found = [node_sum_dq(one, [result], rows) for one in g]
    return torch.stack([torch.cat([f[i] for f in found]) for i in (1, 0)])


def products(g: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums over n, h, w of g times each tensor, [K, C] float64."""
    found = [
        node_sum_dq(g, tensors[k : k + MOST_INPUTS])[0] for k in range(0, len(tensors), MOST_INPUTS)
    ]
    return torch.cat(found).double()
