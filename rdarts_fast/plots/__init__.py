"""Pictures: cells as graphs, and numbers. matplotlib is imported when a picture is drawn."""

from rdarts_fast.plots.cells import Edge, draw_cell, save_cells
from rdarts_fast.plots.curves import (
    draw_curves,
    draw_landscape,
    draw_spectrum,
    draw_trajectory,
    save_curves,
    save_landscape,
    save_spectrum,
    save_trajectory,
)

__all__ = [
    "Edge",
    "draw_cell",
    "draw_curves",
    "draw_landscape",
    "draw_spectrum",
    "draw_trajectory",
    "save_cells",
    "save_curves",
    "save_landscape",
    "save_spectrum",
    "save_trajectory",
]
