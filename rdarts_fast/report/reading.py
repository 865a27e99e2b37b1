"""Finds run folders, and reads each as far as it can be read."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

from rdarts_fast.errors import UserError
from rdarts_fast.metrics import METRICS as SCORES
from rdarts_fast.run_dir import CONFIG, METRICS, Run

Kind = Literal["search", "random search", "retraining"]
State = Literal["ended", "still going", "not finished"]

_HOLDER = re.compile(r"process (\d+) on (.*)")
_MOST_NOTES = 4  # of one run
_SCORES = {"loss", *(name for metric in SCORES.values() for name in (metric.name, metric.cost))}
PARTS = ("train", "valid", "test")
_NUMBERS = (
    *(f"{part}_{name}" for part in PARTS for name in sorted(_SCORES)),
    *("lambda_max", "regret", "seconds"),
)


@dataclass(frozen=True)
class Found:
    """A run that could be read, at least in part.

    name: its folder below what was given, for people. run: its records have whole epochs and
    branches, numbers that are finite, and are in the order of the file. notes: what is damaged or
    missing.
    """

    name: str
    run: Run
    kind: Kind
    state: State
    notes: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is, without links."""
        return self.run.folder.resolve()


@dataclass(frozen=True)
class Unread:
    """A folder that is no run, or cannot be read at all."""

    path: str
    reason: str


def read_all(given: Sequence[Path]) -> tuple[list[Found], list[Unread]]:
    """Return the runs in these folders, which are runs or hold runs at any depth, and what could
    not be read. A run that is found twice counts once.
    """
    found: list[Found] = []
    unread: list[Unread] = []
    seen: set[Path] = set()
    for root in given:
        places = list(_run_folders(root, unread))
        for folder in places:
            place = folder.resolve()
            if place in seen:
                continue
            seen.add(place)
            try:
                found.append(_read(folder, _name(folder, root, len(given) > 1)))
            except (UserError, RecursionError) as error:
                unread.append(Unread(printable(folder), printable(error)))
    return _told_apart(found), unread


def printable(text: object) -> str:
    """Return text without what no page may hold: control characters and halves of characters, as
    names of files and settings can have them.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))


def number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a finite number of a record or result, None where there is none."""
    value = values.get(name)
    return float(value) if is_number(value) else None


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and one that can be reckoned with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # of a NaN it is not


def further(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures of a record beside loss, score and cost: of the test data where it has
    them, else of the validation data; by name.
    """
    for part in ("test_", "valid_"):
        names = [name.removeprefix(part) for name in record if name.startswith(part)]
        found = {
            n: v for n in names if n not in _SCORES and (v := number(record, part + n)) is not None
        }
        if found:
            return found
    return {}


def whole_number(values: Mapping[str, Any], name: str) -> int | None:
    """Return a whole number of at least 0 of a record or result, None where there is none."""
    value = values.get(name)
    return value if type(value) is int and 0 <= value < 2**64 else None


def _run_folders(root: Path, unread: list[Unread]) -> Iterator[Path]:
    """Yield the run folders at and below `root`, in the order of their names."""
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "there is no such folder"
        unread.append(Unread(printable(root), reason))
        return
    before = len(unread)
    count = 0
    walk = os.walk(root, onerror=lambda error: unread.append(_refused(error)))
    for place, folders, files in walk:
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if CONFIG in files:
            count += 1
            yield Path(place)
        elif METRICS in files:
            unread.append(Unread(printable(place), f"is not a run folder: it has no {CONFIG}"))
    if not count and len(unread) == before:
        unread.append(Unread(printable(root), f"holds no run folder (none has a {CONFIG})"))


def _refused(error: OSError) -> Unread:
    return Unread(printable(error.filename), f"cannot be read: {error.strerror or error}")


def _name(folder: Path, root: Path, several: bool) -> str:
    below = folder.relative_to(root)
    top = root.resolve().name or str(root)
    if below == Path("."):
        return printable(top)
    return printable(Path(top, below) if several else below)


def _told_apart(found: Iterable[Found]) -> list[Found]:
    """Return the runs with whole paths as names where two would have the same one."""
    runs = list(found)
    names = [run.name for run in runs]
    return [
        replace(run, name=printable(run.folder)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def _read(folder: Path, name: str) -> Found:
    run, notes = Run.salvage(folder)
    if "space" not in run.config and "source" not in run.config:
        raise UserError(f"its {CONFIG} is of no search and no retraining")
    here = str(folder) + os.sep
    notes = [note.replace(here, "") for note in notes]
    records, strange = _clean(run.metrics)
    notes += strange
    run = replace(run, metrics=records)
    state, held = _state(run)
    notes += held
    if len(notes) > _MOST_NOTES:
        notes = [*notes[:_MOST_NOTES], f"and {len(notes) - _MOST_NOTES} more of this kind"]
    return Found(name, run, _kind(run.config), state, tuple(printable(note) for note in notes))


def _kind(config: Mapping[str, Any]) -> Kind:
    if "source" in config:
        return "retraining"
    return "search" if "alpha_learning_rate" in config else "random search"


def _clean(metrics: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records that have an epoch, their branch filled in, without numbers that are
    none; and what was left out.
    """
    kept, without, strange = [], 0, set()
    for record in metrics:
        if whole_number(record, "epoch") is None:
            without += 1
            continue
        bad = {name for name in _NUMBERS if name in record and number(record, name) is None}
        strange |= bad
        clean = {name: value for name, value in record.items() if name not in bad}
        kept.append(clean | {"branch": whole_number(record, "branch") or 0})
    notes = []
    if without:
        notes.append(f"{METRICS}: {without} lines without an epoch were left out")
    if strange:
        notes.append(f"{METRICS}: no finite numbers, left out: {', '.join(sorted(strange))}")
    return kept, notes


def _state(run: Run) -> tuple[State, list[str]]:
    """Return the state, and what the lock says where that is not sure."""
    if run.result is not None:
        return "ended", []
    holder = _HOLDER.match(run.holder or "")
    if holder is None:
        return "not finished", []
    process, host = holder[1], holder[2]
    if host != socket.gethostname():
        return "not finished", [f"process {process} on {host} writes to it, or was killed"]
    if Path("/proc", process).exists():
        return "still going", []
    return "not finished", ["the process that wrote to it was killed"]
