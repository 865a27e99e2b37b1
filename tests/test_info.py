from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rdarts_fast import info, native

CLONE = Path(__file__).resolve().parent.parent


def run(*arguments: str, cwd: Path = CLONE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_report_names_what_a_bug_report_needs() -> None:
    text = info.report()
    built = native.build_info()
    for word in ("torch:", "python:", built["csrc_hash"], built["compiler"], "driver:", "threads:"):
        assert word in text
    assert str(native.extension.__file__) in text
    assert f"in use: {native.cpu_unit()}" in text


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_is_clean(arguments: list[str]) -> None:
    done = run("-W", "error::RuntimeWarning", "-m", "rdarts_fast.info", *arguments)
    assert done.returncode == 0 and done.stderr == ""
    assert ("usage: python -m rdarts_fast.info" if arguments else "Native module") in done.stdout


def test_an_unknown_flag_is_an_error() -> None:
    done = run("-m", "rdarts_fast.info", "--wrong")
    assert done.returncode == 2 and "--wrong" in done.stderr


def test_a_missing_module_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rdarts_fast.native")
    monkeypatch.delattr("rdarts_fast.native")
    monkeypatch.setitem(sys.modules, "_rdarts_fast", None)
    text = info.report()
    assert "not usable:" in text and "pip install ." in text
    assert "driver:" in text


def test_a_stale_module_is_reported() -> None:
    script = (
        "import rdarts_fast.csrc_hash as module\n"
        "module.csrc_hash = lambda folder: '0' * 64\n"
        "from rdarts_fast import info; print(info.report())"
    )
    done = run("-c", script)
    assert "not usable:" in done.stdout and "built from other sources" in done.stdout


def test_a_bad_unit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDARTS_CPU", "sse9")
    assert 'in use: none (RDARTS_CPU="sse9"' in info.report()
