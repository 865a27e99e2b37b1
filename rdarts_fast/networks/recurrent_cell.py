"""A window of the recurrent supernet's cell on kernels, its backward written out.

Work goes by source: all nodes' matrices that a state meets are one product, of which node i reads
its columns. Outside the products there is one launch a node (kernels/recurrent_node.py); the
weights' gradients are products over several words at once. A derivative of the gradients comes from
the same steps, put together of functions that torch differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.recurrent_node import (
    BATCH_NORM,
    CURVES,
    RUNNING_NORM,
    node_at,
    without_curves,
    workspace,
)
from rdarts_fast.networks.recurrent_composed import FIRST, Cell, differentiable_gradients

ROWS_TOGETHER = 1024  # that the weights' gradients sum in one product


def recurrent_cell(
    x: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    w0: Tensor,
    ws: Sequence[Tensor],
    mix: Tensor,
    norm: nn.BatchNorm1d,
    *,
    curved: bool,
) -> Tensor:
    """Return the hidden states after each of T words, [T, B, H].

    x: [T, B, E], as the cell sees them. hidden: [B, H]. mask: of hidden states, [B, H] or None, no
    gradient. w0: [E + H, 2 H]. ws: [H, 2 H] a node. mix: [edges, 4], the weights of CURVES on each
    edge. norm: moved as a BatchNorm1d without affine is, once for s_0 and once for each node a
    word. Differentiable, twice and more. Raises ValueError for one column in train mode.
    """
    if norm.training and x.shape[1] < 2:
        raise ValueError("a batch norm in train mode expects 2 columns of text or more, got 1")
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.momentum is not None
    kind = BATCH_NORM if norm.training else RUNNING_NORM
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked += len(x) * (1 + len(ws))
    cell = Cell(
        curved,
        kind,
        norm.eps,
        norm.momentum,
        norm.running_mean,
        norm.running_var,
        torch.is_grad_enabled(),
    )
    raw: Tensor = _Window.apply(cell, x, hidden, mask, w0, mix, *ws)
    return raw


class _Room:
    """A window's tensors, and where the launches find their rows. `kept` words have a place."""

    def __init__(self, x: Tensor, size: int, nodes: int, kept: int, masked: bool) -> None:
        batch = x.shape[1]
        self.batch, self.size, self.nodes, self.kept = batch, size, nodes, kept
        self.states = _empty(x, nodes + 1, kept, batch, size)
        self.masked = _empty(x, nodes, kept, batch, size) if masked else None
        self.gates = [_empty(x, kept, batch, (nodes - j) * 2 * size) for j in range(nodes)]
        shape = (kept, nodes + 1, 2, size)
        self.statistics = torch.empty(shape, dtype=torch.float64, device=x.device)
        self.width = x.element_size()

    def tensors(self) -> list[Tensor]:
        """Return all of them, in order."""
        masked = [] if self.masked is None else [self.masked]
        return [self.states, self.statistics, *self.gates, *masked]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Room:
        """Return the room of what `tensors` gave."""
        room = cls.__new__(cls)
        room.states, room.statistics, *rest = tensors
        nodes, room.kept, room.batch, room.size = room.states.shape
        room.nodes = nodes - 1
        room.gates, masked = rest[: room.nodes], rest[room.nodes :]
        room.masked = masked[0] if masked else None
        room.width = room.states.element_size()
        return room

    def seen(self, j: int, t: int) -> Tensor:
        """What the matrices meet of state j."""
        return (self.states if self.masked is None else self.masked)[j, t]

    def state(self, j: int, t: int) -> int:
        """The address of state j."""
        plane = self.batch * self.size * self.width
        return self.states.data_ptr() + (j * self.kept + t) * plane

    def mean_at(self, j: int, t: int) -> int:
        """The address of state j's mean and rstd."""
        return self.statistics.data_ptr() + (t * (self.nodes + 1) + j) * 2 * self.size * 8

    def state_rows(self, count: int, t: int) -> list[int]:
        """The rows of the first `count` states."""
        return [number for j in range(count) for number in (self.state(j, t), self.size)]

    def gate_rows(self, gates: Sequence[Tensor], node: int, t: int) -> list[int]:
        """The rows that `node` reads of the products of all states before it."""
        found = []
        for j in range(node + 1):
            columns = (self.nodes - j) * 2 * self.size
            at = t * self.batch * columns + (node - j) * 2 * self.size
            found += [gates[j].data_ptr() + at * self.width, columns]
        return found


def _empty(like: Tensor, *shape: int) -> Tensor:
    whole = [*shape, *([1] * (4 - len(shape)))]
    return array.empty(like, whole, torch.contiguous_format).view(shape)


def _mixes(mix: Tensor) -> Tensor:
    """Return [1 + edges, 4]: s_0's, then the edges'."""
    return torch.cat([mix.new_tensor([FIRST]), mix])


