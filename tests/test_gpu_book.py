"""The run-book for a machine with a GPU: it goes on, keeps to its time and writes what it found."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_report, gpu_steps
from bench.gpu_report import Report, Result
from bench.gpu_steps import STEPS, Book, Missing, Step

HEAD = {"gpu": "NVIDIA H100", "date": "2026-01-02", "commit": "abc", "dry": False}
ROW = {"bench": "kernels", "space": "C16", "case": "c", "baseline": "b", "ours_ms": 1.5}
PRINTS = f"print('words'); print({json.dumps(json.dumps(ROW))})"


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(False, tmp_path / "scratch", Path("cifar10.npz"))


def python(*scripts: str) -> Callable[[Book], list[list[str]]]:
    return lambda book: [[sys.executable, "-c", script] for script in scripts]


def missing(book: Book) -> list[list[str]]:
    raise Missing("no such tool")


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(book: Book) -> None:
    steps = [
        Step("g", "fails", 9, python("print('why'); exit(3)", PRINTS), least=0),
        Step("g", "hangs", 0.3, python("import time; time.sleep(60)"), least=0),
        Step("g", "not there", 9, lambda book: [["no-such-program"]], least=0),
        Step("g", "absent", 9, missing, least=0),
        Step("g", "prints", 9, python("", PRINTS), least=0),
        Step("g", "planted", 9, python("exit(1)"), least=0, fails=True),
        Step("g", "unnoticed", 9, python(""), least=0, fails=True),
    ]
    started, seen = time.monotonic(), []
    results = gpu.run_steps(steps, book, 60.0, lambda result: seen.append(result.step))
    assert time.monotonic() - started < 30
    assert seen == [step.name for step in steps]
    found = {result.step: result.status for result in results}
    assert found == {
        "fails": "failed",
        "hangs": "timed out",
        "not there": "failed",
        "absent": "skipped",
        "prints": "ok",
        "planted": "ok",
        "unnoticed": "failed",
    }
    by_name = {result.step: result for result in results}
    assert "why" in by_name["fails"].note and by_name["fails"].rows == []
    assert by_name["absent"].note == "no such tool"
    assert by_name["prints"].rows == [ROW] and by_name["prints"].note == ""


def test_later_steps_get_the_least_that_they_need(book: Book) -> None:
    slow, last = Step("g", "slow", 99, python("import time; time.sleep(60)")), python("")
    steps = [replace(slow, least=0), Step("g", "last", 9, last, least=8.0)]
    first, second = gpu.run_steps(steps, book, 9.0, lambda result: None)
    assert (first.status, second.status) == ("timed out", "ok")
    assert first.box == pytest.approx(1.0, abs=0.1) and 7.0 < second.box <= 9.0
    (none,) = gpu.run_steps(steps[1:], book, 0.0, lambda result: None)
    assert (none.status, none.note) == ("skipped", "no time was left")


def test_a_step_out_of_time_takes_what_it_started_with_it(book: Book, tmp_path: Path) -> None:
    told = tmp_path / "child"
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"open({str(told)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    gpu.run_steps([Step("g", "a", 5.0, python(script))], book, 60.0, lambda result: None)
    child = Path("/proc") / told.read_text() / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it goes on")


def test_the_boxes_of_a_whole_call_fit_its_limit() -> None:
    assert sum(step.least for step in STEPS) < gpu.LIMIT < 600
    assert all(step.least <= step.seconds for step in STEPS)
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_results_are_written_after_each_step_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    report = Report.open(path, HEAD)
    report.add(Result("kernels", "ok", 2.0, 9.0, rows=[ROW]))
    report.add(Result("module", "failed", 1.0, 9.0, "no | compiler"))
    stored = json.loads(path.read_text())
    assert [step["step"] for step in stored["steps"]] == ["module", "kernels"]  # the book's order
    assert stored["gpu"] == "NVIDIA H100"
    later = Report.open(path, HEAD)
    later.add(Result("module", "ok", 1.0, 9.0))
    assert [step["status"] for step in json.loads(path.read_text())["steps"]] == ["ok", "ok"]
    text = path.with_suffix(".md").read_text()
    assert "| kernels | ok | 2 | 9 |  |" in text and "| C16 | c | b | 1.5 |  |  |  |" in text
    assert Report.open(path, {**HEAD, "commit": "other"}).steps == {}
    assert list(path.parent.iterdir()) != [] and not list(path.parent.glob("*.part"))


def test_a_table_says_what_it_is_of() -> None:
    result = Result("module", "failed", 1.0, 9.0, "a | b")
    row = {"bench": "roofline", "machine": "H100", "floors": [1], "note": ""}
    rows = gpu_report.table(HEAD, [result, Result("roofline", "ok", rows=[row])])
    assert rows[0] == "# NVIDIA H100, 2026-01-02, commit abc"
    assert "| module | failed | 1 | 9 | a / b |" in rows and "- machine H100" in rows
    dry = gpu_report.table({**HEAD, "dry": True}, [])[0]
    assert "no measurement" in dry
    assert gpu_report.name_of(HEAD) == "nvidia-h100-2026-01-02"
    assert gpu_report.name_of({**HEAD, "dry": True}) == "dry-2026-01-02"


def test_lines_of_json_are_found_and_half_ones_left() -> None:
    whole = json.dumps(ROW)
    assert gpu_report.rows_of(f"words\n{whole}\n{whole[:20]}\n") == [ROW]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has the tools and a wheel."""
    for name in ("compute-sanitizer", "ncu"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").touch()
    monkeypatch.setattr(gpu_steps, "WHEELS", tmp_path / "wheels")
    monkeypatch.setenv("RDARTS_CUDA_ARCHS", "")
    monkeypatch.delenv("RDARTS_CUDA_ARCHS")


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("dry", [False, True])
def test_every_command_is_one_that_its_program_takes(
    dry: bool, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = replace(book, dry=dry)
    parsed = set()
    for step in STEPS:
        if dry and (step.fails or step.name == "racecheck"):
            continue
        for command in step.commands(book):
            name = command[2] if command[1:2] == ["-m"] else ""
            if name.startswith("bench."):
                monkeypatch.setattr(sys, "argv", command[2:])
                read: Any = importlib.import_module(name)._parse()
                assert read.device == ("cpu" if dry else "cuda")
                parsed.add(name.removeprefix("bench."))
            for word in command:
                if word.startswith("tests/"):
                    assert (gpu_steps.ROOT / word).exists()
    assert parsed == {
        *("search_step", "kernels", "roofline", "reached", "curvature", "slowest"),
        "whole_search",
    }


@pytest.mark.usefixtures("tools")
def test_the_build_asks_for_no_network_and_one_generation(book: Book) -> None:
    (command,) = gpu_steps.module(book)
    for flag in ("--no-build-isolation", "--no-deps", "--no-index"):
        assert flag in command
    assert book.environment()["RDARTS_CUDA"] == "1"
    assert book.environment()["RDARTS_CUDA_ARCHS"] == "90"
    assert replace(book, dry=True).environment()["RDARTS_CUDA"] == "0"
    assert "--no-index" in gpu_steps.wheels(book)[0]
    memcheck, racecheck = (gpu_steps.sanitizer(t)(book)[0] for t in ("memcheck", "racecheck"))
    assert memcheck[-1] == racecheck[-1] == str(book.program)
    assert gpu_steps.planted(book)[0][-2:] == [str(book.program), "planted"]


def test_what_is_missing_is_said(
    book: Book, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Missing, match="compute-sanitizer was not found"):
        gpu_steps.sanitizer("memcheck")(book)
    with pytest.raises(Missing, match="one run checks all"):
        gpu_steps.sanitizer("racecheck")(replace(book, dry=True))
    with pytest.raises(Missing, match="CIFAR10"):
        gpu_steps.search(replace(book, cifar10=None))
    monkeypatch.setattr(gpu_steps, "WHEELS", tmp_path)
    monkeypatch.setattr(gpu_steps, "PACKAGES", ("no-such-package",))
    with pytest.raises(Missing, match=r"lacks no-such-package.* pip download"):
        gpu_steps.wheels(book)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [gpu_steps.ROOT / "bench" / "gpu.sh", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_wrong_words_are_told() -> None:
    done = run("bulid")
    assert done.returncode == 2 and 'unknown step "bulid": one of build, test' in done.stderr
    assert run().returncode == 2
    wheels = run("--wheels-command").stdout
    assert "pip download --no-deps" in wheels and "tyro" in wheels


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "test", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="nvidia-smi names no GPU; --dry"):
        gpu.main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_does_every_step(tmp_path: Path) -> None:
    done = run("all", "--dry", "--scratch", str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").glob("dry-*.json")
    steps = {step["step"]: step for step in json.loads(path.read_text())["steps"]}
    assert list(steps) == [step.name for step in STEPS]
    skipped = {name for name, step in steps.items() if step["status"] == "skipped"}
    assert skipped == {"wheels", "racecheck", "planted fault"}
    for name in ("search_step", "kernels", "roofline", "reached", "curvature", "slowest", "search"):
        assert steps[name]["rows"], name
    assert "extrapolated_50_epochs_seconds" in steps["search"]["rows"][0]
    assert "| search | ok |" in path.with_suffix(".md").read_text()
