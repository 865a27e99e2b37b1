"""A picture of the alphas over a search: softmax weights as colours, a row for each candidate."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rdarts_fast.plots import svg
from rdarts_fast.plots.look import FAINT, PALETTE
from rdarts_fast.plots.styles import styles_of

_WIDTH, _LABELS, _GAP, _TOP, _BOTTOM = 1080.0, 148.0, 24.0, 26.0, 66.0  # pixels
_MANY = 60  # rows from which on they are lower
_MAP = "cividis"


@dataclass(frozen=True)
class Weights:
    """The softmax weights of one cell over a search.

    edges: of each edge its name and its operations. values: [rows, epochs] in [0, 1], the rows by
    edge, then by operation. kept: the rows of the genotype.
    """

    title: str
    edges: Sequence[tuple[str, Sequence[str]]]
    values: np.ndarray
    kept: Collection[int] = ()


def save_weights(
    path: Path, panels: Sequence[Weights], epochs: Sequence[int], stop_epoch: int | None = None
) -> None:
    """Write softmax weights over the epochs as .svg, a panel beside the other, in one scale of
    colours from the least to the greatest weight.

    Names of kept rows are bold. stop_epoch: has an upright line. Raises ValueError where there is
    nothing to draw or the shapes differ, UserError as `save_drawing` does.
    """
    shapes = [(sum(len(ops) for _, ops in panel.edges), len(epochs)) for panel in panels]
    if not panels or not epochs or any(not rows for rows, _ in shapes):
        raise ValueError("expected at least one panel, one epoch and one row")
    for panel, shape in zip(panels, shapes, strict=True):
        if panel.values.shape != shape:
            raise ValueError(f"{panel.title}: expected values {shape}, got {panel.values.shape}")
    most = max(rows for rows, _ in shapes)
    row = 12.5 if most <= _MANY else 9.5
    low = min(float(panel.values.min()) for panel in panels)
    high = max(float(panel.values.max()) for panel in panels)
    wide = (_WIDTH - _GAP * (len(panels) - 1)) / len(panels)
    parts: list[str] = []
    for i, panel in enumerate(panels):
        left = i * (wide + _GAP)
        parts += _panel(panel, left, wide - _LABELS - 8, row, (low, high), epochs, stop_epoch)
    bottom = _TOP + most * row
    parts += _scale(low, high, bottom + 44)
    svg.save_drawing(path, _WIDTH, bottom + _BOTTOM, parts)


def _panel(
    panel: Weights,
    left: float,
    wide: float,
    row: float,
    limits: tuple[float, float],
    epochs: Sequence[int],
    stop_epoch: int | None,
) -> Iterator[str]:
    x, high = left + _LABELS, row * len(panel.values)
    yield svg.label(left + 2, _TOP - 9, panel.title, size=12, bold=True)
    place = f'x="{x:.1f}" y="{_TOP:g}" width="{wide:.1f}" height="{high:.1f}"'
    look = 'preserveAspectRatio="none" style="image-rendering:pixelated"'
    yield f'<image {place} {look} href="{_image(panel.values, *limits)}"/>'
    yield from _names(panel, left, x, wide, row)
    step = wide / len(epochs)
    for i in _ticks(len(epochs)):
        middle = x + (i + 0.5) * step
        yield svg.line(middle, _TOP + high, middle, _TOP + high + 4, FAINT)
        yield svg.label(middle, _TOP + high + 15, str(epochs[i]), size=10, anchor="middle")
    yield svg.label(x + wide / 2, _TOP + high + 29, "epoch", size=10, anchor="middle", color=FAINT)
    if stop_epoch in epochs:
        at = x + (epochs.index(stop_epoch) + 1) * step
        dashes = 'stroke-width="2" stroke-dasharray="5 3"'
        yield svg.line(at, _TOP - 4, at, _TOP + high + 4, PALETTE[1], dashes)
        yield svg.label(at, _TOP - 8, f"stop {stop_epoch}", size=10, anchor="middle")


def _names(panel: Weights, left: float, x: float, wide: float, row: float) -> Iterator[str]:
    """Yield the names of edges and operations, and the lines between edges."""
    size, number = 0.8 * row, 0
    for edge, operations in panel.edges:
        y = _TOP + number * row
        if number:
            yield svg.line(left, y, x + wide, y, "white", 'stroke-width="2"')
        yield svg.label(left + 2, y + 0.8 * row, edge, size=size)
        styles = styles_of(operations)
        for name in operations:
            y, kept = _TOP + (number + 0.8) * row, number in panel.kept
            color = "#111111" if kept else FAINT
            short = styles[name].short
            yield svg.label(x - 6, y, short, size=size, anchor="end", color=color, bold=kept)
            number += 1


def _ticks(count: int) -> list[int]:
    """Return which of `count` columns have their number below: the first, the last, some others."""
    return sorted({round(i * (count - 1) / 5) for i in range(6)})


def _scale(low: float, high: float, y: float) -> Iterator[str]:
    x, wide = _LABELS, 200.0
    ramp = np.linspace(low, high, 64)[None]
    place = f'x="{x:g}" y="{y:.1f}" width="{wide:g}" height="9"'
    yield f'<image {place} preserveAspectRatio="none" href="{_image(ramp, low, high)}"/>'
    yield svg.label(x - 6, y + 9, f"{low:.2f}", size=10, anchor="end")
    yield svg.label(x + wide + 6, y + 9, f"{high:.2f}  softmax weight", size=10)


def _image(values: np.ndarray, low: float, high: float) -> str:
    """Return [rows, columns] as a PNG of so many pixels, as a data URI."""
    from matplotlib import colormaps
    from PIL import Image

    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    pixels = (colormaps[_MAP](share)[..., :3] * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
