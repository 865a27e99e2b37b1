"""The cell on kernels: second derivatives, what it launches and keeps, many steps."""

from __future__ import annotations

import gc
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor

from bench.contenders import run_supernet
from rdarts_fast import native
from rdarts_fast.config import SearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.networks import Supernet, cell_backward, softmax_weights
from rdarts_fast.search import Losses, SearchState, alpha_step, weight_step
from rdarts_fast.spaces import Space, load_space, space_from_dict, spaces_of
from rdarts_fast.training import raising
from tests.host_cuda import counts, on_host
from tests.test_fused import SPACES_AND_ALL, everything, two


def space_of(*operations: str, nodes: int = 2) -> Space:
    return space_from_dict(
        {"nodes": nodes, "cells": {kind: list(operations) for kind in ("normal", "reduce")}}, "own"
    )


def loss_of(net: Supernet, alphas: dict[str, Tensor], images: Tensor) -> Tensor:
    logits = net(images, softmax_weights(alphas), Draws(5))
    return F.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1])


@pytest.mark.parametrize("space", [SPACES_AND_ALL[0], SPACES_AND_ALL[-1]], ids=lambda s: s.name)
def test_second_derivatives_equal_the_reference(space: Space) -> None:
    images, found = torch.randn(5, 3, 7, 8, dtype=torch.float64), []
    for net in two(space, channels=3, layers=3):
        net.drop_path_prob = 0.3
        alphas = net.initial_alphas(1)
        tensors = [*alphas.values(), *net.parameters()]
        loss = loss_of(net, alphas, images)
        buffers = [buffer.clone() for buffer in net.buffers()]
        gradient = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        pairs = zip(gradient, tensors, strict=True)
        some = [(g, t) for g, t in pairs if g is not None and g.requires_grad]
        product = sum((g * torch.cos(torch.arange(g.numel()).view_as(g))).sum() for g, _ in some)
        second = torch.autograd.grad(product, [t for _, t in some], allow_unused=True)
        assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
        found.append([*(g.detach() for g, _ in some), *(s for s in second if s is not None)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + a.abs().max())


def test_a_backward_can_be_had_twice() -> None:
    net = Supernet(SPACES_AND_ALL[-1], channels=2, layers=3).double()
    alphas = net.initial_alphas(1)
    loss = loss_of(net, alphas, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    tensors = [*alphas.values(), *net.parameters()]
    first = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("space", ["s1", "s4"])
def test_frozen_weights_cost_no_gradient_and_change_no_other(space: str, monkeypatch) -> None:
    wanted: list[bool] = []
    names = ("launch_stages_backward", "launch_mixing_backward", "launch_mixings_backward")
    for name in names:
        original = getattr(cell_backward, name)

        def recorded(*arguments, original=original, wants_weights, **others):
            wanted.append(wants_weights)
            return original(*arguments, wants_weights=wants_weights, **others)

        monkeypatch.setattr(cell_backward, name, recorded)
    net = Supernet(space, channels=2, layers=3)
    images, gradients = torch.randn(4, 3, 8, 8), []
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        wanted.clear()
        alphas = net.initial_alphas(1)
        loss = loss_of(net, alphas, images)
        gradients.append(torch.autograd.grad(loss, list(alphas.values())))
        assert wanted and all(want is not frozen for want in wanted)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_launch_a_source_and_kind() -> None:
    """On a GPU the edges of a kind that leave a state, or either input, share a launch, whatever
    their number.
    """
    net = Supernet(space_of("sep_conv_3x3", "dil_conv_5x5", nodes=4), channels=2, layers=1).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with on_host():
        net(images, softmax_weights(net.initial_alphas(1)), Draws(5))
        found = counts()
    # The inputs and 3 nodes that edges leave, 3 stages on each, whose sums and batch norms their
    # own launches fill; 4 nodes, which make their own coefficients; the preprocessed inputs.
    assert found["sep_stage"].launches == 4 * 3
    assert found["mixing"].launches == 1
    assert found["affine"].launches == 1 + 1  # and the stem
    assert found["node_sum"].launches == 4 + 1
    assert found["normalize"].launches == 1  # the stem's
    assert "term_coefficients" not in found


def test_cells_that_only_the_composed_path_can_compute() -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for operations in (("noise",), ("none", "noise")):
        nets = two(space_of(*operations), channels=2, layers=3)
        assert not nets[1].cells[0].plan().whole
        one, other = (everything(net, images, 0.3) for net in nets)
        for a, b in zip(one, other, strict=True):
            assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_one_value_a_channel_has_no_statistics() -> None:
    net = Supernet("s2", channels=2, layers=1)
    with pytest.raises(ValueError, match=r"2 values a channel or more, got .*\(1, 6, 1, 1\)"):
        loss_of(net, net.initial_alphas(1), torch.randn(1, 3, 1, 1))
    with torch.no_grad():
        assert loss_of(net.eval(), net.initial_alphas(1), torch.randn(1, 3, 1, 1)).isfinite()


def test_inputs_of_two_sizes_are_refused() -> None:
    cell = Supernet("s2", channels=2, layers=3).cells[0]
    inputs = [torch.randn(2, 6, 8, 8)], [torch.randn(2, 6, 7, 8)]
    with pytest.raises(ValueError, match=r"two of one size, got \(2, 2, 8, 8\) and \(2, 2, 7, 8\)"):
        cell(*inputs, torch.rand(14, 2), Draws(5), 0.0)


def test_weights_of_another_type_are_refused() -> None:
    net = Supernet("s2", channels=2, layers=1)
    weights = {kind: w.double() for kind, w in softmax_weights(net.initial_alphas(1)).items()}
    with pytest.raises(TypeError, match=r"weights: expected dtype torch\.float32"):
        net(torch.randn(2, 3, 8, 8), weights)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_forward_pass(training: bool) -> None:
    images, found = torch.randn(4, 3, 8, 8, dtype=torch.float64), []
    for net in two("s4", channels=2, layers=3):
        alphas = net.train(training).initial_alphas(1)
        tensors = [*alphas.values(), *net.parameters()]
        losses = [loss_of(net, alphas, images) for _ in range(2)]
        net.train(not training)
        found.append(torch.autograd.grad(losses[0], tensors))
        again = torch.autograd.grad(losses[1], tensors, create_graph=True)
        for a, b in zip(found[-1], again, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)
        assert all(module.training is not training for module in net.modules())
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_batch_norms_of_other_settings_equal_the_reference() -> None:
    """Another eps and momentum, and one held still in a training network."""
    images, found = torch.randn(4, 3, 8, 8, dtype=torch.float64), []
    nets = two(space_of("sep_conv_3x3", "max_pool_3x3"), channels=2, layers=3)
    for net in nets:
        for module in net.cells[0].modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps, module.momentum = 1e-2, 0.3
        net.cells[1].edges[0].operations[0][3].eval()
        alphas = net.initial_alphas(1)
        loss = loss_of(net, alphas, images)
        tensors = [*alphas.values(), *net.parameters()]
        gradient = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradient), alphas.values())
        buffers = [buffer.double() for buffer in net.buffers()]
        found.append([*(g.detach() for g in gradient), *second, *buffers])
    assert nets[1].cells[0].plan().whole
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + a.abs().max())


