"""The bilevel step of DARTS (section 2.3): gradients of the alphas through the weights, and the
weights' own step.

The alphas minimise the validation loss at the weights' optimum, of which one virtual step is the
approximation (DARTS, equation 6; paper, section 2.1):

    w'      = w - eta * (momentum * buffer + dL_train/dw + weight_decay * w)
    dalpha  = dL_val(w')/dalpha - eta * d2L_train(w)/dalpha dw @ v,      v = dL_val(w')/dw'
    d2L_train(w)/dalpha dw @ v
            ~ (dL_train(w + eps v)/dalpha - dL_train(w - eps v)/dalpha) / (2 eps)

with eps = epsilon_scale / |v| (DARTS, equations 7 and 8; published scale 0.01), or exactly, by
differentiating twice. First order has w' = w and no second term.

Everything here takes closures and lists of tensors, so that it is tested on functions with known
derivatives. A closure computes its loss at the present values of the tensors; it may draw afresh
each time it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
Within = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class VirtualStep:
    """The weights' optimiser as the virtual step sees it."""

    learning_rate: float | Tensor  # eta; a tensor, [], lies on the parameters' device
    momentum: float
    weight_decay: float
    buffers: Sequence[Tensor | None]  # one momentum buffer a parameter, None before the first step
    clip: float | None = None  # largest norm of both gradients in the weights; see second_order
    within: Within = nullcontext  # where the gradient at w and exact derivatives are computed


@dataclass(frozen=True)
class AlphaGradient:
    """The gradient of the alphas, and the validation loss it was taken at (w' in second order)."""

    gradient: list[Tensor]
    validation_loss: Tensor


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put the tensors' values back on leaving, bit for bit, whatever happened inside; yields the
    saved values.
    """
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield saved
    finally:
        with torch.no_grad():
            if saved:
                torch._foreach_copy_(list(tensors), saved)


@contextmanager
def frozen(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let losses have no gradient in the parameters, so that no pass forms one."""
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in moved:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moved:
            parameter.requires_grad_(True)


def first_order(
    validation_loss: Loss,
    alphas: Sequence[Tensor],
    buffers: Sequence[Tensor] = (),
    parameters: Sequence[Tensor] = (),
) -> AlphaGradient:
    """Return dL_val/dalpha at the present weights (DARTS, section 2.3, eta = 0).

    alphas: [E, O] each. buffers: what a forward pass moves (batch-norm statistics), put back bit
    for bit. parameters: the weights, of which no gradient is formed.
    """
    with unchanged(buffers), frozen(parameters):
        loss = validation_loss()
        gradient = _gradient(loss, alphas)
    return AlphaGradient(gradient, loss.detach())


def _gradient(loss: Tensor, alphas: Sequence[Tensor]) -> list[Tensor]:
    """Return dloss/dalpha, zeros where there is none."""
    if not loss.requires_grad:
        return [torch.zeros_like(alpha) for alpha in alphas]
    return list(torch.autograd.grad(loss, list(alphas), materialize_grads=True))


def second_order(
    training_loss: Loss,
    validation_loss: Loss,
    parameters: Sequence[Tensor],
    alphas: Sequence[Tensor],
    step: VirtualStep,
    *,
    epsilon_scale: float = 0.01,
    exact: bool = False,
    buffers: Sequence[Tensor] = (),
) -> AlphaGradient:
    """Return the alphas' gradient through one virtual step of the weights (DARTS, equation 7).

    parameters and buffers are the same bits afterwards. The closures are called four times:
    training at w, validation at w', training at w + eps v and w - eps v; with `exact`, three times,
    training at w in place of the last two, and the mixed derivative is no difference.

    With step.clip, as in DARTS's search for a recurrent cell, dL_train/dw and dL_val/dw' are cut to
    that norm, and v is the latter + weight_decay * w'.
    """
    parameters = list(parameters)
    with unchanged(buffers), unchanged(parameters) as at_w:
        with step.within():
            _virtual_step(training_loss(), parameters, step)
        loss = validation_loss()
        gradients = torch.autograd.grad(loss, [*alphas, *parameters], materialize_grads=True)
        direct, vector = list(gradients[: len(alphas)]), list(gradients[len(alphas) :])
        with torch.no_grad():
            if step.clip is not None:
                cut(vector, step.clip)
                torch._foreach_add_(vector, parameters, alpha=step.weight_decay)
            torch._foreach_copy_(parameters, at_w)
        if exact:
            with step.within():
                implicit = exact_implicit_term(training_loss, parameters, alphas, vector)
        else:
            implicit = implicit_term(training_loss, parameters, alphas, vector, epsilon_scale)
        torch._foreach_mul_(implicit, step.learning_rate)
        torch._foreach_sub_(direct, implicit)
    return AlphaGradient(direct, loss.detach())


