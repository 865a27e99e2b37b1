"""The paper's figures over many runs, each where the runs have what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rdarts_fast import plots
from rdarts_fast.plots import Panel
from rdarts_fast.report.markup import Html
from rdarts_fast.report.numbers import LEAST, Scale, capital, pearson, plain, spearman
from rdarts_fast.report.pictures import Pictures
from rdarts_fast.report.reading import number
from rdarts_fast.report.rows import Row, early_cost
from rdarts_fast.report.search import drop_of

Value = Callable[[Row], float | None]
_NO_PROTOCOL = (
    *("source", "out", "seed", "genotypes_at", "device", "threads", "data_root"),
    *("checkpoint_minutes", "tensorboard", "resume"),
)
_LAMBDA = "lambda_max"
_Series = dict[str, list[list[tuple[float, float]]]]


def figures(rows: Sequence[Row], pictures: Pictures) -> list[Html]:
    """Return the cards of all figures that these runs, which have one metric, have the data for."""
    searches = [row for row in rows if row.found.kind == "search"]
    return [
        *_by_level(searches, pictures, "weight_decay", "weight decay"),
        *_by_level(searches, pictures, "drop_path_prob", "drop-path probability"),
        *_by_epoch(searches, pictures),
        *_curvature_and_error(searches, pictures),
        *_curvature_and_drop(searches, pictures),
        *_regret(searches, pictures),
    ]


def series_name(row: Row, rows: Sequence[Row], without: str = "") -> str:
    """Return a search's group: space and data, and what else the searches differ in but `without`
    and the seed.
    """
    parts = [row.space, row.data]
    if len({r.method for r in rows}) > 1:
        parts.append(row.method)
    for name, words in (("weight_decay", "weight decay"), ("drop_path_prob", "drop path")):
        if name != without and len({getattr(r, name) for r in rows}) > 1:
            parts.append(f"{words} {plain(getattr(row, name))}")
    return ", ".join(parts)


# Against the regularisation (paper, figures 3, 5 and 10)


def _by_level(
    searches: Sequence[Row], pictures: Pictures, setting: str, words: str
) -> Iterator[Html]:
    levels: dict[str, set[float]] = {}
    for row in searches:
        if getattr(row, setting) is not None:
            levels.setdefault(series_name(row, searches, setting), set()).add(getattr(row, setting))
    names = {name for name, found in levels.items() if len(found) > 1}
    rows = [row for row in searches if series_name(row, searches, setting) in names]
    if not rows:
        return

    scale = rows[0].scale

    def series(value: Value, more: str = "") -> _Series:
        found: _Series = {}
        for row in rows:
            y, x = value(row), getattr(row, setting)
            if y is not None and x is not None:
                name = series_name(row, searches, setting) + more
                found.setdefault(name, []).append([(x, y)])
        return found

    tested = series(lambda row: scale.of(row.test_cost))
    if any(row.stop_epoch is not None for row in rows):
        tested |= series(lambda row: scale.of(early_cost(row)), ", stopped early")
    # Of R-DARTS's searches only the chosen ones have a test cost.
    short = {} if _varies(tested) else series(lambda row: scale.of(row.valid_cost))
    test, valid = scale.titled(scale.test), scale.titled(scale.valid)
    shown = (
        (test, "retrained networks", tested),
        (valid, "networks retrained for a short time", short),
        (_LAMBDA, "curvature", series(lambda row: row.lambda_last)),
        (valid, "supernets", series(lambda row: _cost(scale, row.supernet_score))),
    )
    panels = [Panel(title, words, y, s, scale="levels") for y, title, s in shown if _varies(s)]
    if not panels:
        return
    caption = (
        f"What more {words} in the search does, over {len(rows)} searches: points are seeds, lines "
        "their means. In the paper stronger regularisation lowers lambda_max and the test error "
        f"while the supernet gets worse (figures 3, 5, 10).{_differing(rows)}"
    )
    yield _card(pictures, f"by-{setting}", panels, caption, f"results against {words}")


def _varies(series: _Series) -> bool:
    """Whether there are points at more than one x."""
    return len({x for runs in series.values() for run in runs for x, _ in run}) > 1


# Against the search epoch (paper, figure 3)


def _by_epoch(searches: Sequence[Row], pictures: Pictures) -> Iterator[Html]:
    rows = [row for row in searches if len(_retrained_epochs(row)) > 1]
    if not rows:
        return
    scale = rows[0].scale
    scored = f"valid_{scale.metric.name}"
    tested: _Series = {}
    supernets: _Series = {}
    curved: _Series = {}
    for row in rows:
        name = series_name(row, rows)
        tested.setdefault(name, []).append(
            [(e, scale.factor * _tested(row, e)) for e in _retrained_epochs(row)]
        )
        _add(supernets, name, row, lambda r: _cost(scale, number(r, scored)))
        _add(curved, name, row, lambda r: number(r, "lambda_max"))
    shown = (
        (scale.titled(scale.test), "retrained genotypes", tested),
        (scale.titled(scale.valid), "supernet", supernets),
        (_LAMBDA, "curvature", curved),
    )
    panels = [Panel(title, "epoch of the search", y, s) for y, title, s in shown if s]
    best = [min(_retrained_epochs(row), key=lambda e: _tested(row, e)) for row in rows]
    caption = (
        f"Genotypes of several epochs, each retrained from scratch. Where the {scale.test} rises "
        f"while the supernet's {scale.valid} falls, the search has gone wrong (paper, figure 3). "
        f"{'The best genotype is' if len(best) == 1 else 'The best genotypes are'} of epoch "
        f"{', '.join(str(e) for e in sorted(set(best)))}.{_differing(rows, at_epochs=True)}"
    )
    yield _card(
        pictures, "by-epoch", panels, caption, f"{scale.test} against the epoch of the search"
    )


def _retrained_epochs(row: Row) -> list[int]:
    epochs = {r.at_epoch for r in row.retrainings if r.at_epoch is not None}
    return [epoch for epoch in sorted(epochs) if row.at(epoch)]


def _add(series: _Series, name: str, row: Row, value: Callable[[Any], float | None]) -> None:
    points = [(r["epoch"], y) for r in row.found.run.history if (y := value(r)) is not None]
    if points:
        series.setdefault(name, []).append(points)


def _cost(scale: Scale, score: float | None) -> float | None:
    return None if score is None else scale.factor * scale.metric.cost_of(score)


def _tested(row: Row, epoch: int) -> float:
    return _mean(r.test_cost for r in row.at(epoch))


def _mean(values: Any) -> float:
    there = list(values)
    return float(sum(there) / len(there))


# Correlations (paper, figures 4 and 7)


def _curvature_and_error(searches: Sequence[Row], pictures: Pictures) -> Iterator[Html]:
    pairs = _pairs(searches, lambda r: r.lambda_mean, lambda r: r.scale.of(r.test_cost))
    if sum(map(len, pairs.values())) < 2:
        return
    used = [r for r in searches if r.lambda_mean is not None and r.test_cost is not None]
    scale = used[0].scale
    label = scale.titled(scale.test)
    panel = Panel("", "lambda_max, mean over the search", label, _runs_of(pairs), join="none")
    caption = (
        "Each point is a search. In the paper the networks of searches with large lambda_max are "
        f"the worse ones (figure 4). {correlations(pairs)}{_differing(used)}"
    )
    yield _card(pictures, "lambda-and-error", [panel], caption, f"{scale.test} against lambda_max")


def _curvature_and_drop(searches: Sequence[Row], pictures: Pictures) -> Iterator[Html]:
    drops = {row.name: (drop_of(row) or {}).get("drop") for row in searches}
    pairs = _pairs(searches, lambda r: r.lambda_last, lambda r: r.scale.of(drops[r.name]))
    if sum(map(len, pairs.values())) < 2:
        return
    scale = searches[0].scale
    label = _difference(scale, "drop on discretising")
    verb = "loses" if scale.metric.more_is_better else "gains"
    panel = Panel("", "lambda_max, last", label, _runs_of(pairs), join="none")
    caption = (
        f"What {scale.supernet} {verb} when the supernet is discretised with inherited weights: "
        f"the paper finds more where lambda_max is large (figure 7). {correlations(pairs)}"
    )
    yield _card(pictures, "lambda-and-drop", [panel], caption, "discretisation drop")


_Pairs = dict[str, list[tuple[float, float]]]


def _pairs(rows: Sequence[Row], x: Value, y: Value) -> _Pairs:
    """Return the points by space and data, which are not mixed."""
    found: _Pairs = {}
    for row in rows:
        one, other = x(row), y(row)
        if one is not None and other is not None:
            found.setdefault(f"{row.space}, {row.data}", []).append((one, other))
    return found


def _runs_of(pairs: _Pairs) -> dict[str, list[list[tuple[float, float]]]]:
    return {name: [points] for name, points in pairs.items()}


def correlations(pairs: _Pairs) -> str:
    """Return in words how strongly x and y go together, for each name."""
    lines = []
    for name, points in pairs.items():
        x, y = [p[0] for p in points], [p[1] for p in points]
        linear, ranked = pearson(x, y), spearman(x, y)
        if len(points) < LEAST:
            count = "1 search" if len(points) == 1 else f"{len(points)} searches"
            lines.append(f"{name}: not enough for a correlation ({count}).")
        elif linear is None or ranked is None:
            lines.append(f"{name}: no correlation, one of both does not vary.")
        else:
            lines.append(
                f"{name}: Pearson {linear:.2f}, Spearman {ranked:.2f} over {len(points)} searches."
            )
    return " ".join(lines)


# Regret (paper, figure 2)


def _regret(searches: Sequence[Row], pictures: Pictures) -> Iterator[Html]:
    regret: _Series = {}
    rows = [
        r for r in searches if any(number(x, "regret") is not None for x in r.found.run.history)
    ]
    if not rows:
        return
    scale = rows[0].scale
    for row in rows:
        _add(regret, series_name(row, rows), row, lambda r: scale.of(number(r, "regret")))
    ends = [run[-1][1] for runs in regret.values() for run in runs]
    unit = f" {scale.difference_unit}".rstrip()
    caption = (
        f"{capital(scale.test)} of each epoch's genotype above that of the best architecture of "
        f"the space (paper, figure 2). It ends at {_mean(ends):.2f}{unit} on average over "
        f"{len(ends)} {'search' if len(ends) == 1 else 'searches'}."
    )
    panel = Panel("", "epoch of the search", _difference(scale, "regret"), regret)
    yield _card(pictures, "regret", [panel], caption, "regret over the epochs")


def _difference(scale: Scale, words: str) -> str:
    return ", ".join(part for part in (words, scale.difference_unit) if part)


def _card(pictures: Pictures, name: str, panels: Sequence[Panel], caption: str, title: str) -> Html:
    wide = len(panels) > 1
    least = 300 * len(panels) if wide else 320
    return pictures.add(
        name, lambda path: plots.save_panels(path, panels), caption, title, wide=wide, least=least
    )


def _differing(rows: Sequence[Row], *, at_epochs: bool = False) -> str:
    """Return a warning where the networks were not all retrained by the same settings."""
    used = [
        r.config
        for row in rows
        for r in (
            [r for r in row.retrainings if r.at_epoch is not None] if at_epochs else row.final()
        )
    ]
    names = {name for config in used for name in config} - set(_NO_PROTOCOL)
    different = sorted(n for n in names if len({repr(config.get(n)) for config in used}) > 1)
    if not different:
        return ""
    return f" Compare with care: their retrainings differ in {', '.join(different[:5])}."
