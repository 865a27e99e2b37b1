"""The recurrent supernet and a genotype's network: against a loop written out, and on kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.curvature import HessianOperator
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import recurrent_cell
from rdarts_fast.networks.recurrent import (
    Dropouts,
    LanguageOutput,
    RecurrentNetwork,
    RecurrentSupernet,
    mask,
)
from rdarts_fast.networks.search_network import softmax_weights
from rdarts_fast.spaces import Space, load_space
from tests.conftest import device_of

VOCABULARY, HIDDEN, COLUMNS = 11, 5, 4
SOME = Dropouts(output=0.4, words=0.3, hidden=0.25, input=0.2, embedding=0.1)
NONE = Dropouts(0.0, 0.0, 0.0, 0.0, 0.0)
EXACT = 1e-10  # float64, relative to the largest number


def supernet(
    space: Space | str = "rnn", backend: str = "fused", dropouts: Dropouts = SOME
) -> RecurrentSupernet:
    torch.manual_seed(0)
    network = RecurrentSupernet(space, VOCABULARY, HIDDEN, dropouts, backend).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8.0)  # so that the gates are not all half open
    return network


def batch(steps: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Words [T, B], those that follow, and a hidden state."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(VOCABULARY, (steps + 1, COLUMNS), generator=generator)
    hidden = torch.randn(COLUMNS, HIDDEN, generator=generator, dtype=torch.float64)
    return words[:-1].to(device), words[1:].to(device), hidden.to(device)


def alphas_of(network: RecurrentSupernet, scale: float = 1000.0) -> Tensor:
    alphas = network.initial_alphas(2)["recurrent"].detach() * scale
    return alphas.requires_grad_()


def loss_of(found: LanguageOutput, following: Tensor) -> Tensor:
    """Cross entropy with AR and TAR, so that every part of the output counts."""
    slowness = (found.raw[1:] - found.raw[:-1]).pow(2).mean() if len(found.raw) > 1 else 0.0
    return (
        F.cross_entropy(found.logits, following.flatten())
        + 0.3 * found.dropped.pow(2).mean()
        + 0.7 * slowness
        + 0.1 * found.hidden.sum()
    )


def by_hand(
    network: RecurrentSupernet, words: Tensor, p: Tensor, draws: Draws, hidden: Tensor
) -> LanguageOutput:
    """DARTS's supernet, a word, a node, a source and an operation at a time."""
    size, train, chance = network.hidden_size, network.training, network.dropouts
    weight, ws = network.embedding.weight, list(network.ws)
    names = network.space.cells["recurrent"]
    ones = torch.ones(COLUMNS, size, dtype=torch.float64)
    x_mask = i_mask = h_mask = o_mask = ones
    e_mask = torch.ones(VOCABULARY, 1, dtype=torch.float64)
    if train:
        e_mask = mask(draws, 0, (VOCABULARY, 1), chance.embedding, weight)
        i_mask = mask(draws, 1, (COLUMNS, size), chance.input, weight)
        x_mask = mask(draws, 2, (COLUMNS, size), chance.words, weight)
        h_mask = mask(draws, 3, (COLUMNS, size), chance.hidden, weight)
        o_mask = mask(draws, 4, (COLUMNS, size), chance.output, weight)
    functions = {
        "tanh": torch.tanh,
        "relu": lambda u: u.clamp(min=0.0),
        "sigmoid": lambda u: 0.5 + 0.5 * torch.tanh(0.5 * u),
        "identity": lambda u: u,
    }

    def normalised(s: Tensor) -> Tensor:
        if not train:
            mean, var = network.norm.running_mean, network.norm.running_var
            assert mean is not None and var is not None
            return (s - mean) / (var + 1e-5).sqrt()
        mean = s.mean(dim=0)
        return (s - mean) / ((s - mean).square().mean(dim=0) + 1e-5).sqrt()

    raw = []
    for t in range(len(words)):
        x = torch.stack([weight[w] * e_mask[w] for w in words[t]]) * i_mask
        gates = (x * x_mask) @ network.w0[:size] + (hidden * h_mask) @ network.w0[size:]
        c, u = gates[:, :size], gates[:, size:]
        c = torch.sigmoid(c)
        states = [normalised(hidden + c * (torch.tanh(u) - hidden))]
        edge = 0
        for i in range(network.space.nodes):
            s = torch.zeros_like(hidden)
            for j in range(i + 1):
                gates = (states[j] * h_mask) @ ws[i]
                c, u = torch.sigmoid(gates[:, :size]), gates[:, size:]
                for o, name in enumerate(names[edge]):
                    if name != "none":
                        s = s + p[edge, o] * (states[j] + c * (functions[name](u) - states[j]))
                edge += 1
            states.append(normalised(s))
        hidden = sum(states[2:], states[1]) / network.space.nodes
        raw.append(hidden)
    outputs = torch.stack(raw)
    logits = (outputs * o_mask).flatten(0, 1) @ weight.t() + network.decoder.bias
    return LanguageOutput(logits, outputs, outputs * o_mask, hidden)


