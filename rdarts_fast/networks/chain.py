"""An operation of a supernet as a chain of steps (tangent.py), and the states that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdarts_fast.kernels.array import empty
from rdarts_fast.networks.norm import Norm, Sum
from rdarts_fast.networks.tangent import (
    Gate,
    Gathered,
    Linear,
    Maximum,
    Mixing,
    Pool,
    Stage,
    Step,
    joined,
)

_BYTES = 4 << 20  # of a tensor that the linear steps take at a time: its memory is used again

Plain = Gate | Linear | Maximum | Pool


@dataclass
class State:
    """A state of a cell: its value [N, C, H, W], and the tangents of the first D of V directions,
    [D N, C, H, W]: along the others nothing moves; None where it moves along none.

    moves: whether the alphas can move it. gathered: the gradients that come back to it.
    """

    value: Tensor
    moves: bool
    tangent: Tensor | None = None
    gathered: Gathered | None = None


@dataclass
class Chain:
    """An operation on a state, or on several whose channels lie side by side."""

    steps: Sequence[Step]

    @property
    def last(self) -> Norm | None:
        """The batch norm that the operation ends with."""
        return self.steps[-1] if self.steps and isinstance(self.steps[-1], Norm) else None

    def primal(self, states: Sequence[State]) -> Tensor:
        """Return the result."""
        x, sums = [state.value for state in states], None
        for step in self.steps:
            if isinstance(step, Norm):
                x, sums = [step.primal(joined(x), sums)], None
            elif isinstance(step, Mixing):
                x, sums = [step.primal(x)], step.sums
            else:
                x = [step.primal(joined(x))]
                sums = step.sums if isinstance(step, Stage | Pool) else None
        return joined(x)

    def tangent(self, states: Sequence[State], hessian: Tensor | None) -> Tensor | None:
        """Return the tangents of what the last batch norm takes, or of the result where there is
        none; None where nothing moves. What the batch norms before add goes to `hessian`; without
        one the batch norms keep what `adjoint` needs of the tangents.
        """
        self.forget()
        if all(state.tangent is None for state in states):
            return None
        n = len(states[0].value)
        x = [state.value[:0] if state.tangent is None else state.tangent for state in states]
        linear: list[Plain] = []  # steps that x is to go through
        before: Norm | None = None  # that x is the input of
        for step in self.steps:
            if isinstance(step, Stage):
                maps = None if before is None else before.coefficients()
                x, linear, before = [step.tangent(_through(linear, x, n), maps)], [], None
                continue
            if before is not None:
                x, before = [before.tangent(joined(x))], None
            if isinstance(step, Mixing):
                x = [step.tangent([_through(linear, x, n)] if linear else x)]
                linear = []
            elif isinstance(step, Norm):
                x = [_through(linear, x, n)]
                linear, before = [], step
                if hessian is None:
                    step.follow(x[0])
                    continue
                step.measure(x[0])
                if step is not self.last:
                    d = step.directions
                    hessian[:d, :d] += step.curvature
            else:
                linear.append(step)
        return _through(linear, x, n)

    def adjoint(
        self,
        g: Tensor | Sum,
        into: Sequence[Gathered],
        through: Callable[[Norm, Tensor, Tensor | None], Tensor | Sum],
    ) -> None:
        """Take V gradients back to the states.

        g: of what the last batch norm takes, or of the result where there is none, [V N, C, H, W].
        through: takes the gradients through a batch norm before the last step; it gets them and, if
        known, their sums and those of the gradients times the norm's result, [2, V, C].
        """
        steps = [step for step in self.steps if step is not self.last]
        sums = None
        for i in reversed(range(len(steps))):
            step = steps[i]
            if i == 0 and isinstance(step, Stage | Mixing):
                step.adjoint_into(g, into)
                return
            if isinstance(step, Stage):
                g, sums = step.adjoint(g)
                continue
            if isinstance(step, Mixing):
                g, sums = step.adjoint(g), None
                continue
            whole = _whole(g)
            g = through(step, whole, sums) if isinstance(step, Norm) else step.adjoint(whole)
            sums = None
        channels = [one.like.shape[1] for one in into]
        for one, part in zip(into, _whole(g).split(channels, dim=1), strict=True):
            one.add(part)

    def forget(self) -> None:
        """Drop the tangents that batch norms keep."""
        for step in self.steps:
            if isinstance(step, Norm):
                step.forget()


def _whole(g: Tensor | Sum) -> Tensor:
    return g.whole() if isinstance(g, Sum) else g


def _through(steps: Sequence[Plain], x: Sequence[Tensor], samples: int) -> Tensor:
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
        y = joined([_padded(tensor[first : first + count], count) for tensor in x])
        for step in steps:
            y = step.tangent(y)
        if count == total:
            return y.contiguous(memory_format=torch.channels_last)
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
