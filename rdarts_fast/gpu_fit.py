"""Whether a GPU, its driver and what the native module was compiled for fit one another.

The rules are those of csrc/include/device.h, which asks again before a launch; here they are asked
before a run begins, of plain numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

INSTEAD = "--backend reference runs without the module's kernels, --device cpu without the GPU"


def misfit(capability: int, driver: int | None, build: Mapping[str, Any]) -> str | None:
    """Return what keeps the module's kernels from a GPU, and the cure; None where nothing does.

    capability: of the GPU, 90 for 9.0. driver: the CUDA version it supports, 13020 for 13.2; None
    where it does not say. build: native.build_info().
    """
    archs: list[str] = build["cuda_archs"]
    if not archs:
        return (
            "the native module is a CPU build: put nvcc on PATH and run `RDARTS_CUDA=1 pip install "
            ".`"
        )
    runtime = version_number(build["cuda_runtime"])
    fitting = [arch for arch in archs if runs_on(arch, capability)]
    if not fitting:
        return (
            f"the GPU is sm_{capability}, the native module was compiled for {', '.join(archs)}: "
            f"run `RDARTS_CUDA_ARCHS={capability} pip install .`"
        )
    # Of one major version a driver runs all machine code, but compiles only PTX that is no newer.
    machine_code = any(arch.startswith("sm_") for arch in fitting)
    needed = runtime // 1000 * 1000 if machine_code else runtime
    if driver is not None and driver < needed:
        return (
            f"the driver supports CUDA {version_text(driver)}, the native module needs "
            f"{version_text(needed)}: update the driver, or run `pip install .` with an older "
            "toolkit"
        )
    return None


def unusable(driver: int | None, torch_cuda: str | None) -> str:
    """Return why torch sees no GPU, as far as the versions tell.

    torch_cuda: the CUDA version that torch was built for, "13.0"; None in a CPU build.
    """
    if driver is None:
        return "no NVIDIA driver was found"
    if torch_cuda is None:
        return "this torch is a CPU build: install one for CUDA"
    needed = version_number(torch_cuda) // 1000 * 1000
    if driver < needed:
        return (
            f"the driver supports CUDA {version_text(driver)}, this torch needs "
            f"{version_text(needed)}: update the driver, or install a torch for an older CUDA"
        )
    return "the driver shows it none (CUDA_VISIBLE_DEVICES?)"


def runs_on(arch: str, capability: int) -> bool:
    """Say whether code for `arch`, such as sm_80 or compute_90 (PTX), runs on that capability.

    The suffix a binds it to that one GPU, f to those of one major version, as machine code is.
    """
    compiled = int(arch.partition("_")[2].rstrip("af"))
    if arch.endswith("a"):
        return capability == compiled
    any_later = arch.startswith("compute_") and not arch.endswith("f")
    return capability >= compiled and (any_later or capability // 10 == compiled // 10)


def driver_version() -> int | None:
    """Return the CUDA version that the driver here supports, 13020 for 13.2; None without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    failed = library.cuDriverGetVersion(ctypes.byref(version)) != 0
    return None if failed or version.value <= 0 else version.value


def version_number(text: str) -> int:
    """Return 13020 for "13.2"."""
    major, _, minor = text.partition(".")
    return 1000 * int(major) + 10 * int(minor or 0)


def version_text(number: int) -> str:
    """Return "13.2" for 13020."""
    return f"{number // 1000}.{number % 1000 // 10}"