def assert_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    error = (got - expected).abs().max().item()
    assert error <= EXACT * (1e-3 + expected.abs().max().item()), (what, error)


def mixed_space() -> Space:
    """Three nodes whose edges have the same operations in different orders."""
    orders = [("relu", "none", "tanh"), ("tanh", "relu", "none"), ("identity", "tanh", "sigmoid")]
    return Space("mixed", 3, {"recurrent": tuple(orders[e % 3] for e in range(6))})


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("space", ["rnn", "rnn_small", "mixed"])
@pytest.mark.parametrize("train", [True, False])
def test_the_supernet_is_the_loop(space: str, train: bool, backend: str) -> None:
    network = supernet(mixed_space() if space == "mixed" else space, backend).train(train)
    words, following, hidden = batch()
    if not train:
        assert network.norm.running_mean is not None and network.norm.running_var is not None
        network.norm.running_mean.copy_(torch.linspace(-0.5, 0.5, HIDDEN))
        network.norm.running_var.copy_(torch.linspace(0.3, 2.0, HIDDEN))
    draws, alphas = Draws(3), alphas_of(network)
    hidden.requires_grad_()
    inputs = [alphas, hidden, *network.parameters()]
    weights = softmax_weights({"recurrent": alphas})
    found = network(words, weights, draws, hidden)
    expected = by_hand(network, words, weights["recurrent"], draws, hidden)
    for name in LanguageOutput._fields:
        assert_close(getattr(found, name), getattr(expected, name), name)
    ours = torch.autograd.grad(loss_of(found, following), inputs, retain_graph=True)
    theirs = torch.autograd.grad(loss_of(expected, following), inputs)
    for got, right in zip(ours, theirs, strict=True):
        assert right.abs().max() > 1e-6
        assert_close(got, right)


def test_there_are_36_edges_with_their_operations() -> None:
    assert supernet("rnn").initial_alphas(0)["recurrent"].shape == (36, 5)
    assert supernet("rnn_small").initial_alphas(0)["recurrent"].shape == (36, 2)


@pytest.mark.parametrize("space", ["rnn", "rnn_small"])
@pytest.mark.parametrize("train", [True, False])
def test_its_hessian_over_the_alphas_is_the_loops(space: str, train: bool) -> None:
    network = supernet(space).train(train)
    words, following, hidden = batch(steps=3)
    draws, alphas = Draws(3), alphas_of(network)

    def fused() -> Tensor:
        weights = softmax_weights({"recurrent": alphas})
        return loss_of(network(words, weights, draws, hidden), following)

    def loop() -> Tensor:
        p = softmax_weights({"recurrent": alphas})["recurrent"]
        return loss_of(by_hand(network, words, p, draws, hidden), following)

    directions = torch.randn(
        alphas.numel(), 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    ours, theirs = HessianOperator(fused, [alphas]), HessianOperator(loop, [alphas])
    assert_close(ours.gradient, theirs.gradient)
    expected = theirs @ directions
    assert expected.abs().max() > 1e-6
    assert_close(ours @ directions, expected)


def test_mixed_derivatives_of_weights_and_alphas() -> None:
    """What the exact second order of a bilevel step needs."""
    network = supernet()
    words, following, hidden = batch(steps=3)
    alphas, parameters, found = alphas_of(network), list(network.parameters()), []
    for fused in (True, False):
        weights = softmax_weights({"recurrent": alphas})
        output = (
            network(words, weights, Draws(3), hidden)
            if fused
            else by_hand(network, words, weights["recurrent"], Draws(3), hidden)
        )
        loss = loss_of(output, following)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        total = sum((g * torch.linspace(-1.0, 1.0, g.numel()).view_as(g)).sum() for g in grads)
        found.append(torch.autograd.grad(total, [alphas, *parameters]))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_the_batch_norm_moves_as_the_references(backend: str) -> None:
    words, _, hidden = batch(device=device_of(backend))
    buffers = []
    for name in ("fused", "reference"):
        network = supernet(backend=name).to(hidden.device)
        weights = softmax_weights({"recurrent": alphas_of(network)})
        with torch.no_grad():
            network(words, weights, Draws(3), hidden)
            network(words[:2], weights, Draws(4), hidden)
        buffers.append([*network.norm.buffers()])
        assert int(network.norm.num_batches_tracked or 0) == 8 * 9
    for ours, theirs in zip(*buffers, strict=True):
        assert_close(ours.double(), theirs.double())


@pytest.mark.parametrize("dropouts", [SOME, NONE])
@pytest.mark.parametrize("train", [True, False])
def test_backends_agree_on_every_device(backend: str, train: bool, dropouts: Dropouts) -> None:
    words, following, hidden = batch(steps=3, device=device_of(backend))
    found = []
    for name in ("fused", "reference"):
        network = supernet(mixed_space(), name, dropouts).to(hidden.device).train(train)
        alphas, start = alphas_of(network), hidden.clone().requires_grad_()
        weights = softmax_weights({"recurrent": alphas})
        loss = loss_of(network(words, weights, Draws(3), start), following)
        inputs = [alphas, start, *network.parameters()]
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        total = torch.stack([(g * g).sum() for g in grads]).sum()
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        twice = torch.autograd.grad(total, inputs)
        found.append([loss, *grads, *once, *twice])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2 * COLUMNS, 3 * COLUMNS, 1000])
