"""Pictures written as SVG by hand: many small marks, for which a figure would be slow and large."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from rdarts_fast.errors import UserError
from rdarts_fast.plots.look import INK, PALETTE

_FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def save_drawing(path: Path, width: float, height: float, parts: Iterable[str]) -> None:
    """Write a picture of these elements on white; sizes in pixels. Raises UserError at another
    suffix than .svg, or where the file cannot be written.
    """
    if Path(path).suffix != ".svg":
        raise UserError(f"cannot draw {path}: this picture's name ends with .svg")
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONT}">'
    ground = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    text = "\n".join([head, ground, *parts, "</svg>", ""])
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def label(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 11.0,
    anchor: str = "start",
    color: str = INK,
    bold: bool = False,
) -> str:
    """Return text with its baseline at y; anchor: start, middle or end."""
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}"'
    return f'<text {place} fill="{color}"{weight}>{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    """Return a straight line; more: further attributes."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}"{" " * bool(more)}{more}/>'


def sparkline(values: Sequence[float], width: float = 84.0, height: float = 18.0) -> str:
    """Return a curve without axes as an SVG element, from the least to the greatest value; a dot at
    its end. What is not finite is left out. Empty where nothing is left.
    """
    points = [(i, value) for i, value in enumerate(values) if math.isfinite(value)]
    if not points:
        return ""
    low, high = min(v for _, v in points), max(v for _, v in points)
    across, up = max(len(values) - 1, 1), (high - low) or 1.0
    at = [
        (2 + (width - 5) * i / across, height - 3 - (height - 6) * (v - low) / up)
        for i, v in points
    ]
    course = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    size = f'class="spark" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    curve = f'<polyline points="{course}" fill="none" stroke="{PALETTE[0]}" stroke-width="1.5"/>'
    dot = f'<circle cx="{at[-1][0]:.1f}" cy="{at[-1][1]:.1f}" r="2" fill="{PALETTE[1]}"/>'
    return f'<svg {size} aria-hidden="true">{curve}{dot}</svg>'
