"""Runs that differ in nothing but the seed, and the table of their means to paste."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rdarts_fast.report.numbers import NOTHING, Average, plain
from rdarts_fast.report.rows import Row, early_error

Key = tuple[str, str, str, float | None, float | None]


@dataclass(frozen=True)
class Group:
    """Searches of one space, data set, method and regularisation, over seeds.

    errors: the test errors of what they found, one a search.
    """

    space: str
    data: str
    method: str
    weight_decay: float | None
    drop_path_prob: float | None
    rows: Sequence[Row]
    errors: Sequence[float | None]

    @property
    def searches(self) -> int:
        """How many."""
        return len(self.rows)

    def average(self, value: Callable[[Row], float | None]) -> Average | None:
        """Return the average of a number of the rows."""
        return Average.of([value(row) for row in self.rows])


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Return the groups of all searches, in the order of their names. Searches that went on after
    the stop epoch are DARTS-ES too, where all genotypes that it would have ended with were
    retrained.
    """
    members: dict[Key, list[tuple[Row, float | None]]] = {}
    for row in rows:
        if row.searched:
            members.setdefault(_key(row, row.method), []).append((row, row.test_error))
    for key, pairs in list(members.items()):
        early = [(row, early_error(row)) for row, _ in pairs]
        fired = any(row.stop_epoch is not None for row, _ in pairs)
        # Not of some: those where the rule did not fire would stand for all.
        if fired and all(error is not None for _, error in early):
            members.setdefault((*key[:2], "DARTS-ES", *key[3:]), []).extend(early)
    ordered = sorted(members.items(), key=lambda item: (*item[0][:3], *map(_level, item[0][3:])))
    return [
        Group(*key, [row for row, _ in pairs], [error for _, error in pairs])
        for key, pairs in ordered
    ]


def _level(value: float | None) -> float:
    return -1.0 if value is None else value


def _key(row: Row, method: str) -> Key:
    return row.space, row.data, method, row.weight_decay, row.drop_path_prob


# The table

HEAD = (
    "space",
    "data",
    "method",
    "weight decay",
    "drop path",
    "searches",
    "supernet validation accuracy, %",
    "lambda_max, last",
    "lambda_max, mean",
    "validation error, %",
    "test error, %",
)
_TEXT = 3  # the first columns are names


def cells_of(group: Group, sign: str = "±") -> list[str]:
    """Return a group's line of the table."""
    averages = [
        (group.average(lambda row: row.supernet_accuracy), 2, 100.0),
        (group.average(lambda row: row.lambda_last), 3, 1.0),
        (group.average(lambda row: row.lambda_mean), 3, 1.0),
        (group.average(lambda row: row.valid_error), 2, 100.0),
        (Average.of(group.errors), 2, 100.0),
    ]
    texts = [
        NOTHING if found is None else found.text(digits, factor, sign)
        for found, digits, factor in averages
    ]
    names = [group.space, group.data, group.method]
    return [
        *names,
        *(plain(group.weight_decay), plain(group.drop_path_prob), str(group.searches)),
        *texts,
    ]


def to_markdown(groups: Sequence[Group]) -> str:
    """Return the table in markdown."""
    lines = [[_markdown(title) for title in HEAD], [*["---"] * _TEXT, *["---:"] * 8]]
    lines += [[_markdown(cell) for cell in cells_of(group)] for group in groups]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(groups: Sequence[Group]) -> str:
    """Return the table in LaTeX, without packages."""
    columns = "l" * _TEXT + "r" * (len(HEAD) - _TEXT)
    lines = [_latex_line([_latex(title) for title in HEAD]), "\\hline"]
    for group in groups:
        cells = [_latex(cell) for cell in cells_of(group)]
        lines.append(_latex_line(cells))
    body = "\n".join(lines)
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def to_csv(groups: Sequence[Group]) -> str:
    """Return the table for a spreadsheet: mean, deviation and count of each number, with all their
    digits, shares in [0, 1]; empty where there is none.
    """
    numbers = ("supernet_valid_accuracy", "lambda_last", "lambda_mean", "valid_error", "test_error")
    head = ["space", "data", "method", "weight_decay", "drop_path_prob", "searches"]
    head += [f"{name}_{part}" for name in numbers for part in ("mean", "deviation", "count")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for group in groups:
        averages = [
            group.average(lambda row: row.supernet_accuracy),
            group.average(lambda row: row.lambda_last),
            group.average(lambda row: row.lambda_mean),
            group.average(lambda row: row.valid_error),
            Average.of(group.errors),
        ]
        names = [harmless(text) for text in (group.space, group.data, group.method)]
        cells = [*names, group.weight_decay, group.drop_path_prob, group.searches]
        for found in averages:
            cells += ["", "", 0] if found is None else [found.mean, found.deviation, found.count]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()


def harmless(text: str) -> str:
    """Return text that no spreadsheet takes for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _markdown(text: str) -> str:
    """Return text that stays text in a cell."""
    for mark in "\\`*_{}[]<>#|~$&":
        text = text.replace(mark, "\\" + mark)
    return text


_LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "–": "--",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    **{mark: "\\" + mark for mark in "&%_#${}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + " \\\\"
