"""Random search with weight sharing: what it samples, trains and selects, and that it survives."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

import rdarts_fast
from rdarts_fast import random_search, training
from rdarts_fast.config import RandomSearchConfig, defaults
from rdarts_fast.config_sources import from_settings
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, one_hot_weights
from rdarts_fast.networks import Network, Supernet
from rdarts_fast.random_search import Budget, RandomSearchState, run_random_search
from rdarts_fast.retrain import run_retraining
from rdarts_fast.run_dir import Run
from rdarts_fast.sampling import Architectures, without_none
from rdarts_fast.search import run_search
from rdarts_fast.spaces import CELLS, INPUTS, SPACES, Space, edges_into, space_from_dict
from rdarts_fast.tasks.classification import Classification
from tests.small import arguments, settings, write_images

REPOSITORY = Path(__file__).parents[1]
DRAWS = Draws(5)
# Operations whose modules are the same in the supernet and in the network: a pool has a batch norm
# in the supernet alone, and noise draws at another site.
SHARED = ["none", "skip_connect", "sep_conv_3x3", "dil_conv_5x5", "conv_7x1_1x7"]


def space_of(names: list[str], nodes: int = 3) -> Space:
    return space_from_dict({"nodes": nodes, "cells": {"normal": names, "reduce": names}}, "test")


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a random search of a second."""
    given = settings(folder, samples=12, sample_batches=2, finalists=3, epochs=2)
    del given["alpha_learning_rate"]
    return given | changes


def prepared(folder: Path, **changes: Any) -> tuple[Any, Classification, RandomSearchState]:
    """Return settings, task and state of a random search that has not begun."""
    config = from_settings(RandomSearchConfig, small(folder, **changes))
    task = Classification.load(config, torch.device("cpu"))
    space = SPACES[config.space]
    return config, task, RandomSearchState.start(config, task.supernet(config, space))


# What is sampled


@pytest.mark.parametrize(
    ("space", "count"),
    [
        (SPACES["s5"], 81),
        (SPACES["s2"], (1 * 3 * 6 * 10 * 4**4) ** 2),
        (SPACES["s3"], (1 * 3 * 6 * 10 * 9**4) ** 2),
        (SPACES["darts"], (1 * 3 * 6 * 10 * 64**4) ** 2),
    ],
)
def test_there_are_as_many_architectures_as_pairs_times_operations(
    space: Space, count: int
) -> None:
    assert Architectures(space).count == count


def test_whole_architectures_have_an_input_at_every_node() -> None:
    assert Architectures(SPACES["s3"], whole=True).count == (1 * 3 * 6 * 10 * 8**4) ** 2
    one_none = Space("t", 1, dict.fromkeys(("normal", "reduce"), (("none", "noise"),) * 2))
    whole = Architectures(one_none, whole=True)
    assert whole.count == 9
    drawn = {without_none(whole.draw(DRAWS.at(step=i))) for i in range(200)}
    assert len(drawn) == 9
    assert {len(g.cells["normal"][0]) for g in drawn} == {1, 2}


@pytest.mark.parametrize("name", SPACES)
def test_a_nodes_inputs_are_different_earlier_ones_with_operations_of_their_edges(
    name: str,
) -> None:
    space = SPACES[name]
    architectures = Architectures(space)
    for step in range(100):
        cells = architectures.draw(DRAWS.at(step=step))
        assert set(cells) == set(space.cells)
        for kind, nodes in cells.items():
            assert len(nodes) == space.nodes
            for i, node in enumerate(nodes):
                edges, sources = space.edges_into(kind, i), [source for _, source in node]
                assert sources == sorted(set(sources))
                assert len(sources) == CELLS[kind].kept_by(i)
                for operation, source in node:
                    assert operation in space.cells[kind][edges[source]]


def assert_uniform(counts: Counter[Any], cells: int) -> None:
    """Pearson's chi-square against `cells` equally likely outcomes: below what one in a million
    fair samples exceeds, and above what one in a million stays below.
    """
    expected = counts.total() / cells
    assert expected > 5
    missing = cells - len(counts)
    value = sum((n - expected) ** 2 for n in counts.values()) / expected + missing * expected
    low, high = chi2.ppf([1e-6, 1 - 1e-6], cells - 1)
    assert low < value < high


