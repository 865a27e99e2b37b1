"""Means, deviations and correlations, and how numbers are written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdarts_fast.metrics import Metric

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
            return fixed(factor * self.mean, digits)
        return (
            f"{fixed(factor * self.mean, digits)} {sign} {fixed(factor * self.deviation, digits)}"
        )


@dataclass(frozen=True)
class Scale:
    """How the numbers of a metric stand in a table or on an axis."""

    metric: Metric

    @property
    def factor(self) -> float:
        """What a number is multiplied by: shares stand in percent."""
        return 100.0 if self.metric.unit == "%" else 1.0

    @property
    def unit(self) -> str:
        """The unit as a word; empty where a number has none."""
        return self.metric.unit.strip()

    @property
    def difference_unit(self) -> str:
        """The unit of differences."""
        return "points" if self.unit == "%" else self.unit

    @property
    def axis(self) -> str:
        """The unit at an axis of scores; empty for shares, which stand there as they are."""
        return "" if self.factor != 1.0 else self.unit

    def of(self, value: float | None) -> float | None:
        """Return a number in its unit."""
        return None if value is None else self.factor * value

    def text(self, value: float | None) -> str:
        """Return a number in its unit, which stands elsewhere."""
        return NOTHING if value is None else fixed(self.factor * value, 2)

    def said(self, value: float | None) -> str:
        """Return a number with its unit."""
        return f"{self.text(value)} {self.unit}".rstrip()

    def difference(self, value: float | None) -> str:
        """Return a difference with its unit."""
        return f"{self.text(value)} {self.difference_unit}".rstrip()

    def titled(self, words: str) -> str:
        """Return the title of a column or an axis: words and the unit."""
        return f"{words}, {self.unit}" if self.unit else words

    @property
    def test(self) -> str:
        """What a retrained network has."""
        return f"test {self.metric.cost_name}"

    @property
    def valid(self) -> str:
        """What a network has that was retrained for a short time."""
        return f"validation {self.metric.cost_name}"

    @property
    def supernet(self) -> str:
        """What a search's supernet has."""
        return f"validation {self.metric.score_name}"


def capital(words: str) -> str:
    """Return words that begin a sentence."""
    return words[:1].upper() + words[1:]


def plural(name: str) -> str:
    """Return a score's name for several."""
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"


def fixed(value: float, digits: int) -> str:
    """Return a number with so many decimals; one that would be long by its power of ten."""
    return f"{value:.{digits}f}" if abs(value) < 1e7 else f"{value:.3g}"


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
    return NOTHING if value is None else fixed(100 * value, 2)


def decimal(value: float | None) -> str:
    """Return a number with three decimals."""
    return NOTHING if value is None else fixed(value, 3)


def plain(value: float | int | None) -> str:
    """Return a number as short as it can be written."""
    return NOTHING if value is None else f"{value:g}" if type(value) is float else str(value)


def seconds(value: float | None) -> str:
    """Return a time in seconds, a decimal below 10."""
    if value is None:
        return NOTHING
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
