"""The native extension: imported after torch, checked against the sources beside it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # first: the extension then shares torch's OpenMP library and its thread pool
from torch import Tensor

from rdarts_fast import gpu_fit
from rdarts_fast.csrc_hash import csrc_hash
from rdarts_fast.errors import UserError

_CLONE = Path(__file__).resolve().parent.parent


def load_extension(clone: Path = _CLONE) -> ModuleType:
    """Import `_rdarts_fast`.

    Raises ImportError where it is not installed, or where `clone` holds csrc/ and the extension was
    built from other sources.
    """
    try:
        module = importlib.import_module("_rdarts_fast")
    except ModuleNotFoundError as error:
        if error.name != "_rdarts_fast":
            raise
        raise ImportError(
            "the native module _rdarts_fast is not installed: run `pip install .` in the clone"
        ) from error
    sources = clone / "csrc"
    if not (sources / "bindings.cpp").is_file():
        return module
    found, expected = module.build_info()["csrc_hash"], csrc_hash(sources)
    if found != expected:
        raise ImportError(
            f"{module.__file__} was built from other sources (hash {found[:12]}) than lie in "
            f"{sources} ({expected[:12]}): {_cure(Path(str(module.__file__)), clone)}"
        )
    return module


def _cure(built: Path, clone: Path) -> str:
    if built.resolve().parent == clone:
        # Left there by an editable install, it would also hide one made by `pip install .`.
        return "run `pip install -e .` again, or delete that file and run `pip install .`"
    return f"run `pip install .` in {clone}"


extension = load_extension()


def build_info() -> dict[str, Any]:
    """Return what the extension was built from, by and for.

    Keys: version, csrc_hash, compiler, build_type, cpu_units, cuda_archs (empty in a CPU build) and
    cuda_runtime (None in a CPU build).
    """
    return dict(extension.build_info())


def cpu_unit() -> str:
    """Return the CPU unit in use: the best this machine runs, or what RDARTS_CPU names.

    Raises UserError where RDARTS_CPU names a unit that is unknown or that this machine cannot run.
    """
    runnable: list[str] = extension.runnable_units()
    wish = os.environ.get("RDARTS_CPU", "")
    if not wish:
        return runnable[-1]
    if wish not in runnable:
        known = wish in build_info()["cpu_units"]
        reason = "this machine does not have its instructions" if known else "no such unit"
        raise UserError(f'RDARTS_CPU="{wish}": {reason}; set one of {", ".join(runnable)} or unset')
    return wish


def runs_on(device: torch.device) -> bool:
    """Say whether the extension has launchers for `device`, and that can run them."""
    if device.type == "cuda":
        return misfit(device) is None
    return device.type == "cpu"


def misfit(device: torch.device) -> str | None:
    """Return what keeps the extension's kernels from a CUDA device, and the cure; None where
    nothing does.
    """
    build = build_info()
    if not build["cuda_archs"]:  # torch need not know the device
        return gpu_fit.misfit(0, None, build)
    if not torch.cuda.is_available():  # it would raise when asked for more
        return gpu_fit.unusable(gpu_fit.driver_version(), torch.version.cuda)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _misfit(index, tuple(build["cuda_archs"]), build["cuda_runtime"])


@functools.lru_cache
def _misfit(index: int, archs: tuple[str, ...], runtime: str) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    build = {"cuda_archs": archs, "cuda_runtime": runtime}
    return gpu_fit.misfit(10 * major + minor, gpu_fit.driver_version(), build)


def has_bfloat16(device: torch.device) -> bool:
    """Say whether kernels take bfloat16 tensors there: on a GPU; on the CPU where it is emulated
    (kernels/emulation.py).
    """
    return device.type != "cpu" or bool(getattr(extension, "emulates_bfloat16", False))


def place(device: torch.device) -> Any:
    """Return the extension's Place for `device`: unit and threads, or CUDA device, stream and
    whether float32's products of a backward pass may be TF32's, as torch's own
    (torch.backends.cuda.matmul).
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        # A graph's are made before it: memory that it made would be zeros only when it is replayed.
        counters = _counters(index, None)
        with torch.cuda.device(index):
            captures = torch.cuda.is_current_stream_capturing()
        if not captures:
            counters = _counters(index, stream)
        ways = {"counters": counters.data_ptr(), "tf32": torch.backends.cuda.matmul.allow_tf32}
        return extension.Place(cpu_unit(), device=index, stream=stream, **ways)
    return _cpu_place(extension, os.environ.get("RDARTS_CPU", ""), torch.get_num_threads())


@functools.cache
def _counters(index: int, stream: int | None) -> Tensor:
    """Return what tells the last block of a launch on that stream; None: in any recorded graph, of
    which no two may run at once on one device.
    """
    return torch.zeros(extension.COUNTERS, dtype=torch.int32, device=torch.device("cuda", index))


@functools.lru_cache
def _cpu_place(module: Any, wish: str, threads: int) -> Any:
    """Return a module's Place for the CPU; `wish` is what the unit depends on."""
    return module.Place(cpu_unit(), threads=threads)


def filled(
    fill: str, out: Tensor, seed: int, counter: Sequence[int], clock: Tensor | None = None
) -> Tensor:
    """Fill the contiguous `out` by the extension's philox function of that name and return it.

    `counter` holds the four words of the first block's counter, `clock` what is added to the last
    two (draws.py).
    """
    launcher, now = getattr(extension, fill), 0 if clock is None else clock.data_ptr()
    launcher(out.data_ptr(), out.numel(), seed, counter, place(out.device), now)
    return out
