"""The weighted sum of K candidates into a node, and its adjoints (DARTS, section 2.2).

    out[n, c, h, w] = sum_k factors[k, n] * (scale[k, c] * z[k][n, c, h, w] + shift[k, c])
                    + sum_j noise.factors[j, n] * noise.weights[j] * drawn_j[n, c, h, w]

A batch norm is such a scale and shift per channel. `node_sum` is bilinear in z and the
coefficients; its derivatives are `node_sum_dz` and `node_sum_dq`, and theirs are the three again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.draws import Draws
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch, place_on

Key = tuple[Draws, tuple[int, ...]]


@dataclass(frozen=True)
class Noise:
    """The drawn terms of a node sum, one a site: `Draws.normal(site, (N, C, H, W))`, never stored.

    sites: J of them. weights: [J]. factors: [J, N] or None for ones; they carry no gradient.
    """

    draws: Draws
    sites: Sequence[int]
    weights: Tensor
    factors: Tensor | None = None

    @property
    def key(self) -> Key:
        return self.draws, tuple(self.sites)


def node_sum(
    z: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor | None = None,
    factors: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return the sum of K scaled and shifted tensors and of noise, [N, C, H, W].

    z: K tensors [N, C, H, W], K from 1 to 64, any strides. scale, shift: [K, C]. factors: [K, N],
    no gradient. Coefficients are float64 for float64 images, else float32. Differentiable, twice
    and more, in z, scale, shift and the noise's weights. Raises TypeError and ValueError.
    """
    array.check_inputs(z)
    k, c = len(z), z[0].shape[1]
    array.check_coefficients(scale, "scale", "[K, C]", (k, c), z[0])
    array.check_coefficients(shift, "shift", "[K, C]", (k, c), z[0])
    check_factors(factors, k, z[0])
    check_noise(noise, z[0])
    key, weights, drawn_factors = parts(noise)
    out: Tensor = _NodeSum.apply(key, scale, shift, factors, weights, drawn_factors, *z)
    return out


def node_sum_dz(g: Tensor, scale: Tensor, factors: Tensor | None = None) -> list[Tensor]:
    """Return the adjoint of `node_sum` in z, K tensors [N, C, H, W]: factors[k, n] * scale[k, c] *
    g.

    g: [N, C, H, W]. scale: [K, C]. factors: [K, N], no gradient. Differentiable in g and scale.
    """
    array.check_images(g, "g")
    k = _rows(scale, "scale")
    array.check_coefficients(scale, "scale", "[K, C]", (k, g.shape[1]), g)
    check_factors(factors, k, g)
    return list(_NodeSumDz.apply(g, scale, factors))