def test_weights_gradients_are_summed_over_any_number_of_words(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent_cell, "ROWS_TOGETHER", rows)
    words, following, hidden = batch(steps=5)
    found = []
    for name in ("fused", "reference"):
        network = supernet(mixed_space(), name)
        weights = softmax_weights({"recurrent": alphas_of(network)})
        loss = loss_of(network(words, weights, Draws(3), hidden), following)
        found.append(torch.autograd.grad(loss, list(network.parameters())))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def test_without_a_graph_nothing_is_kept_and_the_result_is_the_same() -> None:
    network = supernet()
    words, _, hidden = batch()
    weights = softmax_weights({"recurrent": alphas_of(network)})
    with_graph = network(words, weights, Draws(3), hidden)
    with torch.no_grad():
        without = network(words, weights, Draws(3), hidden)
    assert without.raw.grad_fn is None
    assert torch.equal(with_graph.raw, without.raw)


def test_a_window_is_differentiated_twice_in_a_row() -> None:
    network = supernet()
    words, following, hidden = batch()
    alphas = alphas_of(network)
    found = network(words, softmax_weights({"recurrent": alphas}), Draws(3), hidden)
    loss = loss_of(found, following)
    first = torch.autograd.grad(loss, alphas, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, alphas)[0])


def test_some_gradients_alone() -> None:
    network = supernet().requires_grad_(False)
    words, following, hidden = batch()
    alphas = alphas_of(network)

    def gradient() -> Tensor:
        weights = softmax_weights({"recurrent": alphas})
        loss = loss_of(network(words, weights, Draws(3), hidden), following)
        return torch.autograd.grad(loss, alphas)[0]

    alone = gradient()
    network.requires_grad_(True)
    assert torch.equal(alone, gradient())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_one_hot_without_a_batch_norm_is_the_genotypes_network(
    backend: str, training: bool
) -> None:
    torch.manual_seed(0)
    searched = RecurrentSupernet("rnn", VOCABULARY, HIDDEN, SOME, backend, normalised=False)
    names = load_space("rnn").cells["recurrent"][0]
    nodes = [(names[1 + i % 4], i // 2) for i in range(8)]
    found = RecurrentNetwork(
        Genotype({"recurrent": tuple((node,) for node in nodes)}), VOCABULARY, HIDDEN, SOME
    )
    for network in (searched.double(), found.double()):
        network.train(training)
    with torch.no_grad():
        for parameter in searched.parameters():
            parameter.mul_(8.0)
    kept = {k: v for k, v in searched.state_dict().items() if "norm" not in k}
    found.load_state_dict(kept)
    weights = torch.zeros(36, 5, dtype=torch.float64)
    for node, (name, source) in enumerate(nodes):
        weights[node * (node + 1) // 2 + source, names.index(name)] = 1.0
    words = torch.randint(VOCABULARY, (4, COLUMNS))
    draws = Draws(4)
    got = searched(words, {"recurrent": weights}, draws).logits
    expected = found(words, draws).logits
    assert (got - expected).abs().max() <= EXACT * expected.abs().max()
    pairs = zip(
        torch.autograd.grad(got.pow(2).sum(), list(searched.parameters())),
        torch.autograd.grad(expected.pow(2).sum(), list(found.parameters())),
        strict=True,
    )
    assert all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in pairs)


def test_windows_carry_on_where_the_last_ended() -> None:
    network = supernet().eval()
    words, _, _ = batch()
    weights = softmax_weights({"recurrent": alphas_of(network)})
    whole = network(words, weights, Draws(3))
    first = network(words[:2], weights, Draws(3))
    second = network(words[2:], weights, Draws(3), first.hidden)
    assert_close(torch.cat([first.logits, second.logits]), whole.logits)
    assert_close(second.hidden, whole.hidden)


def test_draws_decide_all_masks() -> None:
    network = supernet()
    words, _, hidden = batch()
    weights = softmax_weights({"recurrent": alphas_of(network)})
    runs = [network(words, weights, Draws(seed), hidden).logits for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    expected = mask(Draws(3), 3, (1000, 10), 0.25, network.w0)
    assert set(expected.unique().tolist()) == {0.0, 1.0 / 0.75}
    assert abs(float((expected == 0.0).double().mean()) - 0.25) < 0.02


@pytest.mark.parametrize("train", [True, False])
def test_a_genotypes_network_is_the_loop(train: bool) -> None:
    nodes = [("tanh", 0), ("relu", 1), ("sigmoid", 0), ("identity", 2)]
    genotype = Genotype({"recurrent": tuple((node,) for node in nodes)})
    torch.manual_seed(0)
    network = RecurrentNetwork(genotype, VOCABULARY, HIDDEN, SOME).double().train(train)
    words, following, hidden = batch()
    found = network(words, Draws(3), hidden)
    weight, size = network.embedding.weight, HIDDEN
    x = weight[words]
    h_mask = torch.ones(COLUMNS, size, dtype=torch.float64)
    o_mask = h_mask
    if train:
        x = (weight * mask(Draws(3), 0, (VOCABULARY, 1), SOME.embedding, weight))[words]
        x = x * mask(Draws(3), 1, (COLUMNS, size), SOME.input, weight)
        x = x * mask(Draws(3), 2, (COLUMNS, size), SOME.words, weight)
        h_mask = mask(Draws(3), 3, (COLUMNS, size), SOME.hidden, weight)
        o_mask = mask(Draws(3), 4, (COLUMNS, size), SOME.output, weight)
    functions = {"tanh": torch.tanh, "relu": F.relu, "sigmoid": torch.sigmoid}
    h, raw = hidden, []
    for t in range(len(words)):
        c, u = (torch.cat([x[t], h * h_mask], dim=1) @ network.w0).split(size, dim=1)
        states = [h + torch.sigmoid(c) * (torch.tanh(u) - h)]
        for (name, j), w in zip(nodes, network.ws, strict=True):
            c, u = ((states[j] * h_mask) @ w).split(size, dim=1)
            f = functions[name](u) if name in functions else u
            states.append(states[j] + torch.sigmoid(c) * (f - states[j]))
        h = sum(states[2:], states[1]) / len(nodes)
        raw.append(h)
    outputs = torch.stack(raw)
    logits = (outputs * o_mask).flatten(0, 1) @ weight.t() + network.decoder.bias
    assert_close(found.raw, outputs)
    assert_close(found.dropped, outputs * o_mask)
    assert_close(found.logits, logits)
    parameters = list(network.parameters())
    ours = torch.autograd.grad(loss_of(found, following), parameters, retain_graph=True)
    right = LanguageOutput(logits, outputs, outputs * o_mask, h)
    theirs = torch.autograd.grad(loss_of(right, following), parameters)
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected)


def test_the_start_is_the_published_one() -> None:
    torch.manual_seed(0)
    network = RecurrentSupernet("rnn", 1000, 50)
    assert network.decoder.weight is network.embedding.weight
    assert network.w0.shape == (100, 100) and len(network.ws) == 8
    assert all(w.shape == (50, 100) for w in network.ws)
    for parameter in (network.embedding.weight, network.w0, *network.ws):
        assert 0.035 < parameter.detach().abs().max() <= 0.04
        assert abs(float(parameter.detach().mean())) < 0.002
    assert not network.decoder.bias.any()
    assert not any(norm.affine for norm in [network.norm])
    vocabulary, hidden = 1000, 50
    expected = vocabulary * hidden + vocabulary + 4 * hidden**2 + 8 * 2 * hidden**2
    assert sum(p.numel() for p in network.parameters()) == expected


def test_kernels_run_in_the_fused_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            launched.append(name)
            return getattr(extension, name)

    extension = native.extension
    monkeypatch.setattr(native, "extension", Watched())
    words, _, _ = batch(steps=2)
    for backend, expected in (("reference", 0), ("fused", 2 * 9)):
        network = supernet(backend=backend, dropouts=NONE)
        launched.clear()
        network(words, softmax_weights({"recurrent": alphas_of(network)}), Draws(0))
        assert launched.count("recurrent_node") == expected


def test_bad_input() -> None:
    with pytest.raises(UserError, match='unknown backend "torch"'):
        RecurrentSupernet("rnn", 5, 4, backend="torch")
    for backend in ("fused", "reference"):
        network = supernet(backend=backend)
        words, _, hidden = batch()
        with pytest.raises(ValueError, match="weights"):
            network(words, {"recurrent": torch.ones(36, 4)}, Draws(0), hidden)
        weights = softmax_weights(network.initial_alphas(0))
        with pytest.raises(ValueError, match=r"batch norm|more than 1 value"):
            network(words[:, :1], weights, Draws(0), hidden[:1])
    assert load_space("rnn").task == "language"
