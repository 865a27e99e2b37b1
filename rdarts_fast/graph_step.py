"""A search step that is recorded once and replayed.

On a GPU a step is some thousand launches, and starting them takes longer than running them. A CUDA
graph has them started together. What it replays reads and writes the same memory each time, and
nothing in it may wait for the device. So what differs from step to step lies in tensors that stay
where they are: the rows of the two batches, the rate, drop path's and cutout's probability, and the
clock that the draws count from. What a step tells stays on the device as well, until it is read:
the epoch's sums, and the first loss or norm that is not finite.

    first step of its shape    run as it is, which loads every kernel and makes optimiser states
    second                     recorded, then replayed
    each later one             replayed

A shape of its own has the epoch's last batch, and a step with drop path or cutout. Without a
recording all of this runs on a CPU too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rdarts_fast import training
from rdarts_fast.config import SearchConfig
from rdarts_fast.draws import Draws, new_clock, set_clock
from rdarts_fast.metrics import Outcome
from rdarts_fast.recording import CudaGraphs, Recorder
from rdarts_fast.run_dir import RunDir
from rdarts_fast.search_state import SearchState
from rdarts_fast.tasks import Task

READ_EVERY = 50  # steps: how late a loss that is not finite is found
PLAIN, GRAPH = "one by one", "by CUDA graph"

Shape = tuple[torch.Size, torch.Size, bool, bool]  # of the rows; whether drop path, whether cutout


@dataclass(frozen=True)
class StepInput:
    """What a step is a function of beside the search's state. Numbers may be tensors, [], on the
    device, but not zeros.
    """

    rows: Tensor  # [B], the weights' batch
    validation_rows: Tensor  # [B], the alphas'
    draws: Draws
    rate: float | Tensor
    cutout: float | Tensor


class Tell(Protocol):
    """Where a step leaves what others want to know of it."""

    def check(self, value: Tensor, name: str) -> None:
        """Take a loss or a norm. Raises UserError where it is not finite, at once or when read."""

    def add(self, outcome: Outcome) -> None:
        """Take the outcome of the weights' batch."""


Step = Callable[[StepInput, Tell], None]


class Taker(Protocol):
    """What takes steps."""

    def __call__(self, given: StepInput) -> None: ...

    def read(self) -> None:
        """Bring the state's sums up to date. Raises UserError where something was not finite."""


def kind(settings: SearchConfig, task: Task, device: torch.device) -> str:
    """Return how steps are taken, PLAIN or GRAPH."""
    return GRAPH if settings.graph and device.type == "cuda" and task.fixed_shapes else PLAIN


class PlainSteps:
    """Each step as it is; what it tells is read at once."""

    def __init__(self, step: Step, state: SearchState, run: RunDir) -> None:
        self._step, self._state, self._run = step, state, run

    def __call__(self, given: StepInput) -> None:
        self._step(given, self)

    def check(self, value: Tensor, name: str) -> None:
        training.check_finite(value, name, self._state.epoch, self._state.step, self._run)

    def add(self, outcome: Outcome) -> None:
        self._state.sums.add(outcome)

    def read(self) -> None:
        """There is nothing left to read."""


