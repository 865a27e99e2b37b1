"""The sum of batch-normalised candidates into a node, in two passes over the images each way.

    out = sum_k weights[k] * factors[k, n] * (z[k] - mean[k, c]) * rstd[k, c] + noise

with the batch's own mean and rstd = 1 / sqrt(var + eps) in training (Ioffe & Szegedy, 2015, without
affine). With g the gradient of out, M elements a channel and z^ the normalised z:

    dz[k] = weights[k] * rstd * (f g - mean(f g) - z^ * mean(f g z^)),   dweights[k] = sum f g z^
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.channel_sums import channel_affine, channel_sums
from rdarts_fast.kernels.launches import launch
from rdarts_fast.kernels.node_sum import (
    Key,
    Noise,
    check_factors,
    check_noise,
    native_noise,
    node_sum_dq,
    node_sum_dz,
    node_sum_twin,
    noise_of,
    parts,
)

Running = Sequence[tuple[Tensor, Tensor] | None]
Sums = Sequence[Tensor | None]


@dataclass(frozen=True)
class _Settings:
    normalised: tuple[bool, ...]
    running: Running | None
    key: Key | None
    sums: Sums | None
    eps: float
    momentum: float
    training: bool


def normalized_sum(
    z: Sequence[Tensor],
    weights: Tensor,
    normalised: Sequence[bool] | None = None,
    running: Running | None = None,
    factors: Tensor | None = None,
    noise: Noise | None = None,
    *,
    sums: Sums | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    training: bool = True,
) -> Tensor:
    """Return sum_k weights[k] * batch_norm(z[k]) and noise, [N, C, H, W]: a node of the supernet
    (DARTS, section 2.2).

    z: K tensors [N, C, H, W], K from 1 to 64, any strides. weights: [K]. normalised: which z are
    batch-normalised, all where None; the others enter as they are. running: for each z its
    (mean [C], var [C]) or None; in training they are updated in place as torch does, in eval mode
    they are what normalises. factors: [K, N], no gradient. sums: for each z its sums [3, C] as
    `pools` gives them, so that training need not read it for them, or None. Weights, factors and
    running buffers are float64 for float64 images, else float32. Differentiable, twice and more, in
    z, weights and the noise's weights. Raises TypeError and ValueError.
    """
    array.check_inputs(z)
    k = len(z)
    array.check_coefficients(weights, "weights", "[K]", (k,), z[0])
    check_factors(factors, k, z[0])
    check_noise(noise, z[0])
    flags = (True,) * k if normalised is None else tuple(map(bool, normalised))
    if len(flags) != k:
        raise ValueError(f"normalised: expected K = {k} flags, got {len(flags)}")
    _check_statistics(flags, running, z[0], training)
    _check_sums(sums, z)
    key, drawn_weights, drawn_factors = parts(noise)
    settings = _Settings(flags, running, key, sums, eps, momentum, training)
    out: Tensor = _NormalizedSum.apply(settings, weights, factors, drawn_weights, drawn_factors, *z)
    return out


def normalized_sum_twin(
    z: Sequence[Tensor],
    weights: Tensor,
    normalised: Sequence[bool] | None = None,
    running: Running | None = None,
    factors: Tensor | None = None,
    noise: Noise | None = None,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    training: bool = True,
) -> Tensor:
    """Return normalized_sum(...) by torch's batch norm."""
    terms = []
    for k, tensor in enumerate(z):
        if normalised is None or normalised[k]:
            pair = None if running is None else running[k]
            mean, var = (None, None) if pair is None else pair
            x = tensor.to(weights.dtype)
            x = torch.nn.functional.batch_norm(
                x, mean, var, training=training, momentum=momentum, eps=eps
            )
            terms.append(x)
        else:
            terms.append(tensor.to(weights.dtype))
    total = node_sum_twin(
        terms, weights.view(-1, 1).expand(-1, z[0].shape[1]), None, factors, noise
    )
    return total.to(z[0].dtype)


def _check_statistics(
    flags: tuple[bool, ...], running: Running | None, first: Tensor, training: bool
) -> None:
    n, c, h, w = first.shape
    if training and n * h * w < 2 and any(flags):
        raise ValueError(
            f"z: batch statistics need 2 values a channel or more, got shape {tuple(first.shape)}"
        )
    if running is None:
        if not training and any(flags):
            raise ValueError("running: expected (mean, var) of each z in eval mode, got None")
        return
    if len(running) != len(flags):
        raise ValueError(f"running: expected K = {len(flags)} entries, got {len(running)}")
    for k, pair in enumerate(running):
        if pair is None:
            if flags[k] and not training:
                raise ValueError(f"running[{k}]: expected (mean, var) in eval mode, got None")
            continue
        for i, name in enumerate(("mean", "var")):
            array.check_coefficients(pair[i], f"running[{k}] {name}", "[C]", (c,), first)
            if not pair[i].is_contiguous():
                raise ValueError(f"running[{k}] {name}: expected a contiguous tensor")


def _check_sums(sums: Sums | None, z: Sequence[Tensor]) -> None:
    if sums is None:
        return
    if len(sums) != len(z):
        raise ValueError(f"sums: expected K = {len(z)} entries, got {len(sums)}")
    shape = (3, z[0].shape[1])
    for k, rows in enumerate(sums):
        if rows is None:
            continue
        if not isinstance(rows, Tensor) or rows.shape != shape or rows.dtype != torch.float64:
            found = (rows.dtype, tuple(rows.shape)) if isinstance(rows, Tensor) else type(rows)
            raise ValueError(f"sums[{k}]: expected a float64 tensor [3, C] = {shape}, got {found}")
        if rows.device != z[0].device or rows.stride(1) != 1:
            raise ValueError(
                f"sums[{k}]: expected packed rows on {z[0].device}, got strides "
                f"{rows.stride()} on {rows.device}"
            )


