"""One search as a report reads it: alphas, genotypes, branches, and what an analysis left."""

from __future__ import annotations

import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdarts_fast.analysis import ANALYSIS, Branch, trajectory
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, kept_edges
from rdarts_fast.plots import Edge
from rdarts_fast.report.reading import number
from rdarts_fast.report.rows import Row, genotype_of, space_of
from rdarts_fast.spaces import Space


@dataclass
class Search:
    """A search whose alphas fit its space: those that do not are left out, with a note."""

    row: Row
    space: Space | None
    history: list[dict[str, Any]]
    alphas: dict[int, dict[str, torch.Tensor]]  # epoch -> cell type -> [E, O]
    notes: list[str]

    @classmethod
    def of(cls, row: Row) -> Search:
        notes: list[str] = []
        space, history = space_of(row.found), row.found.run.history
        if space is None:
            notes.append("its search space could not be read: no cells, no alphas")
        alphas = {}
        for record in history:
            found = None if space is None else _alphas_of(record, space)
            if found is not None:
                alphas[record["epoch"]] = found
        missing = len(history) - len(alphas)
        if missing and space is not None and row.found.kind == "search":
            notes.append(f"{missing} of {len(history)} epochs have no alphas that fit its space")
        return cls(row, space, history, alphas, notes)

    @property
    def name(self) -> str:
        return self.row.name


def _alphas_of(record: Mapping[str, Any], space: Space) -> dict[str, torch.Tensor] | None:
    """Return a record's alphas, None where they are none of this space."""
    found, values = {}, record.get("alphas")
    if not isinstance(values, Mapping):
        return None
    for kind in space.cells:
        try:
            array = np.asarray(values[kind], dtype=np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        if (
            array.shape != (space.edges(kind), space.operations(kind))
            or not np.isfinite(array).all()
        ):
            return None
        found[kind] = torch.from_numpy(array)
    return found


def genotype_found(search: Search) -> tuple[Genotype | None, str]:
    """Return the found genotype and a word on where it is from, or None and why there is none."""
    run = search.row.found.run
    if run.genotype is not None:
        return run.genotype, ""
    for record in reversed(search.history):
        genotype = genotype_of(record)
        if genotype is not None:
            return genotype, f", as epoch {record['epoch']} of metrics.jsonl has them"
    return None, "it has no genotype yet"


def record_of(search: Search, genotype: Genotype) -> dict[str, Any] | None:
    """Return the record that a genotype is from: of the stop epoch where DARTS-ES ended it, else
    the last.
    """
    stopped = search.row.config.get("early_stop") == "stop" and search.row.stop_epoch is not None
    for record in reversed(search.history):
        if stopped and record["epoch"] != search.row.stop_epoch:
            continue
        return record if genotype_of(record) == genotype else None
    return None


def edges_of(
    search: Search, genotype: Genotype, alphas: Mapping[str, torch.Tensor] | None
) -> dict[str, list[Edge]]:
    """Return the kept edges, with softmax weights where the alphas are there and fit."""
    if search.space is not None and alphas is not None:
        try:
            found = kept_edges(search.space, genotype, alphas)
        except (IndexError, KeyError, ValueError):
            search.notes.append("its genotype is not of its search space")
        else:
            return {kind: list(edges) for kind, edges in found.items()}
    return {kind: [(*edge, None) for edge in genotype.edges(kind)] for kind in genotype.cells}


def abandoned(search: Search) -> list[list[dict[str, Any]]]:
    """Return the epochs that were undone, a list for each branch."""
    parts: dict[int, list[dict[str, Any]]] = {}
    for record in search.row.found.run.metrics:
        if record.get("abandoned"):
            parts.setdefault(record["branch"], []).append(record)
    return list(parts.values())


def branches_of(search: Search, measured: Sequence[Mapping[str, Any]]) -> list[Branch]:
    """Return lambda_max along each branch, with averages and stops where the settings are known."""
    run = search.row.found.run
    try:
        return trajectory(run)
    except (UserError, ValueError) as error:
        search.notes.append(f"lambda_max without local average and stop: {error}")
    numbers = sorted({record["branch"] for record in measured})
    found = []
    for branch in numbers:
        pairs = [(r["epoch"], r["lambda_max"]) for r in measured if r["branch"] == branch]
        found.append(Branch(branch, [e for e, _ in pairs], [v for _, v in pairs], [], [], None))
    return found


# What `python -m rdarts_fast.analysis` left


def drop_of(row: Row) -> dict[str, float] | None:
    """Return the numbers on discretising in a run's analysis.json, None where there are none."""
    try:
        found = json.loads((row.found.run.folder / ANALYSIS / "analysis.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    values = found.get("discretisation") if isinstance(found, dict) else None
    if not isinstance(values, dict):
        return None
    names = ("epoch", "supernet", "discretised", "drop", "batch_statistics")
    numbers = {name: value for name in names if (value := number(values, name)) is not None}
    return numbers if set(names[:4]) <= set(numbers) else None


def planes_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the steps and the two planes of a landscape, None where missing or damaged."""
    arrays = arrays_of(path, ("steps", "leading", "random"))
    if arrays is None or any(array.dtype.kind not in "fiu" for array in arrays):
        return None
    steps, leading, random = (np.asarray(array, dtype=np.float64) for array in arrays)
    shapes_fit = steps.ndim == 1 and leading.shape == random.shape == (len(steps), len(steps))
    whole = shapes_fit and all(np.isfinite(a).all() for a in (steps, leading, random))
    return (steps, leading, random) if whole and len(steps) > 1 else None


# Files of arrays


def arrays_of(path: Path, names: Sequence[str]) -> list[np.ndarray] | None:
    """Return arrays of an .npz file, None where it is missing or damaged or holds more than a
    picture can show.
    """
    try:
        with zipfile.ZipFile(path) as file:
            sizes = [file.getinfo(f"{name}.npy").file_size for name in names]
            if max(sizes) > _MOST_BYTES:
                return None
        with np.load(path, allow_pickle=False) as arrays:
            return [np.asarray(arrays[name]) for name in names]
    except _DAMAGED:
        return None


_MOST_BYTES = 2**30
# What zipfile, zlib and numpy raise at bytes that are not what they should be.
_DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, OverflowError),
    *(MemoryError, SyntaxError, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
