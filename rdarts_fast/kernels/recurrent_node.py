"""A node of a recurrent cell (DARTS, appendix A.1.2): what it reads, all activations in one pass.

    node = sum over j of [ q_j s_j (1 - o_j) + o_j m_j ],     o_j = sigmoid(c_j)
    m_j  = sum over f of mix[j, f] f(u_j),                    q_j = sum over f of mix[j, f]

with f in CURVES: as in the published code the sum over j and f of mix[j, f] (s_j + o_j (f(u_j) -
s_j)). It, its backward and the backward's derivative are one pass each. What launches them for a
whole cell, with batch norm, masks and the carried gradients, is here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rdarts_fast import native
from rdarts_fast.kernels import array
from rdarts_fast.kernels.launches import launch

CURVES = ("tanh", "relu", "sigmoid", "identity")
MOST_SOURCES = 16
NO_NORM, BATCH_NORM, RUNNING_NORM = 0, 1, 2

_DTYPES = {torch.float32: 0, torch.float64: 1}


def recurrent_node(
    states: Sequence[Tensor], gates: Sequence[Tensor], mix: Tensor, *, curved: bool = True
) -> Tensor:
    """Return the node [B, H].

    states: J tensors [B, H], J from 1 to 16. gates: J tensors [B, 2 H]: c_j, then u_j; any strides,
    but rows whose numbers lie apart are copied. mix: [J, 4]. curved: whether a coefficient of tanh
    or sigmoid may be other than 0; without, theirs have no gradients. float32 and float64.
    Differentiable, twice and more, in all three. Raises TypeError and ValueError.
    """
    _check(states, gates, mix)
    node: Tensor = _Node.apply(curved, mix, *states, *gates)
    return node


def recurrent_node_twin(states: Sequence[Tensor], gates: Sequence[Tensor], mix: Tensor) -> Tensor:
    """Return recurrent_node(...) in plain torch."""
    node = torch.zeros_like(states[0])
    for s, gate, row in zip(states, gates, mix, strict=True):
        c, u = gate.chunk(2, dim=1)
        o = torch.sigmoid(c)
        m = row[0] * torch.tanh(u) + row[1] * torch.relu(u) + row[2] * torch.sigmoid(u) + row[3] * u
        node = node + row.sum() * s * (1.0 - o) + o * m
    return node


def _check(states: Sequence[Tensor], gates: Sequence[Tensor], mix: Tensor) -> None:
    if not 1 <= len(states) <= MOST_SOURCES or len(gates) != len(states):
        found = f"{len(states)} and {len(gates)}"
        raise ValueError(f"states, gates: expected 1 to {MOST_SOURCES} of each, got {found}")
    first = states[0]
    if first.dtype not in _DTYPES:
        raise TypeError(f"states[0]: expected dtype float32 or float64, got {first.dtype}")
    if first.dim() != 2:
        raise ValueError(f"states[0]: expected shape [B, H], got {tuple(first.shape)}")
    for j, (s, gate) in enumerate(zip(states, gates, strict=True)):
        array.check_alike(s, f"states[{j}]", first, "states[0]")
        expected = (first.shape[0], 2 * first.shape[1])
        _check_one(gate, f"gates[{j}]", "[B, 2 H]", expected, first)
    _check_one(mix, "mix", "[J, 4]", (len(states), len(CURVES)), first)


def _check_one(x: Tensor, name: str, axes: str, shape: tuple[int, int], like: Tensor) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {axes} = {shape}, got {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} as states[0], got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as states[0], got {x.device}")
    if x.device.type != "meta" and not native.runs_on(x.device):
        raise ValueError(f"{name}: this build has no kernels for {x.device}")


# Launches


class Rows(NamedTuple):
    """What the native side reads of tensors [B, columns]: two numbers each, in one list."""

    numbers: list[int]
    kept: tuple[Tensor, ...]  # copies of those whose rows' numbers lie apart


def rows_of(tensors: Sequence[Tensor]) -> Rows:
    """Return the rows of `tensors`, of which some are copied; hold the result as long as them."""
    whole = tuple(x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous() for x in tensors)
    return Rows([n for x in whole for n in (x.data_ptr(), x.stride(0))], whole)


def workspace(state: Tensor, sources: int) -> Tensor:
    """Return room for the launches of nodes of so many states like `state` [B, H]."""
    batch, hidden = state.shape
    place = native.place(state.device)
    size = native.extension.recurrent_workspace(batch, hidden, sources, place)
    return torch.empty(size, dtype=torch.float64, device=state.device)


def node_at(like: Tensor, mix: int, curved: bool) -> tuple[int, int, int, bool, int]:
    """Return what the launches are told of a node of states like `like` [B, H]; mix: an address."""
    return (_DTYPES[like.dtype], like.shape[0], like.shape[1], curved, mix)


class _Node(Function):
    @staticmethod
    def forward(ctx: Any, curved: bool, mix: Tensor, *tensors: Tensor) -> Tensor:
        ctx.curved = curved
        ctx.save_for_backward(mix, *tensors)
        count = len(mix)
        states, gates = tensors[:count], tensors[count:]
        if mix.device.type == "meta":
            return recurrent_node_twin(states, gates, mix)
        node = torch.empty(states[0].shape, dtype=mix.dtype, device=mix.device)
        whole, s, g = mix.contiguous(), rows_of(states), rows_of(gates)
        launch(
            "recurrent_node",
            node_at(node, whole.data_ptr(), curved),
            s.numbers,
            g.numbers,
            (NO_NORM, 0.0, 0.0, 0, 0),
            (0, node.data_ptr(), 0, 0, 0),
            native.place(node.device),
        )
        return node

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        mix, *tensors = ctx.saved_tensors
        return None, *_NodeBackward.apply(ctx.curved, g, mix, *tensors)


class _NodeBackward(Function):
    """The gradients of mix, states and gates for the node's gradient g."""

    @staticmethod
    def forward(ctx: Any, curved: bool, g: Tensor, mix: Tensor, *tensors: Tensor) -> Any:
        ctx.curved = curved
        ctx.save_for_backward(g, mix, *tensors)
        if mix.device.type == "meta":
            return tuple(torch.empty_like(x) for x in (mix, *tensors))
        count = len(mix)
        states, gates = tensors[:count], tensors[count:]
        room = workspace(states[0], count)
        made = _Made(mix, states, gates)
        total, whole, given = torch.empty_like(made.states[0]), mix.contiguous(), g.contiguous()
        room_for_g, dmix = total.data_ptr(), made.mix.data_ptr()
        s, c = rows_of(states), rows_of(gates)
        launch(
            "recurrent_node_backward",
            node_at(total, whole.data_ptr(), curved),
            s.numbers,
            c.numbers,
            NO_NORM,
            1.0,
            (0, 0, given.data_ptr(), 0, 0, 0, room_for_g, dmix, room.data_ptr()),
            False,
            made.state_rows,
            made.gate_rows,
            native.place(mix.device),
        )
        return made.results(curved)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        saved = ctx.saved_tensors
        if not ctx.curved:
            along = without_curves(along[0]), *along[1:]
        if torch.is_grad_enabled():  # a third derivative: seldom, and exact in plain torch
            return None, *_differentiated_twin(saved, along)
        g, mix, *tensors = saved
        count = len(mix)
        states, gates = tensors[:count], tensors[count:]
        room = workspace(states[0], count)
        made = _Made(mix, states, gates)
        tangent, whole, given = torch.empty_like(made.states[0]), mix.contiguous(), g.contiguous()
        s, c = rows_of(states), rows_of(gates)
        along_mix, along_s = along[0].contiguous(), rows_of(along[1 : 1 + count])
        along_c = rows_of(along[1 + count :])
        launch(
            "recurrent_node_second",
            node_at(tangent, whole.data_ptr(), ctx.curved),
            s.numbers,
            c.numbers,
            along_mix.data_ptr(),
            along_s.numbers,
            along_c.numbers,
            (given.data_ptr(), tangent.data_ptr(), made.mix.data_ptr(), room.data_ptr()),
            made.state_rows,
            made.gate_rows,
            native.place(mix.device),
        )
        return None, tangent, *made.results(ctx.curved)