class _NormalizedSum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: _Settings,
        weights: Tensor,
        factors: Tensor | None,
        drawn_weights: Tensor | None,
        drawn_factors: Tensor | None,
        *z: Tensor,
    ) -> Tensor:
        ctx.settings = settings
        weights = weights.contiguous()
        factors, drawn_weights, drawn_factors = map(
            array.contiguous, (factors, drawn_weights, drawn_factors)
        )
        shape, device = tuple(z[0].shape), z[0].device
        statistics = torch.empty(2, len(z), shape[1], dtype=torch.float64, device=device)
        ctx.save_for_backward(weights, factors, drawn_weights, drawn_factors, statistics, *z)
        out = array.empty_node(z)
        if device.type == "meta":
            return out
        place = native.place(device)
        space = native.extension.workspace(shape, len(z), 0, place)
        workspace = torch.empty(space, dtype=torch.float64, device=device)
        launch(
            "normalized_sum",
            array.DTYPES[out.dtype],
            shape,
            array.flat((out, *z)),
            array.address(weights),
            settings.normalised,
            _addresses(settings.running),
            _rows(settings.sums),
            array.address(factors),
            native_noise(settings.key, drawn_weights, drawn_factors),
            (settings.eps, settings.momentum, settings.training),
            array.address(statistics),
            array.address(workspace),
            place,
        )
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        # Under create_graph the derivatives are composed of functions that have their own.
        backward = _recorded_backward if torch.is_grad_enabled() else _fused_backward
        dz, dweights, ddrawn = backward(ctx, g)
        return None, dweights, None, ddrawn if ctx.needs_input_grad[3] else None, None, *dz


Gradients = tuple[Sequence[Tensor | None], Tensor | None, Tensor | None]


def _fused_backward(ctx: Any, g: Tensor) -> Gradients:
    settings = ctx.settings
    weights, factors, _, drawn_factors, statistics, *z = ctx.saved_tensors
    needs = ctx.needs_input_grad[5:]
    dz = [array.empty_like(x) if need else None for x, need in zip(z, needs, strict=True)]
    sites = 0 if settings.key is None else len(settings.key[1])
    dtype, shape = weights.dtype, tuple(g.shape)
    if g.device.type == "meta":
        return dz, torch.empty_like(weights), torch.empty(sites, dtype=dtype, device=g.device)
    place = native.place(g.device)
    sums = len(z) + sites
    space = native.extension.workspace(shape, len(z), sites, place)
    buffer = torch.empty(sums + space, dtype=torch.float64, device=g.device)
    launch(
        "normalized_sum_backward",
        array.DTYPES[g.dtype],
        shape,
        array.flat((g, *z, *dz)),
        array.address(weights),
        settings.normalised,
        array.address(factors),
        native_noise(settings.key, None, drawn_factors),
        settings.training,
        array.address(statistics),
        array.address(buffer),
        place,
    )
    if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[3]):
        return dz, None, None
    dweights, ddrawn = buffer[:sums].to(dtype).split((len(z), sites))
    return dz, dweights, ddrawn


def _recorded_backward(ctx: Any, g: Tensor) -> Gradients:
    settings = ctx.settings
    weights, factors, drawn_weights, drawn_factors, statistics, *z = ctx.saved_tensors
    noise = noise_of(settings.key, drawn_weights, drawn_factors)
    mean, rstd = statistics.to(weights.dtype)  # [K, C] each; 0 and 1 where not normalised
    offset = torch.zeros_like(mean)  # the mean, less that constant
    rows = [k for k, flag in enumerate(settings.normalised) if flag and settings.training]
    count = g.numel() // max(g.shape[1], 1)
    chosen, index = [z[k] for k in rows], array.index_of(tuple(rows), g.device)
    if rows:
        total, square = (x / count for x in channel_sums(chosen, mean[index]))
        offset = offset.index_copy(0, index, total)
        rstd = rstd.index_copy(0, index, (square - total.square() + settings.eps).rsqrt())
    dscale, dshift, ddrawn = node_sum_dq(g, z, factors, noise, mean)
    along = rstd * (dscale - offset * dshift)  # sum f g z^
    by_g = weights.view(-1, 1) * rstd
    dz = node_sum_dz(g, by_g, factors)
    if rows:
        u = (-by_g * rstd * along / count)[index]
        v = (-by_g * dshift / count)[index] - u * (mean + offset)[index]
        for k, term in zip(rows, channel_affine(chosen, u, v), strict=True):
            dz[k] = dz[k] + term
    return dz, along.sum(dim=1), ddrawn


def _addresses(running: Running | None) -> list[int]:
    addresses: list[int] = []
    for pair in running or ():
        addresses += (0, 0) if pair is None else (array.address(pair[0]), array.address(pair[1]))
    return addresses


def _rows(sums: Sums | None) -> list[int]:
    rows: list[int] = []
    for tensor in sums or ():
        rows += (0, 0) if tensor is None else (array.address(tensor), tensor.stride(0))
    return rows
