"""The fused supernet against the reference: the same function, in float64 to 1e-10."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast.draws import Draws
from rdarts_fast.networks import Supernet, softmax_weights
from rdarts_fast.networks.operations import OPERATIONS
from rdarts_fast.search import run_search
from rdarts_fast.spaces import load_space, space_from_dict, spaces_of
from tests.conftest import device_of
from tests.host_cuda import counts, on_host
from tests.small import settings

ALL = [name for name in OPERATIONS]
SPACES_AND_ALL = [*map(load_space, spaces_of("classification")), space_from_dict(
    {"nodes": 2, "cells": {kind: ALL for kind in ("normal", "reduce")}}, "all", "all"
)]  # fmt: skip

BACKENDS = ("reference", "fused")


def two(space, **sizes) -> tuple[Supernet, Supernet]:
    torch.manual_seed(0)
    nets = [Supernet(space, backend=name, **sizes).double() for name in BACKENDS]
    nets[1].load_state_dict(nets[0].state_dict())
    return nets[0], nets[1]


def everything(net: Supernet, images: Tensor, drop_path: float, passes: int = 2) -> list[Tensor]:
    """Logits, gradients of weights and alphas, and buffers after some passes."""
    alphas = net.initial_alphas(1)
    net.drop_path_prob = drop_path
    for step in range(passes):
        logits = net(images, softmax_weights(alphas), Draws(5, step=step))
    labels = torch.arange(len(images), device=images.device) % logits.shape[1]
    parameters = [*net.parameters(), *alphas.values()]
    loss = F.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = [g for g in gradients if g is not None]
    return [logits.detach(), *found, *(buffer.double() for buffer in net.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("space", SPACES_AND_ALL, ids=lambda space: space.name)
def test_fused_equals_reference(space, training: bool) -> None:
    images = torch.randn(6, 3, 9, 10, dtype=torch.float64)
    one, other = (
        everything(net.train(training), images, 0.3) for net in two(space, channels=4, layers=3)
    )
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


@pytest.mark.parametrize("space", ["s1", "s2", "s4"])
def test_fused_equals_reference_on_every_backend(space: str, backend: str) -> None:
    device = device_of(backend)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, device=device)
    nets = [net.to(device) for net in two(space, channels=2, layers=3)]
    one, other = (everything(net, images, 0.3, passes=1) for net in nets)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


@pytest.mark.parametrize("sizes", [(1, 1, 8, 8), (5, 7, 8, 8), (3, 3, 1, 1)])
def test_odd_sizes(sizes: tuple[int, int, int, int]) -> None:
    n, channels, h, w = sizes
    images = torch.randn(n, 3, h, w, dtype=torch.float64)
    nets = two("s2", channels=channels, layers=1 if h == 1 or n == 1 else 3)
    one, other = (everything(net, images, 0.0) for net in nets)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def full_size(space: str, seed: int) -> tuple[Tensor, Tensor]:
    """Errors of float32 reference and fused against the float64 reference, at full size, each [2]:
    the mean squares over logits and over alpha gradients.
    """
    torch.manual_seed(seed)
    exact = Supernet(space, backend="reference", channels=16, layers=8)
    nets = [exact, *(Supernet(space, backend=name, channels=16, layers=8) for name in BACKENDS)]
    for net in nets[1:]:
        net.load_state_dict(exact.state_dict())
    exact.double()
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    found = []
    for net in nets:
        dtype = next(net.parameters()).dtype
        alphas = {
            kind: alpha.detach().to(dtype).requires_grad_()
            for kind, alpha in exact.initial_alphas(seed).items()
        }
        logits = net(images.to(dtype), softmax_weights(alphas), Draws(seed))
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(alphas.values()))
        gradient = torch.cat([g.flatten() for g in gradients])
        found.append([logits.detach().double(), gradient.double()])
    reference, fused = (
        torch.stack([(a - b).square().mean() for a, b in zip(one, found[0], strict=True)])
        for one in found[1:]
    )
    return reference, fused


@pytest.mark.parametrize("space", ["s2", "s4"])
def test_float32_is_as_exact_as_the_reference_over_seeds(space: str) -> None:
    """Alpha gradients err by the few ReLUs that change sides: one seed may err five times as much
    as the reference, and the next a fifth. The middle of so many is held that chance does not
    decide: of six it came out at 1.1 and, with other roundings, at 1.6 times the reference's.
    """
    reference, fused = (
        torch.stack(errors).sqrt().median(dim=0).values
        for errors in zip(*(full_size(space, seed) for seed in range(24)), strict=True)
    )
    assert (fused > 0).all() and (fused <= 1.5 * reference).all(), (reference, fused)


def test_both_pools_of_a_state_are_one_launch() -> None:
    """A reduction cell: two inputs at stride 2 and all nodes but the last at stride 1."""
    net = two("darts", channels=2, layers=1)[1]
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with on_host():
        net(images, softmax_weights(net.initial_alphas(1)), Draws(5))
        assert counts()["pool"].launches == 2 + 3


def test_same_names_and_order() -> None:
    reference, fused = two("darts", channels=2, layers=3)
    assert list(reference.state_dict()) == list(fused.state_dict())


def test_an_operation_of_a_users_own_runs_as_its_module(monkeypatch) -> None:
    class Own(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    net = two("s2", channels=2, layers=3)
    for supernet in net:
        for edge in supernet.cells[0].edges:  # of a normal cell: these operations have no stride
            edge.operations[0] = Own()
            edge.operations[1] = torch.nn.Sequential(torch.nn.AvgPool2d(1), Own())
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    one, other = (everything(supernet, images, 0.2) for supernet in net)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_a_search_and_its_checkpoints_swap_backends(tmp_path) -> None:
    runs = [
        run_search(**settings(tmp_path, space="s4", backend=name, out=tmp_path / name))
        for name in BACKENDS
    ]
    states = [run.load_checkpoint() for run in runs]
    assert list(states[0]["supernet"]) == list(states[1]["supernet"])
    for kind, alpha in states[0]["alphas"].items():
        torch.testing.assert_close(alpha, states[1]["alphas"][kind], rtol=0, atol=2e-2)
    path = tmp_path / "reference" / "config.json"
    path.write_text(
        path.read_text().replace('"epochs": 3', '"epochs": 4').replace('"reference"', '"fused"')
    )
    swapped = run_search(resume=tmp_path / "reference")
    assert len(swapped.metrics) == 4
    assert swapped.environment["resumed_on"][0]["backend"] == "fused"


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = (part for part in text.split("```python")[1:] if "normalized_sum" in part)
    names: dict[str, Tensor] = {}
    exec(example.split("```")[0], names)
    expected = sum(
        w * F.batch_norm(x, None, None, training=True)
        for w, x in zip(names["weights"], names["candidates"], strict=True)
    )
    torch.testing.assert_close(names["node"], expected, rtol=1e-4, atol=1e-5)
