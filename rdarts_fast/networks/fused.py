"""A cell of the supernet on kernels: one autograd function, each result written once.

cell_forward.py and cell_backward.py are its two passes, plan.py says what they launch. What is
differentiated twice is computed anew by composed.py, whose parts have derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rdarts_fast.draws import Draws
from rdarts_fast.kernels import channel_affine, normalized_sum
from rdarts_fast.kernels.array import check_coefficients, check_inputs
from rdarts_fast.networks.cell_backward import CellBackward
from rdarts_fast.networks.cell_forward import CellForward, Kept, Setting, buffers_of
from rdarts_fast.networks.checkpointed import BuffersAside, drawing_from, random_states
from rdarts_fast.networks.composed import composed_cell
from rdarts_fast.networks.narrow import narrowed
from rdarts_fast.networks.plan import Plan


def fused_cell(
    cell: Any,
    plan: Plan,
    inputs: Sequence[Sequence[Tensor]],
    weights: Tensor,
    draws: Draws,
    factors: Tensor | None,
    *,
    narrow: bool = False,
    again: bool = False,
    passes: bool = False,
) -> list[Tensor]:
    """Return the nodes of a cell, [N, C, H, W] each, channels innermost; with `passes` the tensors
    of its second input follow, to whose gradients this cell's backward pass then adds, in place:
    nothing else may hold them.

    cell: a SearchCell. plan: its, which is whole. inputs: the two, each as the tensors whose
    channels make it up, all of one size. weights: [E, O]. factors: drop path's, [E, N] or None.
    narrow: whether the backward pass of a float32 cell has its tensors in bfloat16; it then has no
    derivative. again: whether it computes the forward pass again, of which nothing is kept then but
    the inputs (in train mode; in eval mode that could have other statistics). Raises TypeError and
    ValueError.
    """
    parameters = plan.parameters()
    _check(cell, plan, inputs, weights, parameters)
    n, _, h, w = inputs[1][0].shape
    stride = plan.sources[0].stride
    if cell.training and n * -(-h // stride) * -(-w // stride) < 2:
        raise ValueError(
            f"batch statistics need 2 values a channel or more, got inputs of shape {(n, _, h, w)}"
        )
    counts = [len(tensors) for tensors in inputs]
    recorded = torch.is_grad_enabled()
    again = again and recorded and cell.training
    ways = (recorded and not again, narrow and recorded, again)
    setting = Setting(cell, plan, draws, factors, counts, cell.training, *ways, passes=passes)
    return list(_Cell.apply(setting, weights, *inputs[0], *inputs[1], *parameters))


def _check(
    cell: Any,
    plan: Plan,
    inputs: Sequence[Sequence[Tensor]],
    weights: Tensor,
    parameters: Sequence[Tensor],
) -> None:
    """Raise TypeError or ValueError unless kernels can read what a cell computes with."""
    like = inputs[0][0]
    for i, tensors in enumerate(inputs):
        check_inputs(tensors, f"inputs[{i}]")
        if tensors[0].dtype != like.dtype or tensors[0].device != like.device:
            got = f"{tensors[0].dtype} on {tensors[0].device}"
            raise TypeError(f"inputs[{i}]: expected {like.dtype} on {like.device}, got {got}")
    shape = (len(cell.edges), len(cell.edges[0].operations))
    check_coefficients(weights, "weights", "[E, O]", shape, like)
    dtype = weights.dtype
    buffers = buffers_of(plan.norms)
    numbers = [*parameters, *(buffer for mean, var, _ in buffers for buffer in (mean, var))]
    counts = [count for _, _, count in buffers if count is not None]
    for tensors, expected in ((numbers, dtype), (counts, torch.int64)):
        for tensor in tensors:
            if tensor.dtype != expected or tensor.device != like.device:
                (name, *_) = (n for n, t in cell.state_dict(keep_vars=True).items() if t is tensor)
                got = f"{tensor.dtype} on {tensor.device}"
                raise TypeError(f"{name}: expected {expected} on {like.device}, got {got}")


def fused_stem(stem: nn.Module, images: Tensor) -> Tensor:
    """Return stem(images), channels innermost.

    torch's batch norm of such images adds in float32: four times the error in the logits.
    """
    convolution, norm = stem.children()
    if (
        type(norm) is not nn.BatchNorm2d
        or not norm.affine
        or norm.momentum is None
        or norm.running_mean is None
        or norm.running_var is None
    ):
        plain: Tensor = stem(images)
        return plain.contiguous(memory_format=torch.channels_last)
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
        ctx.set_materialize_grads(False)
        passed = setting.split(tensors)[0][1] if setting.passes else []
        draws = setting.again and any(source.singles for source in setting.plan.sources)
        ctx.states = random_states(tensors[0].device) if draws else None
        run = CellForward(setting, weights.contiguous(), tensors)
        nodes = run.compute()
        if setting.again:
            ctx.save_for_backward(weights, *tensors)
            return *nodes, *passed
        if setting.narrow:
            tensors = _rounded(run, setting, tensors)
        ctx.kept, taken = run.kept.taken()
        ctx.save_for_backward(weights, *tensors, *taken)
        return *nodes, *passed

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        setting, needs = ctx.setting, ctx.needs_input_grad[1:]
        weights, *rest = ctx.saved_tensors
        tensors, taken = rest[: len(needs) - 1], rest[len(needs) - 1 :]
        if torch.is_grad_enabled():  # create_graph: derivatives that have their own
            if setting.narrow:
                raise RuntimeError("--precision bf16 has no second derivatives: use fp32")
            return None, *_recorded_backward(setting, [weights, *tensors], needs, given)
        if setting.again:
            with drawing_from(ctx.states, weights.device):
                tensors, kept = _again(setting, weights, tensors)
        else:
            kept = ctx.kept.restored(taken)
        run = CellBackward(setting, weights.contiguous(), tensors, kept, needs)
        return None, *run.compute(given)


def _rounded(run: CellForward, setting: Setting, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Round what a pass keeps; return the inputs, rounded, and the parameters."""
    count = sum(setting.counts)
    return *narrowed(run.kept, setting.plan, tensors[:count]), *tensors[count:]


