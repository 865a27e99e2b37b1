"""Pictures of numbers: curves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from rdarts_fast.plots.look import PALETTE, check_suffix, save


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
    from matplotlib.figure import Figure

    check_suffix(path)
    figure = Figure(figsize=(6.4, 3.8), layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    looks = itertools.cycle(itertools.product(("-", "--", ":", "-."), PALETTE[:-1]))
    for (name, (x, y)), (line, color) in zip(series.items(), looks, strict=False):
        if len(x) != len(y):
            raise ValueError(f"series {name!r}: {len(x)} x values and {len(y)} y values")
        marker = "o" if len(x) < 25 else ""
        ax.plot(x, y, line, color=color, marker=marker, markersize=3.5, label=str(len(ax.lines)))
    for text, put in ((xlabel, ax.set_xlabel), (ylabel, ax.set_ylabel), (title, ax.set_title)):
        put(text, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#E3E5E8", linewidth=0.8)
    ax.set_axisbelow(True)
    if len(series) > 1:  # named afterwards: a legend leaves out names like "_x" and typesets "$x$"
        for entry, name in zip(ax.legend(frameon=False).get_texts(), series, strict=True):
            entry.set(text=name, parse_math=False)
    save(figure, path)
