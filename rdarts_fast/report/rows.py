"""What a report says of each run in numbers, and which retraining belongs to which search."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.metrics import METRICS, Metric, metric_of, task_of
from rdarts_fast.report.numbers import Scale
from rdarts_fast.report.reading import Found, further, number, printable, whole_number
from rdarts_fast.run_dir import CONFIG, SPACE
from rdarts_fast.spaces import Space, load_space


@dataclass
class Row:
    """A run in numbers; None where it has none. Scores and costs are those of its task's metric,
    accuracies and errors as shares in [0, 1].

    lambda_last, lambda_mean: over the epochs that count, those of abandoned branches left out (the
    mean is the paper's of figure 4). stop_epoch: where the rule of DARTS-ES fired first. source:
    of a retraining, its search. retrainings: of a search, all of them. curve: what goes into the
    table's small curve.
    """

    found: Found
    data: str
    method: str
    epochs_done: int
    epochs_asked: int | None
    seed: int | None
    weight_decay: float | None
    drop_path_prob: float | None
    seconds: float | None
    space: str = ""
    supernet_score: float | None = None
    lambda_last: float | None = None
    lambda_mean: float | None = None
    stop_epoch: int | None = None
    rollbacks: int | None = None
    valid_cost: float | None = None
    test_cost: float | None = None
    further: dict[str, float] = field(default_factory=dict)  # measures after the last epoch
    at_epoch: int | None = None  # a retraining of an epoch's genotype
    source: Row | None = None
    retrainings: list[Row] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.found.name

    @property
    def searched(self) -> bool:
        """Whether it is a search."""
        return self.found.kind != "retraining"

    @property
    def config(self) -> dict[str, Any]:
        """The settings as they are in the folder."""
        return self.found.run.config

    @property
    def task(self) -> str:
        """What the network is for."""
        return task_of(self.config.get("task"))

    @property
    def metric(self) -> Metric:
        """What its networks are scored by."""
        return metric_of(self.task)

    @property
    def scale(self) -> Scale:
        """How its scores and costs are written."""
        return Scale(self.metric)

    def final(self, *, holdout: bool = False) -> list[Row]:
        """Return the ended retrainings of what the search found: of all, those with most epochs.

        holdout: those that have a cost on held-out data in place of that on the test data.
        """
        ended = [
            r
            for r in self.retrainings
            if r.found.state == "ended"
            and (r.valid_cost if holdout else r.test_cost) is not None
            and _is_final(r, self)
        ]
        most = max((r.epochs_asked or 0 for r in ended), default=0)
        return [r for r in ended if (r.epochs_asked or 0) == most]

    def at(self, epoch: int) -> list[Row]:
        """Return the ended retrainings of an epoch's genotype that have a test cost."""
        return [
            r
            for r in self.retrainings
            if r.at_epoch == epoch and r.found.state == "ended" and r.test_cost is not None
        ]


def _is_final(retraining: Row, search: Row) -> bool:
    """Whether what was retrained is what the search ended with."""
    if retraining.at_epoch is None:
        return True
    found = search.found.run.genotype
    return found is not None and retraining.found.run.genotype == found


def rows_of(found: Sequence[Found]) -> list[Row]:
    """Return a row for each run: searches in order, each followed by its retrainings, then the
    retrainings whose search is not among the runs.
    """
    searches = [_search_row(run) for run in found if run.kind != "retraining"]
    retrainings = [_retraining_row(run) for run in found if run.kind == "retraining"]
    for row in retrainings:
        row.source = _source_of(row, searches)
        if row.source is None:
            row.notes.append("its search is not among these runs")
        else:
            row.space = row.source.space
            row.source.retrainings.append(row)
    for row in searches:
        row.retrainings.sort(key=lambda r: -1 if r.at_epoch is None else r.at_epoch)
        row.test_cost = _mean([r.test_cost for r in row.final()])
        row.valid_cost = _mean([r.valid_cost for r in row.final(holdout=True)])
    alone = [row for row in retrainings if row.source is None]
    return [each for row in searches for each in (row, *row.retrainings)] + alone


def by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each task that has some: numbers of two metrics do not mix."""
    found = {task: [row for row in rows if row.task == task] for task in METRICS}
    return {task: there for task, there in found.items() if there}


def space_of(found: Found) -> Space | None:
    """Return a search's space, None where it cannot be read."""
    folder, name = found.run.folder, found.run.config.get("space")
    try:
        return load_space(folder / SPACE if (folder / SPACE).exists() else str(name))
    except (UserError, UnicodeDecodeError, RecursionError):
        return None


def history_of(row: Row) -> list[dict[str, Any]]:
    """Return a run's records but those of abandoned branches."""
    return row.found.run.history


def genotype_of(record: Mapping[str, Any]) -> Genotype | None:
    """Return a record's genotype, None where it has none that is whole."""
    try:
        return Genotype.from_dict(record.get("genotype"))
    except UserError:
        return None


def _search_row(found: Found) -> Row:
    run, history = found.run, found.run.history
    row = _row(found)
    space = space_of(found)
    row.space = printable(space.name if space else run.config.get("space", ""))
    result, last = run.result or {}, history[-1] if history else {}
    metric = row.metric
    name = f"valid_{metric.name}"
    score = number(result, name)
    row.supernet_score = score if score is not None else number(last, name)
    cost = number(result, f"valid_{metric.cost}")
    if found.kind == "random search" and cost is not None:
        row.supernet_score = metric.cost_of(cost)
    measured = [value for r in history if (value := number(r, "lambda_max")) is not None]
    if measured:
        row.lambda_last, row.lambda_mean = measured[-1], statistics.fmean(measured)
    stops = [stop for r in run.metrics if (stop := whole_number(r, "stop_epoch")) is not None]
    early = result.get("early_stop")
    noted = whole_number(early, "epoch") if isinstance(early, dict) else None
    row.stop_epoch = noted if noted is not None else stops[0] if stops else None
    branches = max((r["branch"] for r in run.metrics), default=0)
    row.rollbacks = whole_number(result, "rollbacks")
    if row.rollbacks is None and (branches or run.config.get("adaptive", "off") != "off"):
        row.rollbacks = branches
    row.curve = [value for r in history if (value := number(r, name)) is not None]
    return row


def _retraining_row(found: Found) -> Row:
    run = found.run
    row = _row(found)
    result, last = run.result or {}, run.history[-1] if run.history else {}
    names = [f"{part}_{row.metric.cost}" for part in ("valid", "test")]
    costs = [number(result, name) for name in names]
    row.valid_cost, row.test_cost = (
        cost if cost is not None else number(last, name)
        for cost, name in zip(costs, names, strict=True)
    )
    if run.config.get("holdout") is not True and row.valid_cost is not None:
        # Of a task that validates too where it tests: not what the short trainings are chosen by.
        row.further = {row.scale.valid: row.valid_cost, **row.further}
        row.valid_cost = None
    name = names[0 if row.test_cost is None else 1]
    row.curve = [value for r in run.history if (value := number(r, name)) is not None]
    at = str(run.config.get("genotypes_at", ""))
    row.at_epoch = int(at) if at.isascii() and at.isdecimal() and len(at) < 9 else None
    return row


def _row(found: Found) -> Row:
    config, history = found.run.config, found.run.history
    took = number(found.run.result or {}, "seconds")
    if took is None:
        times = [number(record, "seconds") for record in found.run.metrics]
        took = sum(t for t in times if t is not None) if history else None
    return Row(
        found=found,
        data=_data_name(config.get("data", "")),
        method=method_of(found),
        epochs_done=max((record["epoch"] + 1 for record in history), default=0),
        epochs_asked=whole_number(config, "epochs"),
        seed=whole_number(config, "seed"),
        weight_decay=number(config, "weight_decay"),
        drop_path_prob=number(config, "drop_path_prob"),
        seconds=took,
        further=further(history[-1]) if history else {},
        notes=list(found.notes),
    )


def _data_name(data: Any) -> str:
    """Return a data set's name; of one's own images the loader and the last part of the path."""
    loader, colon, path = printable(data).partition(":")
    return f"{loader}:{Path(path).name}" if colon else loader


def method_of(found: Found) -> str:
    """Return the method by its name in the paper."""
    if found.kind == "retraining":
        return ""
    if found.kind == "random search":
        return "RandomNAS-ws"
    config = found.run.config
    adaptive = config.get("adaptive", "off")
    if adaptive != "off":
        return f"DARTS-ADA ({printable(adaptive)})"
    return "DARTS-ES" if config.get("early_stop") == "stop" else "DARTS"


def early_cost(row: Row) -> float | None:
    """Return the test cost of what DARTS-ES would have ended a search with that went on: of the
    stop epoch's genotype, or of the last where the rule did not fire. None where that was not
    retrained, or the search is no such.
    """
    if row.config.get("early_stop") == "stop" or row.config.get("curvature", "off") == "off":
        return None
    if row.stop_epoch is not None:
        return _mean([r.test_cost for r in row.at(row.stop_epoch)])
    simulated = row.config.get("early_stop") == "simulate" and row.found.state == "ended"
    return row.test_cost if simulated else None


def _source_of(row: Row, searches: Sequence[Row]) -> Row | None:
    """Return the search of its task that a retraining names: by its path, else, where folders have
    moved or were copied, the one of that name that lies closest.
    """
    named = str(row.config.get("source", ""))
    try:
        os.fsencode(named)
    except UnicodeEncodeError:
        return None
    if not named or "\0" in named:
        return None
    searches = [search for search in searches if search.task == row.task]
    path = Path(named)
    for place in (path, path.parent) if path.suffix else (path,):
        for search in searches:
            if os.path.realpath(place) == str(search.found.folder):
                return search
    names = (path.name, path.parent.name) if path.suffix == ".json" else (path.name,)
    same = [search for search in searches if search.found.folder.name in names]
    settings = _text_of(path / CONFIG)
    if settings is not None:  # the search is still there, so another of its name must be a copy
        same = [s for s in same if _text_of(s.found.folder / CONFIG) == settings]
    near = [_shared(search.found.folder, row.found.folder) for search in same]
    if not near or near.count(max(near)) > 1:
        return None
    return same[near.index(max(near))]


def _text_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _shared(one: Path, other: Path) -> int:
    """Return how many parts two paths have in common from the top."""
    return len(Path(os.path.commonpath([one, other])).parts)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None
