"""The program that launches every CUDA kernel: it misses none, and every output is written."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.host_cuda.build import built_program

CLONE = Path(__file__).resolve().parent.parent


def test_every_launcher_is_called() -> None:
    declared = (CLONE / "csrc/include/launchers.h").read_text().partition("namespace cuda {")[2]
    launchers = re.findall(r"^void (\w+)\(", declared, re.M)
    called = re.findall(r"\bcuda::(\w+)\(", (CLONE / "tests/all_kernels/main.cpp").read_text())
    assert launchers and set(launchers) <= set(called)


def test_every_output_is_written() -> None:
    done = subprocess.run([built_program()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\d{3} cases: every output written\n", done.stdout)
