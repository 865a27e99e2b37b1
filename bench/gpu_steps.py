"""What the run-book (gpu.py) does: a table of steps, each of them commands.

This file knows neither torch nor the package: it is read before they can be imported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "bench" / "wheels"
PACKAGES = ("tyro", "docstring-parser", "typeguard")  # pure Python, and rarely beside a torch
BUILDS = ("setuptools>=77",)  # an older one cannot read pyproject.toml
WHEELS_COMMAND = (
    "python3 -m pip download --no-deps --only-binary=:all: -d bench/wheels "
    + " ".join(f"'{name}'" for name in (*PACKAGES, *BUILDS))
)

Command = list[str]


@dataclass(frozen=True)
class Book:
    """Where and how a call runs."""

    dry: bool
    scratch: Path
    cifar10: Path | None
    python: str = sys.executable

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def site(self) -> Path:
        """Where modules are put."""
        return self.scratch / "site"

    @property
    def program(self) -> Path:
        """The program of tests/all_kernels."""
        return self.scratch / "program" / "tests" / "all_kernels" / "rdarts_all_kernels"

    @property
    def slack(self) -> float:
        """What time boxes are multiplied by: a dry run measures nothing, on whatever machine."""
        return 6.0 if self.dry else 1.0

    def module(self, name: str, *arguments: object) -> Command:
        return [self.python, "-m", name, *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        """Return the variables that every step runs under."""
        places = [str(self.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        chosen = {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            chosen |= {"RDARTS_CUDA": "0", "RDARTS_CPU_UNITS": "base"}
        else:
            chosen |= {"RDARTS_CUDA": "1"}
            chosen["RDARTS_CUDA_ARCHS"] = os.environ.get("RDARTS_CUDA_ARCHS", "90")
        beside = str(Path(self.python).parent)  # where cmake and ninja may lie
        chosen["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), beside])
        if self.dry:  # two threads wait for each other longer than tiny sizes take
            chosen["OMP_NUM_THREADS"] = "1"
        return {**os.environ, **chosen}


@dataclass(frozen=True)
class Step:
    """Commands that run one after another.

    seconds: their time box. least: what the steps before leave them of the whole. fails: the last
    command has to fail, as a planted fault does.
    """

    group: str
    name: str
    seconds: float
    commands: Callable[[Book], list[Command]]
    least: float = 10.0
    fails: bool = False


class Missing(Exception):
    """A step cannot run here, for a reason that is no fault of the project."""


def wheels(book: Book) -> list[Command]:
    found = sorted(map(str, WHEELS.glob("*.whl")))
    if not found:
        lacking = [name for name in PACKAGES if not _importable(name, book)]
        if lacking:
            raise Missing(f"Python lacks {', '.join(lacking)}, bench/wheels is empty: run, where "
                          f"there is a network: {WHEELS_COMMAND}")  # fmt: skip
        raise Missing("nothing is lacking")
    options = ("--no-index", "--no-deps", "--upgrade", "--quiet", "--target", book.site)
    return [book.module("pip", "install", *options, *found)]


def _importable(package: str, book: Book) -> bool:
    name = package.replace("-", "_")
    return importlib.util.find_spec(name) is not None or (book.site / name).exists()


def module(book: Book) -> list[Command]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--quiet")
    return [book.module("pip", "install", *options, "--target", book.site, ROOT)]


def program(book: Book) -> list[Command]:
    if book.dry:
        text = "from tests.host_cuda.build import built_program; print(built_program())"
        return [[book.python, "-c", text]]
    folder = book.scratch / "program"
    script = "import pybind11; print(pybind11.get_cmake_dir())"
    environment = book.environment()
    found = subprocess.run(
        [book.python, "-c", script], env=environment, capture_output=True, text=True
    )
    cmake = shutil.which("cmake", path=environment["PATH"])
    if cmake is None or found.returncode != 0:
        raise Missing("cmake or pybind11 was not found")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={book.python}", f"-Dpybind11_DIR={found.stdout.strip()}"]
    return [configure, [cmake, "--build", str(folder), "--target", "rdarts_all_kernels"]]


def info(book: Book) -> list[Command]:
    return [book.module("rdarts_fast.info")]


def kernel_tests(book: Book) -> list[Command]:
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    if book.dry:
        return [book.module("pytest", *options, "tests/test_stage.py", "-k", "cpu-base and relu")]
    files = [f"tests/test_{name}.py" for name in ("kernels", "stage", "pool", "fused", "resources")]
    return [book.module("pytest", *options, *files, "-k", "(cuda and not host) or resources")]


def sanitizer(tool: str) -> Callable[[Book], list[Command]]:
    def commands(book: Book) -> list[Command]:
        if book.dry and tool != "memcheck":
            raise Missing("on the CPU one run checks all")
        return [[*_checker(book, tool), *_program(book)]]

    return commands


def planted(book: Book) -> list[Command]:
    if book.dry:
        raise Missing("the CPU has no such tool")
    return [[*_checker(book, "memcheck"), *_program(book), "planted"]]


def _checker(book: Book, tool: str) -> Command:
    """Return what goes before the program; on the CPU its kernels are checked as they run."""
    if book.dry:
        return []
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), f"{home}/bin"])
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        raise Missing("compute-sanitizer was not found (PATH, CUDA_HOME)")
    return [found, "--tool", tool, "--error-exitcode", "9"]


def _program(book: Book) -> Command:
    if not book.dry:
        return [str(book.program)]
    text = "from tests.host_cuda.build import built_program as b; import os; os.execv(b(), ['all'])"
    return [book.python, "-c", text]


TINY = ("--batch", 4, "--channels", 4, "--layers", 3, "--size", 8)


def search_step(book: Book) -> list[Command]:
    sizes = (*TINY, "--seconds", 0, "--spaces", "s2") if book.dry else ("--seconds", 1.5)
    spaces = () if book.dry else ("--spaces", "s2,s4,s3,s1,darts")
    options = ("--json", "--no-memory", "--baselines", "eager,channels_last")
    return [book.module("bench.search_step", *options, *sizes, *spaces, "--device", book.device)]


def kernels(book: Book) -> list[Command]:
    sizes = ("--kernels", "node_sum,sep_stage", "--batch", 2, "--seconds", 0)
    chosen = sizes if book.dry else ("--seconds", 0.3)
    return [book.module("bench.kernels", "--json", "--no-memory", *chosen, "--device", book.device)]


def roofline(book: Book) -> list[Command]:
    sizes = (*TINY, "--copy-mb", 1) if book.dry else ("--copy-mb", 4096)
    return [book.module("bench.roofline", "--json", *sizes, "--device", book.device)]


def reached(book: Book) -> list[Command]:
    sizes = ("--batch", 1, "--copy-mb", 1, "--seconds", 0) if book.dry else ("--copy-mb", 4096)
    return [book.module("bench.reached", "--json", *sizes, "--device", book.device)]


def curvature(book: Book) -> list[Command]:
    sizes = (*TINY, "--train-steps", 1, "--spaces", "s5", "--seconds", 0)
    chosen = sizes if book.dry else ("--spaces", "s4", "--seconds", 2)
    options = ("--json", "--baselines", "row loop")
    return [book.module("bench.curvature", *options, *chosen, "--device", book.device)]


def slowest(book: Book) -> list[Command]:
    sizes = TINY if book.dry else ("--ncu",) if shutil.which("ncu") else ()
    return [book.module("bench.slowest", "--json", *sizes, "--device", book.device)]


def search(book: Book) -> list[Command]:
    sizes: tuple[object, ...] = ("--epochs", 2)
    if book.dry:
        sizes += ("--epoch-steps", 2, "--channels", 4, "--layers", 3, "--batch-size", 8)
    if book.cifar10 is not None:
        sizes += ("--cifar10", book.cifar10, *(("--per-class", 8) if book.dry else ()))
    elif not book.dry:
        raise Missing("CIFAR10 names no archive of CIFAR-10")
    return [book.module("bench.whole_search", *sizes, "--device", book.device)]


STEPS = (
    Step("build", "wheels", 20, wheels),
    Step("build", "module", 110, module, least=60),
    Step("build", "program", 80, program, least=40),
    Step("build", "info", 30, info),
    Step("test", "kernel tests", 90, kernel_tests, least=30),
    Step("sanitize", "memcheck", 60, sanitizer("memcheck"), least=20),
    Step("sanitize", "racecheck", 60, sanitizer("racecheck"), least=20),
    Step("sanitize", "planted fault", 20, planted, fails=True),
    Step("bench", "search_step", 150, search_step, least=60),
    Step("bench", "kernels", 60, kernels, least=20),
    Step("bench", "roofline", 30, roofline),
    Step("bench", "reached", 40, reached, least=15),
    Step("bench", "curvature", 80, curvature, least=30),
    Step("bench", "slowest", 60, slowest, least=20),
    Step("search", "search", 150, search, least=80),
)
GROUPS = tuple(dict.fromkeys(step.group for step in STEPS))