def node_sum_dq(
    g: Tensor,
    z: Sequence[Tensor],
    factors: Tensor | None = None,
    noise: Noise | None = None,
    pivot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the adjoint of `node_sum` in its coefficients: (dscale [K, C], dshift [K, C], dweights
    [J]).

    dscale = sum over n, h, w of factors * g * (z - pivot), dshift = that of factors * g,
    dweights[j] = sum of noise.factors * g * drawn_j. g: [N, C, H, W]. pivot: [K, C] or None for
    zeros, no gradient. Differentiable in g and z; the noise's weights play no part.
    """
    array.check_inputs(z)
    array.check_alike(g, "g", z[0], "z[0]")
    k, c = len(z), z[0].shape[1]
    check_factors(factors, k, z[0])
    check_noise(noise, z[0])
    array.check_coefficients(pivot, "pivot", "[K, C]", (k, c), z[0])
    array.check_constant(pivot, "pivot")
    key, _, drawn_factors = parts(noise)
    dscale, dshift, dweights = _NodeSumDq.apply(key, g, factors, drawn_factors, pivot, *z)
    return dscale, dshift, dweights


def node_sum_twin(
    z: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor | None = None,
    factors: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return node_sum(...) in plain torch."""
    total = torch.zeros_like(z[0], dtype=scale.dtype)
    for k, tensor in enumerate(z):
        term = tensor * scale[k].view(-1, 1, 1)
        if shift is not None:
            term = term + shift[k].view(-1, 1, 1)
        total = total + (term if factors is None else term * factors[k].view(-1, 1, 1, 1))
    if noise is not None:
        for weight, drawn in zip(noise.weights, drawn_twin(noise, z[0]), strict=True):
            total = total + weight * drawn
    return total.to(z[0].dtype)


def node_sum_dz_twin(g: Tensor, scale: Tensor, factors: Tensor | None = None) -> list[Tensor]:
    """Return node_sum_dz(...) in plain torch."""
    terms = [row.view(-1, 1, 1) * g for row in scale]
    if factors is not None:
        terms = [term * row.view(-1, 1, 1, 1) for term, row in zip(terms, factors, strict=True)]
    return [term.to(g.dtype) for term in terms]


def node_sum_dq_twin(
    g: Tensor,
    z: Sequence[Tensor],
    factors: Tensor | None = None,
    noise: Noise | None = None,
    pivot: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return node_sum_dq(...) in plain torch."""
    g = g.to(array.coefficient_dtype(g.dtype))
    dscale, dshift = [], []
    for k, tensor in enumerate(z):
        weighted = g if factors is None else g * factors[k].view(-1, 1, 1, 1)
        centred = tensor if pivot is None else tensor - pivot[k].view(-1, 1, 1)
        dscale.append((weighted * centred).sum(dim=(0, 2, 3)))
        dshift.append(weighted.sum(dim=(0, 2, 3)))
    drawn = [] if noise is None else drawn_twin(noise, g)
    dweights = torch.stack([(g * d).sum() for d in drawn]) if drawn else g.new_zeros(0)
    return torch.stack(dscale), torch.stack(dshift), dweights


def drawn_twin(noise: Noise, images: Tensor) -> list[Tensor]:
    """Return noise.factors * drawn_j for every site, J tensors [N, C, H, W]."""
    dtype = array.coefficient_dtype(images.dtype)
    drawn = [noise.draws.normal(s, images.shape, images.device).to(dtype) for s in noise.sites]
    if noise.factors is None:
        return drawn
    return [d * row.view(-1, 1, 1, 1) for d, row in zip(drawn, noise.factors, strict=True)]


def check_factors(factors: Tensor | None, k: int, images: Tensor) -> None:
    """Raise unless `factors` is None or a constant [K, N]."""
    array.check_coefficients(factors, "factors", "[K, N]", (k, images.shape[0]), images)
    array.check_constant(factors, "factors")


def check_noise(noise: Noise | None, images: Tensor) -> None:
    """Raise unless `noise` is None or has up to 64 sites and weights and factors that fit."""
    if noise is None:
        return
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: expected a Noise, got {type(noise).__name__}")
    j = len(noise.sites)
    if j > array.MOST_INPUTS:
        raise ValueError(f"noise.sites: expected at most {array.MOST_INPUTS} sites, got {j}")
    for site in noise.sites:
        if not 0 <= site < 1 << 32:
            raise ValueError(f"noise.sites: expected sites in [0, 2**32), got {site}")
    if images.numel() > 4 << 32:
        raise ValueError(f"noise: expected at most 2**34 numbers a site, got {images.numel()}")
    array.check_coefficients(noise.weights, "noise.weights", "[J]", (j,), images)
    shape = (j, images.shape[0])
    array.check_coefficients(noise.factors, "noise.factors", "[J, N]", shape, images)
    array.check_constant(noise.factors, "noise.factors")


def native_noise(
    key: Key | None, weights: Tensor | None, factors: Tensor | None, kept: Tensor | None = None
) -> tuple[int, ...] | None:
    """Return the noise as the extension takes it: seed, step, branch and pass, addresses of the
    draws' clock, the weights, the factors and the numbers that are kept for the backward, sites.
    """
    if key is None:
        return None
    draws, sites = key
    stream = draws.branch << 16 | draws.pass_index
    addresses = array.addresses((draws.clock, weights, factors, kept))
    return (draws.seed, draws.step, stream, *addresses, *sites)


def _rows(x: Tensor, name: str) -> int:
    if not isinstance(x, Tensor) or x.dim() != 2:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected shape [K, C], got {found}")
    if not 1 <= x.shape[0] <= array.MOST_INPUTS:
        raise ValueError(f"{name}: expected 1 to {array.MOST_INPUTS} rows, got {x.shape[0]}")
    return x.shape[0]


def parts(noise: Noise | None) -> tuple[Key | None, Tensor | None, Tensor | None]:
    if noise is None or not noise.sites:
        return None, None if noise is None else noise.weights, None
    return noise.key, noise.weights, noise.factors


def noise_of(key: Key | None, weights: Tensor | None, factors: Tensor | None) -> Noise | None:
    return None if key is None or weights is None else Noise(*key, weights, factors)


def launch_node_sum(
    key: Key | None,
    scale: Tensor,
    shift: Tensor | None,
    factors: Tensor | None,
    weights: Tensor | None,
    drawn_factors: Tensor | None,
    z: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """Return node_sum(...), not differentiable."""
    if z[0].device.type == "meta":
        return node_sum_twin(z, scale, shift, factors, noise_of(key, weights, drawn_factors))
    rows, shift, factors, weights, drawn_factors = map(
        array.contiguous, (scale, shift, factors, weights, drawn_factors)
    )
    out = array.empty_node(z) if out is None else out
    launch(
        "node_sum",
        array.DTYPES[out.dtype],
        tuple(out.shape),
        array.flat((out, *z)),
        array.address(rows),
        array.address(shift),
        array.address(factors),
        native_noise(key, weights, drawn_factors),
        place_on(out.device),
    )
    return out


def launch_node_sum_dq(
    g: Tensor,
    z: Sequence[Tensor],
    factors: Tensor | None,
    key: Key | None = None,
    drawn_factors: Tensor | None = None,
    pivot: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return node_sum_dq(...), not differentiable: dscale and dshift, [2, K, C], and dweights [J],
    float64.
    """
    factors, drawn_factors = map(array.contiguous, (factors, drawn_factors))
    pivot = None if pivot is None else array.contiguous(pivot.double())
    shape, place = tuple(g.shape), place_on(g.device)
    count, sites = 2 * len(z) * shape[1], 0 if key is None else len(key[1])
    space = native.extension.workspace(shape, len(z), sites, place)
    buffer = torch.empty(count + sites + space, dtype=torch.float64, device=g.device)
    launch(
        "node_sum_dq",
        array.DTYPES[g.dtype],
        shape,
        array.flat((g, *z)),
        array.address(pivot),
        array.address(factors),
        native_noise(key, None, drawn_factors),
        array.address(buffer),
        place,
    )
    return buffer[:count].view(2, len(z), shape[1]), buffer[count : count + sites]


def launch_affine(
    g: Tensor | None,
    z: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    by_g: Tensor | None,
    by_z: Tensor | None,
    constant: Tensor | None,
    factors: Tensor | None,
) -> None:
    """Fill out[k] = factors[k, n] * by_g[k, c] * g + by_z[k, c] * z[k] + constant[k, c]; what is
    None is zero, an output that is None is not wanted.
    """
    like = next(tensor for tensor in out if tensor is not None)
    by_g, by_z, constant, factors = map(array.contiguous, (by_g, by_z, constant, factors))
    launch(
        "affine",
        array.DTYPES[like.dtype],
        tuple(like.shape),
        array.flat((g, *z, *out)),
        array.address(by_g),
        array.address(by_z),
        array.address(constant),
        array.address(factors),
        place_on(like.device),
    )


def launch_node_sums(
    scale: Tensor, factors: Tensor | None, z: Sequence[Tensor], out: Sequence[Tensor]
) -> list[Tensor]:
    """Fill out[j] = sum_k factors[j K + k, n] * scale[j K + k, c] * z[k], and return it.

    At most two, of the shape of z. scale: [J K, C]. factors: [J K, N] or None.
    """
    rows, factors = map(array.contiguous, (scale, factors))
    launch(
        "node_sums",
        array.DTYPES[z[0].dtype],
        tuple(z[0].shape),
        array.flat((*out, *z)),
        len(out),
        array.address(rows),
        array.address(factors),
        place_on(z[0].device),
    )
    return list(out)


def launch_scaled(z: Sequence[Tensor], scale: Tensor, shift: Tensor) -> list[Tensor]:
    """Return scale[k, c] * z[k] + shift[k, c], channels innermost; scale, shift: [K, C], packed."""
    shape = tuple(z[0].shape)
    out = [array.empty(x, shape, torch.channels_last) for x in z]
    launch(
        "scaled",
        array.DTYPES[z[0].dtype],
        shape,
        array.flat((*z, *out)),
        array.address(scale),
        array.address(shift),
        place_on(z[0].device),
    )
    return out


class _NodeSum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: Key | None,
        scale: Tensor,
        shift: Tensor | None,
        factors: Tensor | None,
        weights: Tensor | None,
        drawn_factors: Tensor | None,
        *z: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.key, ctx.inputs = key, len(z)
        kept = z if needs[1] or needs[2] or needs[4] else ()
        ctx.save_for_backward(scale, factors, drawn_factors, *kept)
        return launch_node_sum(key, scale, shift, factors, weights, drawn_factors, z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        scale, factors, drawn_factors, *z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dscale = dshift = dweights = None
        if z:
            dscale, dshift, dweights = _NodeSumDq.apply(
                ctx.key, g, factors, drawn_factors, None, *z
            )
        dz = _NodeSumDz.apply(g, scale, factors) if any(needs[6:]) else (None,) * ctx.inputs
        return (
            *(None, dscale, dshift if needs[2] else None, None),
            *(dweights if needs[4] else None, None, *dz),
        )


class _NodeSumDz(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, scale: Tensor, factors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, scale, factors)
        if g.device.type == "meta":
            return tuple(node_sum_dz_twin(g, scale, factors))
        out = tuple(array.empty_like(g) for _ in scale)
        launch_affine(g, (None,) * len(out), out, scale, None, None, factors)
        return out

    @staticmethod
    def backward(ctx: Any, *h: Tensor) -> Any:
        g, scale, factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dg = dscale = None
        if needs[0]:
            dg = _NodeSum.apply(None, scale, None, factors, None, None, *h)
        if needs[1]:
            dscale = _NodeSumDq.apply(None, g, factors, None, None, *h)[0]
        return dg, dscale, None


class _NodeSumDq(Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: Key | None,
        g: Tensor,
        factors: Tensor | None,
        drawn_factors: Tensor | None,
        pivot: Tensor | None,
        *z: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.key = key
        ctx.save_for_backward(g, factors, drawn_factors, pivot, *z)
        dtype = array.coefficient_dtype(g.dtype)
        if g.device.type == "meta":
            sites = 0 if key is None else len(key[1])
            weights = torch.empty(sites, dtype=dtype, device=g.device)
            return node_sum_dq_twin(g, z, factors, noise_of(key, weights, drawn_factors), pivot)
        sums, drawn = launch_node_sum_dq(g, z, factors, key, drawn_factors, pivot)
        dscale, dshift = sums.to(dtype)
        return dscale, dshift, drawn.to(dtype)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Any:
        g, factors, drawn_factors, pivot, *z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dg = None
        if needs[1]:
            shift = b if pivot is None else b - a * pivot
            dg = _NodeSum.apply(ctx.key, a, shift, factors, c, drawn_factors, *z)
        dz = _NodeSumDz.apply(g, a, factors) if any(needs[5:]) else (None,) * len(z)
        return None, dg, None, None, None, *dz