def without_curves(mix: Tensor) -> Tensor:
    """Return mix or its gradient [., 4] with zeros for tanh and sigmoid."""
    return mix * mix.new_tensor([name not in ("tanh", "sigmoid") for name in CURVES])


class _Made:
    """Room for the gradients of mix, states and gates."""

    def __init__(self, mix: Tensor, states: Sequence[Tensor], gates: Sequence[Tensor]) -> None:
        def room(like: Sequence[Tensor]) -> Tensor:
            shape = (len(like), *like[0].shape)
            return torch.empty(shape, dtype=mix.dtype, device=mix.device)

        self.dtype = mix.dtype
        self.mix = torch.empty(mix.shape, dtype=torch.float64, device=mix.device)
        self.states, self.gates = room(states), room(gates)
        self.state_rows = rows_of(self.states.unbind()).numbers
        self.gate_rows = rows_of(self.gates.unbind()).numbers

    def results(self, curved: bool) -> tuple[Tensor, ...]:
        """Return them in order; without curves, tanh and sigmoid have no gradient."""
        mix = self.mix.to(self.dtype)
        mix = mix if curved else without_curves(mix)
        return mix, *self.states.unbind(), *self.gates.unbind()


def _differentiated_twin(saved: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of <backward of (g, mix, states, gates), along>, differentiable."""
    # Views, so that no input is another's ancestor.
    inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in saved]
    g, mix, *tensors = inputs
    node = recurrent_node_twin(tensors[: len(mix)], tensors[len(mix) :], mix)
    found = torch.autograd.grad(node, inputs[1:], g, create_graph=True)
    return torch.autograd.grad(found, inputs, along, create_graph=True, materialize_grads=True)
