"""What is recorded once and replayed: a function whose tensors stay where they are, in which
nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """What records a function of nothing, on memory that stays where it is."""

    def prepare(self, function: Callable[[], None]) -> None:
        """Run the function, for the first time."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what runs the function from now on; it does not run yet."""


class CudaGraphs:
    """CUDA graphs on a device. They share memory, in which none leaves anything for another."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._memory = device, torch.cuda.graph_pool_handle()

    def prepare(self, function: Callable[[], None]) -> None:
        # On a stream of its own, as recording is: what autograd keeps of a parameter's stream must
        # not be the default one.
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                function()
            here.wait_stream(aside)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._memory):
            function()
        return graph.replay


class Recorded:
    """A function of one tensor that gives one like it, always of the shape of the first: run as it
    is at first, then recorded and replayed.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], recorder: Recorder) -> None:
        self._function, self._recorder = function, recorder
        self._given: Tensor | None = None
        self._found: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return function(x)."""
        if self._given is None or self._found is None:
            self._given, self._found = x.clone(), torch.empty_like(x)
            self._recorder.prepare(self._run)
            return self._found.clone()
        self._given.copy_(x)
        if self._replay is None:
            self._replay = self._recorder.record(self._run)
        self._replay()
        return self._found.clone()

    def _run(self) -> None:
        assert self._given is not None and self._found is not None
        self._found.copy_(self._function(self._given))
