"""A recorder for a CPU: it notes the operators of torch and the calls of the native module that a
function makes, with the very tensors, and runs those again. Nothing of the function's Python is run
then, as in a CUDA graph: a number that Python worked out stays what it was when it was recorded.

It refuses what a CUDA graph cannot have: a value that comes to the host, and a tensor that comes
from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdarts_fast import native

aten = torch.ops.aten
REFUSED = (
    # they wait for a value
    *("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.masked_select"),
    *("aten._unique2", "aten.equal", "aten.is_nonzero", "aten.repeat_interleave.Tensor"),
    # they copy a number of the host
    *("aten.lift_fresh", "aten.lift", "aten.where.Scalar", "aten.scalar_tensor"),
)
UNFILLED = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided")


class FromHost(AssertionError):
    """A recorded function waited for the device, or copied to it."""


def in_adam_on_a_cpu() -> bool:
    """Whether torch's Adam is calling, which adds to steps on a CPU in a way of its own."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("optim/adam.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class Tape(TorchDispatchMode):
    """One recording. known: tensors that may be read without having been made in it."""

    def __init__(self, known: dict[int, Tensor], strict: bool) -> None:
        super().__init__()
        self.known, self.strict = known, strict
        self.entries: list[Callable[[], None]] = []
        self.alive: list[Any] = []  # so that no memory is used for something else

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, name = kwargs or {}, str(func)
        if self.strict and not in_adam_on_a_cpu():
            if name.startswith(REFUSED):
                raise FromHost(name)
            for tensor in tensors_of((args, kwargs)):
                if storage(tensor) not in self.known:
                    raise FromHost(f"{name} reads a tensor that was made on the host: {tensor}")
            if name.startswith("aten.index") and any(
                t.dtype == torch.bool for t in tensors_of(args[1])
            ):
                raise FromHost(f"{name} by flags")
        out = func(*args, **kwargs)
        for tensor in tensors_of((args, kwargs, out)):
            self.known[storage(tensor)] = tensor
        self.alive.append((args, kwargs, out))
        self.entries.append(lambda: again(func, args, kwargs, out))
        return out

    def note_call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function of the native module and note it."""
        self.entries.append(lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    def replay(self) -> None:
        with torch.no_grad():
            for entry in self.entries:
                entry()


def again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Run an operator once more, into what it gave before."""
    if str(func).startswith(UNFILLED):
        return
    new = func(*args, **kwargs)
    returns = func._schema.returns
    pairs = zip(tree_leaves(out), tree_leaves(new), strict=True)
    if any(r.alias_info is not None for r in returns):
        return  # in place, or a view of what has been made again
    for old, one in pairs:
        if isinstance(old, Tensor) and storage(old) != storage(one):
            old.copy_(one)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class NotedModule:
    """The native module; its calls are noted too."""

    def __init__(self, module: Any, tape: Tape) -> None:
        self._module, self._tape = module, tape

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, type) or name in ("build_info", "runnable_units", "workspace"):
            return found
        return lambda *args, **kwargs: self._tape.note_call(found, args, kwargs)


@contextmanager
def noting(tape: Tape) -> Iterator[None]:
    before = native.extension
    native.extension = NotedModule(before, tape)  # type: ignore[assignment]
    try:
        with tape:
            yield
    finally:
        native.extension = before


class Tapes:
    """A Recorder (rdarts_fast.recording) of tapes."""

    def __init__(self) -> None:
        self.known: dict[int, Tensor] = {}  # kept alive: no other tensor has their place
        self.counts = {"prepared": 0, "recorded": 0, "replayed": 0}

    def prepare(self, function: Callable[[], None]) -> None:
        self.counts["prepared"] += 1
        self.first = Tape(self.known, strict=False)
        with noting(self.first):
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.counts["recorded"] += 1
        tape = Tape(self.known, strict=True)
        with noting(tape):
            function()
        ran = [True]  # here recording runs the function, on a GPU it does not

        def replay() -> None:
            if ran:
                ran.clear()
                return
            self.counts["replayed"] += 1
            tape.replay()

        return replay
