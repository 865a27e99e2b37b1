"""bfloat16 storage on the CPU, to check what it does to a result: inside `emulated_bfloat16()` the
CPU's kernels take bfloat16 tensors as those of a GPU do.

A call works on float32 copies, and what it writes is rounded as it is stored. The stages of a
separable convolution are one call each in the forward pass, so that a stage reads what the one
before it stored; backward, the gradients between two stages are not rounded. For checks: slower
than float32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.kernels.array import DTYPES

_BF16, _FLOAT32 = DTYPES[torch.bfloat16], DTYPES[torch.float32]
_WORDS = 5  # of a tensor in a flat list: its address and four strides


class Tensors(NamedTuple):
    """Where a call has tensors: the places of the list and of their shape among its arguments, and
    which of so many are written.
    """

    at: int
    shape: int
    written: Callable[[int], range]


def _none(count: int) -> range:
    return range(0)


def _first(count: int) -> range:
    return range(1)


def _first_two(count: int) -> range:
    return range(2)


def _all(count: int) -> range:
    return range(count)


def _last_half(count: int) -> range:
    return range(count - count // 2, count)


CALLS: Mapping[str, Sequence[Tensors]] = {
    "node_sum": [Tensors(2, 1, _first)],
    "affine": [Tensors(2, 1, _last_half)],
    "channel_sums": [Tensors(2, 1, _none)],
    "node_sum_dq": [Tensors(2, 1, _none)],
    "normalized_sum": [Tensors(2, 1, _first)],
    "normalized_sum_backward": [Tensors(2, 1, _last_half)],
    "node": [Tensors(2, 1, _first)],
    "node_backward": [Tensors(2, 1, _none)],
    "norms_backward": [Tensors(2, 1, _none)],
    "node_sums": [Tensors(2, 1, _first_two)],
    "scaled": [Tensors(2, 1, _last_half)],
    "batch_norms": [],
    "sep_stage": [Tensors(2, 1, _none), Tensors(4, 3, _all)],
    "sep_stage_backward": [Tensors(2, 1, _none), Tensors(4, 3, _none), Tensors(10, 1, _all)],
}


@contextmanager
def emulated_bfloat16() -> Iterator[None]:
    """Let the CPU's kernels take bfloat16 tensors inside the block."""
    before = native.extension
    native.extension = cast(Any, _Emulated(before))
    try:
        yield
    finally:
        native.extension = before


class _Copies:
    """Float32 copies of the bfloat16 tensors of one call; a tensor that stands there twice has
    one.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._written: set[tuple[int, ...]] = set()

    def of(
        self, shape: Sequence[int], flat: Sequence[int], written: Sequence[int] = ()
    ) -> list[int]:
        """Return the flat list of the copies; `written` counts tensors."""
        found: list[int] = []
        for k in range(len(flat) // _WORDS):
            words = tuple(flat[_WORDS * k : _WORDS * (k + 1)])
            if words[0] == 0 or math.prod(shape) == 0:
                found += words
                continue
            key = (*shape, *words)
            if key not in self._of:
                tensor = _at(words[0], shape, words[1:])
                self._of[key] = tensor, tensor.float()
            if k in written:
                self._written.add(key)
            wide = self._of[key][1]
            found += (wide.data_ptr(), *wide.stride())
        return found

    def store(self) -> None:
        """Round what was written."""
        for key in self._written:
            tensor, wide = self._of[key]
            tensor.copy_(wide)


def _at(address: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Return the bfloat16 tensor that lies there."""
    count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (2 * count)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, strides)