def test_edges_that_take_turns_equal_the_reference() -> None:
    """Images so large that the CPU takes two edges of five at a time through their stages."""
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    sizes = (1, (4, 16, 64, 64), 5, native.place(images.device))
    assert native.extension.edges_together(*sizes) == 2
    one, other = (everything(net, images, 0.3, 1) for net in two("s2", channels=16, layers=3))
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_parameters_of_a_functional_call_have_their_derivatives() -> None:
    images, found = torch.randn(4, 3, 8, 8, dtype=torch.float64), []
    for net in two("s2", channels=2, layers=3):
        alphas = net.initial_alphas(1)
        other = {name: (1.5 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
        arguments = (images, softmax_weights(alphas), Draws(5))
        logits = torch.func.functional_call(net, other, arguments)
        loss = F.cross_entropy(logits, torch.arange(4))
        gradient = torch.autograd.grad(loss, [*other.values()], create_graph=True)
        product = sum((g * g.detach()).sum() for g in gradient)
        second = torch.autograd.grad(product, [*alphas.values(), *other.values()])
        found.append([*(g.detach() for g in gradient), *second])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + a.abs().max())


class Own(torch.nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


def test_a_candidate_that_is_replaced_is_seen() -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    nets = two("s2", channels=2, layers=3)
    for net in nets:
        everything(net, images, 0.0, 1)
        net.cells[0].edges[3].operations[1] = Own(torch.tanh)
    one, other = (everything(net, images, 0.0, 1) for net in nets)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x: x[:, :, 1:], ValueError, r"edge 3: Own: expected shape \(4, 2, 8, 8\), got"),
        (lambda x: x[:, :1], ValueError, r"edge 3: Own: expected shape .*got \(4, 1, 8, 8\)"),
        (
            lambda x: x.double(),
            TypeError,
            r"edge 3: Own: expected torch\.float32 on cpu, got torch",
        ),
    ],
)
def test_what_an_operation_of_a_users_own_gives_is_checked(change, error, text: str) -> None:
    net = Supernet("s2", channels=2, layers=3)
    net.cells[0].edges[3].operations[1] = Own(change)
    with pytest.raises(error, match=text):
        loss_of(net, net.initial_alphas(1), torch.randn(4, 3, 8, 8))


