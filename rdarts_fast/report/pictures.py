"""Draws pictures into the report's folder and puts them into its page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from rdarts_fast.report.markup import Html, Piece, inlined, picture

FOLDER = "pictures"


class Pictures:
    """The pictures of one report; every one has a file and ids of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def add(
        self,
        name: str,
        draw: Callable[[Path], object],
        caption: Piece,
        title: str,
        *,
        wide: bool = False,
        least: int = 0,
        most: int = 0,
    ) -> Html:
        """Draw a picture to a file and return its card.

        name: of the file, any text. title: what a screen reader says. wide: over both columns.
        least, most: pixels below which it scrolls; above which it does not grow.
        """
        path = self.folder / self._free(name)
        with warnings.catch_warnings():
            # The page's fonts are the reader's: one that matplotlib lacks may well be there.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            draw(path)
        svg = inlined(path, f"p{len(self.names)}-", title)
        return picture(svg, caption, path.name, wide=wide, least=least, most=most)

    def _free(self, name: str) -> str:
        """Return a file's name of plain characters that no other picture has."""
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:80] or "picture"
        free, number = f"{stem}.svg", 2
        while free in self.names:
            free, number = f"{stem}-{number}.svg", number + 1
        self.names.append(free)
        return free
