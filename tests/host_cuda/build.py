"""Builds the library of tests/host_cuda, once for each state of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybind11

from rdarts_fast.csrc_hash import csrc_hash

CLONE = Path(__file__).resolve().parents[2]
CACHE = CLONE / "build" / "on_host"
TARGET = "rdarts_on_host"
PROGRAM = "rdarts_all_kernels_on_host"


def built_library(clone: Path = CLONE, cache: Path = CACHE) -> Path:
    """Return the library, built first where the sources have changed since.

    Raises RuntimeError with the compiler's own words where it cannot be built.
    """
    folder = cache / fingerprint(clone)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):  # parallel test workers wait for the first of them
        library = _library(folder)
        if library is None:
            _forget_others(folder)
            _build(clone, folder)
            library = _library(folder)
    assert library is not None
    return library


def built_program(clone: Path = CLONE, cache: Path = CACHE) -> Path:
    """Return the program of tests/all_kernels for the CPU, built beside the library. Raises as
    built_library.
    """
    folder = built_library(clone, cache).parents[2]
    with _locked(cache / "lock"):
        _checked([_program("cmake"), "--build", str(folder), "--target", PROGRAM])
    return folder / "tests" / "host_cuda" / PROGRAM


def fingerprint(clone: Path) -> str:
    """Return a hash of all that the library depends on."""
    harness = clone / "tests" / "host_cuda"
    parts = [csrc_hash(clone / "csrc"), csrc_hash(harness), sys.version, pybind11.__version__]
    parts += [(clone / "CMakeLists.txt").read_text(), (harness / "CMakeLists.txt").read_text()]
    parts += [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _library(folder: Path) -> Path | None:
    if not (folder / "finished").exists():  # a build that was cut off leaves half a library
        return None
    return next((folder / "tests" / "host_cuda").glob(f"{TARGET}*.so"))


def _forget_others(folder: Path) -> None:
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            shutil.rmtree(other)


def _build(clone: Path, folder: Path) -> None:
    started = time.monotonic()
    configure = [
        *(_program("cmake"), "-S", str(clone), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DRDARTS_ON_HOST=ON",
    ]
    _checked(configure)
    _checked([_program("cmake"), "--build", str(folder), "--target", TARGET])
    (folder / "finished").touch()
    print(f"tests/host_cuda: built in {time.monotonic() - started:.1f} s", file=sys.stderr)


def _program(name: str) -> str:
    """Return the path of a build program: beside this Python, else on PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        raise RuntimeError(f"tests/host_cuda needs {name}: pip install '.[test]'")
    return found


def _checked(command: list[str]) -> None:
    # nvcc has no part in this build, whatever the environment asks for.
    environment = {**os.environ, "RDARTS_CUDA": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"tests/host_cuda: the .cu files do not compile as C++:\n{done.stdout}{done.stderr}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
