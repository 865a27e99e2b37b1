"""What is held and computed in which type under `--precision fp32 | tf32 | bf16`: one table, and
the settings of torch that belong to it.

fp32 is float32 throughout. tf32 lets products round their factors to 10 bits on a GPU: in a fused
search the gradients of the kernels' 1x1 convolutions, on tensor cores, and torch's stem and
classifier; in a search on the reference backend and in a retraining all of torch's convolutions and
matrix products. bf16 is the table's for a fused search, and torch's autocast for a retraining.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from rdarts_fast import native
from rdarts_fast.errors import UserError

FP32, TF32, BF16 = "fp32", "tf32", "bf16"
PRECISIONS = (FP32, TF32, BF16)
Call = TypeVar("Call", bound=Callable[..., Any])
LEAST_CAPABILITY = (8, 0)  # of a GPU that has tf32 and bf16
_F32, _F64, _BF16 = torch.float32, torch.float64, torch.bfloat16


@dataclass(frozen=True)
class Rule:
    """The type of something in a fused search under bf16, and why. Under fp32 and tf32, float32
    stands where this has bfloat16; where this says float32, tf32 rounds no factors but those that
    "arithmetic" and "ends" name.
    """

    what: str
    dtype: torch.dtype
    why: str


# bench/precision.py measures what the other choice would do to the alphas' gradient.
RULES: Mapping[str, Rule] = {
    "kept": Rule(
        "what a cell's backward reads: inputs, states, pools, z of each stage",
        _BF16,
        "nearly all the memory of a step; rounded once, and never across the zero of a ReLU: masks "
        "of their own have a cosine down to 0.9984 to float64's gradient, these 0.9999",
    ),
    "gradients": Rule(
        "the gradients of all of these within a cell", _BF16, "a cosine above 0.9999"
    ),
    "forward": Rule(
        "what a cell's forward reads: the same tensors, as long as the cell is computed",
        _F32,
        "rounding flips signs at ReLUs, and cell after cell makes more of it: after 8 cells the "
        "logits are off by 2 to 5 %, the alphas' gradient has a cosine of 0.83 to 0.98",
    ),
    "virtual step": Rule(
        "second order's gradient of the weights at w, and what differentiates exactly",
        _F32,
        "what moves the virtual weights moves the alphas' gradient by far more: of an s2 network "
        "after 30 steps its cosine to float64's is 0.995 in float32, 0.992 with the other passes "
        "in bfloat16, 0.95 with this one too; of another 0.99998 with the other passes in tf32, "
        "0.965 with this one too",
    ),
    "between cells": Rule("nodes from cell to cell, and their gradients", _F32, "as forward"),
    "arithmetic": Rule(
        "what kernels compute with between a load and a store: convolutions, sums, noise; in the "
        "backward, and under tf32 there too, factors of 1x1 products have 10 bits, as tensor cores "
        "take them",
        _F32,
        "it costs no bytes; on a GPU noise is never stored. Of an s2 network after 30 steps the "
        "backward's factors leave one pass' gradient a cosine of 0.9999998 to float64's, the "
        "forward's too 0.9987",
    ),
    "statistics": Rule(
        "sums over channels, means, deviations",
        _F64,
        "a variance is a difference of sums; running buffers are float32",
    ),
    "coefficients": Rule(
        "weights of convolutions and operations, drop path's factors, normalisation",
        _F32,
        "few numbers, each read by every pixel",
    ),
    "ends": Rule("images, stem, classifier, loss", _F32, "few bytes"),
    "modules": Rule(
        "operations that have no kernel, whatever is differentiated twice", _F32, "torch's own"
    ),
    "optimisers": Rule(
        "alphas, weights, their gradients, momenta, Adam's moments, the virtual step",
        _F32,
        "steps are smaller than bfloat16 can tell apart",
    ),
    "curvature": Rule(
        "the pass that the Hessian is taken of",
        _F32,
        "it comes once in some epochs: its cost does not count, its error would",
    ),
}


def check_precision(precision: str, device: torch.device, backend: str) -> None:
    """Raise UserError where the device or the backend (fused, reference or torch) does not have the
    precision.
    """
    if precision == FP32:
        return
    name = f"--precision {precision}"
    if precision == BF16 and backend == "reference":
        raise UserError(
            f"{name}: the reference backend has no rules for it (autocast's leave the alphas' "
            "gradient a cosine of 0.83 to 0.89 to float64's): add --backend fused"
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            found = f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
            raise UserError(f"{name}: needs a GPU of compute capability 8.0 or more, {found}")
    elif precision == TF32:
        raise UserError(f"{name}: only GPUs have it: add --precision fp32 or --device cuda")
    elif backend == "fused" and not native.has_bfloat16(device):
        raise UserError(
            f"{name}: the CPU's kernels have no bfloat16: add --precision fp32 or --device cuda"
        )


def in_float32(measure: Call) -> Call:
    """Let products and convolutions inside a function be float32's, torch's and the kernels'."""

    @functools.wraps(measure)
    def measured(*arguments: Any, **named: Any) -> Any:
        with torch_precision(FP32):
            return measure(*arguments, **named)

    return cast(Call, measured)


@contextlib.contextmanager
def torch_precision(precision: str) -> Iterator[None]:
    """Let matrix products and convolutions on a GPU be float32's, or with tf32 round their factors;
    and give the same bits each time. The kernels follow torch.backends.cuda.matmul.
    """
    allowed, matmul = precision == TF32, torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=allowed):
        matmul.allow_tf32 = allowed
        try:
            yield
        finally:
            matmul.allow_tf32 = before
