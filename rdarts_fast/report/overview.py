"""The top of the page: what there is in words, and the table of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rdarts_fast.plots import sparkline
from rdarts_fast.report.many import correlations
from rdarts_fast.report.markup import Html, Piece, bullets, join, paragraphs, table, tag
from rdarts_fast.report.numbers import LEAST, NOTHING, Scale, decimal, plain, seconds
from rdarts_fast.report.reading import Unread, printable
from rdarts_fast.report.rows import Row, by_task

_NUMBERS = (
    *("lambda_max, last", "lambda_max, mean", "stop epoch", "rollbacks"),
    *("space", "data", "seed", "weight decay", "drop path", "epochs", "seconds"),
)
_FURTHER = "also"
# Columns to the left.
_TEXT = ("run", "kind", "state", "over the epochs", _FURTHER, "space", "data")
_MOST_NOTES = 20
_STATES = {"ended": "", "still going": "going", "not finished": "unfinished"}


def title(rows: Sequence[Row]) -> str:
    """Return the page's title."""
    return f"Searches on {_listed([row.data for row in rows])}: {_count(len(rows), 'run')}"


def head(rows: Sequence[Row], unread: Sequence[Unread]) -> Html:
    """Return the title, the summary in words and numbers, and what could not be read."""
    searches = [row for row in rows if row.searched]
    parts: list[Piece] = [tag("h1", title(rows)), tag("p", _summary(rows), class_="lead")]
    tiles = _tiles(rows, searches)
    if tiles:
        parts.append(tag("div", join(tiles), class_="tiles"))
    if unread:
        lines: list[Piece] = [join([tag("code", u.path), f": {u.reason}"]) for u in unread]
        count = _count(len(unread), "folder")
        parts.append(_note(f"{count} could not be read:", lines))
    notes = _notes(rows)
    if notes:
        parts.append(_note("What is missing or damaged in what was read:", notes))
    return tag("header", *parts)


def _note(words: str, lines: Sequence[Piece]) -> Html:
    left = len(lines) - _MOST_NOTES
    more = [f"and {left} more"] if left > 0 else []
    return tag("div", paragraphs(words), bullets([*lines[:_MOST_NOTES], *more]), class_="note")


