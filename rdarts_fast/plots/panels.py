"""Pictures of several runs: panels of points, with means over the runs that share an x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rdarts_fast.plots.curves import label_axes, whole_numbers
from rdarts_fast.plots.look import PALETTE, check_suffix, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]
_MARKERS = "osD^vP*"
_MOST_TICKS = 8


@dataclass(frozen=True)
class Panel:
    """Points under names.

    series: name -> of each run, its points. join: mean: a line through the mean at each x; none:
    points alone. scale: linear, or the levels of a setting, equally far apart.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[Points]]
    join: Literal["mean", "none"] = "mean"
    scale: Literal["linear", "levels"] = "linear"


def save_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Write panels side by side as .svg or .png, one legend for all; see draw_panel.

    Raises ValueError where there are none, UserError as `save_cells` does.
    """
    from matplotlib.figure import Figure

    check_suffix(path)
    if not panels:
        raise ValueError("expected at least one panel")
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    legend = len(names) > 1
    width = 5.8 if len(panels) == 1 else 11.6
    height = 3.4 + (0.22 * -(-len(names) // 2) if legend else 0.0)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    looks = {name: _look(i) for i, name in enumerate(names)}
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel, looks)
    if legend:
        from matplotlib.lines import Line2D

        joined = any(panel.join == "mean" for panel in panels)
        marks = [
            Line2D([], [], **(look if joined else look | {"ls": ""})) for look in looks.values()
        ]
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
        entries = figure.legend(marks, [str(i) for i in range(len(names))], **place).get_texts()
        for entry, name in zip(entries, names, strict=True):  # as in draw_curves
            entry.set(text=name, parse_math=False)
    save(figure, path)


def draw_panel(ax: Axes, panel: Panel, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw every run's points, and where they are to be joined, a line through the mean at each x.

    scale "levels": x are the levels of a setting, in order and equally far apart, as in a geometric
    sweep. looks: of each name, as matplotlib's Line2D takes it.
    """
    levels = sorted({x for runs in panel.series.values() for run in runs for x, _ in run})
    at = {x: float(i) if panel.scale == "levels" else x for i, x in enumerate(levels)}
    for name, runs in panel.series.items():
        look = dict(looks[name])
        means = _means(runs)
        several = any(len(ys) > 1 for ys in means.values())
        for run in runs:
            faint = {**look, "ls": "", "alpha": 0.45 if several and panel.join == "mean" else 0.9}
            ax.plot([at[x] for x, _ in run], [y for _, y in run], **faint)
        if panel.join == "mean" and len(means) > 1:
            line = {**look, "marker": "" if several else look["marker"], "lw": 2}
            ax.plot([at[x] for x in means], [float(np.mean(ys)) for ys in means.values()], **line)
    label_axes(ax, panel.xlabel, panel.ylabel, panel.title)
    if panel.scale == "levels":
        shown = levels[:: -(-len(levels) // _MOST_TICKS)] if levels else []
        ax.set_xticks([at[x] for x in shown], [f"{x:g}" for x in shown])
        ax.margins(x=0.08)
    elif all(float(x).is_integer() for x in levels):
        whole_numbers(ax)


def _means(runs: Sequence[Points]) -> dict[float, list[float]]:
    """Return every run's y at each x, x in order."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for x, y in run:
            found.setdefault(x, []).append(y)
    return dict(sorted(found.items()))


def _look(number: int) -> dict[str, Any]:
    colors = PALETTE[:-1]
    line = ("-", "--", ":", "-.")[number // len(colors) % 4]
    marker = _MARKERS[number % len(_MARKERS)]
    return {"color": colors[number % len(colors)], "ls": line, "marker": marker, "ms": 4.5}
