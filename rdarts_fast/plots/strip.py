"""Cells over the epochs of a search, small and side by side, to see what changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rdarts_fast.plots import svg
from rdarts_fast.plots.layout import Layout, lay_out
from rdarts_fast.plots.look import FAINT, INK
from rdarts_fast.plots.styles import (
    Edge,
    Inputs,
    Style,
    inputs_of,
    kind_of,
    styles_of,
    text_width,
)

_WIDTH, _ROW_NAME, _GAP, _TOP = 1080.0, 58.0, 10.0, 24.0  # pixels
_WIDE, _NODE_WIDE = 240.0, 42.0  # a cell at the most, and one of many nodes for each of them
_UP = 26.0  # pixels an inch of the layout upwards; across it takes what there is


def save_strip(
    path: Path,
    columns: Mapping[str, Mapping[str, Sequence[Edge]]],
    nodes: int,
    inputs: Inputs | None = None,
) -> None:
    """Write cells as .svg: a column for each title (cell type -> edges as in `draw_cell`), a row
    for each cell type, and a legend.

    inputs: as in `save_cells`. Raises ValueError as `draw_cell` does or where there are no columns,
    UserError as `save_drawing` does.
    """
    if not columns:
        raise ValueError("expected at least one column")
    kinds = list(next(iter(columns.values())))
    styles = styles_of(
        e[2] for cells in columns.values() for edges in cells.values() for e in edges
    )
    layouts = {
        title: {
            kind: lay_out(_bare(cells[kind]), nodes, len(inputs_of(inputs, kind)), styles)
            for kind in kinds
        }
        for title, cells in columns.items()
    }
    names = {kind: kind_of(kind).short for kind in kinds}
    start = max([_ROW_NAME, *(72 * text_width(name, 10.0) + 6 for name in names.values())])
    wide = min((_WIDTH - start) / len(columns) - _GAP, max(_WIDE, _NODE_WIDE * nodes))
    parts = [
        svg.label(start + i * (wide + _GAP) + wide / 2, 15, title, anchor="middle", bold=True)
        for i, title in enumerate(columns)
    ]
    y = _TOP
    for kind in kinds:
        tall = max(_height(layouts[title][kind]) for title in columns) * _UP
        parts.append(svg.label(0, y + tall / 2 + 4, names[kind], size=10, color=FAINT))
        for i, title in enumerate(columns):
            x = start + i * (wide + _GAP)
            parts += _cell(columns[title][kind], layouts[title][kind], styles, x, y, wide, tall)
        y += tall + 8
    parts += _legend(styles, y + 12)
    rows = -(-len(styles) // _PER_ROW)
    svg.save_drawing(path, _WIDTH, y + 8 + 18 * rows, parts)


def _bare(edges: Sequence[Edge]) -> list[Edge]:
    return [(source, target, name, None) for source, target, name, _ in edges]


def _height(layout: Layout) -> float:
    bottom, top = layout.height
    return top - bottom


def _cell(
    edges: Sequence[Edge],
    layout: Layout,
    styles: Mapping[str, Style],
    x: float,
    y: float,
    wide: float,
    tall: float,
) -> Iterator[str]:
    """Yield a cell in the box at x, y."""
    left, right = layout.inputs[0].x - 0.2, layout.panel.x + layout.panel.width / 2
    scale, middle = wide / (right - left), sum(layout.height) / 2

    def place(point: tuple[float, float]) -> str:
        across = x + (point[0] - left) * scale
        return f"{across:.1f} {y + tall / 2 - (point[1] - middle) * _UP:.1f}"

    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" rx="6" '
        'fill="#F4F5F7"/>'
    )
    for edge, route in zip(edges, layout.routes, strict=True):
        course = f"M{place(route.pieces[0][0])}"
        for piece in route.pieces:
            course += "C" + " ".join(place(point) for point in piece[1:])
        yield from _stroke(f'<path d="{course}" fill="none"', styles[edge[2]])
    for state in layout.inputs:
        across, up = place((state.x, state.y)).split()
        yield f'<circle cx="{across}" cy="{up}" r="3.5" fill="{INK}"/>'
    for number, state in enumerate(layout.nodes):
        across, up = place((state.x, state.y)).split()
        yield f'<circle cx="{across}" cy="{up}" r="7" fill="white" stroke="{INK}"/>'
        yield svg.label(float(across), float(up) + 3.2, str(number), size=9, anchor="middle")


def _stroke(start: str, style: Style) -> Iterator[str]:
    """Yield the element that begins with `start` as a line of this look."""
    dashes = f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in style.dashes)}"'
    more = dashes if style.dashes else ""
    yield f'{start} stroke="{style.color}" stroke-width="{3.2 if style.hollow else 2.4}"{more}/>'
    if style.hollow:
        yield f'{start} stroke="white" stroke-width="1.2"/>'


_PER_ROW = 5


def _legend(styles: Mapping[str, Style], y: float) -> Iterator[str]:
    for i, style in enumerate(styles.values()):
        x, at = _ROW_NAME + 204 * (i % _PER_ROW), y + 18 * (i // _PER_ROW)
        yield from _stroke(f'<path d="M{x:g} {at - 4:.1f}h28" fill="none"', style)
        yield svg.label(x + 34, at, style.name, size=10)