def _notes(rows: Sequence[Row]) -> list[Piece]:
    """Return a line for each note, with the runs that have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            found.setdefault(note, []).append(row.name)
    return [join([tag("b", _listed(names)), f": {note}"]) for note, names in found.items()]


def _summary(rows: Sequence[Row]) -> str:
    counts = []
    for kind, several in (
        ("search", "searches"),
        ("random search", "random searches"),
        ("retraining", "retrainings"),
    ):
        count = sum(row.found.kind == kind for row in rows)
        counts += [f"{count} {kind if count == 1 else several}"] if count else []
    states = []
    for state in ("still going", "not finished"):
        count = sum(row.found.state == state for row in rows)
        states += [f"{count} {'is' if count == 1 else 'are'} {state}"] if count else []
    text = f"{_count(len(rows), 'run')} read: {', '.join(counts)}. "
    ended = "All have ended. " if len(rows) > 1 else "It has ended. "
    text += f"Of these {' and '.join(states)}. " if states else ended
    spaces = [row.space for row in rows if row.space]
    text += f"Spaces: {_listed(spaces)}. " if spaces else ""
    return text + _findings([row for row in rows if row.found.kind == "search"])


def _findings(searches: Sequence[Row]) -> str:
    measured = [row for row in searches if row.lambda_last is not None]
    lines = []
    if measured:
        stops = sum(row.stop_epoch is not None for row in measured)
        lines.append(
            f"lambda_max was measured in {_count(len(measured), 'search', 'searches')}; in "
            f"{stops or 'none'} of them it grew until the early-stopping rule fired."
        )
    for rows in by_task(measured).values():
        pairs: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.lambda_mean is not None and row.test_cost is not None:
                pairs.setdefault(f"{row.space}, {row.data}", []).append(
                    (row.lambda_mean, row.test_cost)
                )
        told = {name: points for name, points in pairs.items() if len(points) >= LEAST}
        if told:
            lines.append(f"Mean lambda_max against {rows[0].scale.test}: {correlations(told)}")
    return " ".join(lines)


def _tiles(rows: Sequence[Row], searches: Sequence[Row]) -> list[Html]:
    tiles = [_tile(str(len(searches)), "search" if len(searches) == 1 else "searches")]
    tiles += (
        [_tile(str(len(rows) - len(searches)), "retrainings")] if len(rows) > len(searches) else []
    )
    tested = [
        r for r in rows if not r.searched and r.test_cost is not None and r.found.state == "ended"
    ]
    for alike in by_task(tested).values():
        if len({row.data for row in alike}) == 1:
            best = min(alike, key=lambda row: row.test_cost or 0.0)
            words = f"lowest {best.scale.test}: {best.name}"
            tiles.append(_tile(best.scale.said(best.test_cost), words))
    curved = [row for row in searches if row.lambda_last is not None]
    if curved:
        stops = sum(row.stop_epoch is not None for row in curved)
        tiles.append(
            _tile(f"{stops} of {len(curved)}", "searches in which the early-stopping rule fired")
        )
    return tiles


def _tile(number: str, words: str) -> Html:
    return tag("div", tag("b", number), tag("span", words), class_="tile")


def table_of(rows: Sequence[Row], parts: Mapping[str, int]) -> Html:
    """Return the table of all runs without the columns that are empty, one for each task. parts:
    the number of the part of the page about a search, by name.
    """
    found = by_task(rows)
    pieces: list[Piece] = []
    for task, there in found.items():
        pieces += [tag("h3", task)] if len(found) > 1 else []
        pieces += [tag("div", _table(there, parts), class_="runs")]
        pieces += [tag("p", _words(there[0].scale), class_="soft")]
    return join(pieces)


def _table(rows: Sequence[Row], parts: Mapping[str, int]) -> Html:
    scale = rows[0].scale
    columns = (
        *("run", "kind", "state", "over the epochs"),
        scale.titled(scale.test),
        scale.titled(f"{scale.valid}, short training"),
        scale.titled(f"supernet's {scale.supernet}"),
        *(_FURTHER, *_NUMBERS),
    )
    lines = [_cells(row, parts) for row in rows]
    used = [
        i
        for i in range(len(columns))
        if any(line[i] not in (NOTHING, "") for line in lines) or i < 1
    ]
    return table(
        [columns[i] for i in used],
        [[line[i] for i in used] for line in lines],
        text=[place for place, i in enumerate(used) if columns[i] in _TEXT],
        looks=["sub" if row.source is not None else "" for row in rows],
    )


def _words(scale: Scale) -> str:
    cost = scale.metric.cost_name
    return (
        "A search is followed by the retrainings of what it found, whose weight decay and drop "
        "path are their own. lambda_max, mean: over the whole search, without what a rollback has "
        f"undone. Validation and test {cost} of a search are those of its retrained network, after "
        f"the last epoch, on average where there are several. Small curves: the {scale.supernet} "
        f"of a search, the {cost} of a retraining, from the lowest to the highest."
    )


def _cells(row: Row, parts: Mapping[str, int]) -> list[Piece]:
    name: Piece = row.name
    if row.searched and row.name in parts:
        name = tag("a", row.name, href=f"#run-{parts[row.name]}")
    kind: Piece = row.found.kind
    if row.at_epoch is not None:
        kind = f"retraining of epoch {row.at_epoch}"
    elif row.config.get("holdout") is True:
        kind = "short retraining"
    elif row.searched and row.method not in ("DARTS", "RandomNAS-ws"):
        kind = f"search, {row.method}"
    scale = row.scale
    asked = NOTHING if row.epochs_asked is None else str(row.epochs_asked)
    state = tag("span", row.found.state, class_=f"state {_STATES[row.found.state]}".strip())
    curve: Piece = Html(sparkline(row.curve)) if len(row.curve) > 1 else NOTHING
    return [
        *(name, kind, state, curve),
        *(scale.text(value) for value in (row.test_cost, row.valid_cost, row.supernet_score)),
        ", ".join(f"{printable(name)} {value:.3g}" for name, value in row.further.items()),
        *(decimal(row.lambda_last), decimal(row.lambda_mean)),
        *(plain(row.stop_epoch), plain(row.rollbacks)),
        *(row.space or NOTHING, row.data or NOTHING),
        *(plain(row.seed), plain(row.weight_decay), plain(row.drop_path_prob)),
        *(f"{row.epochs_done} / {asked}", seconds(row.seconds)),
    ]


def _count(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _listed(words: Sequence[str]) -> str:
    different = list(dict.fromkeys(word for word in words if word))
    shown = different[:4]
    return ", ".join(shown) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
