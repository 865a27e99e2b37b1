"""The disparity maps that runs have left in maps.npz."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rdarts_fast import plots
from rdarts_fast.report.markup import Html
from rdarts_fast.report.numbers import fixed
from rdarts_fast.report.pictures import Pictures
from rdarts_fast.report.rows import Row
from rdarts_fast.report.search import Search, arrays_of

MAPS = "maps.npz"
_NAMES = ("left", "truth", "prediction")
_FAR = 3.0  # pixels from which on an error counts as bad
_MOST = 4  # retrainings of a search whose maps are drawn


def of_search(search: Search, pictures: Pictures) -> list[Html]:
    """Return the cards of a search's own maps and of its retrainings'; notes on those that are
    damaged or left out go to the search.
    """
    rows = [search.row, *search.row.retrainings]
    there = [row for row in rows if _path(row).exists()]
    cards = [_card(row, pictures, search.notes) for row in there[:_MOST]]
    if len(there) > _MOST:
        search.notes.append(f"{MAPS} of {len(there) - _MOST} more retrainings are not drawn")
    return [card for card in cards if card is not None]


def alone(rows: Sequence[Row], pictures: Pictures) -> list[Html]:
    """Return the cards of retrainings whose search is not among the runs."""
    there = [r for r in rows if not r.searched and r.source is None and _path(r).exists()]
    cards = [_card(row, pictures, row.notes) for row in there[:_MOST]]
    for row in there[_MOST:]:
        row.notes.append(f"its {MAPS} is not drawn: {_MOST} others are")
    return [card for card in cards if card is not None]


def _path(row: Row) -> Path:
    return row.found.run.folder / MAPS


def _card(row: Row, pictures: Pictures, notes: list[str]) -> Html | None:
    maps = maps_of(_path(row))
    if maps is None:
        where = MAPS if row.searched or row.source is None else f"{row.name}/{MAPS}"
        notes.append(f"{where}: damaged, or nothing in it is known")
        return None
    left, truth, prediction = maps
    return pictures.add(
        f"{row.name}-maps",
        lambda path: plots.save_maps(path, left, truth, prediction),
        _caption(row, truth, prediction),
        f"input, disparity, prediction and error of {row.name}",
        wide=True,
        least=640,
    )


def _caption(row: Row, truth: np.ndarray, prediction: np.ndarray) -> str:
    of = f"{row.found.kind} {row.name}"
    text = f"The {of}: input, true and predicted disparity on one scale, and how far they are apart"
    known = np.isfinite(truth) & np.isfinite(prediction)
    if not known.any():
        return f"{text}. No true disparity is known."
    error = np.abs(prediction[known].astype(float) - truth[known].astype(float))
    return (
        f"{text}: {fixed(float(error.mean()), 2)} px on average over the {100 * known.mean():.0f} "
        f"% of the pixels that are known (grey: unknown), more than {_FAR:.0f} px at "
        f"{100 * float((error > _FAR).mean()):.1f} % of these."
    )


def maps_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return left [H, W, 3] uint8, truth and prediction [H, W]; None where they are missing or
    damaged, or no disparity is known.
    """
    arrays = arrays_of(path, _NAMES)
    if arrays is None:
        return None
    left, truth, prediction = arrays
    kinds = (left.dtype == np.uint8, truth.dtype.kind == "f", prediction.dtype.kind == "f")
    shapes = left.ndim == 3 and left.shape[2] == 3
    if not all(kinds) or not shapes or not left.shape[:2] == truth.shape == prediction.shape:
        return None
    # What a float32 can hold, but no picture, is no disparity.
    far = [np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in (truth, prediction)]
    known = np.isfinite(truth).any() or np.isfinite(prediction).any()
    return (left, truth, prediction) if known and max(far) < _MOST_PIXELS else None


_MOST_PIXELS = 1e9
