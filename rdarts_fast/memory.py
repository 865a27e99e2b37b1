"""Out of memory: an error that says what would fit."""

from __future__ import annotations

import contextlib
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rdarts_fast.config import RunConfig, SupernetConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.networks import SearchNetwork, softmax_weights
from rdarts_fast.networks.precision import BF16, LEAST_CAPABILITY
from rdarts_fast.tasks import Task

BESIDE = 1.3  # of what a pass keeps: gradients and workspaces beside it
SIZES = (2, 4)  # batches that are small enough to be tried
_TEXTS = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # and on Windows
    "out of memory",  # CUDA, from the kernels' own launches
)


@dataclass(frozen=True)
class Way:
    """A way to compute, and the bytes that it keeps of an image."""

    flags: str
    bytes: float


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@contextlib.contextmanager
def explained(
    config: RunConfig, device: torch.device, measure: Callable[[], list[Way]] | None = None
) -> Iterator[None]:
    """Turn an error about memory inside the block into a UserError that says what would fit.

    measure: returns the ways to compute, the present one first; without it no sizes are told.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
        raise UserError(explanation(config, device, measure)) from error


def explanation(
    config: RunConfig, device: torch.device, measure: Callable[[], list[Way]] | None
) -> str:
    """Return the line that says what would fit."""
    text = f"out of memory on {device} with --batch-size {config.batch_size}"
    ways: list[Way] = []
    if measure is not None:
        with contextlib.suppress(RuntimeError, MemoryError):  # no room for that either
            ways = measure()
    if not ways:
        half = max(1, config.batch_size // 2)
        return f"{text}: start anew with less, such as --batch-size {half}"
    free = free_bytes(device)
    needs = f"{_size(config.batch_size * ways[0].bytes * BESIDE)} for a pass"
    found = [fit for way in ways if (fit := _fitting(config.batch_size, way, free))]
    text += f": about {needs}, and {_size(free)} are free"
    if not found:
        return f"{text}; not even a batch of 2 fits: fewer --channels or --layers"
    return f"{text}; start anew with what would fit: {', or '.join(found)}"


def _fitting(batch: int, way: Way, free: float) -> str | None:
    """Return the flags of a way with the largest batch that fits: the present one, or halves."""
    size = batch if way.flags else batch // 2
    while size >= 2 and size * way.bytes * BESIDE > free:
        size //= 2
    if size < 2:
        return None
    flags = [way.flags] if way.flags else []
    flags += [f"--batch-size {size}"] if size < batch else []
    return f"{' '.join(flags)} ({_size(size * way.bytes * BESIDE)})"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def free_bytes(device: torch.device) -> float:
    """Return about how many bytes may still be taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return float(free)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return float(max(0, min(free, limit - used)))


def ways_of(config: SupernetConfig, task: Task, supernet: SearchNetwork) -> list[Way]:
    """Return the ways to compute a supernet's pass that there are, measured on a few images: as it
    is, cells computed again, and on GPUs in bfloat16. Empty where rows are not what fills a batch,
    and where a batch has too few to measure.
    """
    if not task.divisible or len(task.search_epoch(Draws(0))[0]) < SIZES[1]:
        return []
    device = next(supernet.parameters()).device
    asked: list[tuple[str, str, bool]] = [("", config.precision, config.checkpoint_cells)]
    if not config.checkpoint_cells and "--checkpoint-cells" in supernet.has:
        asked.append(("--checkpoint-cells", config.precision, True))
    low = device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    if low and config.precision != BF16 and "--precision bf16" in supernet.has:
        asked.append(("--precision bf16", BF16, config.checkpoint_cells))
    ways = []
    for flags, precision, again in asked:
        supernet.compute(precision, again)
        small, large = (kept_bytes(task, supernet, size) for size in SIZES)
        ways.append(Way(flags, (large - small) / (SIZES[1] - SIZES[0])))
    supernet.compute(config.precision, config.checkpoint_cells)
    return ways


def kept_bytes(task: Task, supernet: SearchNetwork, size: int) -> int:
    """Return the bytes that the forward pass of a batch of `size` keeps for its backward."""
    found: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    draws = Draws(0)
    rows = task.search_epoch(draws)[0][:size]
    batch = task.training_batch(rows, draws, 0.0)
    alphas = {k: a.to(next(supernet.parameters())) for k, a in supernet.initial_alphas(0).items()}
    buffers = [buffer.clone() for buffer in supernet.buffers()]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        outcome = task.run_supernet(supernet, batch, softmax_weights(alphas), draws, {})
    size = sum(found.values())
    del outcome
    with torch.no_grad():
        for buffer, before in zip(supernet.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return size
