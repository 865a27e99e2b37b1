"""Pictures: cells as graphs, and numbers. matplotlib is imported when a picture is drawn."""

from rdarts_fast.plots.cells import draw_cell, save_cells
from rdarts_fast.plots.curves import (
    Score,
    draw_curves,
    draw_landscape,
    draw_spectrum,
    draw_trajectory,
    save_course,
    save_curves,
    save_landscape,
    save_spectrum,
    save_trajectory,
)
from rdarts_fast.plots.heat import Weights, save_weights
from rdarts_fast.plots.maps import save_maps
from rdarts_fast.plots.panels import Panel, draw_panel, save_panels
from rdarts_fast.plots.strip import save_strip
from rdarts_fast.plots.styles import Edge, kind_of
from rdarts_fast.plots.svg import sparkline

__all__ = [
    "Edge",
    "Panel",
    "Score",
    "Weights",
    "draw_cell",
    "draw_curves",
    "draw_landscape",
    "draw_panel",
    "draw_spectrum",
    "draw_trajectory",
    "kind_of",
    "save_cells",
    "save_course",
    "save_curves",
    "save_landscape",
    "save_maps",
    "save_panels",
    "save_spectrum",
    "save_strip",
    "save_trajectory",
    "save_weights",
    "sparkline",
]
