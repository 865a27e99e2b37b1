"""The one stopwatch: callables run in turn, and the peak memory of a case in a fresh process.

    ours, theirs = in_turn([f, g], torch.device("cpu"))
    theirs.median / ours.median                       # how many times as fast f is
    peak_mb(functools.partial(prepare, "s4"), "cpu")  # prepare("s4") returns the callable

In turn, because a machine that others use is slow at times: then it is slow for both. With several
threads that is not enough, since waiting for a thread that does not run costs most where there are
many small operations: look at the quartiles.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
MB = 1e6


@dataclass(frozen=True)
class Times:
    """How long each run of one callable took, in milliseconds."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile; half of the runs lie between."""
        if len(self.ms) < 2:
            return self.ms[0], self.ms[0]
        low, _, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return low, high


def in_turn(
    calls: Sequence[Call],
    device: torch.device,
    *,
    seconds: float = 10.0,
    least: int = 5,
    warm_up: int = 1,
) -> list[Times]:
    """Run all `calls` once a round and return the times of each.

    First `warm_up` rounds that do not count, then rounds until `seconds` have passed in all, but
    not fewer than `least`. On a GPU the times are of CUDA events around the call.
    """
    for _ in range(warm_up):
        for call in calls:
            once_ms(call, device)
    found: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    while len(found[0]) < least or time.perf_counter() - started < seconds:
        for call, times in zip(calls, found, strict=True):
            times.append(once_ms(call, device))
    return [Times(tuple(times)) for times in found]


def once_ms(call: Call, device: torch.device) -> float:
    """Return how long one run takes, in milliseconds."""
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def peak_mb(prepare: Callable[[], Call], device: torch.device | str) -> float:
    """Return the peak memory of prepare()'s callable, in MB (10^6 bytes), in a fresh process: what
    that process held after its imports is taken off.

    prepare: can be pickled (a function of a module, or functools.partial of one).
    """
    with fresh_process(_report_peak, prepare, torch.device(device)) as connection:
        return float(receive(connection))


def _report_peak(connection: Connection, prepare: Callable[[], Call], device: torch.device) -> None:
    imported = resident_mb()  # what `prepare` lives in was imported when it was unpickled
    call = prepare()
    call()
    connection.send(peak_mb_here(call, device, imported))


def peak_mb_here(call: Call, device: torch.device, imported: float) -> float:
    """Return the peak of one more run in this process, in MB, less `imported`; on a GPU only
    torch's tensors there count. Run `call` before, so that what it makes once (momenta, code) is
    there.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MB
    # Linux's own ru_maxrss would not do: a new process inherits its parent's, and it cannot be
    # set back. 5 sets back the high-water mark that VmHWM shows (man proc_pid_clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status_mb("VmHWM") - imported


def resident_mb() -> float:
    """Return the memory this process holds, in MB."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(name + ":"):
            return int(row.split()[1]) * 1024 / MB
    raise RuntimeError(f"/proc/self/status has no {name}")


@contextlib.contextmanager
def fresh_process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run target(connection, *arguments) in a process that shares nothing with this one, and yield
    the other end of the connection; on leaving, the process and all that it started are killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, theirs, *arguments))
    # The process inherits the mask: Ctrl-C is for this one alone, which then kills it. And none
    # comes between its start and the try. Python's tracker of resources, which the first start
    # starts too, lets SIGINT through again: it comes before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    theirs.close()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield ours
        process.join(10.0)  # all is received: it may end by itself
    finally:
        _kill(process.pid)
        process.join()
        ours.close()


def _run(target: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    os.setsid()  # a group of its own, which can be killed whole
    try:
        target(connection, *arguments)
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _kill(process: int | None) -> None:
    assert process is not None
    for kill in (os.killpg, os.kill):  # no group yet where it is still importing
        with contextlib.suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)


def receive(connection: Connection, timeout: float | None = None) -> Any:
    """Return what the other process sends next.

    Raises TimeoutError after `timeout` seconds, RuntimeError where it failed or died.
    """
    if not connection.poll(timeout):
        raise TimeoutError(f"nothing came within {timeout:.0f} s")
    try:
        message = connection.recv()
    except EOFError:
        raise RuntimeError("the measuring process was killed: is there enough memory?") from None
    if isinstance(message, Exception):
        raise message
    return message
