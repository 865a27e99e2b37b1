"""What came of the run-book's steps (gpu.py): a file of JSON, and the same as a table."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_steps import ROOT, STEPS, Book


@dataclass
class Result:
    """What became of a step.

    status: ok, failed, timed out, or skipped; the note says why.
    """

    step: str
    status: str
    seconds: float = 0.0
    box: float = 0.0
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)  # lines of JSON that it printed


def rows_of(text: str) -> list[dict[str, Any]]:
    """Return the lines of JSON that a benchmark printed (bench/record.py)."""
    rows = []
    for row in text.splitlines():
        if row.startswith('{"bench"'):
            try:
                rows.append(json.loads(row))
            except json.JSONDecodeError:  # cut off by the time box
                continue
    return rows


@dataclass
class Report:
    """The file of results: those of a day's earlier calls at the same commit stay."""

    path: Path  # of the JSON; the table lies beside it
    head: dict[str, Any]
    steps: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, head: dict[str, Any]) -> Report:
        """Return the report, with what is there already."""
        report = cls(path, head)
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["commit"] == head["commit"]:
                report.steps = {step["step"]: Result(**step) for step in stored["steps"]}
        return report

    def add(self, result: Result) -> None:
        """Take a step's result in, and write both files."""
        self.steps[result.step] = result
        ordered = [self.steps[step.name] for step in STEPS if step.name in self.steps]
        whole = {**self.head, "steps": [vars(result) for result in ordered]}
        replace(self.path, json.dumps(whole, indent=1) + "\n")
        replace(self.path.with_suffix(".md"), "\n".join(table(self.head, ordered)) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def table(head: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """Return the results in Markdown: the steps, then a table for each benchmark."""
    where = "on the CPU, tiny sizes: no measurement" if head["dry"] else head["gpu"]
    rows = [f"# {where}, {head['date']}, commit {head['commit']}", ""]
    rows += ["| step | | seconds | of at most | |", "|---|---|---|---|---|"]
    for result in results:
        words = " ".join(result.note.split())[-120:].replace("|", "/")
        cells = (result.step, result.status, f"{result.seconds:.0f}", f"{result.box:.0f}", words)
        rows.append("| " + " | ".join(cells) + " |")
    for result in results:
        timed = [row for row in result.rows if row.get("ours_ms") is not None]
        if timed:
            rows += ["", f"## {result.step}", "", *_timed(timed)]
        others = [row for row in result.rows if row.get("ours_ms") is None]
        if others:
            rows += ["", f"## {result.step}: other lines", "", *map(_other, others)]
    return rows


def _timed(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = ["| space or shape | case | baseline | ours, ms | baseline, ms | ratio | |"]
    found.append("|---|---|---|---|---|---|---|")
    for row in rows:
        numbers = [row.get(key) for key in ("ours_ms", "baseline_ms", "ratio")]
        cells = ["" if number is None else f"{number:.4g}" for number in numbers]
        words = [str(row.get(key, "")) for key in ("space", "case", "baseline")]
        found.append("| " + " | ".join([*words, *cells, str(row.get("note", ""))]) + " |")
    return found


HIDDEN = (
    *("bench", "floors", "genotype", "dtype"),
    *("device", "threads", "cpu_unit", "torch", "python", "rdarts_fast", "commit"),
)


def _other(row: dict[str, Any]) -> str:
    shown = (f"{key} {value}" for key, value in row.items() if key not in HIDDEN and value)
    return "- " + ", ".join(shown)


def head_of(book: Book) -> dict[str, Any]:
    """Return what the results are of."""
    now = datetime.datetime.now(datetime.UTC)
    query = ("nvidia-smi", "--format=csv,noheader")
    describe = ("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*")
    return {
        "gpu": "none (dry)" if book.dry else output_of(*query, "--query-gpu=name"),
        "driver": None if book.dry else output_of(*query, "--query-gpu=driver_version"),
        "date": now.strftime("%Y-%m-%d"),
        "commit": os.environ.get("COMMIT") or output_of(*describe),
        "python": sys.version.split()[0],
        "dry": book.dry,
    }


def output_of(*command: str) -> str:
    """Return the first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split("\n")
    return lines[0].strip() or "unknown"


def name_of(head: dict[str, Any]) -> str:
    """Return the results' file name without its ending: nvidia-h100-80gb-hbm3-2026-11-25."""
    gpu = "dry" if head["dry"] else head["gpu"]
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + f"-{head['date']}"
