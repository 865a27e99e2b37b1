"""Runs that differ in nothing but the seed, and the table of their means to paste."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rdarts_fast.metrics import METRICS, metric_of
from rdarts_fast.report.numbers import NOTHING, Average, Scale, plain
from rdarts_fast.report.rows import Row, early_cost

Key = tuple[str, str, str, str, float | None, float | None]


@dataclass(frozen=True)
class Group:
    """Searches of one task, space, data set, method and regularisation, over seeds.

    costs: the test costs of what they found, one a search.
    """

    task: str
    space: str
    data: str
    method: str
    weight_decay: float | None
    drop_path_prob: float | None
    rows: Sequence[Row]
    costs: Sequence[float | None]

    @property
    def searches(self) -> int:
        """How many."""
        return len(self.rows)

    @property
    def scale(self) -> Scale:
        """How their scores and costs are written."""
        return Scale(metric_of(self.task))

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
            members.setdefault(_key(row, row.method), []).append((row, row.test_cost))
    for key, pairs in list(members.items()):
        early = [(row, early_cost(row)) for row, _ in pairs]
        fired = any(row.stop_epoch is not None for row, _ in pairs)
        # Not of some: those where the rule did not fire would stand for all.
        if fired and all(cost is not None for _, cost in early):
            members.setdefault((*key[:3], "DARTS-ES", *key[4:]), []).extend(early)
    tasks = list(METRICS)
    ordered = sorted(
        members.items(),
        key=lambda item: (tasks.index(item[0][0]), *item[0][1:4], *map(_level, item[0][4:])),
    )
    return [
        Group(*key, [row for row, _ in pairs], [cost for _, cost in pairs])
        for key, pairs in ordered
    ]


def _level(value: float | None) -> float:
    return -1.0 if value is None else value


def _key(row: Row, method: str) -> Key:
    return row.task, row.space, row.data, method, row.weight_decay, row.drop_path_prob


def tables_of(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return the groups of each task: the numbers of one table have one metric."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.task, []).append(group)
    return found


# The table

_NAMES = ("space", "data", "method", "weight decay", "drop path", "searches")
TEXT = 3  # the first columns are names


def head_of(scale: Scale) -> list[str]:
    """Return the titles of the columns."""
    return [
        *_NAMES,
        scale.titled(f"supernet {scale.supernet}"),
        *("lambda_max, last", "lambda_max, mean"),
        scale.titled(scale.valid),
        scale.titled(scale.test),
    ]


def cells_of(group: Group, sign: str = "±") -> list[str]:
    """Return a group's line of the table."""
    supernet, last, mean, valid, test = _averages(group)
    factor = group.scale.factor
    averages = [
        *((supernet, 2, factor), (last, 3, 1.0), (mean, 3, 1.0)),
        *((valid, 2, factor), (test, 2, factor)),
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


def _averages(group: Group) -> list[Average | None]:
    return [
        group.average(lambda row: row.supernet_score),
        group.average(lambda row: row.lambda_last),
        group.average(lambda row: row.lambda_mean),
        group.average(lambda row: row.valid_cost),
        Average.of(group.costs),
    ]


def to_markdown(groups: Sequence[Group]) -> str:
    """Return the table in markdown, one for each task."""
    return "\n".join(_markdown_table(found) for found in tables_of(groups).values())


def _markdown_table(groups: Sequence[Group]) -> str:
    head = head_of(groups[0].scale)
    rule = [*["---"] * TEXT, *["---:"] * (len(head) - TEXT)]
    lines = [[_markdown(title) for title in head], rule]
    lines += [[_markdown(cell) for cell in cells_of(group)] for group in groups]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(groups: Sequence[Group]) -> str:
    """Return the table in LaTeX, without packages, one for each task."""
    return "\n".join(_latex_table(found) for found in tables_of(groups).values())


def _latex_table(groups: Sequence[Group]) -> str:
    head = head_of(groups[0].scale)
    columns = "l" * TEXT + "r" * (len(head) - TEXT)
    lines = [_latex_line([_latex(title) for title in head]), "\\hline"]
    for group in groups:
        cells = [_latex(cell) for cell in cells_of(group)]
        lines.append(_latex_line(cells))
    body = "\n".join(lines)
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def to_csv(groups: Sequence[Group]) -> str:
    """Return the table for a spreadsheet: mean, deviation and count of each number, with all their
    digits, shares in [0, 1]; empty where there is none. Each metric has columns of its own.
    """
    head = ["space", "data", "method", "weight_decay", "drop_path_prob", "searches"]
    for table in tables_of(groups).values():
        names = [f"{name}_{part}" for name in _numbers_of(table[0]) for part in _PARTS]
        head += [name for name in names if name not in head]
    text = io.StringIO()
    writer = csv.DictWriter(text, head, restval="", lineterminator="\n")
    writer.writeheader()
    for group in groups:
        names = [harmless(text) for text in (group.space, group.data, group.method)]
        cells: list[object] = [*names, group.weight_decay, group.drop_path_prob, group.searches]
        line = dict(zip(head, cells, strict=False))
        for name, found in zip(_numbers_of(group), _averages(group), strict=True):
            parts: list[object] = ["", "", 0]
            if found is not None:
                parts = [found.mean, found.deviation, found.count]
            line |= {f"{name}_{part}": value for part, value in zip(_PARTS, parts, strict=True)}
        writer.writerow({name: "" if cell is None else cell for name, cell in line.items()})
    return text.getvalue()


_PARTS = ("mean", "deviation", "count")


def _numbers_of(group: Group) -> list[str]:
    metric = group.scale.metric
    supernet, costs = f"supernet_valid_{metric.name}", (f"{p}_{metric.cost}" for p in _HALVES)
    return [supernet, "lambda_last", "lambda_mean", *costs]


_HALVES = ("valid", "test")


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
