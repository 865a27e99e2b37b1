"""How tensors reach the native kernels: checked, then as one flat list of addresses and strides."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels.launches import hold, run_waiting

MOST_INPUTS = 64
LEAST_KEPT = 1 << 16  # bytes of a tensor whose memory is used again
MOST_ELEMENTS = 1 << 40  # so that no size, offset or workspace of a call overflows 64 bits
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
}  # the codes of csrc/include/array.h


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums and coefficients are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_inputs(z: Sequence[Tensor], name: str = "z") -> None:
    """Raise TypeError or ValueError unless `z` holds 1 to 64 alike tensors [N, C, H, W]."""
    if isinstance(z, Tensor) or not isinstance(z, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {type(z).__name__}")
    if not 1 <= len(z) <= MOST_INPUTS:
        raise ValueError(f"{name}: expected 1 to {MOST_INPUTS} tensors, got {len(z)}")
    check_images(z[0], f"{name}[0]")
    first = z[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for k, tensor in enumerate(z):
        if not isinstance(tensor, Tensor) or (
            tensor.shape != shape or tensor.dtype != dtype or tensor.device != device
        ):
            check_alike(tensor, f"{name}[{k}]", first, f"{name}[0]")


def check_images(x: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless `x` is [N, C, H, W] of a type that has kernels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got shape {tuple(x.shape)}")
    if math.prod(size or 1 for size in x.shape) > MOST_ELEMENTS:
        raise ValueError(
            f"{name}: expected sizes of product 2**40 at most, got shape {tuple(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float64 or bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {x.layout}")
    if x.device.type not in ("cpu", "meta") and not native.runs_on(x.device):
        raise ValueError(
            f"{name}: expected a tensor on a device that has kernels, got one on {x.device}"
            + (f": {native.misfit(x.device)}" if x.device.type == "cuda" else "")
        )


def check_alike(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raise TypeError or ValueError unless `x` has the shape, dtype and device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != other.shape:
        expected = f"{tuple(other.shape)} as {other_name}"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} as {other_name}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {x.device}")


def check_coefficients(
    x: Tensor | None, name: str, axes: str, shape: tuple[int, ...], images: Tensor
) -> None:
    """Raise TypeError or ValueError unless `x` is None or has `shape`, the coefficients' dtype of
    `images` and their device. `axes` names the shape, as "[K, C]".
    """
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {axes} = {shape}, got {tuple(x.shape)}")
    dtype = coefficient_dtype(images.dtype)
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} for {images.dtype} images, got {x.dtype}")
    if x.device != images.device:
        raise ValueError(f"{name}: expected device {images.device}, got {x.device}")


def check_constant(x: Tensor | None, name: str) -> None:
    """Raise ValueError where `x`, which gets no gradient, asks for one."""
    if x is not None and x.requires_grad:
        raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient")


def memory_format(z: Sequence[Tensor]) -> torch.memory_format:
    """Return channels_last where most of the tensors hold their channels innermost."""
    inner = 0
    for tensor in z:
        inner += tensor.stride(1) == 1 and tensor.shape[1] > 1
    return torch.channels_last if 2 * inner > len(z) else torch.contiguous_format


def empty(
    like: Tensor,
    shape: Sequence[int],
    format_: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return a dense uninitialised tensor [N, C, H, W] on like's device, of its dtype or another.

    On the CPU in memory that earlier results have left (csrc/bindings_memory.cpp), but where torch
    is asked to fill what it allocates (torch.use_deterministic_algorithms).
    """
    return empties(1, like, shape, format_, dtype)[0]


def empties(
    count: int,
    like: Tensor,
    shape: Sequence[int],
    format_: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return `count` such tensors."""
    dtype = like.dtype if dtype is None else dtype
    size = math.prod(shape) * dtype.itemsize
    filled = torch.are_deterministic_algorithms_enabled()
    if like.device.type != "cpu" or size < LEAST_KEPT or filled:
        how: Any = {"dtype": dtype, "device": like.device, "memory_format": format_}
        return [torch.empty(shape, **how) for _ in range(count)]
    c, h, w = shape[1:]
    strides = (
        (c * h * w, 1, w * c, c) if format_ == torch.channels_last else (c * h * w, h * w, w, 1)
    )
    new, view = native.extension.Block, torch.frombuffer
    try:
        # In place: autograd adds to a gradient where it lies unless that is another tensor's view.
        return [view(new(size), dtype=dtype).as_strided_(shape, strides) for _ in range(count)]
    except MemoryError:  # torch says how much it was
        return [torch.empty(shape, dtype=dtype, memory_format=format_) for _ in range(count)]


def empty_like(x: Tensor) -> Tensor:
    """Return a dense uninitialised tensor of x's shape, dtype and device, its channels innermost
    where x's are.
    """
    return empty(x, x.shape, memory_format((x,)))


def empty_node(z: Sequence[Tensor]) -> Tensor:
    """Return a dense uninitialised tensor like z[0], laid out as most of z are."""
    return empty(z[0], z[0].shape, memory_format(z))


@functools.cache
def index_of(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Return positions as a tensor, int64 [K]: kept, because making it anew would wait for a copy
    to the device, and a step that is recorded once can have none.
    """
    return torch.tensor(positions, dtype=torch.int64, device=device)


def chosen(x: Tensor, positions: Sequence[int]) -> Tensor:
    """Return x[positions], of its first dimension."""
    return x.index_select(0, index_of(tuple(positions), x.device))


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return x, packed in row-major order; None for None."""
    if x is None or x.is_contiguous():
        return x
    run_waiting()  # which may fill it
    return x.contiguous()


def flat(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return five numbers for each: its address and four strides; five zeros for None.

    Raises ValueError for a lazily negated view, whose memory holds the opposite.
    """
    hold(tensors)
    numbers: list[int] = []
    for tensor in tensors:
        if tensor is None:
            numbers += (0, 0, 0, 0, 0)
            continue
        if tensor.is_neg():
            raise ValueError("expected plain tensors, got a negated view: call resolve_neg() on it")
        numbers.append(tensor.data_ptr())
        numbers += tensor.stride()
    return numbers


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return where tensors lie, which launches that wait keep alive; 0 for None."""
    hold(tensors)
    return [0 if x is None else x.data_ptr() for x in tensors]


def address(x: Tensor | None) -> int:
    """Return where `x` lies, which launches that wait keep alive; 0 for None."""
    return addresses((x,))[0]
