"""Pictures of a disparity network's work: what it saw, what is true, what it found, how far off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rdarts_fast.plots.look import check_suffix, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_UNKNOWN = "#9A9FA6"
_DISPARITY, _ERROR = "viridis", "inferno"  # neither has a grey
_SHOWN = 99.0  # percentile of the errors that ends their scale: a few would take it all
_WIDE = 1.35  # width over height above which the panels stand in two rows
_HIGH, _BAR, _GAP, _BESIDE, _TITLE = 6.0, 0.10, 0.08, 0.55, 0.28  # inches


def save_maps(path: Path, left: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Write the input, its disparities, the predicted ones and the absolute error beside each other
    as .svg or .png.

    left: [H, W, 3] uint8. truth, prediction: [H, W] in pixels, not finite where unknown, which is
    grey. Disparities have one scale of colours, over what is true; where predictions or errors go
    beyond a scale its bar ends with an arrow. Raises ValueError where shapes differ or nothing is
    known, UserError as `save_cells` does.
    """
    check_suffix(path)
    _check(left, truth, prediction)
    truth, prediction = (np.ma.masked_invalid(a.astype(float)) for a in (truth, prediction))
    figure, axes, bars = _panels(left.shape[1] / left.shape[0])
    names = ("input", "disparity", "prediction", "absolute error")
    for ax, name in zip(axes, names, strict=True):
        ax.set_title(name, fontsize=10, pad=4)
        ax.set(xticks=[], yticks=[])
    axes[0].imshow(left, aspect="auto")
    known = truth if truth.count() else prediction
    low, high = float(known.min()), float(known.max())
    for ax, values in zip(axes[1:3], (truth, prediction), strict=True):
        shown = _show(ax, values, low, high, _DISPARITY)
    _label(figure, shown, bars[0], _beyond(prediction, low, high))
    error = np.ma.abs(prediction - truth)
    most = float(np.percentile(error.compressed(), _SHOWN)) if error.count() else 0.0
    shown = _show(axes[3], error, 0.0, most, _ERROR)
    _label(figure, shown, bars[1], _beyond(error, 0.0, most))
    save(figure, path)


def _check(left: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
    fits = left.ndim == 3 and left.shape[2] == 3 and left.size > 0 and left.dtype == np.uint8
    if not fits or not left.shape[:2] == truth.shape == prediction.shape:
        shapes = f"{left.dtype} {left.shape}, {truth.shape} and {prediction.shape}"
        raise ValueError(f"expected uint8 [H, W, 3], [H, W] and [H, W], got {shapes}")
    if not (np.isfinite(truth).any() or np.isfinite(prediction).any()):
        raise ValueError("expected a known disparity, got none")


def _show(ax: Axes, values: np.ma.MaskedArray, low: float, high: float, colors: str) -> AxesImage:
    from matplotlib import colormaps

    scale = colormaps[colors].with_extremes(bad=_UNKNOWN)
    high = max(high, low + 1e-6)
    # Nearest: no values between a known and an unknown pixel, or across an edge of the scene.
    return ax.imshow(
        values, aspect="auto", cmap=scale, vmin=low, vmax=high, interpolation="nearest"
    )


def _beyond(values: np.ma.MaskedArray, low: float, high: float) -> str:
    """Return which ends of a bar have an arrow."""
    below = bool(values.count()) and float(values.min()) < low
    above = bool(values.count()) and float(values.max()) > high
    return {(False, False): "neither", (True, False): "min", (False, True): "max"}.get(
        (below, above), "both"
    )


def _label(figure: Figure, shown: AxesImage, bar: Axes, beyond: str) -> None:
    colors = figure.colorbar(shown, cax=bar, extend=beyond, extendfrac=0.04)
    colors.ax.tick_params(labelsize=8)
    colors.set_label("px", fontsize=9)


def _panels(shape: float) -> tuple[Figure, list[Axes], list[Axes]]:
    """Return a figure of four panels `shape` times as wide as high, and the bars of the disparities
    and the errors: one row, or two where the panels are wide.
    """
    from matplotlib.figure import Figure

    columns, wide = (2, 4.2) if shape > _WIDE else (4, 2.5)
    high = min(wide / shape, _HIGH)
    wide = high * shape
    # A bar and its numbers stand behind the last panel of a row, or of two that share it.
    behind = {1, 3} if columns == 2 else {2, 3}
    rows = [[0, 1], [2, 3]] if columns == 2 else [[0, 1, 2, 3]]
    height = len(rows) * (high + _TITLE) + _GAP
    places, bars = [], []
    for number, row in enumerate(rows):
        x, y = _GAP, height - (number + 1) * (high + _TITLE)
        for panel in row:
            places.append((x, y, wide))
            x += wide + _GAP
            if panel in behind:
                bars.append((x, y, _BAR))
                x += _BAR + _BESIDE
    width = max(x + w for x, _, w in bars) + _BESIDE
    figure = Figure(figsize=(width, height), facecolor="white")
    panels, scales = (
        [figure.add_axes((x / width, y / height, w / width, high / height)) for x, y, w in found]
        for found in (places, bars)
    )
    return figure, panels, scales