def _again(
    setting: Setting, weights: Tensor, tensors: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Kept]:
    """Compute the forward pass again; return what its backward takes, tensors and what is kept."""
    setting = replace(setting, recorded=True, again=False)
    with _as_it_was(setting, tensors[sum(setting.counts) :]):
        run = CellForward(setting, weights.contiguous(), tensors)
        run.compute()
    if setting.narrow:
        tensors = _rounded(run, setting, tensors)
    return tensors, run.kept


@contextmanager
def _as_it_was(setting: Setting, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let a cell compute what it did in the forward pass: in the same mode, with these parameters,
    and with copies of its buffers, which it may move.
    """
    modules = [(part, part.training) for part in setting.cell.modules()]
    tables = [(part._parameters, dict(part._parameters)) for part, _ in modules]
    for (part, name), parameter in zip(setting.plan.owners, parameters, strict=True):
        own: dict[str, Any] = part._parameters
        own[name] = parameter
    setting.cell.train(setting.training)
    try:
        with BuffersAside(setting.cell):
            yield
    finally:
        for table, before in tables:
            table.update(before)
        for part, mode in modules:
            part.training = mode


def _recorded_backward(
    setting: Setting,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    given: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the gradients as functions that can be differentiated again; tensors: weights, inputs
    and parameters.
    """
    # A tensor that enters twice has a gradient at each place: an alias for each.
    weights, *rest = aliases = [tensor.view_as(tensor) for tensor in tensors]
    inputs, parameters = setting.split(rest)
    with _as_it_was(setting, parameters):
        nodes = composed_cell(setting.cell, inputs, weights, setting.draws, setting.factors)
    results = [*nodes, *inputs[1]] if setting.passes else nodes
    # An input passed on may have no gradient: alphas alone make autograd send one.
    pairs = [(x, g) for x, g in zip(results, given, strict=True) if g is not None]
    pairs = [(x, g) for x, g in pairs if x.requires_grad]
    wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
    if not pairs:
        return [None for _ in needs]
    results, g = [x for x, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(results, wanted, g, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
