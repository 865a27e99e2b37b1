"""The whole page, and the files beside it."""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rdarts_fast import __version__
from rdarts_fast.errors import UserError
from rdarts_fast.report import beside, groups, many, maps, overview, protocols, single
from rdarts_fast.report.commands import command_of
from rdarts_fast.report.groups import Group
from rdarts_fast.report.markup import (
    Html,
    Piece,
    folded,
    join,
    paragraphs,
    raw,
    table,
    tag,
)
from rdarts_fast.report.pictures import FOLDER, Pictures
from rdarts_fast.report.protocols import Protocol
from rdarts_fast.report.reading import Unread, read_all
from rdarts_fast.report.rows import Row, by_task, rows_of
from rdarts_fast.report.style import CSS

DETAILS = 12  # searches that have a part of their own unless more are asked for
PAGE = "report.html"
_MADE_BY = '<meta name="generator" content="rdarts_fast.report">'
_STRIPS, _OPEN = 3, 2  # how many searches have a strip of cells; are unfolded


@dataclass(frozen=True)
class Report:
    """What was written: the page, and in words what is in it."""

    page: Path
    runs: int
    unread: Sequence[Unread]
    pictures: int

    def described(self) -> Iterator[str]:
        """Yield lines to print."""
        yield f"{self.runs} {'run' if self.runs == 1 else 'runs'} read"
        for unread in self.unread:
            yield f"not read: {unread.path}: {unread.reason}"
        yield f"written: {self.page} (open it in a browser)"
        beside = f"table.md, table.tex, table.csv, {self.pictures} pictures"
        yield f"         {self.page.parent}: {beside}"


def write_report(
    runs: Sequence[Path | str] | Path | str,
    out: Path | str = "report",
    *,
    details: int | None = DETAILS,
) -> Report:
    """Write a page about runs: report.html, its pictures, and tables to paste.

    runs: folders of runs, or such that hold some at any depth. details: how many searches have a
    part of their own, None for all. Damaged or unfinished runs are told of as far as they go.
    Raises UserError where nothing can be read, or `out` is neither empty nor an earlier report.
    """
    given = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    out = Path(out)
    if details is not None and details < 0:
        raise UserError(f"details: expected a number from 0 on, got {details}")
    found, unread = read_all(given)
    if not found:
        reasons = "; ".join(f"{each.path}: {each.reason}" for each in unread[:5])
        raise UserError(f"nothing to report on: {reasons or 'no folders were named'}")
    ended, damaged = protocols.protocols_in(given)
    unread += damaged
    try:
        _prepare(out)
        rows = rows_of(found)
        pictures = Pictures(out / FOLDER)
        text = _page(given, out, rows, ended, unread, pictures, details)
        grouped = groups.groups_of(rows)
        (out / "table.md").write_text(groups.to_markdown(grouped), encoding="utf-8")
        (out / "table.tex").write_text(groups.to_latex(grouped), encoding="utf-8")
        (out / "table.csv").write_text(groups.to_csv(grouped), encoding="utf-8")
        (out / PAGE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror or error}") from error
    return Report(out / PAGE, len(found), unread, len(pictures.names))


def _prepare(out: Path) -> None:
    """Make the report's folders; of an earlier report, its pictures go."""
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write the report to {out}: it is a file")
    if out.exists() and any(out.iterdir()):
        page = out / PAGE
        if not page.is_file() or _MADE_BY not in page.read_text(errors="replace")[:2000]:
            raise UserError(f"{out} is not empty and holds no earlier report: choose another --out")
        for picture in (out / FOLDER).glob("*.svg"):
            picture.unlink()
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    # Where the writing is interrupted, the next one may go on here.
    (out / PAGE).write_text(f"<!DOCTYPE html>\n{_MADE_BY}\n<p>This report is not finished.</p>\n")