def test_pairs_and_operations_are_uniform_and_cells_independent() -> None:
    """4,000 draws. An operation that is twice as likely, or an input that is left out, is found at
    once: the statistic is then above 400, where 1 in a million is 66 for the 24 choices of a node.
    """
    space = SPACES["s1"]
    architectures = Architectures(space)
    drawn = [architectures.draw(Draws(11, step=step)) for step in range(4000)]
    for kind in ("normal", "reduce"):
        for node in range(4):
            pairs = math.comb(INPUTS + node, 2)
            assert_uniform(Counter(cells[kind][node] for cells in drawn), 4 * pairs)
    both = Counter((cells["normal"][1], cells["reduce"][1]) for cells in drawn)
    assert_uniform(both, 12 * 12)
    within = Counter((cells["normal"][0], cells["normal"][2]) for cells in drawn)
    assert_uniform(within, 4 * 24)
    following = [(a["normal"][1], b["normal"][1]) for a, b in pairwise(drawn)]
    assert_uniform(Counter(following), 12 * 12)


def test_a_draw_is_a_function_of_its_key() -> None:
    architectures = Architectures(SPACES["s2"])
    first = architectures.draw(Draws(3, step=7))
    assert Architectures(SPACES["s2"]).draw(Draws(3, step=7)) == first
    assert architectures.draw(Draws(4, step=7)) != first
    assert architectures.draw(Draws(3, step=8)) != first
    assert architectures.draw(Draws(3, step=7, pass_index=64)) != first


def test_one_hot_weights_by_hand() -> None:
    edges = (("none", "noise"), ("noise", "none"), ("none", "noise"), ("noise", "none"))
    edges += (("skip_connect", "noise"),)
    space = Space("t", 2, {"normal": edges, "reduce": edges})
    nodes = ((("none", 0), ("none", 1)), (("noise", 0), ("skip_connect", 2)))
    weights = one_hot_weights(space, {"normal": nodes, "reduce": nodes[::-1][1:] + nodes[1:]})
    assert weights["normal"].tolist() == [[1, 0], [0, 1], [0, 1], [0, 0], [1, 0]]
    assert weights["reduce"].tolist() == [[1, 0], [0, 1], [0, 1], [0, 0], [1, 0]]


def test_without_none() -> None:
    node = (("none", 0), ("noise", 1))
    genotype = without_none({"normal": (node,), "reduce": (node[::-1],)})
    assert genotype == Genotype({"normal": ((("noise", 1),),), "reduce": ((("noise", 1),),)})
    with pytest.raises(UserError, match=r"reduce\[0\]: a node needs an input"):
        without_none({"normal": (node,), "reduce": ((("none", 0), ("none", 1)),)})


# The supernet under one-hot weights


def trained(space: Space, dtype: torch.dtype, backend: str = "fused") -> Supernet:
    """Return a small supernet whose running statistics have left their start."""
    torch.manual_seed(0)
    net = Supernet(space, channels=4, layers=3, backend=backend).to(dtype)
    for step in range(2):
        cells = Architectures(space).draw(DRAWS.at(step=step))
        weights = {k: w.to(dtype) for k, w in one_hot_weights(space, cells).items()}
        net(torch.randn(8, 3, 8, 8, dtype=dtype), weights, DRAWS)
    return net