def test_a_part_of_another_type_is_refused() -> None:
    for part, change in (("norm", "double"), ("cells", "bfloat16")):
        net = Supernet("s2", channels=2, layers=3)
        getattr(net.cells if part == "cells" else net.cells[0].edges[3].operations[1][3], change)()
        with pytest.raises(
            TypeError, match=r"(edges|preprocess).*: expected torch\.float32 on cpu"
        ):
            loss_of(net, net.initial_alphas(1), torch.randn(4, 3, 8, 8))


def test_convolutions_that_are_more_than_their_weight_run_as_modules() -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    nets = two("s4", channels=2, layers=3)
    for net in nets:
        pruned = net.cells[0].edges[3].operations[1][2]
        torch.nn.utils.prune.ln_structured(pruned, "weight", amount=1, n=1, dim=1)
        net.cells[0].edges[1].operations[1][1].register_forward_hook(lambda m, i, z: 2 * z)
    one, other = (everything(net, images, 0.2, 1) for net in nets)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())
    assert len(nets[1].cells[0].plan().sources[1].singles) == 2


def test_a_stem_of_another_kind_runs_as_it_is() -> None:
    for affine, momentum in ((False, 0.1), (True, None)):
        nets = two("s5", channels=2, layers=1)
        for net in nets:
            net.stem[1] = torch.nn.BatchNorm2d(6, affine=affine, momentum=momentum).double()
        images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        one, other = (everything(net, images, 0.0, 1) for net in nets)
        for a, b in zip(one, other, strict=True):
            assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("layer", [1, 2])
def test_one_input_alone_has_its_gradient(layer: int, which: int) -> None:
    found = []
    for net in two("s2", channels=4, layers=3):
        cell = net.cells[layer].requires_grad_(False)
        channels = [
            next(m.in_channels for m in part.modules() if isinstance(m, torch.nn.Conv2d))
            for part in (cell.preprocess0, cell.preprocess1)
        ]
        generator = torch.Generator().manual_seed(0)
        h = 16 if "Factorized" in type(cell.preprocess0).__name__ else 8
        sizes = [(channels[0], h), (channels[1], 8)]
        inputs = [
            torch.randn(3, c, size, size, generator=generator, dtype=torch.float64)
            for c, size in sizes
        ]
        inputs[which].requires_grad_()
        weights = torch.rand(14, 2, generator=generator, dtype=torch.float64)
        nodes = cell([inputs[0]], [inputs[1]], weights, Draws(5), 0.0)
        out = torch.cat(nodes, dim=1)
        loss = (torch.arange(1, 1 + out.shape[1])[:, None, None] * out.square()).sum()
        found.append(torch.autograd.grad(loss, inputs[which])[0])
    assert (found[0] - found[1]).abs().max() <= 1e-10 * found[0].abs().max()


