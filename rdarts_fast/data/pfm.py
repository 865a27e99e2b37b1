"""PFM images: float32, grey (Pf) or colour (PF), rows from the bottom up, either byte order.

    Pf or PF, whitespace, width, whitespace, height, whitespace, scale, one whitespace, the rows

A negative scale says little-endian. The scale's size is not applied to the values: Middlebury's
writer leaves 1/255 there beside plain disparities.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from rdarts_fast.data.reading import one_line
from rdarts_fast.errors import UserError

_HEADER = re.compile(rb"(P[fF])\s+(\d{1,9})\s+(\d{1,9})\s+([-+.0-9eE]{1,32})(\r\n|\s)")
_LONGEST_HEADER = 256

Floats = np.ndarray[Any, np.dtype[np.float32]]


def read_pfm(file: Path) -> Floats:
    """Return float32 [H, W] of a grey file, [H, W, 3] of a colour one, the top row first.

    Raises UserError, which names the file, for a missing or unreadable one, a header that is not
    PFM's, and a size that is not the header's.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from error
    header = _HEADER.match(content[:_LONGEST_HEADER])
    if header is None:
        raise UserError(
            f"{file}: not a PFM file: expected Pf or PF, width, height and scale, "
            f"found {content[:24]!r}"
        )
    kind, width, height, text, end = header.groups()
    columns, rows, channels = int(width), int(height), 3 if kind == b"PF" else 1
    scale = _scale(file, text)
    if columns == 0 or rows == 0:
        raise UserError(f"{file}: expected a pixel or more, the header says {columns}x{rows}")
    expected, start = 4 * rows * columns * channels, header.end()
    if end == b"\r\n" and len(content) - start == expected - 1:
        start -= 1  # the line ends with \r; the first byte of the rows happens to be \n
    if len(content) - start != expected:
        raise UserError(
            f"{file}: expected {expected:,} bytes after the header ({columns}x{rows}, "
            f"{channels} channel{'s' if channels > 1 else ''}), found {len(content) - start:,}: "
            "cut off or damaged"
        )
    values = np.frombuffer(content, "<f4" if scale < 0 else ">f4", offset=start)
    shape = (rows, columns, 3) if channels == 3 else (rows, columns)
    return np.ascontiguousarray(values.reshape(shape)[::-1], dtype=np.float32)


def _scale(file: Path, text: bytes) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if scale == 0 or not math.isfinite(scale):
        found = text.decode("ascii")
        raise UserError(f"{file}: scale: expected a number other than 0, found {found}")
    return scale