def inherited(net: Supernet, genotype: Genotype) -> Network:
    """Return the genotype's network with the supernet's weights, in eval mode; affine is 1 and 0 as
    at the start.
    """
    network = Network(genotype, 4, 3).to(net.classifier.weight.dtype)
    for cell, target in zip(net.cells, network.cells, strict=True):
        pairs = [
            (cell.preprocess0, target.preprocess0),
            (cell.preprocess1, target.preprocess1),
        ]
        for k, (source, node, name) in enumerate(genotype.edges(cell.kind)):
            edge = edges_into(node - INPUTS)[source]
            o = net.space.cells[cell.kind][edge].index(name)
            pairs.append((cell.edges[edge].operations[o], target.operations[k]))
        for given, taker in pairs:
            unfilled = taker.load_state_dict(given.state_dict(), strict=False)
            assert unfilled.unexpected_keys == []
            assert {key.split(".")[-1] for key in unfilled.missing_keys} <= {"weight", "bias"}
    network.stem.load_state_dict(net.stem.state_dict())
    network.classifier.load_state_dict(net.classifier.state_dict())
    return network.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_one_hot_equals_the_network_with_inherited_weights(
    dtype: torch.dtype, tolerance: float
) -> None:
    space = space_of(SHARED)
    net, x = trained(space, dtype), torch.randn(5, 3, 8, 8, dtype=dtype)
    net.eval()
    architectures, single, logits = Architectures(space, whole=True), 0, []
    for step in range(8):
        cells = architectures.draw(DRAWS.at(step=step))
        weights = {kind: tensor.to(dtype) for kind, tensor in one_hot_weights(space, cells).items()}
        genotype = without_none(cells)  # of the network that is scored, whatever was `none`
        single += sum(len(node) == 1 for node in genotype.cells["normal"])
        network = inherited(net, genotype)
        with torch.no_grad():
            expected = network(x, DRAWS)
            for got in (net(x, weights, DRAWS), net.restricted(weights)(x, weights, DRAWS)):
                scale = expected.abs().max()
                assert (got - expected).abs().max() <= tolerance * scale
        logits.append(expected)
    assert single > 0
    assert not torch.equal(logits[0], logits[1])


def norms_of(net: nn.Module) -> dict[str, tuple[Tensor, Tensor, int]]:
    return {
        name: (m.running_mean.clone(), m.running_var.clone(), int(m.num_batches_tracked))
        for name, m in net.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    }


@pytest.mark.parametrize(
    ("name", "backend"),
    [("s1", "fused"), ("s4", "fused"), ("s4", "reference"), ("all", "fused"), ("all", "reference")],
)
def test_a_restricted_supernet_is_the_same_function(name: str, backend: str) -> None:
    space = SPACES[name] if name in SPACES else space_of([*SHARED, "noise", "max_pool_3x3"], 2)
    net = trained(space, torch.float64, backend)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    names = [key for key, _ in net.named_parameters()]
    for step in range(2):
        cells = Architectures(space).draw(DRAWS.at(step=step + 10))
        weights = {kind: tensor.double() for kind, tensor in one_hot_weights(space, cells).items()}
        net.eval()
        whole, part = net(x, weights, DRAWS), net.restricted(weights)(x, weights, DRAWS)
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)

        net.train()
        state, before = {k: v.clone() for k, v in net.state_dict().items()}, norms_of(net)
        grown: list[Any] = []
        for restricted in (False, True):
            net.load_state_dict(state)
            network = net.restricted(weights) if restricted else net
            logits = network(x, weights, DRAWS)
            gradient = torch.autograd.grad(logits.square().sum(), net.parameters(), None,
                                           allow_unused=True)  # fmt: skip
            grown.append((logits, gradient, norms_of(net)))
        (logits, gradient, moved), (logits_part, gradient_part, moved_part) = grown
        torch.testing.assert_close(logits_part, logits, rtol=1e-10, atol=1e-10)
        for key, got, expected in zip(names, gradient_part, gradient, strict=True):
            expected = torch.zeros(1) if expected is None else expected
            got = torch.zeros_like(expected) if got is None else got
            scale = max(1.0, float(expected.abs().max()))
            assert (got - expected).abs().max() <= 1e-10 * scale, key
        check_norms(space, net, cells, before, moved, moved_part)


