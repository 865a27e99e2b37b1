"""An operation of a supernet as a chain of steps (tangent.py), and the states that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdarts_fast.kernels.array import empty
from rdarts_fast.networks.tangent import Gate, Linear, Maximum, Norm, Stage, Step

_BYTES = 4 << 20  # of a tensor that the linear steps take at a time: its memory is used again


@dataclass
class State:
    """A state of a cell: its value [N, C, H, W], and the tangents of the first D of V directions,
    [D N, C, H, W]: along the others nothing moves; None where it moves along none.
    """

    value: Tensor
    tangent: Tensor | None = None


@dataclass
class Chain:
    """An operation on a state, or on several whose channels lie side by side."""

    steps: Sequence[Step]

    @property
    def last(self) -> Norm | None:
        """The batch norm that the operation ends with."""
        return self.steps[-1] if self.steps and isinstance(self.steps[-1], Norm) else None

    def primal(self, states: Sequence[State], inner: list[tuple[Norm, Tensor]]) -> Tensor:
        """Return the result; what moves of batch norms before the last step goes to `inner`."""
        x = _joined([state.value for state in states])
        for step in self.steps:
            x = step.primal(x)
            if isinstance(step, Norm) and step is not self.last and not step.still:
                inner.append((step, x))
        return x

    def tangent(self, states: Sequence[State], hessian: Tensor) -> Tensor | None:
        """Return the tangents of what the last batch norm takes, or of the result where there is
        none; None where nothing moves. What the batch norms before add goes to `hessian`.
        """
        if all(state.tangent is None for state in states):
            return None
        n = len(states[0].value)
        x = [state.value[:0] if state.tangent is None else state.tangent for state in states]
        linear: list[Gate | Linear | Maximum] = []  # steps that x is to go through
        before: Norm | None = None  # that x is the input of
        for step in self.steps:
            if isinstance(step, Stage):
                maps = None if before is None else before.coefficients()
                x, linear, before = [step.tangent(_through(linear, x, n), maps)], [], None
                continue
            if before is not None:
                x, before = [before.tangent(_joined(x))], None
            if isinstance(step, Norm):
                x = [_through(linear, x, n)]
                step.measure(x[0])
                linear, before = [], step
                if step is not self.last:
                    d = step.directions
                    hessian[:d, :d] += step.curvature
            else:
                linear.append(step)
        return _through(linear, x, n)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def _through(steps: Sequence[Gate | Linear | Maximum], x: Sequence[Tensor], samples: int) -> Tensor:
    """Return the tangents x, channels side by side, after some steps: a few directions at a time,
    so that what lies between takes little memory. Of what moves along fewer directions the rest is
    zero.
    """
    if not steps and len(x) == 1:
        return x[0]
    total = max(len(tensor) for tensor in x)
    size = sum(t[0].numel() * t.element_size() for t in x if len(t)) * samples  # of a direction
    each = max(1, _BYTES // max(1, size)) * samples
    out = None
    for first in range(0, total, each):
        count = min(each, total - first)
        y = _joined([_padded(tensor[first : first + count], count) for tensor in x])
        for step in steps:
            y = step.tangent(y)
        if out is None:
            out = empty(y, (total, *y.shape[1:]), torch.channels_last)
        out[first : first + count] = y
    assert out is not None
    return out


def _padded(x: Tensor, count: int) -> Tensor:
    """Return `count` rows: x's, then zeros."""
    if len(x) == count:
        return x
    return torch.cat([x, x.new_zeros(count - len(x), *x.shape[1:])])
