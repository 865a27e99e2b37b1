"""Means, deviations and correlations, and how numbers are written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 3  # points below which a correlation says nothing
NOTHING = "–"


@dataclass(frozen=True)
class Average:
    """A mean over `count` values, and their sample deviation (by count - 1), None of one value."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Average | None:
        """Return the average of the values that are there, None where none is."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        deviation = statistics.stdev(there) if len(there) > 1 else None
        return cls(statistics.fmean(there), deviation, len(there))

    def text(self, digits: int, factor: float = 1.0, sign: str = "±") -> str:
        """Return "mean ± deviation"."""
        if self.deviation is None:
            return f"{factor * self.mean:.{digits}f}"
        return f"{factor * self.mean:.{digits}f} {sign} {factor * self.deviation:.{digits}f}"


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation, None for fewer than LEAST points or a constant x or y."""
    if len(x) < LEAST:
        return None
    a, b = (np.asarray(values, dtype=float) - np.mean(values) for values in (x, y))
    norm = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    scale = max(float(np.abs(x).max()) * float(np.abs(y).max()), 1e-300)
    if norm <= 1e-14 * len(x) * scale:  # what rounding leaves of a constant
        return None
    return float(np.clip(a @ b / norm, -1.0, 1.0))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank.
    None as `pearson`.
    """
    return pearson(ranks(x), ranks(y))


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value from 1, equal values sharing their mean rank."""
    ordered = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(ordered, start=1)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]


def percent(value: float | None) -> str:
    """Return a share in percent, with two decimals and no sign."""
    return NOTHING if value is None else f"{100 * value:.2f}"


def decimal(value: float | None) -> str:
    """Return a number with three decimals."""
    return NOTHING if value is None else f"{value:.3f}"


def plain(value: float | int | None) -> str:
    """Return a number as short as it can be written."""
    return NOTHING if value is None else f"{value:g}" if type(value) is float else str(value)


def seconds(value: float | None) -> str:
    """Return a time in seconds, a decimal below 10."""
    if value is None:
        return NOTHING
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
