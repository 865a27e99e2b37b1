"""Runs that share the GPUs of this machine, each in a process of its own that sees one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
Item = TypeVar("Item")


def visible_gpus() -> list[str]:
    """Return what the GPUs that this process may use are called in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",")]
    return named[:count] if any(named) else [str(i) for i in range(count)]


class Slots:
    """Places for so many runs on each GPU; the GPU with the fewest is next, the first at a tie."""

    def __init__(self, gpus: Sequence[str], each: int) -> None:
        self._each, self._runs = each, dict.fromkeys(gpus, 0)

    @property
    def free(self) -> bool:
        """Whether there is a place."""
        return min(self._runs.values(), default=self._each) < self._each

    def take(self) -> str:
        """Return the GPU of a place that is now taken."""
        gpu = min(self._runs, key=self._runs.__getitem__)
        self._runs[gpu] += 1
        return gpu

    def give(self, gpu: str) -> None:
        """Give a place back."""
        self._runs[gpu] -= 1


@dataclass(frozen=True)
class Worker(Generic[Item]):
    """A process at work on an item."""

    item: Item
    gpu: str
    process: BaseProcess
    answer: Connection  # that its result comes from, or the end of it


class Workers(Generic[Item]):
    """The processes that are at work."""

    def __init__(self, slots: Slots, threads: int) -> None:
        self._slots, self._threads = slots, threads
        self._context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._working: dict[Connection, Worker[Item]] = {}

    def __len__(self) -> int:
        return len(self._working)

    def start(self, item: Item, work: Callable[..., str | None], *arguments: object) -> None:
        """Let a process of its own do work(*arguments), which returns an error or None."""
        gpu = self._slots.take()
        answer, given = self._context.Pipe(duplex=False)
        about = (gpu, self._threads, given, work, arguments)
        process = self._context.Process(target=_in_process, args=about)
        process.start()
        given.close()  # ours; the end of the process closes the last
        self._working[answer] = Worker(item, gpu, process, answer)

    def ended(self) -> list[tuple[Item, str | None, bool]]:
        """Wait, and return what each that has ended worked on, its error and whether it died."""
        found = []
        for answer in wait(list(self._working)):
            assert isinstance(answer, Connection)
            worker = self._working.pop(answer)
            try:
                error, died = answer.recv(), False
            except EOFError:
                error, died = None, True
            worker.process.join()
            answer.close()
            self._slots.give(worker.gpu)
            if died:
                error = f"its process died (exit code {worker.process.exitcode})"
            found.append((worker.item, error, died))
        return found

    def stop(self, patience: float) -> None:
        """Interrupt all as Ctrl-C would, wait until they end, and kill the rest."""
        for worker in self._working.values():
            if worker.process.pid is not None and worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGINT)
        for worker in self._working.values():
            worker.process.join(patience)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _in_process(
    gpu: str,
    threads: int,
    answer: Connection,
    work: Callable[..., str | None],
    arguments: Sequence[object],
) -> None:
    os.setsid()  # Ctrl-C is for the fleet, which passes it on once
    os.environ[VISIBLE] = gpu  # before CUDA is first used
    torch.set_num_threads(threads)
    answer.send(work(*arguments))
