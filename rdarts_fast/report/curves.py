"""The pictures of numbers in the part of the page about one search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rdarts_fast import plots
from rdarts_fast.analysis import ANALYSIS, Branch
from rdarts_fast.report.markup import Html, Piece, join, tag
from rdarts_fast.report.numbers import capital, decimal, plural
from rdarts_fast.report.pictures import Pictures
from rdarts_fast.report.reading import is_number, number
from rdarts_fast.report.search import Search, abandoned, branches_of, drop_of, planes_of


def course(search: Search, pictures: Pictures) -> list[Html]:
    scale, metric = search.row.scale, search.row.metric
    names = [f"{half}_{what}" for half in ("train", "valid") for what in ("loss", metric.name)]
    wanted = [*names, "epoch"]

    def clean(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {name: value for name in wanted if (value := number(record, name)) is not None}
            for record in records
        ]

    history, left = clean(search.history), [clean(part) for part in abandoned(search)]
    if not any(name in record for record in history for name in names):
        search.notes.append(f"its metrics have no losses or {plural(metric.score_name)}")
        return []
    both = f"losses and {plural(metric.score_name)}"
    caption = f"{capital(both)} of the supernet on both halves of the training {metric.data}."
    scores = [r[f"valid_{metric.name}"] for r in history if f"valid_{metric.name}" in r]
    if scores:
        most = "highest" if metric.more_is_better else "lowest"
        best = max(scores) if metric.more_is_better else min(scores)
        caption += f" The {scale.supernet} ends at {scale.said(scores[-1])}"
        caption += (
            f", its {most}." if best == scores[-1] else f", its {most} was {scale.said(best)}."
        )
    caption += " Fainter: epochs that a rollback has undone." if left else ""
    score = plots.Score(metric.name, metric.score_name, scale.axis, log=metric.exponential)
    return [
        pictures.add(
            f"{search.name}-course",
            lambda path: plots.save_course(path, history, left, score),
            caption,
            f"{both} of {search.name}",
            wide=True,
            least=640,
        )
    ]


def trajectory(search: Search, pictures: Pictures) -> list[Html]:
    run = search.row.found.run
    measured = [r for r in run.metrics if number(r, "lambda_max") is not None]
    if not measured:
        return []
    branches = branches_of(search, measured)
    caption = (
        f"lambda_max, the largest eigenvalue of the alphas' Hessian. {_told(search, branches)}"
    )
    if len(branches) > 1:
        caption += " Fainter: before a rollback."
    return [
        pictures.add(
            f"{search.name}-lambda",
            lambda path: plots.save_trajectory(path, [asdict(b) for b in branches], "lambda_max"),
            caption,
            f"lambda_max of {search.name} over the epochs",
            least=320,
        )
    ]


def _told(search: Search, branches: Sequence[Branch]) -> str:
    """Return in words whether lambda_max grew, and what the rule makes of it."""
    found = [(r["epoch"], v) for r in search.history if (v := number(r, "lambda_max")) is not None]
    if not found:
        return "No measurement counts: a rollback has undone them."
    ends = f"It goes from {decimal(found[0][1])} at epoch {found[0][0]} to "
    ends += f"{decimal(found[-1][1])} at epoch {found[-1][0]}"
    stops = [branch.stop_epoch for branch in branches if branch.stop_epoch is not None]
    if not branches[-1].averages:
        return f"{ends}."
    if not stops:
        return f"{ends}; its local average never grows by more than the rule allows: no stop."
    config = search.row.config
    verb = "stops at" if config.get("early_stop") == "stop" else "would stop at"
    verb = "goes back to" if config.get("adaptive", "off") != "off" else verb
    at = " and ".join(str(stop) for stop in dict.fromkeys(stops))
    return (
        f"{ends}. Its local average grows after epoch {at}, which foretells a degenerate cell: the "
        f"rule {verb} {at}."
    )


def spectrum(search: Search, pictures: Pictures) -> list[Html]:
    whole = []
    for record in search.history:
        values = record.get("eigenvalues")
        if isinstance(values, list) and values and all(map(is_number, values)):
            whole.append(record)
    if not whole:
        return []
    spectra = {r["epoch"]: sorted(r["eigenvalues"], key=abs, reverse=True) for r in whole}
    negative = sum(value < 0 for value in spectra[max(spectra)])
    caption = (
        "The eigenvalues of largest size at the first, the middle and the last measurement; "
        f"{negative or 'none'} of the last {len(spectra[max(spectra)])} "
        f"{'is' if negative == 1 else 'are'} negative."
    )
    return [
        pictures.add(
            f"{search.name}-spectrum",
            lambda path: plots.save_spectrum(path, spectra),
            caption,
            f"eigenvalues of {search.name}",
            least=320,
        )
    ]


# What `python -m rdarts_fast.analysis` left


def analysis(search: Search, pictures: Pictures) -> tuple[list[Piece], list[Html]]:
    """Return the words on the discretisation drop, and the landscape's card."""
    if search.row.found.kind != "search":
        return [], []
    folder = search.row.found.run.folder / ANALYSIS
    command = tag("code", f"python -m rdarts_fast.analysis {search.row.found.run.folder}")
    drop = drop_of(search.row)
    if drop is None and not (folder / "landscape.npz").exists():
        words: Piece = join(["Discretisation drop and loss landscape are not there: ", command])
        return [words], []
    lines: list[Piece] = []
    if drop is not None:
        scale, metric = search.row.scale, search.row.metric
        lines.append(
            f"Discretising the supernet of epoch {drop['epoch']:.0f} with inherited weights takes "
            f"its {scale.supernet} from {scale.said(drop['supernet'])} to "
            f"{scale.said(drop['discretised'])}, a {'drop' if metric.more_is_better else 'rise'} "
            f"of {scale.difference(drop['drop'])} (to {scale.said(drop.get('batch_statistics'))} "
            "where batch norms take each batch's statistics)."
        )
    return lines, _landscape(search, folder, pictures)


def _landscape(search: Search, folder: Path, pictures: Pictures) -> list[Html]:
    planes = planes_of(folder / "landscape.npz")
    if planes is None:
        search.notes.append(f"{ANALYSIS}/landscape.npz: missing or damaged")
        return []
    steps, leading, random = planes
    least, middle = (
        float(min(leading.min(), random.min())),
        float(leading[len(steps) // 2][len(steps) // 2]),
    )
    caption = (
        "The validation loss on one batch around the last alphas (+): along the Hessian's two "
        f"leading eigenvectors and along two random directions. It is {decimal(middle)} at the "
        f"alphas and {decimal(least)} where it is lowest; the closer the lines, the sharper."
    )
    return [
        pictures.add(
            f"{search.name}-landscape",
            lambda path: plots.save_landscape(
                path, steps.tolist(), leading.tolist(), random.tolist()
            ),
            caption,
            f"loss landscape of {search.name}",
            wide=True,
            least=640,
            most=820,
        )
    ]
