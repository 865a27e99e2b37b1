"""Builds the package: the native module comes from CMakeLists.txt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent
SCRATCH = tempfile.TemporaryDirectory(prefix="rdarts_fast_")  # removed when this process ends


class FreshBuild(build):
    """Builds in a temporary folder, so that no file of an earlier build comes along."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = SCRATCH.name


class CMakeBuild(build_ext):
    """Builds every extension by one run of CMake in a temporary folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        with tempfile.TemporaryDirectory(dir=SCRATCH.name) as folder:
            configure = [
                program("cmake"),
                *("-S", str(ROOT), "-B", folder, "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11_folder()}",
                f"-DRDARTS_VERSION={VERSION}",
            ]
            started = time.monotonic()
            checked(configure)
            checked([program("cmake"), "--build", folder])
            print(f"native module: compiled in {time.monotonic() - started:.0f} s", flush=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(folder) / target.name, target)


def program(name: str) -> str:
    """Return the path of a build program: beside this Python, else on PATH."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=places)
    if found is None:
        raise SystemExit(f"error: {name} was not found: run pip install {name}")
    return found


def pybind11_folder() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


def checked(command: list[str]) -> None:
    """Run a command; its own message says what went wrong."""
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"error: the native module could not be built: {command[0]} failed (above)"
        )


setup(
    version=VERSION,
    ext_modules=[Extension("_rdarts_fast", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
    # Metadata left in the clone would pass for an installed package. A source archive takes it in.
    options={} if "sdist" in sys.argv else {"egg_info": {"egg_base": SCRATCH.name}},
)