class _Window(Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        x: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        w0: Tensor,
        mix: Tensor,
        *ws: Tensor,
    ) -> Tensor:
        steps, batch, embedded = x.shape
        size, nodes = hidden.shape[1], len(ws)
        mask, hidden = array.contiguous(mask), hidden.contiguous()
        mixes, wall = _mixes(mix), torch.cat(ws, dim=1)
        room = _Room(x, size, nodes, steps if cell.keeps else 1, mask is not None)
        gates0 = (x.reshape(-1, embedded) @ w0[:embedded]).view(steps, batch, 2 * size)
        raw, before = torch.empty_like(gates0[..., :size].contiguous()), hidden
        space = workspace(hidden, nodes)
        launches = _Forward(cell, room, mixes, mask, space)
        for step in range(steps):
            t = step if cell.keeps else 0
            seen = before if mask is None else before * mask
            gates0[step].addmm_(seen, w0[embedded:])
            launches.first(before, gates0[step], t)
            for i in range(nodes):
                torch.mm(room.seen(i, t), wall[:, 2 * size * i :], out=room.gates[i][t])
                launches.node(i, t)
            torch.mean(room.states[1:, t], dim=0, out=raw[step])
            before = raw[step]
        ctx.cell, ctx.words = cell, len(ws)
        ctx.save_for_backward(
            x, hidden, mask, w0, mix, *ws, raw, gates0, *(room.tensors() if cell.keeps else ())
        )
        return raw

    @staticmethod
    def backward(ctx: Any, graw: Tensor) -> Any:
        x, hidden, mask, w0, mix, *rest = ctx.saved_tensors
        ws, (raw, gates0), tensors = rest[: ctx.words], rest[ctx.words :][:2], rest[ctx.words + 2 :]
        room, needs = _Room.of(tensors), ctx.needs_input_grad[1:]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            found = differentiable_gradients(
                ctx.cell, (x, hidden, w0, mix, *ws), mask, graw, room.statistics[0, 0], needs
            )
        else:
            inputs = x, hidden, mask, w0, mix, ws
            found = _Backward(ctx.cell, room, inputs, raw, gates0, graw, needs).run()
        dx, dhidden, dw0, dmix, *dws = found
        return None, dx, dhidden, None, dw0, dmix, *dws


