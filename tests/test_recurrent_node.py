"""The kernels of a recurrent cell's node against plain torch: values, derivatives of any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdarts_fast.kernels.recurrent_node import recurrent_node, recurrent_node_twin
from tests.conftest import device_of
from tests.tolerances import assert_equal

# J, B, H: one of each, odd sizes, rows of several pieces, blocks that share rows, no rows.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 33, 19), (8, 150, 11), (16, 4, 64), (2, 0, 5)]
Operands = tuple[list[Tensor], list[Tensor], Tensor]


def operands(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Operands:
    """States [B, H] and gates [B, 2 H] that are slices of larger tensors, and mix [J, 4]."""
    sources, batch, hidden = shape
    generator = torch.Generator().manual_seed(sources * 100 + hidden)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    wide = normal(batch, sources * 2 * hidden + 3)
    gates = [wide.clone()[:, 1 + 2 * hidden * j :][:, : 2 * hidden] for j in range(sources)]
    states = [normal(batch, hidden) for _ in range(sources)]
    return states, gates, normal(sources, 4)


def leaves(given: Operands) -> list[Tensor]:
    states, gates, mix = given
    return [x.detach().requires_grad_() for x in (*states, *gates, mix)]


def apply(function: object, inputs: list[Tensor], **more: bool) -> Tensor:
    count = (len(inputs) - 1) // 2
    assert callable(function)
    found: Tensor = function(inputs[:count], inputs[count:-1], inputs[-1], **more)
    return found


def cotangents(like: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        for x in like
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_derivatives(
    shape: tuple[int, int, int], dtype: torch.dtype, backend: str
) -> None:
    given = operands(shape, dtype, device_of(backend))
    exact = [x.double() for x in leaves(given)]
    exact = [x.detach().requires_grad_() for x in exact]
    found: list[list[Tensor]] = []
    for function, inputs in ((recurrent_node, leaves(given)), (recurrent_node_twin, exact)):
        node = apply(function, inputs)
        g = cotangents([node], 1)[0].requires_grad_()
        first = torch.autograd.grad(node, inputs, g, create_graph=True)
        along = cotangents(list(first), 2)
        second = torch.autograd.grad(first, [*inputs, g], along, materialize_grads=True)
        found.append([node.detach(), *(x.detach() for x in first), *second])
    for ours, theirs in zip(*found, strict=True):
        assert_equal(ours, theirs, dtype, times=4.0)


def test_third_derivatives(backend: str) -> None:
    inputs = leaves(operands((2, 3, 4), torch.float64, device_of(backend)))
    found = []
    for function in (recurrent_node, recurrent_node_twin):
        grads = list(torch.autograd.grad(apply(function, inputs).sum(), inputs, create_graph=True))
        for seed in (3, 4):
            along = cotangents(grads, seed)
            grads = list(
                torch.autograd.grad(grads, inputs, along, create_graph=True, materialize_grads=True)
            )
        found.append(grads)
    for ours, theirs in zip(*found, strict=True):
        assert_equal(ours, theirs, torch.float64)


def test_gradgradcheck(backend: str) -> None:
    inputs = leaves(operands((2, 3, 2), torch.float64, device_of(backend)))

    def node(*given: Tensor) -> Tensor:
        return apply(recurrent_node, list(given))

    assert torch.autograd.gradcheck(node, inputs)
    assert torch.autograd.gradgradcheck(node, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_curves(dtype: torch.dtype, backend: str) -> None:
    given = operands((3, 17, 9), dtype, device_of(backend))
    given[2][:, 0::2] = 0.0  # tanh and sigmoid
    found = []
    for function, more in ((recurrent_node, {"curved": False}), (recurrent_node_twin, {})):
        inputs = leaves(given)
        node = apply(function, inputs, **more)
        grads = list(torch.autograd.grad(node.square().sum(), inputs, create_graph=True))
        along = cotangents(grads, 5)
        if not more:  # the kernel's gradients of those columns are constant
            along[-1][:, 0::2] = 0.0
        twice = list(torch.autograd.grad(grads, inputs, along))
        for each in (grads, twice):
            each[-1] = each[-1][:, 1::2]
        found.append([node, *grads, *twice])
    for ours, theirs in zip(*found, strict=True):
        assert_equal(ours, theirs.double(), dtype, times=4.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_curves_hold_their_relative_precision_at_both_ends(
    dtype: torch.dtype, backend: str
) -> None:
    u = torch.tensor([-700.0, -80.0, -30.0, -1e-5, -1e-30, 0.0, 1e-20, 1e-4, 0.3, 20.0, 90.0, 800])
    u = u.to(device_of(backend), dtype)[None]
    states, c = torch.zeros_like(u), torch.full_like(u, 40.0)  # an open gate
    for f, curve in enumerate((torch.tanh, torch.relu, torch.sigmoid)):
        mix = torch.zeros(1, 4, dtype=dtype, device=u.device)
        mix[0, f] = 1.0
        found = recurrent_node([states], [torch.cat([c, u], dim=1)], mix)
        expected = curve(u.double()) * torch.sigmoid(c.double())
        tiny = torch.finfo(dtype).tiny
        error = (found.double() - expected).abs() / expected.abs().clamp(min=tiny)
        within = expected.abs() > 1e-37 if dtype == torch.float32 else expected.abs() > 1e-300
        assert error[within].max() < 8 * torch.finfo(dtype).eps, (f, error)


def test_not_a_number_stays_one(backend: str) -> None:
    nan = torch.tensor([[float("nan")]], device=device_of(backend))
    one = torch.ones_like(nan)
    for s, c, u in ((nan, one, one), (one, nan, one), (one, one, nan)):
        found = recurrent_node([s], [torch.cat([c, u], dim=1)], torch.full((1, 4), 0.25).to(s))
        assert found.isnan().all(), (s, c, u)


def test_rows_that_lie_apart_are_copied(backend: str) -> None:
    states, gates, mix = operands((2, 6, 5), torch.float64, device_of(backend))
    expected = recurrent_node_twin(states, gates, mix)
    turned = [x.t().contiguous().t() for x in gates]
    assert_equal(recurrent_node(states, turned, mix), expected, torch.float64)


def test_the_bits_do_not_depend_on_the_threads() -> None:
    inputs = leaves(operands((3, 70, 37), torch.float32, "cpu"))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            node = apply(recurrent_node, inputs)
            found.append([node, *torch.autograd.grad(node.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_bad_input() -> None:
    states, gates, mix = operands((2, 6, 5), torch.float64, "cpu")
    for given, error, message in (
        ((states, gates[:1], mix), ValueError, "states, gates: expected 1 to 16 of each, got 2"),
        (([], [], mix), ValueError, "expected 1 to 16 of each, got 0 and 0"),
        ((states, gates, mix[:1]), ValueError, r"mix: expected shape \[J, 4\] = \(2, 4\)"),
        ((states, [gates[0], states[1]], mix), ValueError, r"gates\[1\]: expected shape .*6, 10"),
        (([states[0], states[1][:5]], gates, mix), ValueError, r"states\[1\]: expected shape"),
        ((states, gates, mix.float()), TypeError, "mix: expected dtype torch.float64"),
        (([x.bfloat16() for x in states], gates, mix), TypeError, "expected dtype float32 or"),
    ):
        with pytest.raises(error, match=message):
            recurrent_node(*given)