def check_norms(
    space: Space, net: Supernet, cells: Any, before: Any, moved: Any, moved_part: Any
) -> None:
    """What was sampled has moved alike, what was not has stood still in the restricted supernet and
    only there.
    """
    sampled = set()
    for c, cell in enumerate(net.cells):
        for node, inputs in enumerate(cells[cell.kind]):
            for operation, source in inputs:
                e = edges_into(node)[source]
                o = space.cells[cell.kind][e].index(operation)
                sampled.add(f"cells.{c}.edges.{e}.operations.{o}")
    stood = 0
    for key, (mean, variance, count) in moved_part.items():
        assert moved[key][2] == before[key][2] + 1
        if ".edges." not in key or ".".join(key.split(".")[:6]) in sampled:
            torch.testing.assert_close(mean, moved[key][0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(variance, moved[key][1], rtol=1e-10, atol=1e-12)
            assert count == moved[key][2]
        else:
            stood += 1
            assert torch.equal(mean, before[key][0]) and torch.equal(variance, before[key][1])
            assert count == before[key][2]
    assert stood > 10


def test_a_restricted_supernet_checks_its_weights_and_leaves_the_supernet_whole() -> None:
    net = Supernet("s2", channels=2, layers=3)
    keys = list(net.state_dict())
    weights = one_hot_weights(net.space, Architectures(net.space).draw(DRAWS))
    part = net.eval().restricted(weights)
    assert not part.training and not any(cell.training for cell in part.cells)
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in net.parameters())
    assert list(net.state_dict()) == keys
    with pytest.raises(ValueError, match=r"weights\['reduce'\]: expected shape \(14, 2\)"):
        net.restricted(weights | {"reduce": torch.ones(14, 3)})


# Training


def test_a_step_moves_the_weights_alike_with_and_without_skipping(tmp_path) -> None:
    after = []
    for skip in (False, True):
        config, task, state = prepared(tmp_path, space="s2", channels=4, skip_unsampled=skip)
        state.supernet.double()
        for step in range(3):  # weight decay and momentum move what an earlier step has sampled
            cells = Architectures(state.supernet.space).draw(DRAWS.at(step=step))
            rows = torch.arange(6 * step, 6 * step + 6)
            images, labels = task.training_batch(rows, DRAWS.at(step=step), 0.0)
            weights = one_hot_weights(state.supernet.space, cells)
            batch = images.double(), labels
            run: Any = None
            random_search.train_step(config, task, state, batch, weights, DRAWS, run)
        after.append(dict(state.supernet.named_parameters()))
        counts = {count for _, _, count in norms_of(state.supernet).values()}
        assert counts == ({0, 1, 2, 3} if skip else {3})  # how often a batch norm has moved
    start = dict(prepared(tmp_path, space="s2", channels=4)[2].supernet.named_parameters())
    for key, expected in after[0].items():
        torch.testing.assert_close(after[1][key], expected, rtol=1e-9, atol=1e-12)
        assert not torch.equal(expected, start[key].double()), key


@pytest.mark.usefixtures("no_picture")
def test_each_step_has_its_own_architecture_and_the_published_order_of_batches(
    tmp_path, monkeypatch
) -> None:
    steps: list[tuple[int, int]] = []
    weights: list[bytes] = []
    step = random_search.train_step

    def recorded(settings, task, state, batch, one, draws, run):
        steps.append((draws.step, draws.pass_index))
        total = {kind: tensor.sum().item() for kind, tensor in one.items()}
        assert total == {"normal": 8, "reduce": 8}
        assert all(set(tensor.unique().tolist()) == {0, 1} for tensor in one.values())
        weights.append(b"".join(tensor.numpy().tobytes() for tensor in one.values()))
        step(settings, task, state, batch, one, draws, run)

    monkeypatch.setattr(random_search, "train_step", recorded)
    run = run_random_search(**small(tmp_path, space="s2", steps=7))
    assert steps == [(i, 0) for i in range(7)]
    assert len(set(weights)) == 7
    assert [r["epoch"] for r in run.metrics] == [0, 1, 2]  # 18 images in batches of 6
    rates = [r["learning_rate"] for r in run.metrics]
    assert rates == pytest.approx([0.025, 0.001 + 0.024 * 0.75, 0.001 + 0.024 * 0.25])


def test_the_budget() -> None:
    cifar = Budget(391, 50 * 391)
    assert (cifar.steps, cifar.epochs, cifar.rounds) == (19_550, 50, 1)
    assert {cifar.steps_of(epoch) for epoch in range(50)} == {391}
    published = Budget(391, int(50 * 25000 / 64))
    assert (published.steps, published.epochs, published.rounds) == (19_531, 50, 1)
    assert published.steps_of(48) == 391
    assert published.steps_of(49) == 391 - 19
    assert sum(published.steps_of(epoch) for epoch in range(50)) == 19_531
    svhn = Budget(573, 19_531)
    assert (svhn.epochs, svhn.steps_of(34)) == (35, 19_531 - 34 * 573)
    assert [Budget(10, n).rounds for n in (1, 9_999, 10_000, 19_999, 20_000)] == [1, 1, 1, 1, 2]


def test_the_budget_follows_the_data(tmp_path) -> None:
    config, task, _ = prepared(tmp_path, epochs=5)
    assert Budget.of(config, task) == Budget(3, 15)
    config, task, _ = prepared(tmp_path, epochs=5, epoch_steps=2)
    assert Budget.of(config, task) == Budget(2, 10)
    config, task, _ = prepared(tmp_path, epochs=5, steps=4)
    assert Budget.of(config, task) == Budget(3, 4)


def test_published_values() -> None:
    c = defaults(RandomSearchConfig, "cifar10", "default")
    assert (c.channels, c.layers, c.epochs, c.batch_size, c.steps) == (16, 8, 50, 64, None)
    assert (c.learning_rate, c.learning_rate_min, c.momentum) == (0.025, 0.001, 0.9)
    assert (c.weight_decay, c.grad_clip, c.drop_path_prob) == (3e-4, 5.0, 0.0)
    assert (c.samples, c.sample_batches, c.finalists) == (1000, 10, 10)
    assert not c.skip_unsampled
    assert defaults(RandomSearchConfig, "digits", "paper") == RandomSearchConfig(preset="paper")


# Selection


def test_an_error_is_the_share_of_wrong_answers_in_eval_mode(tmp_path) -> None:
    config, task, state = prepared(tmp_path, space="s4")
    key = Draws(config.seed, pass_index=training.EVALUATION_PASS)
    genotype = without_none(Architectures(SPACES["s4"], whole=True).draw(DRAWS.at(step=1)))
    weights = one_hot_weights(SPACES["s4"], genotype.cells)
    batches, wrong = task.validation_batches(), 0
    before = norms_of(state.supernet)
    error = random_search.validation_cost(config, task, state, genotype, 3, batches)
    after = norms_of(state.supernet)
    assert all(torch.equal(before[k][0], after[k][0]) for k in before)
    for b, rows in enumerate(batches):
        draws = key.at(step=3 * 65536 + b)
        images, labels = task.training_batch(rows, draws, 0.0, validation=True)
        with torch.no_grad():
            logits = state.supernet.eval()(images, weights, draws)
        wrong += int((logits.argmax(1) != labels).sum())
    assert error == pytest.approx(wrong / 18, abs=1e-12)
    assert wrong not in (0, 9, 18)


def planted(monkeypatch, first: dict[Genotype, float], second: dict[Genotype, float]) -> Any:
    """Score by tables in place of networks; return what was scored, a list a stage."""
    scored: dict[int, list[tuple[Genotype, int]]] = {}

    def by_table(settings, task, state, genotype, stage, batches):
        scored.setdefault(stage, []).append((genotype, sum(len(rows) for rows in batches)))
        return (second if stage % 2 else first)[genotype]

    monkeypatch.setattr(random_search, "validation_cost", by_table)
    return scored


def architectures_of_s5() -> list[Genotype]:
    operations = SPACES["s5"].cells["normal"][0]
    pairs = [((a, 0), (b, 1)) for a in operations for b in operations]
    return [Genotype({"normal": (n,), "reduce": (r,)}) for n in pairs for r in pairs]


@pytest.mark.usefixtures("no_picture")
def test_the_selection_finds_the_planted_best(tmp_path, monkeypatch) -> None:
    """All of S5's 81 architectures are drawn. The best on the sample are 80, 79, ..., 70; of those,
    73 is the best on all, and 0, which is better still, was never scored there.
    """
    everything = architectures_of_s5()
    first = {genotype: 1.0 - i / 100 for i, genotype in enumerate(everything)}
    second = dict.fromkeys(everything, 0.5) | {everything[73]: 0.25, everything[0]: 0.0}
    scored = planted(monkeypatch, first, second)
    run = run_random_search(
        **small(tmp_path, steps=1, samples=1500, sample_batches=2, finalists=11)
    )
    assert sorted(Counter(g for g, _ in scored[0]).values()) == [1] * 81
    assert {images for _, images in scored[0]} == {12}  # two batches of 6
    assert [g for g, _ in scored[1]] == everything[:69:-1]
    assert {images for _, images in scored[1]} == {18}
    assert list(scored) == [0, 1]
    assert run.genotype == everything[73]
    assert run.result is not None and run.result["valid_error"] == 0.25
    table = run.result["finalists"]
    assert [Genotype.from_dict(row["genotype"]) for row in table] == [
        everything[73],
        *(everything[i] for i in (80, 79, 78, 77, 76, 75, 74, 72, 71, 70)),
    ]
    assert table[0]["sampled_error"] == first[everything[73]]
    assert [row["valid_error"] for row in table] == [0.25] + [0.5] * 10


@pytest.mark.usefixtures("no_picture")
def test_every_round_has_its_own_samples_and_the_best_of_all_wins(tmp_path, monkeypatch) -> None:
    everything = architectures_of_s5()
    table = {genotype: i / 100 for i, genotype in enumerate(everything)}
    scored = planted(monkeypatch, table, table)
    monkeypatch.setattr(random_search, "STEPS_PER_ROUND", 3)
    run = run_random_search(**small(tmp_path, steps=7, samples=10, finalists=2))
    assert list(scored) == [0, 1, 2, 3]
    firsts = [[g for g, _ in scored[stage]] for stage in (0, 2)]
    assert firsts[0] != firsts[1]
    assert run.result is not None
    assert run.result["valid_error"] == min(table[g] for g in firsts[0] + firsts[1])
    assert len(run.result["finalists"]) == 4


@pytest.mark.usefixtures("no_picture")
def test_small_data_sets_have_fewer_batches_and_samples_fewer_finalists(
    tmp_path, monkeypatch
) -> None:
    table = dict.fromkeys(architectures_of_s5(), 0.5)
    scored = planted(monkeypatch, table, table)
    given = small(tmp_path, steps=1, samples=1, sample_batches=50, finalists=7)
    run = run_random_search(**given)
    assert {images for _, images in scored[0]} == {18}
    assert run.result is not None and len(run.result["finalists"]) == 1


@pytest.mark.usefixtures("no_picture")
def test_equal_scores_go_to_the_first_drawn(tmp_path, monkeypatch) -> None:
    table = dict.fromkeys(architectures_of_s5(), 0.5)
    scored = planted(monkeypatch, table, table)
    run = run_random_search(**small(tmp_path, steps=1))
    assert run.genotype == scored[0][0][0]


@pytest.mark.usefixtures("no_picture")
def test_the_weights_never_see_the_images_of_the_selection(tmp_path, monkeypatch) -> None:
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    batch = Classification.training_batch

    def recorded(self, rows, draws, cutout, *, validation=False):
        seen[validation].update(rows.tolist())
        return batch(self, rows, draws, cutout, validation=validation)

    monkeypatch.setattr(Classification, "training_batch", recorded)
    run_random_search(**small(tmp_path))
    assert seen[False] & seen[True] == set()
    assert seen[False] | seen[True] == set(range(36))


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(("drop_path_prob", "expected"), [(0.0, 0.0), (0.3, 0.8)])
def test_cutout_comes_with_drop_path_only(
    drop_path_prob: float, expected: float, tmp_path, monkeypatch
) -> None:
    seen = set()
    batch = Classification.training_batch

    def recorded(self, rows, draws, cutout, **rest):
        seen.add(cutout)
        return batch(self, rows, draws, cutout, **rest)

    monkeypatch.setattr(Classification, "training_batch", recorded)
    changes = {"drop_path_prob": drop_path_prob, "cutout_prob": 0.8, "cutout_length": 2}
    run_random_search(**small(tmp_path, steps=1, samples=1, **changes))
    assert seen == {expected}


# Whole runs


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave away what takes as long as all the rest of a small run."""
    monkeypatch.setattr(random_search.plots, "save_cells", lambda *a: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    return run_random_search(**small(tmp_path_factory.mktemp("finished"), space="s3"))


def assert_same_bits(a: Path, b: Path) -> None:
    stored = [Run.read(run).load_checkpoint() for run in (a, b)]
    one, other = (entry["supernet"] for entry in stored)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    momenta = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
        for state in stored
    ]
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert stored[0]["costs"] == stored[1]["costs"]
    runs, drop = [Run.read(run) for run in (a, b)], ("seconds", "training_seconds")
    records = [[{k: v for k, v in r.items() if k not in drop} for r in run.metrics] for run in runs]
    assert records[0] == records[1]
    results = [{k: v for k, v in (run.result or {}).items() if k not in drop} for run in runs]
    assert results[0] == results[1] != {}
    assert runs[0].genotype == runs[1].genotype is not None


def test_a_run_leaves_everything_behind(finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl", "genotype.json"}
    assert names >= {"result.json", "cells.svg", "checkpoints", "space.json"}
    assert [r["epoch"] for r in finished.metrics] == [0, 1]
    for record in finished.metrics:
        assert record["train_loss"] > 0.0 and 0.0 <= record["train_accuracy"] <= 1.0
    table = finished.result["finalists"]
    assert len(table) == 3
    assert finished.result["valid_error"] == table[0]["valid_error"]
    assert [row["valid_error"] for row in table] == sorted(row["valid_error"] for row in table)
    assert Genotype.from_dict(table[0]["genotype"]) == finished.genotype
    assert finished.result["seconds"] > finished.result["training_seconds"] > 0.0
    stored = finished.load_checkpoint()
    assert (stored["epoch"], len(stored["costs"][0]), len(stored["costs"][1])) == (2, 12, 3)
    assert any(name.startswith("cells.") for name in stored["supernet"])
    assert rdarts_fast.run_random_search is run_random_search


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "s1", "skip_unsampled": True},
        {"space": "s2", "backend": "reference", "skip_unsampled": True},
        {"space": "s4", "drop_path_prob": 0.4, "cutout_length": 2},
        {"space": "s4", "skip_unsampled": True, "drop_path_prob": 0.4, "cutout_length": 2},
        {"space": "darts", "layers": 1},
        {"space": "mine.json", "skip_unsampled": True},
    ],
)
def test_every_kind_of_run_ends_with_a_genotype_of_its_space(
    changes: dict[str, Any], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = {"normal": ["none", "sep_conv_5x5"], "reduce": ["avg_pool_3x3", "noise"]}
    Path("mine.json").write_text(json.dumps({"nodes": 2, "cells": mine}))
    run = run_random_search(**small(tmp_path, steps=4, samples=4, **changes))
    space = space_from_dict(json.loads((run.folder / "space.json").read_text()), "space.json")
    assert run.genotype is not None and run.genotype.nodes == space.nodes
    for kind in ("normal", "reduce"):
        for source, target, name in run.genotype.edges(kind):
            assert name in space.cells[kind][edges_into(target - INPUTS)[source]]
    if changes["space"] == "mine.json":
        assert run.config["space"] == str(tmp_path / "mine.json")  # resumed from any folder
    drop = changes.get("drop_path_prob", 0.0)
    assert [r["drop_path_prob"] for r in run.metrics] == [0.0, drop]


@pytest.mark.usefixtures("no_picture")
def test_the_same_seed_gives_the_same_bits_and_another_does_not(finished, tmp_path) -> None:
    data = finished.config["data"]
    again = run_random_search(**small(tmp_path, space="s3", data=data))
    assert_same_bits(finished.folder, again.folder)
    other = run_random_search(
        **small(tmp_path, space="s3", data=data, seed=4, out=tmp_path / "other")
    )
    assert other.metrics[0]["train_loss"] != again.metrics[0]["train_loss"]
    assert other.result["finalists"] != again.result["finalists"]


def test_resuming_a_finished_run_computes_nothing(finished, monkeypatch) -> None:
    for name in ("train_step", "validation_cost"):
        monkeypatch.setattr(random_search, name, None)
    run = run_random_search(resume=finished.folder)
    assert run.result == finished.result and run.metrics == finished.metrics


def test_a_found_genotype_is_retrained_and_has_no_epochs(finished, tmp_path) -> None:
    given: dict[str, Any] = {
        "source": str(finished.folder),
        "out": tmp_path / "retrained",
        "channels": 2,
        "layers": 3,
        "epochs": 1,
        "batch_size": 12,
    }
    (run,) = run_retraining(**given)
    assert run.genotype == finished.genotype
    with pytest.raises(UserError, match="has one genotype, not one an epoch"):
        run_retraining(**given | {"genotypes_at": "1"})


# Killed and interrupted

KILLS = """
import os, signal, sys, torch
import torch._dynamo  # which an optimiser imports: once, not in every fork
from pathlib import Path
torch.set_num_threads(1)
from rdarts_fast import random_search, run_dir

def arm(owner, name, count):
    function, left = getattr(owner, name), [count]
    def killing(*args, **kwargs):
        result = function(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, killing)

OWNERS = {"random_search": random_search, "run_dir.RunDir": run_dir.RunDir}
for given, owner, name, count in CASES:
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = open(os.devnull, "w")
            arm(OWNERS[owner], name, count)
            random_search.run_random_search(**given)
        finally:
            os._exit(1)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""
MOMENTS = [  # whose function, its name, after which call
    ("random_search", "train_step", 2),
    ("run_dir.RunDir", "append_metrics", 2),  # before the checkpoint that knows of it
    ("random_search", "validation_cost", 5),
    ("random_search", "validation_cost", 14),  # the second finalist
    ("run_dir.RunDir", "write_text", 1),  # genotype.json, without result.json
]


@pytest.mark.usefixtures("no_picture")
def test_killed_at_any_moment_and_resumed_gives_the_same_bits(tmp_path) -> None:
    data = f"npz:{write_images(tmp_path / 'images.npz')}"
    given = small(tmp_path, data=data, space="s4", layers=1, drop_path_prob=0.3)
    whole = run_random_search(**given)
    cases = [
        (given | {"out": tmp_path / f"killed-{i}", "checkpoint_minutes": 5.0 * (i % 2)}, *moment)
        for i, moment in enumerate(MOMENTS)
    ]
    script = KILLS.replace("CASES", repr(cases)).replace("PosixPath", "Path")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(cases), done.stderr
    for case, *_ in cases:
        assert Run.read(case["out"]).result is None
        run_random_search(resume=case["out"])
        assert_same_bits(whole.folder, case["out"])


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("name", ["train_step", "validation_cost"])
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    name: str, finished, tmp_path, monkeypatch, capsys
) -> None:
    given = small(tmp_path, space="s3", data=finished.config["data"])
    function, calls = getattr(random_search, name), 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args)

    monkeypatch.setattr(random_search, name, interrupted)
    monkeypatch.setattr(sys, "argv", ["random_search", *arguments(given)])
    with pytest.raises(SystemExit) as stop:
        random_search.main()
    assert stop.value.code == 130
    line = f"python -m rdarts_fast.random_search --resume {tmp_path / 'run'}"
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; go on with: {line}"
    assert calls == 4
    run_random_search(resume=tmp_path / "run")
    assert calls == {"train_step": 6, "validation_cost": 15}[name]  # none twice
    assert_same_bits(finished.folder, tmp_path / "run")


