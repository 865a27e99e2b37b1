"""Launches of native functions, which on the CPU may wait for each other.

A kernel leaves the caches full of images, and the Python after it runs slower than it could. Inside
`together` Python goes on at once: launches wait, and run one after the other at the end, as on a
GPU's stream. What reads a result earlier asks for `run_waiting` first, and code of others' runs in
`at_once`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from rdarts_fast import native

Made = TypeVar("Made")


class _Queue(threading.local):
    calls: list[tuple[Any, tuple[Any, ...]]] | None = None  # None: launches do not wait

    def __init__(self) -> None:
        self.held: list[Tensor | None] = []  # what they read and write
        self.scratch: dict[Any, Any] = {}


_queue = _Queue()


def launch(name: str, *arguments: Any) -> None:
    """Run the native function of that name, or let it wait."""
    function = getattr(native.extension, name)
    if _queue.calls is None:
        function(*arguments)
    else:
        _queue.calls.append((function, arguments))


def hold(tensors: Iterable[Tensor | None]) -> None:
    """Keep tensors, whose addresses a launch takes, for as long as launches wait."""
    if _queue.calls is not None:
        _queue.held.extend(tensors)


def scratch(key: Any, make: Callable[[], Made]) -> Made:
    """Return make(): memory that a launch and no other code reads and writes, or what stays the
    same; launches that wait for each other share what has the same key.
    """
    if _queue.calls is None:
        return make()
    if key not in _queue.scratch:
        _queue.scratch[key] = make()
    made: Made = _queue.scratch[key]
    return made


def place_on(device: torch.device) -> Any:
    """Return native.place(device), of launches that wait for each other the same."""
    return scratch(("place", device), lambda: native.place(device))


def run_waiting() -> None:
    """Run the launches that wait."""
    calls = _queue.calls
    if not calls:
        return
    _queue.calls = None  # for what they launch themselves
    try:
        for function, arguments in calls:
            function(*arguments)
    finally:
        _queue.calls = []
        _queue.held.clear()


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Let launches on the CPU wait until the end of the block; an error drops them."""
    if device.type != "cpu":
        yield
        return
    with at_once():
        _queue.calls = []
        try:
            yield
            run_waiting()
        finally:
            _queue.calls = None
            _queue.held.clear()
            _queue.scratch.clear()


@contextmanager
def at_once() -> Iterator[None]:
    """Run the launches that wait, and those of the block as they come."""
    run_waiting()
    waited, _queue.calls = _queue.calls, None
    try:
        yield
    finally:
        _queue.calls = waited
