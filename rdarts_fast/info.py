"""Print what one pastes into a bug report: versions, paths, devices, what was compiled for what.

`python -m rdarts_fast.info`; it works, and says so, where the native module does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from rdarts_fast import __version__
from rdarts_fast.errors import UserError
from rdarts_fast.gpu_fit import driver_version, misfit, unusable, version_text

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "tqdm", "tyro", "matplotlib")
VARIABLES = (
    "RDARTS_CPU",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
)

Lines = Iterator[tuple[str, str]]


def report() -> str:
    """Return the whole report, one `name: value` a line, in sections."""
    sections = {
        "Software": software(),
        "Native module": native_module(),
        "Machine": machine(),
        "CUDA": cuda(),
    }
    blocks = []
    for title, lines in sections.items():
        block = [title, *(f"  {name + ':':<22}{value}" for name, value in lines)]
        blocks.append("\n".join(block))
    return "\n\n".join(blocks)


def software() -> Lines:
    """Yield the package, Python and the versions of what it is built on."""
    yield "rdarts_fast", f"{__version__} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    for package in PACKAGES:
        yield package, _version(package)


def native_module() -> Lines:
    """Yield what the extension was built from, by and for, or why it cannot be used."""
    try:
        from rdarts_fast import native
    except ImportError as error:
        yield "not usable", str(error)
        return
    built = native.build_info()
    yield "path", str(native.extension.__file__)
    yield "version", str(built["version"])
    yield "sources", f"csrc {built['csrc_hash']}"
    yield "compiler", f"{built['compiler']}, {built['build_type']}"
    yield "cpu units", f"{', '.join(built['cpu_units'])}; in use: {_cpu_unit(native.cpu_unit)}"
    if built["cuda_runtime"] is None:
        yield "cuda", "CPU build: nvcc was not found when it was built, or RDARTS_CUDA=0 was set"
    else:
        yield "cuda", f"runtime {built['cuda_runtime']} for {', '.join(built['cuda_archs'])}"


def machine() -> Lines:
    """Yield the processor, the threads that torch takes and the variables that change a run."""
    yield "processor", _processor()
    yield "cores", f"{os.cpu_count()}, usable: {len(os.sched_getaffinity(0))}"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    try:
        import torch
    except ImportError as error:
        yield "torch", f"not importable: {error}"
    else:
        yield "torch threads", str(torch.get_num_threads())
        yield "torch cpu unit", torch.backends.cpu.get_cpu_capability()
    for variable in VARIABLES:
        if variable in os.environ:
            yield variable, os.environ[variable]


def cuda() -> Lines:
    """Yield the driver and every device that torch sees."""
    yield "driver", _driver()
    try:
        import torch
    except ImportError as error:
        yield "devices", f"unknown, torch is not importable: {error}"
        return
    yield "torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    driver = driver_version()
    yield "driver supports", "nothing found" if driver is None else _cuda(driver)
    if not torch.cuda.is_available():
        yield "devices", f"none: {unusable(driver, torch.version.cuda)}"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"device {index}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
        yield f"kernels on {index}", _kernels(10 * device.major + device.minor, driver)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m rdarts_fast.info",
        description="Print versions, paths, what was compiled for what, devices and threads: what "
        "one pastes into a bug report.",
    )
    parser.parse_args()
    print(report())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.processor() or 'unknown')}, {platform.machine()}"


def _cuda(number: int) -> str:
    return f"CUDA {version_text(number)}"


def _kernels(capability: int, driver: int | None) -> str:
    """Return whether the native module's kernels run on such a GPU."""
    try:
        from rdarts_fast import native
    except ImportError:
        return "none: the native module is not usable"
    return misfit(capability, driver, native.build_info()) or "run"


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "none found"


def _cpu_unit(cpu_unit: Callable[[], str]) -> str:
    try:
        return cpu_unit()
    except UserError as error:
        return f"none ({error})"


if __name__ == "__main__":
    main()