class Telling:
    """What steps tell, kept on the device until it is read; the memory stays where it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.batch = self._number(0, torch.int64)  # that of the step, within the epoch
        self._first: dict[str, tuple[Tensor, Tensor]] = {}  # name -> first bad batch or -1, value
        self.sums: dict[str, Tensor] = {}

    def _number(self, value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((), value, dtype=dtype, device=self._device)

    def check(self, value: Tensor, name: str) -> None:
        if name not in self._first:
            self._first[name] = self._number(-1, torch.int64), self._number(0.0)
        (batch, bad), number = self._first[name], value.detach().double()
        found = torch.isfinite(number).logical_not_() & (batch < 0)
        batch.copy_(torch.where(found, self.batch, batch))
        bad.copy_(torch.where(found, number, bad))

    def add(self, outcome: Outcome) -> None:
        found = {"loss": outcome.loss.double() * outcome.items, "score": outcome.score}
        for name, value in {**found, **outcome.more}.items():
            self._sum(name).add_(value)
        self._sum("items").add_(outcome.items)

    def _sum(self, name: str) -> Tensor:
        if name not in self.sums:
            self.sums[name] = self._number(0.0)
        return self.sums[name]

    def set_sums(self, values: dict[str, float]) -> None:
        """Go on with sums; those that are not named begin at 0."""
        for name in {**self.sums, **values}:
            self._sum(name).fill_(values.get(name, 0.0))

    def first_bad(self) -> tuple[int, str, float] | None:
        """Return batch, name and value of the first that was not finite, and forget it."""
        if not self._first:
            return None
        batches = torch.stack([batch for batch, _ in self._first.values()]).tolist()
        found = [(b, i) for i, b in enumerate(batches) if b >= 0]  # in a step's own order
        if not found:
            return None
        batch, i = min(found)
        name = list(self._first)[i]
        value = float(self._first[name][1])
        for first, _ in self._first.values():
            first.fill_(-1)
        return batch, name, value


class StaticSteps:
    """Steps on memory that stays where it is; `_run` says how."""

    def __init__(self, step: Step, state: SearchState, run: RunDir) -> None:
        self._step, self._state, self._run_dir = step, state, run
        parameter = next(state.supernet.parameters())
        self._device = parameter.device
        self._telling = Telling(self._device)
        self._clock = new_clock(self._device)
        self._rate = torch.zeros((), dtype=parameter.dtype, device=self._device)
        self._cutout, self._drop_path = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._inputs: dict[Shape, StepInput] = {}
        self._branch: int | None = None
        self._sums: object = None  # of the state, as the device goes on with them
        self._unread = 0

    def __call__(self, given: StepInput) -> None:
        state = self._state
        if given.draws.branch != self._branch:  # a rollback brought other optimiser states
            self._branch = given.draws.branch
            self._forget()
        if self._sums is not state.sums:
            self._sums = state.sums
            self._telling.set_sums(state.sums.values)
        drop_path = state.supernet.drop_path_prob
        assert not isinstance(drop_path, Tensor) and not isinstance(given.cutout, Tensor)
        shape = (given.rows.shape, given.validation_rows.shape, drop_path > 0.0, given.cutout > 0.0)
        self._set(shape, given)
        with self._on_device():
            self._run(shape)
        self._unread += 1
        if self._unread >= READ_EVERY:
            self.read()

    def read(self) -> None:
        """Bring the state's sums up to date. Raises UserError where something was not finite."""
        self._unread = 0
        if self._sums is not self._state.sums:
            return
        bad = self._telling.first_bad()
        if bad is not None:
            batch, name, value = bad
            raise training.not_finite(value, name, self._state.epoch, batch, self._run_dir)
        names = list(self._telling.sums)
        values = torch.stack([self._telling.sums[name] for name in names]).tolist()
        self._state.sums.values.update(zip(names, values, strict=True))

    def _set(self, shape: Shape, given: StepInput) -> None:
        """Write what the step differs by."""
        if shape not in self._inputs:
            self._inputs[shape] = StepInput(
                torch.empty_like(given.rows, device=self._device),
                torch.empty_like(given.validation_rows, device=self._device),
                given.draws.at(step=0, branch=0, clock=self._clock),
                self._rate,
                self._cutout if shape[3] else 0.0,
            )
        fixed = self._inputs[shape]
        fixed.rows.copy_(given.rows, non_blocking=True)
        fixed.validation_rows.copy_(given.validation_rows, non_blocking=True)
        set_clock(self._clock, given.draws.step, given.draws.branch)
        self._rate.fill_(given.rate)
        self._cutout.fill_(given.cutout)
        self._drop_path.fill_(self._state.supernet.drop_path_prob)
        self._telling.batch.fill_(self._state.step)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Let the state have drop path's probability and the rate in tensors, inside."""
        state = self._state
        drop_path, rate = (
            state.supernet.drop_path_prob,
            state.weight_optimizer.param_groups[0]["lr"],
        )
        if drop_path > 0.0:
            state.supernet.drop_path_prob = self._drop_path
        try:
            yield
        finally:
            state.supernet.drop_path_prob = drop_path
            training.set_learning_rate(state.weight_optimizer, rate)

    def _run(self, shape: Shape) -> None:
        """Take the step of `_inputs[shape]`."""
        self._step(self._inputs[shape], self._telling)

    def _forget(self) -> None:
        """The state's tensors are others now."""


class RecordedSteps(StaticSteps):
    """Those, recorded and replayed. recorder: makes a new one."""

    def __init__(
        self, step: Step, state: SearchState, run: RunDir, recorder: Callable[[], Recorder]
    ) -> None:
        super().__init__(step, state, run)
        self._new_recorder, self._recorder = recorder, recorder()
        self._replays: dict[Shape, Callable[[], None] | None] = {}  # None: to be recorded

    def _run(self, shape: Shape) -> None:
        function = functools.partial(super()._run, shape)
        if shape not in self._replays:
            self._recorder.prepare(function)
            self._replays[shape] = None
            return
        replay = self._replays[shape]
        if replay is None:
            replay = self._replays[shape] = self._recorder.record(function)
        replay()

    def _forget(self) -> None:
        self._replays.clear()
        self._recorder = self._new_recorder()  # memory that no graph has any more is not used again


def taker(step: Step, how: str, state: SearchState, run: RunDir) -> Taker:
    """Return what takes steps, `how` being PLAIN or GRAPH."""
    if how == PLAIN:
        return PlainSteps(step, state, run)
    device = next(state.supernet.parameters()).device
    return RecordedSteps(step, state, run, functools.partial(CudaGraphs, device))
