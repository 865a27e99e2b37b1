"""The early stopping of DARTS-ES: stop when the local average of lambda_max has grown (paper,
section 3).

    stop as soon as  average(i) / average(i - delta) > factor,  and go back to measurement i - delta

with average(i) the mean of `window` measurements around i, fewer at both ends. The published code
has measurements every 2 epochs, window 5, delta 4, factor 1.3, no stop before epoch 10, and never
stops at the last epoch. The paper has them every epoch, delta 5 and factor 1 / 0.75.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Rule = Literal["code", "paper"]


class EigenvalueTrace:
    """The measurements of a search, and when they say to stop.

    `update` takes them in the order of epochs; `stop_epoch` is None until the rule fires, then the
    epoch to go back to, for good. Measurements off the grid of `every` epochs count only at the
    last epoch, as published. rule "code": see above; "paper" needs every = 1 and takes delta 5,
    factor 1 / 0.75 and start_epoch 0, whatever was given, and stops at the last epoch as well.
    Raises ValueError for numbers that make no rule.
    """

    def __init__(
        self,
        window: int = 5,
        every: int = 2,
        epochs: int = 50,
        factor: float = 1.3,
        delta: int = 4,
        start_epoch: int = 10,
        rule: Rule = "code",
    ) -> None:
        if rule == "paper":
            if every != 1:
                raise ValueError(f'every: rule "paper" needs 1, got {every}')
            factor, delta, start_epoch = 1.0 / 0.75, 5, 0
        for name, value in (("window", window), ("every", every), ("delta", delta)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if window % 2 == 0:
            raise ValueError(f"window: expected an odd number, got {window}")
        self.window, self.every, self.epochs = window, every, epochs
        self.factor, self.delta, self.start_epoch, self.rule = factor, delta, start_epoch, rule
        self.measured: list[tuple[int, float]] = []  # those that count, with their epochs
        self.local_average: list[float] = []  # of the measurements whose window is whole
        self.stop_epoch: int | None = None

    def update(self, epoch: int, value: float) -> None:
        """Take the measurement of an epoch. Raises ValueError where it is not finite, or the epoch
        not after the last one's.
        """
        if not math.isfinite(value):
            raise ValueError(f"value: expected a finite number at epoch {epoch}, got {value}")
        if self.measured and epoch <= self.measured[-1][0]:
            raise ValueError(f"epoch: expected one after {self.measured[-1][0]}, got {epoch}")
        last = epoch == self.epochs - 1
        if epoch % self.every and not last:
            return
        self.measured.append((epoch, value))
        self._average(last)

    def _average(self, last: bool) -> None:
        """Add the local averages that the newest measurement completes: at the end, all."""
        half, count = self.window // 2, len(self.measured)
        values = [value for _, value in self.measured]
        for i in range(len(self.local_average), count if last else max(count - half, 0)):
            around = values[max(0, i - half) : i + half + 1]
            self.local_average.append(sum(around) / len(around))
            if self.rule == "paper" or not last:
                self._decide(i)

    def _decide(self, i: int) -> None:
        before = i - self.delta
        if self.stop_epoch is not None or before < 0:
            return
        epoch = self.measured[before][0]
        if epoch < self.start_epoch:
            return
        if _grew(self.local_average[before], self.local_average[i], self.factor):
            self.stop_epoch = epoch

    def rolled_back(self, epoch: int) -> EigenvalueTrace:
        """Return the trace as it was at the end of an epoch."""
        return self.replayed([pair for pair in self.measured if pair[0] <= epoch])

    def replayed(self, measured: Sequence[tuple[int, float]]) -> EigenvalueTrace:
        """Return a trace of the same rule that has taken these measurements."""
        trace = EigenvalueTrace(
            self.window, self.every, self.epochs, self.factor, self.delta, self.start_epoch
        )
        trace.rule = self.rule
        for epoch, value in measured:
            trace.update(epoch, value)
        return trace

    @property
    def lag(self) -> int:
        """Epochs from an epoch to the one whose measurement can make it the stop epoch."""
        return (self.delta + self.window // 2) * self.every


def _grew(before: float, now: float, factor: float) -> bool:
    """Whether now / before > factor, as floating point has it for a zero."""
    if before == 0.0:
        return now > 0.0
    return now / before > factor