class _Emulated:
    """The extension, with functions that take bfloat16 too."""

    emulates_bfloat16 = True

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._extension, name)
        if name not in CALLS:
            return function
        return lambda *arguments: self._call(function, CALLS[name], arguments)

    def _call(self, function: Any, lists: Sequence[Tensors], arguments: Sequence[Any]) -> None:
        if arguments[0] != _BF16:
            function(*arguments)
            return
        copies, given = _Copies(), [_FLOAT32, *arguments[1:]]
        for tensors in lists:
            flat = arguments[tensors.at]
            written = tensors.written(len(flat) // _WORDS)
            given[tensors.at] = copies.of(arguments[tensors.shape], flat, written)
        function(*given)
        copies.store()

    def pool(
        self, dtype: int, shape: Sequence[int], stride: int, flat: Sequence[int], *rest: Any
    ) -> None:
        """x, maximum, mean and, in bytes, where the maxima lie."""
        self._pool("pool", dtype, shape, stride, flat, rest, outer=())

    def pool_tangent(
        self, dtype: int, shape: Sequence[int], stride: int, flat: Sequence[int], *rest: Any
    ) -> None:
        """As pool."""
        self._pool("pool_tangent", dtype, shape, stride, flat, rest, outer=())

    def pool_adjoint(
        self, dtype: int, shape: Sequence[int], stride: int, flat: Sequence[int], *rest: Any
    ) -> None:
        """As pool; x is what is written."""
        self._pool("pool_adjoint", dtype, shape, stride, flat, rest, outer=(0,))

    def _pool(
        self,
        name: str,
        dtype: int,
        shape: Sequence[int],
        stride: int,
        flat: Sequence[int],
        rest: Sequence[Any],
        outer: Sequence[int],
    ) -> None:
        function = getattr(self._extension, name)
        if dtype != _BF16:
            function(dtype, shape, stride, flat, *rest)
            return
        copies, (n, c, h, w) = _Copies(), shape
        pooled = (n, c, -(-h // stride), -(-w // stride))
        x = copies.of(shape, flat[:_WORDS], outer)
        two = copies.of(pooled, flat[_WORDS : 3 * _WORDS], () if outer else (0, 1))
        function(_FLOAT32, shape, stride, [*x, *two, *flat[3 * _WORDS :]], *rest)
        copies.store()

    def mixing(self, dtype: int, calls: Sequence[Any], place: Any) -> None:
        """Each call's sources, results and rows."""
        copies = _Copies()
        if dtype == _BF16:
            calls = [
                (_sources(copies, at), copies.of(at[2], z, range(len(z) // _WORDS)), rows)
                for at, z, rows in calls
            ]
        self._extension.mixing(_FLOAT32 if dtype == _BF16 else dtype, calls, place)
        copies.store()

    def mixing_backward(self, dtype: int, calls: Sequence[Any], place: Any) -> None:
        """Each call's sources, gradients and z, and the gradients of the sources among others."""
        copies = _Copies()
        if dtype == _BF16:
            calls = [
                (
                    *(_sources(copies, at), copies.of(at[2], out), map_),
                    *(copies.of(at[0], dv, range(len(dv) // _WORDS)), *rest),
                )
                for at, out, map_, dv, *rest in calls
            ]
        self._extension.mixing_backward(_FLOAT32 if dtype == _BF16 else dtype, calls, place)
        copies.store()

    def stages(
        self,
        dtype: int,
        shape: Sequence[int],
        x: Sequence[int],
        stages: Sequence[Any],
        table: Any,
        rule: Any,
        maps: int,
        buffer: int,
        place: Any,
    ) -> None:
        """Stage by stage, each from what the one before it stored."""
        if dtype != _BF16:
            self._extension.stages(dtype, shape, x, stages, table, rule, maps, buffer, place)
            return
        edges, scale = len(x) // _WORDS, 0
        for out, z, geometry, weights, first, running in stages:
            size = edges * out[1]
            space = self._extension.stage_buffer(edges, shape, out, geometry, False, place)
            sums = torch.empty(space, dtype=torch.float64)
            shift = scale + 4 * edges * shape[1] if scale else 0
            at = (weights, scale, shift, sums.data_ptr(), place)
            self.sep_stage(dtype, shape, x, out, z, geometry, *at)
            rows = [n for e in range(edges) for n in (sums[e * out[1] :].data_ptr(), size)]
            self.batch_norms(_FLOAT32, out, table, first, rows, running, rule, place)
            _fill_map(maps, table, first, edges, out[1])
            shape, x, scale, maps = out, z, maps, maps + 8 * size

    def stages_backward(
        self,
        dtype: int,
        shape: Sequence[int],
        x: Sequence[int],
        stages: Sequence[Any],
        table: Any,
        maps: int,
        g: Sequence[int],
        between: Sequence[Sequence[int]],
        dv: Sequence[int],
        *rest: Any,
    ) -> None:
        """All stages in one call."""
        if dtype == _BF16:
            copies, count, shapes = _Copies(), len(dv) // _WORDS, [stage[0] for stage in stages]
            x = copies.of(shape, x)
            stages = [(s[0], copies.of(s[0], s[1]), *s[2:]) for s in stages]
            g, dv = copies.of(shapes[-1], g), copies.of(shape, dv, range(count))
            between = [copies.of(*pair) for pair in zip(shapes, between, strict=False)]
            given = (x, stages, table, maps, g, between, dv, *rest)
            self._extension.stages_backward(_FLOAT32, shape, *given)
            copies.store()
            return
        given = (x, stages, table, maps, g, between, dv, *rest)
        self._extension.stages_backward(dtype, shape, *given)


def _sources(copies: _Copies, at: Sequence[Any]) -> tuple[Any, ...]:
    """Return what both passes of a mixing take, with copies of its sources."""
    shape, x, *rest = at
    return (shape, copies.of(shape, x), *rest)


def _fill_map(at: int, table: Any, first: int, edges: int, channels: int) -> None:
    """Write scale and shift of rows of the table, [2, G, C] float32, to an address."""
    statistics, _, rows, _ = table
    size = edges * channels
    memory = (ctypes.c_double * (2 * rows * channels)).from_address(statistics)
    found = torch.frombuffer(memory, dtype=torch.float64).view(2, rows, channels)
    mean, rstd = found[:, first : first + edges]
    out = (ctypes.c_float * (2 * size)).from_address(at)
    map_ = torch.frombuffer(out, dtype=torch.float32).view(2, edges, channels)
    map_.copy_(torch.stack([rstd, -mean * rstd]))
