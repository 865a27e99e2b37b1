"""Pictures of numbers: curves, lambda_max over a search, its spectrum, the loss in a plane."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdarts_fast.plots.look import FAINT, INK, PALETTE, check_suffix, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = "#E3E5E8"
_FACTOR = 4.0  # from the least to the greatest value, from which on an axis is logarithmic
_SHOWN = 30  # eigenvalues in a picture of a spectrum, as in the paper
_BLUE, _ORANGE = PALETTE[0], PALETTE[1]


def save_curves(
    path: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Write curves as .svg or .png. series: name -> (x, y); what is not finite leaves a gap.

    Raises ValueError where x and y differ in length, UserError as `save_cells` does.
    """
    check_suffix(path)
    figure, ax = _one_panel()
    draw_curves(ax, series, xlabel, ylabel, title)
    save(figure, path)


def draw_curves(
    ax: Axes,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Draw curves on `ax`; see save_curves."""
    looks = itertools.cycle(itertools.product(("-", "--", ":", "-."), PALETTE[:-1]))
    for (name, (x, y)), (line, color) in zip(series.items(), looks, strict=False):
        if len(x) != len(y):
            raise ValueError(f"series {name!r}: {len(x)} x values and {len(y)} y values")
        marker = "o" if len(x) < 25 else ""
        ax.plot(x, y, line, color=color, marker=marker, markersize=3.5, label=str(len(ax.lines)))
    label_axes(ax, xlabel, ylabel, title)
    if len(series) > 1:  # named afterwards: a legend leaves out names like "_x" and typesets "$x$"
        for entry, name in zip(ax.legend(frameon=False).get_texts(), series, strict=True):
            entry.set(text=name, parse_math=False)


def save_trajectory(path: Path, branches: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Write lambda_max over a search's epochs as .svg or .png; see draw_trajectory."""
    check_suffix(path)
    figure, ax = _one_panel(constrained=False)
    draw_trajectory(ax, branches, title or "largest eigenvalue of the alphas' Hessian")
    save(figure, path)


def draw_trajectory(ax: Axes, branches: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw lambda_max and its local average over the epochs (paper, figures 3 and 12).

    branches: each with epochs, values, average_epochs, averages and stop_epoch (None where there is
    none). A branch that a rollback ended is fainter; a stop is an upright line.
    """
    stops = []
    for number, branch in enumerate(branches):
        last = number == len(branches) - 1
        names = ("measured", "local average") if last else ("_", "_")  # "_": not in the legend
        look: dict[str, Any] = {"alpha": 1.0 if last else 0.35}
        dots = {"color": FAINT, "markersize": 3.5, "label": names[0], **look}
        ax.plot(branch["epochs"], branch["values"], "o", **dots)
        line = {"color": _BLUE, "linewidth": 2, "label": names[1], **look}
        ax.plot(branch["average_epochs"], branch["averages"], "-", **line)
        if branch["stop_epoch"] is not None:
            stops.append(branch["stop_epoch"])
    for epoch in sorted(set(stops)):
        ax.axvline(epoch, color=_ORANGE, ls=(0, (4, 2)), lw=1.5)
        ax.annotate(
            f"stop {epoch}",
            (epoch, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            color=INK,
            fontsize=9,
        )
    label_axes(ax, "epoch", "lambda_max", title)
    whole_numbers(ax)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.margins(y=0.12)
    ax.legend(frameon=False)


@dataclass(frozen=True)
class Score:
    """What a course shows beside the loss.

    name: in the records, after `train_` and `valid_`. title, unit: on the page. log: whether it
    grows by factors: then its axis does, where it goes over more than a few.
    """

    name: str = "accuracy"
    title: str = "accuracy"
    unit: str = ""
    log: bool = False


def save_course(
    path: Path,
    history: Sequence[Mapping[str, Any]],
    abandoned: Sequence[Sequence[Mapping[str, Any]]] = (),
    score: Score = Score(),
) -> None:
    """Write losses and scores over a search's epochs as .svg or .png, two panels.

    history, and each of `abandoned`, which is fainter: records as in metrics.jsonl, one an epoch; a
    value that is missing leaves a gap. Raises UserError as `save_cells` does.
    """
    from matplotlib.figure import Figure

    check_suffix(path)
    figure = Figure(figsize=(11.6, 3.4), facecolor="white")
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.14, top=0.91, wspace=0.1)
    shown = (Score("loss", "loss"), score)
    for ax, what in zip(figure.subplots(1, 2), shown, strict=True):
        found = []
        for half, color in (("train", FAINT), ("valid", _BLUE)):
            for records in (*abandoned, history):
                kept = records is history
                at = [record["epoch"] for record in records]
                values = [record.get(f"{half}_{what.name}", math.nan) for record in records]
                found += values
                look = {"color": color, "lw": 2 if kept else 1.2, "alpha": 1.0 if kept else 0.4}
                name = {"train": "training", "valid": "validation"}[half] if kept else "_"
                marker = "o" if len(records) < 2 else ""
                ax.plot(at, values, marker=marker, ms=3.5, label=name, **look)
        label_axes(ax, "epoch", "", f"{what.title}, {what.unit}" if what.unit else what.title)
        whole_numbers(ax)
        if what.log and _is_wide(found):
            _by_factors(ax)
            figure.subplots_adjust(wspace=0.15)  # its numbers may have six digits
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def _is_wide(values: Sequence[float]) -> bool:
    """Whether positive values go over more than a factor of _FACTOR."""
    there = [value for value in values if math.isfinite(value)]
    return bool(there) and min(there) > 0.0 and max(there) > _FACTOR * min(there)


def _by_factors(ax: Axes) -> None:
    """Make the y axis logarithmic, numbered in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def save_spectrum(path: Path, spectra: Mapping[int, Sequence[float]]) -> None:
    """Write the spectra of several epochs as .svg or .png; see draw_spectrum."""
    check_suffix(path)
    figure, ax = _one_panel(constrained=False)
    draw_spectrum(ax, spectra, "eigenvalues of the alphas' Hessian")
    save(figure, path)


def draw_spectrum(ax: Axes, spectra: Mapping[int, Sequence[float]], title: str) -> None:
    """Draw the eigenvalues of largest absolute value of the first, the middle and the last epoch
    (paper, figure 14).

    spectra: epoch -> eigenvalues, largest absolute value first.
    """
    epochs = sorted(spectra)
    chosen = sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]})
    looks = (("o", PALETTE[5]), ("s", PALETTE[4]), ("^", PALETTE[0]))
    for epoch, (marker, color) in zip(chosen, looks[-len(chosen) :], strict=True):
        values = spectra[epoch][:_SHOWN]
        at = range(1, len(values) + 1)
        ax.plot(at, values, marker, color=color, ms=4.5, label=f"epoch {epoch}")
    ax.axhline(0.0, color=FAINT, lw=0.8)
    label_axes(ax, "eigenvalue, by absolute value", "value", title)
    ax.legend(frameon=False)