class _Forward:
    """The launches of a window's forward pass."""

    def __init__(
        self, cell: Cell, room: _Room, mixes: Tensor, mask: Tensor | None, space: Tensor
    ) -> None:
        self.cell, self.room, self.mixes, self.space = cell, room, mixes, space
        self.mask = 0 if mask is None else mask.data_ptr()
        mean, var = cell.mean.data_ptr(), cell.var.data_ptr()
        self.norm = (cell.norm, cell.eps, cell.momentum, mean, var)
        self.place = native.place(mixes.device)

    def first(self, hidden: Tensor, gates: Tensor, t: int) -> None:
        """s_0."""
        size = self.room.size
        states, rows = [hidden.data_ptr(), size], [gates.data_ptr(), 2 * size]
        self._launch(0, t, 0, True, states, rows)

    def node(self, i: int, t: int) -> None:
        """Node i, which is state i + 1."""
        room = self.room
        states, gates = room.state_rows(i + 1, t), room.gate_rows(room.gates, i, t)
        self._launch(i + 1, t, 1 + i * (i + 1) // 2, self.cell.curved, states, gates)

    def _launch(
        self, state: int, t: int, row: int, curved: bool, states: list[int], gates: list[int]
    ) -> None:
        room = self.room
        mix = self.mixes.data_ptr() + row * len(CURVES) * room.width
        masked = 0
        if room.masked is not None and state < room.nodes:
            masked = room.masked[state, t].data_ptr()
        room_of = room.mean_at(state, t), self.space.data_ptr()
        native.extension.recurrent_node(
            node_at(room.states[0, 0], mix, curved),
            states,
            gates,
            self.norm,
            (self.mask, room.state(state, t), masked, *room_of),
            self.place,
        )


class _Backward:
    """A window's gradients, word by word from the last."""

    def __init__(
        self,
        cell: Cell,
        room: _Room,
        inputs: tuple[Any, ...],
        raw: Tensor,
        gates0: Tensor,
        graw: Tensor,
        needs: Sequence[bool],
    ) -> None:
        self.cell, self.room, self.raw, self.gates0 = cell, room, raw, gates0
        self.x, self.hidden, self.mask, self.w0, self.mix, self.ws = inputs
        self.graw, self.needs = graw, needs
        self.wall, self.mixes = torch.cat(self.ws, dim=1), _mixes(self.mix)
        batch, size, nodes = room.batch, room.size, room.nodes
        self.weighs = any(needs[5:])
        self.together = min(len(raw), max(1, ROWS_TOGETHER // batch)) if self.weighs else 1
        # The gradients of the products, of as many words as go into one of the weights'.
        self.dgates = [
            _empty(raw, self.together, batch, (nodes - j) * 2 * size) for j in range(nodes)
        ]
        self.dgates0 = torch.empty_like(gates0)
        self.dwall = torch.zeros_like(self.wall) if self.weighs else None
        self.dstates = _empty(raw, nodes, batch, size)
        self.dseen, self.total, self.dall, self.dhidden = (
            torch.empty_like(raw[0]) for _ in range(4)
        )
        shape = (len(raw), len(self.mixes), len(CURVES))
        self.dmix = torch.empty(shape, dtype=torch.float64, device=raw.device)
        self.space = workspace(raw[0], nodes)
        self.place = native.place(raw.device)

    def run(self) -> Sequence[Tensor | None]:
        """Return the gradients of x, hidden, w0, mix and ws."""
        embedded, steps = self.x.shape[2], len(self.raw)
        carried = torch.zeros_like(self.hidden)
        wh = self.w0[embedded:].t()
        for t in reversed(range(steps)):
            torch.add(self.graw[t], carried, out=self.dall)
            self._nodes(t)
            torch.mm(self.dgates0[t], wh, out=self.dseen)
            if self.mask is not None:
                self.dseen *= self.mask
            torch.add(self.dhidden, self.dseen, out=carried)
            if self.weighs and t % self.together == 0:
                self._add_weights(t)
        dgates0 = self.dgates0.flatten(0, 1)
        dx = dw0 = None
        if self.needs[0]:
            dx = (dgates0 @ self.w0[:embedded].t()).view_as(self.x)
        if self.needs[3]:
            before = torch.cat([self.hidden[None], self.raw[:-1]])
            seen = before if self.mask is None else before * self.mask
            dw0 = torch.cat([self.x, seen], dim=2).flatten(0, 1).t() @ dgates0
        dmix = self.dmix[:, 1:].sum(dim=0).to(self.mix.dtype)
        dmix = dmix if self.cell.curved else without_curves(dmix)
        dws = [None] * len(self.ws) if self.dwall is None else self._parts(self.dwall)
        return dx, carried, dw0, dmix, *dws

    def _parts(self, dwall: Tensor) -> Sequence[Tensor]:
        return [part.contiguous() for part in dwall.split(2 * self.room.size, dim=1)]

    def _nodes(self, t: int) -> None:
        room, size = self.room, self.room.size
        slot = t % self.together
        for i in reversed(range(room.nodes)):  # node i is state i + 1
            last = i + 1 == room.nodes
            if not last:
                self._product(i + 1, slot)
            states, gates = room.state_rows(i + 1, t), room.gate_rows(room.gates, i, t)
            dgates = room.gate_rows(self.dgates, i, slot)
            dstates = [n for j in range(i + 1) for n in (self._dstate(j), size)]
            row = 1 + i * (i + 1) // 2
            incoming = (0, 0) if last else (self._dstate(i + 1), self.dseen.data_ptr())
            self._launch(i + 1, t, row, states, gates, incoming, not last, dstates, dgates)
        self._product(0, slot)
        before = self.raw[t - 1] if t > 0 else self.hidden
        states, gates = [before.data_ptr(), size], [self.gates0[t].data_ptr(), 2 * size]
        dstates, dgates = [self.dhidden.data_ptr(), size], [self.dgates0[t].data_ptr(), 2 * size]
        incoming = self._dstate(0), self.dseen.data_ptr()
        self._launch(0, t, 0, states, gates, incoming, False, dstates, dgates)

    def _dstate(self, j: int) -> int:
        return self.dstates.data_ptr() + j * self.room.batch * self.room.size * self.room.width

    def _product(self, j: int, slot: int) -> None:
        """The gradient of what the matrices met of state j."""
        columns = self.wall[:, 2 * self.room.size * j :]
        torch.mm(self.dgates[j][slot], columns.t(), out=self.dseen)

    def _launch(
        self,
        state: int,
        t: int,
        row: int,
        states: list[int],
        gates: list[int],
        incoming: tuple[int, int],
        adds: bool,
        dstates: list[int],
        dgates: list[int],
    ) -> None:
        room, curves = self.room, len(CURVES)
        mix = self.mixes.data_ptr() + row * curves * room.width
        own = room.mean_at(state, t), room.state(state, t)
        mask = 0 if self.mask is None else self.mask.data_ptr()
        dall = self.dall.data_ptr() if state > 0 else 0
        dmix = self.dmix.data_ptr() + (t * len(self.mixes) + row) * curves * 8
        native.extension.recurrent_node_backward(
            node_at(self.total, mix, self.cell.curved or state == 0),
            states,
            gates,
            self.cell.norm,
            1.0 / room.nodes,
            (*own, *incoming, mask, dall, self.total.data_ptr(), dmix, self.space.data_ptr()),
            adds,
            dstates,
            dgates,
            self.place,
        )

    def _add_weights(self, t: int) -> None:
        """Add the weights' gradients of the words whose products' gradients lie there."""
        assert self.dwall is not None
        room = self.room
        count = min(self.together, len(self.raw) - t)
        seen = room.states if room.masked is None else room.masked
        for j, dgates in enumerate(self.dgates):
            met = seen[j, t : t + count].reshape(-1, room.size)
            columns = self.dwall[:, 2 * room.size * j :]
            columns.addmm_(met.t(), dgates[:count].flatten(0, 1))
