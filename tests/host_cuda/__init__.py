"""The project's CUDA kernels on the CPU: its .cu files compiled as C++, run thread by thread.

`with on_host():` makes the public functions of rdarts_fast run CUDA kernels on CPU tensors. Each
access is checked (bounds, missing barriers, memory nobody wrote); a fault is a RuntimeError that
names kernel, block, thread and source line. Results must have the same bits in every thread order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rdarts_fast import native
from tests.host_cuda.build import built_library

THREAD_ORDERS = ("ascending", "descending", "shuffled")
DRIVER = 13020  # CUDA 13.2, as the runtime that the module is linked with


class Counts(NamedTuple):
    """What a kernel did since `reset`, as its Spans saw it."""

    launches: int
    bytes_read: int
    bytes_written: int


@contextmanager
def on_host() -> Iterator[ModuleType]:
    """Run CUDA kernels on CPU tensors inside the block; gives the native module that does it.

    Every torch.empty is filled with NaN (integers: the largest), so that an output which a kernel
    leaves unwritten shows. Counts, thread order and driver start afresh.
    """
    module = _module()
    before = native.extension, native.place
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    reset()
    set_thread_order("ascending")
    set_driver(DRIVER)
    _counters().zero_()  # a kernel that was stopped leaves them
    native.extension, native.place = module, _place
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills torch.empty
    try:
        yield module
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        native.extension, native.place = before


def set_thread_order(order: str, seed: int = 0) -> None:
    """Set the order of threads and blocks: one of THREAD_ORDERS; ValueError for another.

    A shuffled order changes at every barrier; `seed` is its start.
    """
    error = _library().on_host_set_thread_order(order.encode(), seed)
    if error is not None:
        raise ValueError(error.decode())


def counts() -> dict[str, Counts]:
    """Return the counts of every kernel launched since `reset`, by the name given to launch."""
    lines = _library().on_host_counts().decode().splitlines()
    rows = [line.split(maxsplit=3) for line in lines]
    return {row[3]: Counts(int(row[0]), int(row[1]), int(row[2])) for row in rows}


def reset() -> None:
    """Set all counts to zero."""
    _library().on_host_reset()


def add_device(capability: int) -> int:
    """Add a device of that compute capability (86 is 8.6) and return its number; 0 is of 9.0."""
    return int(_library().on_host_add_device(capability))


def set_driver(version: int) -> None:
    """Set the CUDA version that the driver supports; 13020 is 13.2."""
    _library().on_host_set_driver(version)


def runs_on(arch: str, capability: int) -> bool:
    """Say what device.h says: whether code for `arch`, such as sm_80, runs on that capability."""
    return bool(_library().on_host_runs_on(arch.encode(), capability))


def run_fault(name: str, out: Tensor, inputs: Tensor, *, planted: bool) -> None:
    """Run a kernel of faults/ or primitives.cu on float32 memory; RuntimeError where caught."""
    error = _library().on_host_run_fault(
        name.encode(), planted, out.data_ptr(), out.numel(), inputs.data_ptr(), inputs.numel()
    )
    if error is not None:
        raise RuntimeError(error.decode())


def _place(device: torch.device) -> Any:
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return _module().Place("base", device=0, counters=_counters().data_ptr(), tf32=tf32)


@functools.cache
def _counters() -> Tensor:
    return torch.zeros(_module().COUNTERS, dtype=torch.int32)


@functools.cache
def _module() -> ModuleType:
    # The last part names the module's initialiser; the first keeps it apart from the installed one.
    loader = ExtensionFileLoader("tests.host_cuda._rdarts_fast", str(built_library()))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_module().__file__))
    text, address, integer = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
    library.on_host_set_thread_order.argtypes = [text, ctypes.c_uint64]
    library.on_host_set_thread_order.restype = text
    library.on_host_counts.restype = text
    library.on_host_reset.restype = None
    library.on_host_add_device.argtypes = [ctypes.c_int]
    library.on_host_add_device.restype = ctypes.c_int
    library.on_host_set_driver.argtypes = [ctypes.c_int]
    library.on_host_set_driver.restype = None
    library.on_host_runs_on.argtypes = [text, ctypes.c_int]
    library.on_host_runs_on.restype = ctypes.c_bool
    library.on_host_run_fault.argtypes = [text, ctypes.c_bool, address, integer, address, integer]
    library.on_host_run_fault.restype = text
    return library