@pytest.mark.parametrize("space", ["s1", "s4"])
def test_the_same_bits_again_and_on_two_threads(space: str) -> None:
    cell = Supernet(space, channels=5, layers=3).cells[1]  # a reduction
    inputs = [[torch.randn(9, 15, 8, 8)], [torch.randn(9, 5, 8, 8) for _ in range(4)]]
    tensors = [x.requires_grad_() for part in inputs for x in part]
    weights = torch.rand(14, 2, requires_grad=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            nodes = cell(*inputs, weights, Draws(5), 0.3)
            loss = sum(node.square().sum() for node in nodes)
            gradient = torch.autograd.grad(loss, [weights, *tensors, *cell.parameters()])
            found.append([*nodes, *gradient])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_dead_network_equals_the_reference() -> None:
    """All inputs zero, and channels that are constant: no NaN, the reference's gradients."""
    images = torch.zeros(4, 3, 8, 8, dtype=torch.float64)
    one, other = (everything(net, images, 0.0) for net in two("darts", channels=2, layers=3))
    for a, b in zip(one, other, strict=True):
        assert b.isfinite().all()
        assert (a - b).abs().max() <= 1e-10 * (1 + a.abs().max())


def test_twenty_search_steps_equal_the_reference() -> None:
    """Second order, noise and drop path: the alphas to 1e-8."""
    settings = SearchConfig(space="s4", channels=2, layers=3, batch_size=6)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator).double(), torch.arange(6)) for _ in range(40)
    ]
    found = []
    for net in two("s4", channels=2, layers=3):
        net.drop_path_prob = 0.2
        state = SearchState.start(settings, net)
        check = raising(state, SimpleNamespace(folder="nowhere"))
        task: Any = SimpleNamespace(run_supernet=run_supernet)
        for step in range(20):
            losses = Losses(settings, task, state, Draws(0, step=step))
            training, validation = batches[2 * step : 2 * step + 2]
            pair = losses.of(training, "weights"), losses.of(validation, "alphas")
            alpha_step(settings, state, *pair, settings.learning_rate, check)
            weight_step(settings, state, losses.of_weights(training, state.sums.add), check)
        found.append({kind: alpha.detach() for kind, alpha in state.alphas.items()})
    for kind, alpha in found[0].items():
        assert (alpha - alpha.mean()).abs().max() > 1e-3  # they have moved
        assert (alpha - found[1][kind]).abs().max() <= 1e-8


def test_a_thousand_steps_keep_no_memory() -> None:
    net = Supernet(space_of("sep_conv_3x3", "max_pool_3x3", nodes=1), channels=1, layers=1)
    alphas, images = net.initial_alphas(1), torch.randn(2, 3, 4, 4)

    def run(steps: int) -> int:
        for step in range(steps):
            loss = loss_of(net, alphas, images)
            if step % 2:
                loss.backward()
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    gc.disable()  # a cycle would hold a cell's tensors
    try:
        for _ in range(2):
            before = run(200)
        assert run(1000) - before < 2048
    finally:
        gc.enable()


def test_the_published_spaces_need_no_composed_path() -> None:
    for space in map(load_space, spaces_of("classification")):
        for cell in Supernet(space, channels=1, layers=3).cells:
            assert cell.plan().whole
            assert not any(source.singles for source in cell.plan().sources)
