"""What a protocol ended with: the tables of R-DARTS in the folders of a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rdarts_fast.errors import UserError
from rdarts_fast.metrics import metric_of
from rdarts_fast.protocol import SETTINGS
from rdarts_fast.report.markup import Html, Piece, join, paragraphs, table, tag
from rdarts_fast.report.reading import Unread, printable
from rdarts_fast.run_dir import read_object
from rdarts_fast.tables import TABLE, TEXTS, Table

_MOST = 20  # rows of a table


@dataclass(frozen=True)
class Protocol:
    """A folder of R-DARTS, and its table; None where it has not ended."""

    name: str
    table: Table | None


def protocols_in(given: Sequence[Path]) -> tuple[list[Protocol], list[Unread]]:
    """Return the protocols at and below these folders, in the order of their names, and those
    whose table is damaged.
    """
    found: dict[Path, Protocol] = {}
    unread: dict[Path, Unread] = {}
    for root in given:
        for folder in _folders(root):
            place = folder.resolve()
            if place in found or place in unread:
                continue
            try:
                found[place] = _read(folder)
            except (UserError, RecursionError) as error:
                reason = str(error).replace(str(folder) + os.sep, "")
                unread[place] = Unread(printable(folder), printable(reason))
    return list(found.values()), list(unread.values())


def _folders(root: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if SETTINGS in files:
            yield Path(place)


def _read(folder: Path) -> Protocol:
    metric = metric_of(read_object(folder / SETTINGS).get("task"))
    ended = (folder / TABLE).exists()
    return Protocol(folder.resolve().name, Table.read(folder, metric) if ended else None)


def section(protocols: Sequence[Protocol]) -> Html:
    """Return the table of each: every search, which was selected, and how good that is."""
    return join([_about(each) for each in protocols])


def _about(protocol: Protocol) -> Html:
    found = protocol.table
    if found is None:
        words = "has no table yet: the same command of rdarts_fast.robust goes on with it."
        return paragraphs(join([tag("b", protocol.name), f" {words}"]))
    chosen = any(row.get("selected") for row in found.rows)
    rows = found.rows[:_MOST]
    head: list[Piece] = [*found.columns().values(), *(["selected"] if chosen else [])]
    lines: list[list[Piece]] = [
        [*found.cells(row), *([_yes(row.get("selected"))] if chosen else [])] for row in rows
    ]
    texts = [i for i, name in enumerate(found.columns()) if name in TEXTS]
    drawn = table(
        head,
        lines,
        text=[*texts, *([len(head) - 1] if chosen else [])],
        looks=["chosen" if row.get("selected") is True else "" for row in rows],
    )
    notes = paragraphs(*found.notes(_MOST))
    return join([tag("h3", found.title), tag("div", drawn, class_="plain"), notes])


def _yes(value: object) -> str:
    return "yes" if value is True else ""