def cut(gradient: list[Tensor], most: float) -> None:
    """Scale a gradient in place, so that its norm is at most `most`."""
    norm = torch.nn.utils.get_total_norm(gradient)
    torch._foreach_mul_(gradient, (most / (norm + 1e-6)).clamp(max=1.0))


def _virtual_step(loss: Tensor, parameters: list[Tensor], step: VirtualStep) -> None:
    gradient = list(torch.autograd.grad(loss, parameters, materialize_grads=True))
    with torch.no_grad():
        if step.clip is not None:
            cut(gradient, step.clip)
        move = torch._foreach_add(gradient, parameters, alpha=step.weight_decay)
        pairs = [(m, b) for m, b in zip(move, step.buffers, strict=True) if b is not None]
        if pairs:
            moves, momenta = (list(column) for column in zip(*pairs, strict=True))
            torch._foreach_add_(moves, momenta, alpha=step.momentum)
        torch._foreach_mul_(move, step.learning_rate)  # rounded as one that is a tensor is
        torch._foreach_sub_(parameters, move)


def implicit_term(
    training_loss: Loss,
    parameters: Sequence[Tensor],
    alphas: Sequence[Tensor],
    vector: Sequence[Tensor],
    epsilon_scale: float = 0.01,
) -> list[Tensor]:
    """Return d2L_train/dalpha dw @ vector by central differences of step epsilon_scale / |vector|
    (DARTS, equation 8).

    vector: one tensor a parameter. A zero vector gives zeros. The parameters are the same bits
    afterwards.
    """
    parameters, vector = list(parameters), list(vector)
    norm = torch.nn.utils.get_total_norm(vector)
    still = norm == 0.0  # like all else here it stays on the device: nothing waits for it
    epsilon = (epsilon_scale / (norm.double() + still)).to(norm.dtype)
    with unchanged(parameters) as at_w, frozen(parameters):
        move, sides = torch._foreach_mul(vector, epsilon), []
        for change in (torch._foreach_add_, torch._foreach_sub_):
            with torch.no_grad():
                torch._foreach_copy_(parameters, at_w)
                change(parameters, move)
            sides.append(_gradient(training_loss(), alphas))
        difference = torch._foreach_sub(sides[0], sides[1])
        torch._foreach_div_(difference, 2.0 * epsilon)
        torch._foreach_mul_(difference, (~still).to(norm.dtype))
        return list(difference)


def exact_implicit_term(
    training_loss: Loss,
    parameters: Sequence[Tensor],
    alphas: Sequence[Tensor],
    vector: Sequence[Tensor],
) -> list[Tensor]:
    """Return d2L_train/dalpha dw @ vector by differentiating twice (DARTS, equation 7).

    vector: one tensor a parameter. The loss is called once.
    """
    parameters = list(parameters)
    gradient = torch.autograd.grad(
        training_loss(), parameters, create_graph=True, materialize_grads=True
    )
    products = torch._foreach_mul(list(gradient), list(vector))
    along = torch.stack([product.sum() for product in products]).sum()
    return _gradient(along, alphas)