# What a user can get wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "s9"}, 'unknown space "s9": one of s1, s2'),
        ({"samples": 0}, "--samples: expected a whole number of at least 1, got 0"),
        ({"sample_batches": 0}, "--sample-batches: expected a whole number of at least 1, got 0"),
        ({"finalists": -1}, "--finalists: expected a whole number of at least 1, got -1"),
        ({"steps": 0}, "--steps: expected a whole number of at least 1, got 0"),
        ({"skip_unsampled": 1}, "--skip-unsampled: expected True or False, got 1"),
        ({"sampels": 3}, 'unknown setting "sampels"'),
        ({"preset": "20x16"}, 'unknown preset "20x16": one of default, paper, quick'),
        ({"learning_rate": 1e30}, "epoch 0, batch"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        run_random_search(**small(tmp_path, **changes))
    assert message in str(error.value)
    assert (tmp_path / "run").exists() == ("learning_rate" in changes)


def test_runs_of_other_kinds_are_not_resumed(finished, tmp_path) -> None:
    searched = run_search(**settings(tmp_path, epochs=1, epoch_steps=1))
    with pytest.raises(UserError, match="not a random search of this version"):
        run_random_search(resume=searched.folder)
    with pytest.raises(UserError, match="not a search of this version"):
        run_search(resume=finished.folder)
    with pytest.raises(UserError, match="--samples: the run was started with 12, got 13"):
        run_random_search(resume=finished.folder, samples=13)
