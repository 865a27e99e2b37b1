"""--checkpoint-cells: the same bits, from less memory."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.kernels.emulation import emulated_bfloat16
from rdarts_fast.networks import softmax_weights
from rdarts_fast.networks.precision import BF16, FP32
from rdarts_fast.networks.supernet import Supernet
from rdarts_fast.random_search import run_random_search
from rdarts_fast.search import run_search
from tests.host_cuda import on_host
from tests.small import settings

Change = Callable[[Supernet], object]


def nothing(net: Supernet) -> None:
    """Leave the network as it is."""


def with_dropout(net: Supernet) -> None:
    """Let an edge have an operation without kernels, which draws from torch's generator."""
    for cell in net.cells:
        width = cell.edges[13].operations[1][1].out_channels
        cell.edges[13].operations[1] = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(width))


def without_a_plan(net: Supernet) -> None:
    """Let a cell be one that the kernels cannot compute."""
    net.cells[0].preprocess0 = nn.Sequential(nn.Tanh(), *net.cells[0].preprocess0)


def outcome(
    backend: str,
    again: bool,
    space: str = "s4",
    precision: str = FP32,
    change: Change = nothing,
    size: int = 16,
) -> tuple[list[Tensor], int]:
    """Return loss, gradients and buffers after two passes, and the bytes that the first kept."""
    torch.manual_seed(1)
    net = Supernet(space, 4, 3, backend=backend)
    change(net)
    net.drop_path_prob = 0.3
    net.compute(precision, again)
    alphas = net.initial_alphas(1)
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(2))
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        if x.dim() == 4:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    torch.manual_seed(3)
    found: list[Tensor] = []
    for step in range(2):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = F.cross_entropy(
                net(images, softmax_weights(alphas), Draws(1, step)), torch.arange(6)
            )
        if step == 0:
            most = sum(kept.values())
        found += [loss, *torch.autograd.grad(loss, [*alphas.values(), *net.parameters()])]
    after = torch.rand(3)  # torch's generator stands where it stood
    return [*found, *net.buffers(), after], most


CASES = [
    ("fused", "s4", FP32, nothing),  # noise
    ("fused", "s1", FP32, nothing),  # ragged groups
    ("fused", "darts", FP32, nothing),  # pools
    ("fused", "s2", BF16, nothing),
    ("fused", "s2", FP32, with_dropout),
    ("fused", "s2", FP32, without_a_plan),
    ("reference", "s4", FP32, nothing),
    ("reference", "darts", FP32, nothing),
]


@pytest.mark.parametrize(("backend", "space", "precision", "change"), CASES)
def test_the_same_bits_from_less_memory(
    backend: str, space: str, precision: str, change: Change
) -> None:
    with emulated_bfloat16():
        expected, plain = outcome(backend, False, space, precision, change)
        found, less = outcome(backend, True, space, precision, change)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert less < plain / (2 if precision == BF16 else 3)


def test_the_same_bits_on_cuda_s_kernels() -> None:
    with on_host():
        expected, _ = outcome("fused", False, size=8)
        found, _ = outcome("fused", True, size=8)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        *itertools.product(("fused", "reference"), [{}, {"order": "first"}, {"implicit": "exact"}]),
        ("fused", {"drop_path_prob": 0.3, "curvature": "lambda"}),
    ],
)
def test_a_search_has_the_same_bits(tmp_path: Path, backend: str, changes: dict[str, str]) -> None:
    stored = []
    for again in (False, True):
        made = settings(tmp_path, space="s4", backend=backend, epochs=2, epoch_steps=3, **changes)
        made |= {"out": tmp_path / str(again), "checkpoint_cells": again}
        stored.append(run_search(**made).load_checkpoint())
    plain, again = stored
    for part in ("supernet", "alphas"):
        for name, tensor in plain[part].items():
            assert torch.equal(tensor, again[part][name]), (part, name)


def test_a_random_search_has_the_same_result(tmp_path: Path) -> None:
    made = {k: v for k, v in settings(tmp_path).items() if k != "alpha_learning_rate"}
    made |= {"epochs": 2, "samples": 3, "finalists": 2, "space": "s2"}
    runs = [
        run_random_search(**made | {"out": tmp_path / str(again), "checkpoint_cells": again})
        for again in (False, True)
    ]
    plain, again = ([run.result[k] for k in ("finalists", "valid_error")] for run in runs)
    assert plain == again


def test_eval_mode_keeps_what_it_kept() -> None:
    """There statistics are buffers, which may move before the backward comes."""
    net = Supernet("s2", 4, 3).eval()
    alphas = net.initial_alphas(1)
    found = []
    for again in (False, True):
        net.compute(FP32, again)
        loss = net(torch.ones(2, 3, 8, 8), softmax_weights(alphas), Draws(1)).square().sum()
        moved = [b for b in net.buffers() if b.is_floating_point()]
        before = [b.clone() for b in moved]
        torch._foreach_add_(moved, 1.0)
        found.append(torch.autograd.grad(loss, list(alphas.values())))
        torch._foreach_copy_(moved, before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
