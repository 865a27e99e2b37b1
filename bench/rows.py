"""A comparison of ours with one baseline: as a line of JSON, or as a row of a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bench.record import line
from bench.timing import Times

HEADER = (
    f"{'space or shape':<25}{'case':<33}{'baseline':<15}"
    f"{'ours, ms':>18}{'baseline, ms':>20}{'ratio':>8}{'peak, MB':>17}"
)


@dataclass(frozen=True)
class Row:
    """One case, ours against one baseline; None where it was not measured, `note` says why."""

    bench: str
    case: str
    space: str  # the search space; the shape, for a kernel
    baseline: str
    ours: Times | None = None
    theirs: Times | None = None
    peak_mb: float | None = None
    baseline_peak_mb: float | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)  # sizes and the like, for the JSON

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is, by the medians."""
        if self.ours is None or self.theirs is None:
            return None
        return self.theirs.median / self.ours.median

    def json(self, device: torch.device) -> str:
        """Return the line of JSON."""
        measured = {
            "case": self.case,
            "space": self.space,
            "baseline": self.baseline,
            "ours_ms": _rounded(self.ours and self.ours.median),
            "baseline_ms": _rounded(self.theirs and self.theirs.median),
            "ratio": _rounded(self.ratio),
            "ours_quartiles_ms": self.ours and [_rounded(ms) for ms in self.ours.quartiles],
            "baseline_quartiles_ms": self.theirs and [_rounded(ms) for ms in self.theirs.quartiles],
            "rounds": self.ours and len(self.ours.ms),
            "peak_mb": _rounded(self.peak_mb),
            "baseline_peak_mb": _rounded(self.baseline_peak_mb),
            "dtype": "float32",
            "note": self.note,
        }
        return line(self.bench, device, **measured, **self.more)

    def text(self) -> str:
        """Return the row under HEADER."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        peaks = "" if self.peak_mb is None else f"{self.peak_mb:.0f}"
        if self.baseline_peak_mb is not None:
            peaks += f" / {self.baseline_peak_mb:.0f}"
        return (
            f"{self.space:<25}{self.case:<33}{self.baseline:<15}{_spread(self.ours):>18}"
            f"{_spread(self.theirs):>20}{ratio:>8}{peaks:>17}  {self.note}"
        ).rstrip()


def show(row: Row, device: torch.device, as_json: bool) -> None:
    """Print the row at once: a whole measurement takes long."""
    print(row.json(device) if as_json else row.text(), flush=True)


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.5g}")


def _spread(times: Times | None) -> str:
    """The median, and how far the quartiles lie from it at most."""
    if times is None:
        return "-"
    off = max(abs(quartile - times.median) for quartile in times.quartiles)
    return f"{times.median:.4g} ±{100 * off / times.median:.0f}%"
