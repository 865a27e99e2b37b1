"""Pictures of cells as graphs; where everything goes is in layout.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdarts_fast.plots.layout import ARROW, Box, Layout, Point, Route, input_width, lay_out
from rdarts_fast.plots.look import FAINT, INK, check_suffix, save
from rdarts_fast.plots.styles import (
    FONT,
    TWO,
    Edge,
    Inputs,
    Kind,
    Style,
    inputs_of,
    is_math,
    kind_of,
    label_of,
    styles_of,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL, _END_FILL = "#F4F5F7", "#DFE2E7"
_PALE = 0.75  # luminance above which a line on white needs an outline


def draw_cell(
    ax: Axes,
    edges: Sequence[Edge],
    nodes: int,
    title: str,
    inputs: Sequence[str] = TWO,
) -> None:
    """Draw one cell on `ax`, which loses its frame; `save_cells` makes axes of the right size.

    edges: (from, to, operation, weight or None); states 0 .. len(inputs)-1 are the inputs, the
    intermediate nodes follow. inputs: their names, words or math text such as c_{k-1}. Raises
    ValueError at an edge that does not lead from an earlier state to an intermediate node.
    """
    styles = styles_of(edge[2] for edge in edges)
    layout = lay_out(edges, nodes, len(inputs), styles, input_width(inputs))
    _draw(ax, edges, layout, Kind(title), inputs, styles)


def save_cells(
    path: Path,
    cells: Mapping[str, Sequence[Edge]],
    nodes: int,
    title: str = "",
    inputs: Inputs | None = None,
) -> None:
    """Write a picture of a genotype, one panel a cell type, as .svg or .png.

    cells: cell type -> edges as in `draw_cell`. inputs: cell type -> the names of its inputs; those
    of a normal cell where it is not there. Raises UserError at another suffix, or where the file
    cannot be written.
    """
    check_suffix(path)
    styles = styles_of(edge[2] for edges in cells.values() for edge in edges)
    names = {kind: inputs_of(inputs, kind) for kind in cells}
    width = max(map(input_width, names.values()))  # the same for all, to have their nodes in line
    layouts = [
        lay_out(edges, nodes, len(names[kind]), styles, width) for kind, edges in cells.items()
    ]
    sizes = [(box[1] - box[0], box[3] - box[2]) for box in (layout.limits for layout in layouts)]
    figure, axes = _panels(sizes, title, styles)
    for ax, (kind, edges), layout in zip(axes, cells.items(), layouts, strict=True):
        _draw(ax, edges, layout, kind_of(kind), names[kind], styles)
    save(figure, path)


# Drawing


def _draw(
    ax: Axes,
    edges: Sequence[Edge],
    layout: Layout,
    kind: Kind,
    inputs: Sequence[str],
    styles: Mapping[str, Style],
) -> None:
    _draw_box(ax, layout.panel, _PANEL, _PANEL, 0)
    for i, (edge, route) in enumerate(zip(edges, layout.routes, strict=True)):
        _draw_route(ax, route, styles[edge[2]], 1 + 0.01 * i)
    for edge, place in zip(edges, layout.labels, strict=True):
        color = styles[edge[2]].color
        _draw_box(ax, place, color, _PANEL, 5)
        ink = INK if _luminance(color) > 0.55 else "white"
        _write(ax, place, label_of(edge, styles), color=ink, parse_math=False)
    for place, name in zip(layout.inputs, inputs, strict=True):
        _draw_box(ax, place, _END_FILL, INK, 4)
        if is_math(name):
            _write(ax, place, f"${name}$", fontsize=FONT + 2)
        else:
            _write(ax, place, name, parse_math=False)
    for i, place in enumerate(layout.nodes):
        _draw_box(ax, place, "white", INK, 4)
        _write(ax, place, str(i))
    _draw_output(ax, layout, "$c_{k}$" if "c_{k-1}" in inputs else "output", kind.joined)
    _draw_title(ax, layout, kind.title, Counter(styles[edge[2]].short for edge in edges))
    left, right, bottom, top = layout.limits
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.axis("off")


def _draw_box(ax: Axes, place: Box, fill: str, line: str, zorder: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = place.x - place.width / 2, place.y - place.height / 2
    radius = min(0.12, 0.22 * place.height)
    shape = f"round,pad=0,rounding_size={radius}"
    look: dict[str, Any] = {"fc": fill, "ec": line, "lw": 1.1, "zorder": zorder}
    ax.add_patch(FancyBboxPatch(corner, place.width, place.height, shape, **look))


def _write(ax: Axes, place: Box, text: str, **look: Any) -> None:
    usual: dict[str, Any] = {
        "fontsize": FONT,
        "ha": "center",
        "va": "center_baseline",
        "color": INK,
        "zorder": 6,
    }
    ax.text(place.x, place.y, text, **(usual | look))


def _draw_route(ax: Axes, route: Route, style: Style, zorder: float) -> None:
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Outline

    points = [route.pieces[0][0], *(point for piece in route.pieces for point in piece[1:])]
    outline = Outline(points, [Outline.MOVETO] + [Outline.CURVE4] * (len(points) - 1))
    core, look = _line_look(style)
    # The halo parts the line from those it crosses.
    ax.add_patch(PathPatch(outline, fc="none", ec=_PANEL, lw=6, capstyle="butt", zorder=zorder))
    look |= {"fc": "none", "ec": core, "capstyle": "butt", "zorder": zorder + 0.005}
    ax.add_patch(PathPatch(outline, **look))
    before, end = np.array(route.pieces[-1][-2:])
    along = (end - before) / np.hypot(*(end - before))
    half = 0.55 * ARROW * np.array([-along[1], along[0]])
    corners = [end + ARROW * along, end + half, end - half]
    edge = FAINT if _luminance(style.color) > _PALE else style.color
    ax.add_patch(Polygon(corners, closed=True, fc=style.color, ec=edge, lw=0.6, zorder=3))


def _line_look(style: Style) -> tuple[str, dict[str, Any]]:
    """Return the colour of a line's core, and the rest of its look."""
    from matplotlib.patheffects import withStroke

    look: dict[str, Any] = {"lw": 2.2, "ls": (0, style.dashes) if style.dashes else "-"}
    if style.hollow:
        return "white", look | {
            "lw": 1.3,
            "path_effects": [withStroke(linewidth=3.6, foreground=style.color)],
        }
    if _luminance(style.color) > _PALE:
        look["path_effects"] = [withStroke(linewidth=3.2, foreground=FAINT)]
    return style.color, look


