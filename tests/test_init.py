from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rdarts_fast

CLONE = Path(__file__).resolve().parent.parent


def test_importing_the_package_imports_nothing_heavy() -> None:
    # Heavy is whatever is not Python's own: then the package adds nothing to importing torch.
    script = """
import json, sys
before = set(sys.modules)
import rdarts_fast
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=CLONE, capture_output=True, text=True, check=True
    )
    added = set(json.loads(done.stdout)) - sys.stdlib_module_names
    assert added == {"rdarts_fast"}


def test_every_public_name_is_there() -> None:
    for name in rdarts_fast.__all__:
        assert getattr(rdarts_fast, name) is not None
        assert name in dir(rdarts_fast)
    assert rdarts_fast.run_search.__module__ == "rdarts_fast.search"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        rdarts_fast.nonsense  # noqa: B018


def test_the_version_is_the_one_of_setup_py() -> None:
    found = re.search(r'^VERSION = "(.*)"', (CLONE / "setup.py").read_text(), re.MULTILINE)
    assert found is not None and rdarts_fast.__version__ == found[1]


@pytest.mark.parametrize(
    "module",
    ["search", "random_search", "retrain", "analysis", "export", "robust", "report", "info"],
)
def test_command_lines_start_without_a_warning(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", f"rdarts_fast.{module}", "--help"],
        cwd=CLONE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "usage:" in done.stdout
