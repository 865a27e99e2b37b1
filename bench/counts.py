"""How many kernels and torch operations one forward and backward takes.

An operation counts where it computes: views and allocations launch nothing. On a GPU the kernels
are those that torch's profiler saw. On a CPU they are what a GPU would be given: one for each
operation (cuDNN takes more for some), and our own launches as tests/host_cuda counts them. Neither
depends on the size, nor on the batch but for copies that one image does without, so small ones are
run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from bench.contenders import OURS, Contender, Setup
from bench.launches import counted

# Of the functions that make tensors, those that write nothing into them; the last lays out the
# memory that kernels/array.py has taken, in place.
ALLOCATIONS = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "as_strided_",
)
SMALL = {"batch": 2, "size": 16}
COPIES = ("Memcpy", "Memset")  # how the profiler's names of what is no kernel begin


class Counted(NamedTuple):
    """Of one forward and backward."""

    kernels: int
    operations: int


class Operations(TorchDispatchMode):
    """Counts the operations that compute, by name, while it is entered; on the CPU, where the
    backward pass runs on the same thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in (*ALLOCATIONS, "lift_fresh"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(name: str, setup: Setup) -> Counted:
    """Return what one contender takes for a forward and backward of the setup."""
    small = replace(setup, device="cpu", **SMALL)
    operations = operations_of(Contender(name, small).forward_backward).total()
    if torch.device(setup.device).type == "cuda":
        return Counted(profiled(Contender(name, setup).forward_backward), operations)
    launched = counted(small, 1) if name == OURS else {}
    return Counted(operations + sum(row.launches for row in launched.values()), operations)


def operations_of(call: Callable[[], None]) -> Counter[str]:
    """Return the operations of a second run of `call`, which makes nothing for the first time."""
    call()
    with Operations() as mode:
        call()
    return mode.counts


def profiled(call: Callable[[], None]) -> int:
    """Return how many kernels a run of `call` launches on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(COPIES) for event in on_gpu)