def _page(
    given: Sequence[Path],
    out: Path,
    rows: Sequence[Row],
    ended: Sequence[Protocol],
    unread: Sequence[Unread],
    pictures: Pictures,
    details: int | None,
) -> str:
    searches = [row for row in rows if row.searched]
    grouped = groups.groups_of(rows)
    figures = {task: many.figures(found, pictures) for task, found in by_task(rows).items()}
    parts: dict[str, tuple[str, Html]] = {}
    if ended:
        parts["protocols"] = ("What the protocol chose", protocols.section(ended))
    name = "All runs" if ended else ""
    parts["runs"] = (name, overview.table_of(rows, _parted(searches, details)))
    if any(figures.values()):
        parts["figures"] = ("Over all runs", _figures(figures))
    if grouped:
        parts["table"] = ("Means over seeds, to paste", _to_paste(grouped))
        parts["paper"] = ("Beside the paper", beside.section(rows))
    if searches:
        parts["searches"] = ("Each search", _searches(searches, pictures, details))
    alone = maps.alone(rows, pictures)
    if alone:
        parts["maps"] = ("Retrainings without their search", tag("div", *alone, class_="cards"))
    head = overview.head(rows, unread)
    title = overview.title(rows)
    links = [tag("a", name, href=f"#{key}") for key, (name, _) in parts.items() if name]
    body = [head]
    if links:
        body.append(tag("p", join(links, "  ·  "), class_="soft"))
    for key, (name, inner) in parts.items():
        heading = tag("h2", name) if name else Html("")
        body.append(tag("section", heading, inner, id=key))
    body.append(_foot(given, out, rows, details))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_MADE_BY}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{raw(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{join(body, chr(10)).text}\n</main>\n</body>\n</html>\n"
    )


def _parted(searches: Sequence[Row], details: int | None) -> dict[str, int]:
    """Return the number of the part of each search that has one, by name."""
    return {row.name: i for i, row in enumerate(searches[:details], start=1)}


def _figures(figures: Mapping[str, Sequence[Html]]) -> Html:
    """Return the cards of each task's figures, under its name where there are several tasks."""
    pieces: list[Piece] = []
    for task, cards in figures.items():
        if cards:
            pieces += [tag("h3", task)] if len(figures) > 1 else []
            pieces.append(tag("div", join(cards), class_="cards"))
    return join(pieces)


def _to_paste(grouped: Sequence[Group]) -> Html:
    tables = groups.tables_of(grouped)
    shown: list[Piece] = []
    for task, found in tables.items():
        lines = [groups.cells_of(group) for group in found]
        drawn = table(groups.head_of(found[0].scale), lines, text=range(groups.TEXT))
        shown += [tag("h3", task)] if len(tables) > 1 else []
        shown.append(tag("div", drawn, class_="plain"))
    costs = " or ".join(dict.fromkeys(group.scale.metric.cost_name for group in grouped))
    words = (
        "Searches that differ in the seed alone: mean ± sample deviation, which one search does "
        f"not have. The test {costs} is that of the network retrained from what a search ended "
        "with."
    )
    forms: list[Piece] = [
        folded(f"{name} ({file})", tag("pre", text))
        for name, file, text in (
            ("Markdown", "table.md", groups.to_markdown(grouped)),
            ("LaTeX", "table.tex", groups.to_latex(grouped)),
            ("CSV, all digits, shares in [0, 1]", "table.csv", groups.to_csv(grouped)),
        )
    ]
    return join([paragraphs(words), *shown, *forms])


def _searches(searches: Sequence[Row], pictures: Pictures, details: int | None) -> Html:
    shown = searches[:details]
    left = len(searches) - len(shown)
    parts: list[Piece] = []
    if left:
        words = f"{left} of the {len(searches)} searches have no part of their own here: "
        parts.append(paragraphs(join([words, tag("code", "--details all"), " draws them too."])))
    for i, row in enumerate(shown):
        parts.append(single.about(row, pictures, i + 1, strip=i < _STRIPS, opened=i < _OPEN))
    return join(parts)


def _foot(given: Sequence[Path], out: Path, rows: Sequence[Row], details: int | None) -> Html:
    names = ("torch", "numpy", "matplotlib")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    count = "all" if details is None else str(details)
    words = ["python", "-m", "rdarts_fast.report", *map(str, given), "--out", str(out)]
    words += [] if details == DETAILS else ["--details", count]
    commands = [f"# {row.name}\n{command}" for row in rows if (command := command_of(row))]
    without = sum(command_of(row) is None for row in rows)
    made = [
        f"rdarts_fast {__version__}, Python {platform.python_version()}, {versions}; "
        f"{time.strftime('%Y-%m-%d %H:%M')}.",
        *_made_with(rows),
        "Everything is in this file and the pictures' folder; nothing was fetched to write it, "
        "nothing is fetched to read it, and it has no scripts.",
    ]
    parts: list[Piece] = [paragraphs(*made), tag("pre", shlex.join(words))]
    more = [] if not without else [paragraphs(f"{without} runs have none: see their config.json.")]
    if commands:
        listed = tag("pre", "\n".join(commands))
        parts.append(folded("The runs again, command by command", listed, *more))
    return tag("footer", *parts)


def _made_with(rows: Sequence[Row]) -> list[str]:
    """Return what the runs ran on, in a line each."""
    found: dict[str, int] = {}
    for row in rows:
        where = row.found.run.environment
        words = [f"{n} {where[n]}" for n in ("rdarts_fast", "torch", "device") if n in where]
        found[", ".join(words) or "an unknown version"] = (
            found.get(", ".join(words) or "an unknown version", 0) + 1
        )
    return [f"{count} of the runs ran on {words}." for words, count in found.items()]