def _luminance(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue


def _draw_output(ax: Axes, layout: Layout, name: str, joined: str) -> None:
    start, end = layout.panel.x + layout.panel.width / 2, layout.output.x - layout.output.width / 2
    arrow = {"arrowstyle": "-|>,head_width=0.28,head_length=0.55", "color": INK, "lw": 2.2}
    arrow |= {"shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (end, 0.0), (start, 0.0), arrowprops=arrow, zorder=3)
    if len(layout.nodes) > 1:
        ax.text((start + end) / 2, 0.12, joined, fontsize=8, color=FAINT, ha="center")
    _draw_box(ax, layout.output, _END_FILL, INK, 4)
    _write(ax, layout.output, name, fontsize=FONT + (2 if name.startswith("$") else 0))


def _draw_title(ax: Axes, layout: Layout, title: str, counts: Counter[str]) -> None:
    panel = layout.panel
    y = panel.y + panel.height / 2 + 0.1
    left, right = panel.x - panel.width / 2, panel.x + panel.width / 2
    ax.text(left, y, title, fontsize=12, weight="bold", color=INK, parse_math=False)
    text = ", ".join(f"{count} {short}" for short, count in counts.most_common())
    if text_width(title, 12, "bold") + text_width(text, 9) + 0.2 < right - left:
        ax.text(right, y, text, fontsize=9, color=FAINT, ha="right", parse_math=False)


def _panels(
    sizes: Sequence[Point], title: str, styles: Mapping[str, Style]
) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes of these sizes, beside each other where they fit, and a legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    edge, gap, widest = 0.12, 0.3, 9.0
    widths, heights = [size[0] for size in sizes], [size[1] for size in sizes]
    abreast = sum(widths) + gap * (len(sizes) - 1) <= widest
    width = (sum(widths) + gap * (len(sizes) - 1) if abreast else max(widths)) + 2 * edge
    columns = min(len(styles), max(1, int(width / 2.5)))
    legend = 0.25 + 0.22 * -(-len(styles) // columns)
    head = 0.45 if title else 0.1
    body = max(heights) if abreast else sum(heights) + gap * (len(sizes) - 1)
    height = legend + body + head
    figure = Figure(figsize=(width, height), facecolor="white")
    axes, x, top = [], edge, legend + body
    for wide, high in sizes:
        place = (x / width, (top - high) / height, wide / width, high / height)
        axes.append(figure.add_axes(place))
        x, top = (x + wide + gap, top) if abreast else (x, top - high - gap)
    if title:
        look: dict[str, Any] = {"fontsize": 13, "ha": "center", "va": "top", "color": INK}
        figure.text(0.5, 1 - 0.12 / height, title, parse_math=False, **look)
    looks = [_line_look(style) for style in styles.values()]
    lines = [Line2D([], [], color=core, **look) for core, look in looks]
    names = [style.name for style in styles.values()]
    place_legend: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.0)}
    figure.legend(
        lines, names, ncols=columns, fontsize=9, frameon=False, handlelength=3, **place_legend
    )
    return figure, axes
