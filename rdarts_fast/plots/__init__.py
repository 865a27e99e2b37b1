"""Pictures: cells as graphs, and numbers. matplotlib is imported when a picture is drawn."""

from rdarts_fast.plots.cells import Edge, draw_cell, save_cells
from rdarts_fast.plots.curves import save_curves

__all__ = ["Edge", "draw_cell", "save_cells", "save_curves"]
