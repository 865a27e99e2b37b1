"""What all pictures share: colours, and how a figure becomes a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rdarts_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; the line is a second cue.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#F0E442"),
)
INK, FAINT = "#222222", "#767676"


def check_suffix(path: Path) -> None:
    """Raise UserError where the name does not end with .svg or .png."""
    if Path(path).suffix not in (".svg", ".png"):
        raise UserError(f"cannot draw {path}: a picture's name ends with .svg or .png")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as its file's suffix says. Raises UserError where it cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    kind = Path(path).suffix[1:]
    # Text stays text, and the same picture gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rdarts_fast"}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    try:
        Path(path).write_bytes(buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
