"""The runs beside the paper's numbers, where they were made the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rdarts_fast import published
from rdarts_fast.report.markup import Html, Piece, bullets, join, paragraphs, table, tag
from rdarts_fast.report.numbers import Average
from rdarts_fast.report.rows import Row

_MOST_REASONS = 8
_COST = "error"  # what is published here, of image classifiers alone
_HEAD = ("space", "data", "method", "drop path", "what", "here", "published", "from")
_Case = tuple[str, str, str, float]


def section(rows: Sequence[Row]) -> Html:
    """Return the numbers of comparable runs beside the paper's, and why others are not."""
    errors: dict[_Case, list[float]] = {}
    supernets: dict[_Case, list[Row]] = {}
    reasons: dict[str, int] = {}
    for row in rows:
        if not row.searched:
            continue
        why = _why_alone(row, supernets)
        for method, retraining in _attempts(row):
            case = _case(row, method)
            found = _matches(case, row, retraining.config)
            if found is None and retraining.test_cost is not None:
                errors.setdefault(case, []).append(retraining.test_cost)
                why = None
            else:
                why = found
        if why is not None:
            reasons[why] = reasons.get(why, 0) + 1
    lines = [*_error_lines(errors), *_supernet_lines(supernets)]
    parts: list[Piece] = []
    if lines:
        parts.append(tag("div", table(_HEAD, lines, text=(0, 1, 2, 4, 7)), class_="plain"))
        parts.append(paragraphs("Mean ± deviation, in brackets over how many searches."))
    if reasons:
        parts.append(paragraphs("Not beside the paper's numbers:"))
        parts.append(bullets(_reason_lines(reasons)))
    if not lines and not reasons:
        parts.append(paragraphs("There are no searches to compare."))
    return join(parts)


def _attempts(row: Row) -> Iterator[tuple[str, Row]]:
    """Yield the method and the retraining of what a search found, and of what DARTS-ES would have
    found.
    """
    for retraining in row.final():
        yield _method(row), retraining
    if row.config.get("early_stop") == "simulate" and row.stop_epoch is not None:
        for retraining in row.at(row.stop_epoch):
            yield "darts-es", retraining


def _why_alone(row: Row, supernets: dict[_Case, list[Row]]) -> str | None:
    """Put a search that may stand beside published supernets with its case; return why it has no
    test error to compare.
    """
    case = _case(row, _method(row))
    why = _matches(case, row, None)
    if why is None and row.found.state == "ended":
        supernets.setdefault(case, []).append(row)
        return None
    return why or "the search has not ended"


def _method(row: Row) -> str:
    if row.method.startswith("DARTS-ADA"):
        return "darts-ada"
    return row.method.lower()


def _case(row: Row, method: str) -> _Case:
    space, data = str(row.config.get("space")), str(row.config.get("data"))
    return space, data, method, row.drop_path_prob or 0.0


def _matches(case: _Case, row: Row, retraining: dict[str, Any] | None) -> str | None:
    space, data, method, drop_path = case
    if row.metric.cost != _COST:
        return f"no published numbers for {space} on {data}"
    return published.matches(space, data, row.config, retraining, method, drop_path)


def _error_lines(errors: dict[_Case, list[float]]) -> Iterator[list[str]]:
    for (space, data, method, drop_path), values in sorted(errors.items()):
        found = published.error(space, data, method) if drop_path == 0.0 else None
        other = published.supernets(space, drop_path)
        if found is not None:
            average, source = Average(found.mean, found.deviation, found.runs), found.source
        else:
            made = Average.of([row.test_error for row in other])
            assert made is not None  # or it would not match
            average, source = made, other[0].source
        here = Average.of(values)
        names = [space, data, method, f"{drop_path:g}", "test error, %"]
        yield [*names, _text(here, 2, 100.0), _text(average, 2, 100.0), source]


def _supernet_lines(supernets: dict[_Case, list[Row]]) -> Iterator[list[str]]:
    for (space, data, method, drop_path), rows in sorted(supernets.items()):
        other = published.supernets(space, drop_path)
        names = [space, data, method, f"{drop_path:g}"]
        accuracy = Average.of([row.supernet_score for row in rows])
        theirs = Average.of([row.valid_accuracy for row in other])
        what = "supernet's validation accuracy, %"
        if accuracy is not None:
            yield [
                *names,
                what,
                _text(accuracy, 2, 100.0),
                _text(theirs, 2, 100.0),
                other[0].source,
            ]
        last = Average.of([row.lambda_last for row in rows])
        theirs = Average.of([row.lambda_max for row in other])
        if last is not None:
            yield [*names, "lambda_max, last", _text(last, 3), _text(theirs, 3), other[0].source]


def _text(found: Average | None, digits: int, factor: float = 1.0) -> str:
    return "" if found is None else f"{found.text(digits, factor)} ({found.count})"


def _reason_lines(reasons: dict[str, int]) -> list[str]:
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    lines = [
        f"{count} {'search' if count == 1 else 'searches'}: {why}"
        for why, count in ordered[:_MOST_REASONS]
    ]
    left = sum(count for _, count in ordered[_MOST_REASONS:])
    return [*lines, *([f"{left} more searches, for other reasons"] if left else [])]