def save_landscape(
    path: Path,
    steps: Sequence[float],
    leading: Sequence[Sequence[float]],
    random: Sequence[Sequence[float]],
) -> None:
    """Write the loss in two planes through the alphas as .svg or .png; see draw_landscape."""
    from matplotlib.figure import Figure

    check_suffix(path)
    figure = Figure(figsize=(8.2, 3.5), layout="constrained", facecolor="white")
    draw_landscape(figure, steps, leading, random)
    save(figure, path)


def draw_landscape(
    figure: Figure,
    steps: Sequence[float],
    leading: Sequence[Sequence[float]],
    random: Sequence[Sequence[float]],
) -> None:
    """Draw two planes of losses [n, n] side by side, in one scale of colours.

    steps: [n], how far along each direction; rows are steps along the first.
    """
    planes = [np.asarray(plane, dtype=float) for plane in (leading, random)]
    low, high = min(plane.min() for plane in planes), max(plane.max() for plane in planes)
    levels = np.linspace(low, max(high, low + 1e-9), 25)
    names = (("leading eigenvectors", "eigenvector"), ("random directions", "direction"))
    axes = figure.subplots(1, 2, sharey=False)
    for ax, plane, (title, name) in zip(axes, planes, names, strict=True):
        filled = ax.contourf(steps, steps, plane, levels=levels, cmap="cividis", extend="neither")
        ax.contour(steps, steps, plane, levels=levels, colors="white", linewidths=0.4)
        ax.plot([0.0], [0.0], "+", color="white", ms=10, mew=2)
        ax.set(xlabel=f"second {name}", ylabel=f"first {name}", aspect="equal", title=title)
    figure.colorbar(
        filled, ax=axes, label="validation loss on one batch", format="%.3g", shrink=0.85
    )


def _one_panel(*, constrained: bool = True) -> tuple[Figure, Axes]:
    """Return a figure of one panel. constrained: as large as its labels allow, which takes as long
    as drawing it; else with margins that numbers of some digits fit into.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), facecolor="white")
    if constrained:
        figure.set_layout_engine("constrained")
    else:
        figure.subplots_adjust(left=0.13, right=0.985, bottom=0.125, top=0.92)
    return figure, figure.add_subplot()


def whole_numbers(ax: Axes) -> None:
    """Number the x axis with whole numbers alone, as epochs are."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def label_axes(ax: Axes, xlabel: str, ylabel: str, title: str) -> None:
    """Name the axes, as they are, and give them the look of all pictures here."""
    for text, put in ((xlabel, ax.set_xlabel), (ylabel, ax.set_ylabel), (title, ax.set_title)):
        put(text, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
