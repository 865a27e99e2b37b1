"""The Hessian as an operator: a shape, and products with vectors.

What is differentiated is a loss as a function of the alphas alone (paper, section 2.2: the weights
are held, the loss is the validation loss on one batch). The functions of spectrum.py take anything
that is an `Operator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Operator(Protocol):
    """A symmetric [P, P] matrix that is known by its products."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __matmul__(self, v: Tensor) -> Tensor: ...  # [P] -> [P], or [P, V] -> [P, V]


class LossOperator(Operator, Protocol):
    """The Hessian of a loss whose gradient [P] is known."""

    gradient: Tensor


@runtime_checkable
class DenseOperator(Protocol):
    """An operator that knows a shorter way to its whole matrix than P products."""

    @property
    def dense_products(self) -> float: ...  # what `dense` costs, in products

    def dense(self) -> Tensor: ...  # [P, P]


class HessianOperator:
    """The Hessian of `loss` with respect to `alphas`, by differentiating twice.

    loss: called once, at the present alphas, to a scalar. It needs second derivatives in them; what
    it draws at random is then fixed for all products. alphas: tensors of any shapes that require
    gradients; P counts their numbers, in order, flattened. The graph is held until the operator is
    dropped. Raises ValueError where `loss` gives no scalar, or does not depend on any alpha.

    `value` is the loss, `gradient` its gradient [P].
    """

    def __init__(self, loss: Callable[[], Tensor], alphas: Sequence[Tensor]) -> None:
        self._alphas = list(alphas)
        with torch.enable_grad():
            value = loss()
            if value.numel() != 1:
                raise ValueError(f"loss: expected a scalar, got shape {tuple(value.shape)}")
            if not value.requires_grad:
                raise ValueError("loss: expected one that depends on the alphas")
            found = torch.autograd.grad(
                value, self._alphas, create_graph=True, materialize_grads=True
            )
            self._gradient = flat(found)
        self.value, self.gradient = value.detach(), self._gradient.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """[P, P]."""
        return self._gradient.numel(), self._gradient.numel()

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with `v` [P] or, column by column, [P, V]. Raises ValueError where the
        shape does not fit.
        """
        check_vectors(self, v)
        if v.ndim == 2:
            columns = [self @ column for column in v.unbind(dim=1)]
            return torch.stack(columns, dim=1) if columns else torch.zeros_like(v)
        if not self._gradient.requires_grad:  # the loss is linear in the alphas
            return torch.zeros_like(v)
        found = torch.autograd.grad(
            self._gradient,
            self._alphas,
            v.to(self._gradient),
            retain_graph=True,
            materialize_grads=True,
        )
        return flat(found).to(v)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the numbers of all tensors, in order: [P]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def check_vectors(operator: Operator, v: Tensor) -> None:
    """Raise ValueError unless `v` is [P] or [P, V]."""
    size = operator.shape[1]
    if v.ndim not in (1, 2) or v.shape[0] != size:
        raise ValueError(f"v: expected shape ({size},) or ({size}, V), got {tuple(v.shape)}")


def softmax_null_space(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Return the directions in which softmax does not change: [P, E'] with orthonormal columns, one
    an edge.

    shapes: [E, O] of each tensor of alphas. A shift of all candidates of an edge changes no weight,
    so each column is in the null space of every Hessian over these alphas.
    """
    columns = [
        torch.full((1, operations), operations**-0.5, dtype=torch.float64)
        for edges, operations in shapes
        for _ in range(edges)
    ]
    rows: Tensor = torch.block_diag(*columns)
    return rows.t().contiguous()
