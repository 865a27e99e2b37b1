"""A cell of the supernet on kernels: one autograd function, each tensor written once.

cell_forward.py and cell_backward.py are its two passes, plan.py says what they launch. What is
differentiated twice is computed anew by composed.py, whose parts have derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rdarts_fast.draws import Draws
from rdarts_fast.kernels import channel_affine, normalized_sum
from rdarts_fast.kernels.array import check_coefficients, check_inputs
from rdarts_fast.networks.cell_backward import CellBackward
from rdarts_fast.networks.cell_forward import CellForward, Setting
from rdarts_fast.networks.composed import composed_cell


def fused_cell(
    cell: Any,
    inputs: Sequence[Sequence[Tensor]],
    weights: Tensor,
    draws: Draws,
    factors: Tensor | None,
) -> list[Tensor]:
    """Return the nodes of a cell, [N, C, H, W] each, channels innermost.

    cell: a SearchCell whose plan is whole. inputs: the two, each as the tensors whose channels make
    it up, all of one size. weights: [E, O]. factors: drop path's, [E, N] or None. Raises TypeError
    and ValueError.
    """
    for i, tensors in enumerate(inputs):
        check_inputs(tensors, f"inputs[{i}]")
    check_coefficients(weights, "weights", "[E, O]", tuple(weights.shape), inputs[0][0])
    plan = cell.plan()
    n, _, h, w = inputs[1][0].shape
    stride = plan.sources[0].stride
    if cell.training and n * -(-h // stride) * -(-w // stride) < 2:
        raise ValueError(
            f"batch statistics need 2 values a channel or more, got inputs of shape {(n, _, h, w)}"
        )
    counts = [len(tensors) for tensors in inputs]
    setting = Setting(cell, plan, draws, factors, counts, torch.is_grad_enabled())
    return list(_Cell.apply(setting, weights, *inputs[0], *inputs[1], *plan.parameters()))


def fused_stem(stem: nn.Module, images: Tensor) -> Tensor:
    """Return stem(images), channels innermost.

    torch's batch norm of such images adds in float32: four times the error in the logits.
    """
    convolution, norm = stem.children()
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(norm.running_mean, Tensor)
    assert norm.running_var is not None and norm.momentum is not None
    z = convolution(images.contiguous(memory_format=torch.channels_last))
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    normalised = normalized_sum(
        [z],
        torch.ones(1, dtype=norm.weight.dtype, device=images.device),
        running=[(norm.running_mean, norm.running_var)],
        eps=norm.eps,
        momentum=norm.momentum,
        training=norm.training,
    )
    return channel_affine([normalised], norm.weight[None], norm.bias[None])[0]


class _Cell(Function):
    @staticmethod
    def forward(ctx: Any, setting: Setting, weights: Tensor, *tensors: Tensor) -> Any:
        ctx.setting = setting
        run = CellForward(setting, weights.contiguous(), tensors)
        nodes = run.compute()
        ctx.kept, taken = run.kept.taken()
        ctx.save_for_backward(weights, *tensors, *taken)
        return tuple(nodes)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        setting, needs = ctx.setting, ctx.needs_input_grad[1:]
        weights, *rest = ctx.saved_tensors
        tensors, taken = rest[: len(needs) - 1], rest[len(needs) - 1 :]
        if torch.is_grad_enabled():  # create_graph: derivatives that have their own
            return None, *_recorded_backward(setting, [weights, *tensors], needs, g)
        kept = ctx.kept.restored(taken)
        return None, *CellBackward(setting, weights.contiguous(), tensors, kept, needs).compute(g)


@contextmanager
def spare_buffers(module: nn.Module) -> Iterator[None]:
    """Let copies of the buffers be moved instead of them."""
    owners = [(part, dict(part._buffers)) for part in module.modules()]
    for part, buffers in owners:
        for name, buffer in buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for part, buffers in owners:
            part._buffers.update(buffers)


def _recorded_backward(
    setting: Setting, tensors: Sequence[Tensor], needs: Sequence[bool], g: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients as functions that can be differentiated again; tensors: weights, inputs
    and parameters.
    """
    # A tensor that enters twice has a gradient at each place: an alias for each.
    weights, *rest = (tensor.view_as(tensor) for tensor in tensors)
    inputs, _ = setting.split(rest)
    with spare_buffers(setting.cell):
        nodes = composed_cell(setting.cell, inputs, weights, setting.draws, setting.factors)
    aliases = [weights, *(tensor for part in inputs for tensor in part)]
    used = [
        *aliases,
        *tensors[len(aliases) :],
    ]  # of the parameters, the modules use these themselves
    wanted = {id(t): t for t, need in zip(used, needs, strict=True) if need}
    gradients = torch.autograd.grad(
        nodes, list(wanted.values()), g, create_graph=True, allow_unused=True
    )
    found = dict(zip(wanted, gradients, strict=True))
    return [found.pop(id(t), None) for t in used]
