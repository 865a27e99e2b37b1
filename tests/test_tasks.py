"""Every program on every task: what holds for images holds for text and for stereo pairs."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdarts_fast import analysis, bilevel, config_sources, memory, search, tasks
from rdarts_fast.config import RandomSearchConfig, RetrainConfig, SearchConfig
from rdarts_fast.config_disparity import DisparityRetrainConfig
from rdarts_fast.curvature import hessian
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, discretize
from rdarts_fast.metrics import METRICS, Metric, Outcome, Sums
from rdarts_fast.networks import softmax_weights
from rdarts_fast.networks.recurrent import RecurrentNetwork
from rdarts_fast.random_search import run_random_search
from rdarts_fast.retrain import run_retraining
from rdarts_fast.robust import run_robust
from rdarts_fast.run_dir import Run
from rdarts_fast.search import run_search
from rdarts_fast.spaces import FAMILIES, load_space
from tests import small_worlds
from tests.test_rollback import RULE, plant
from tests.test_search import assert_same_bits

REPOSITORY = Path(__file__).parents[1]
WORLDS: dict[str, Callable[..., dict[str, Any]]] = {
    "language": small_worlds.language,
    "disparity": small_worlds.disparity,
}
OF_A_SEARCH = ("space", "alpha_learning_rate")
world = pytest.mark.parametrize("name", WORLDS)


def of_a_training(given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the settings of a search that a retraining has too, with changes."""
    return {k: v for k, v in given.items() if k not in OF_A_SEARCH} | changes


@world
def test_search_analysis_and_retraining(name: str, tmp_path, capsys) -> None:
    metric = METRICS[name]
    run = run_search(**WORLDS[name](tmp_path, epochs=2, curvature="lambda", curvature_every=1))
    assert run.config["task"] == name
    assert run.genotype is not None and set(run.genotype.cells) == set(FAMILIES[name])
    for record in run.metrics:
        alphas = {kind: torch.tensor(a) for kind, a in record["alphas"].items()}
        assert discretize(load_space(run.config["space"]), alphas).to_dict() == record["genotype"]
        assert record[f"valid_{metric.name}"] > 0.0 and record["train_loss"] > 0.0
        assert abs(record["lambda_abs"]) >= record["lambda_max"] >= 0.0
    assert run.result[f"valid_{metric.name}"] == run.metrics[-1][f"valid_{metric.name}"]
    assert (run.folder / "cells.svg").stat().st_size > 1000

    found = analysis.analyse(run.folder, points=3)
    assert found["discretisation"]["supernet"] == run.result[f"valid_{metric.name}"]
    assert (run.folder / "analysis" / "landscape.svg").exists()
    assert f"discretising: {metric.name} " in analysis.describe(found)

    (trained,) = run_retraining(source=str(run.folder), out=tmp_path / "r", epochs=2, threads=1,
                                **sizes_of(run.config))  # fmt: skip
    assert trained.config["data"] == run.config["data"]  # the run's own
    costs = [record[f"test_{metric.cost}"] for record in trained.metrics]
    assert trained.result[f"test_{metric.cost}"] == costs[-1]
    assert trained.result[f"best_test_{metric.cost}"] == min(costs)
    assert next(iter(trained.result["baselines"].values())) > 0.0
    assert f"test {metric.cost} after the last epoch: {metric.text(costs[-1])}" in (
        capsys.readouterr().out
    )


def sizes_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of a run's network and batches."""
    names = ("hidden", "bptt", "channels", "decoders", "max_displacement", "crop_height")
    names += ("crop_width", "batch_size")
    unused = search.config_sources.kind_for(SearchConfig, config["task"]).unused
    return {k: config[k] for k in names if k in config and k not in unused}


@world
def test_planted_eigenvalues_stop_and_roll_back(name: str, tmp_path, monkeypatch) -> None:
    plant(monkeypatch.setattr)
    given = {"epochs": 6, "curvature": "lambda", "epoch_steps": 2, **RULE}
    stopped = run_search(**WORLDS[name](tmp_path, out=tmp_path / "s", early_stop="stop", **given))
    assert stopped.result["early_stop"]["epoch"] == 2
    assert len(stopped.metrics) == 5
    rolled = run_search(**WORLDS[name](tmp_path, out=tmp_path / "a", adaptive="l2", **given))
    assert rolled.result["rollbacks"] == 1
    decays = [record["weight_decay"] for record in rolled.history]
    assert decays[-1] == pytest.approx(10 * decays[0])
    assert [record["epoch"] for record in rolled.history] == list(range(6))


KILLED = """
import os, signal
from pathlib import Path, PosixPath
from rdarts_fast import search

step, left = search.alpha_step, [3]

def stepping(*given):
    left[0] -= 1
    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    return step(*given)

search.alpha_step = stepping
search.run_search(**GIVEN)
"""


@world
def test_killed_and_resumed_gives_the_same_bits(name: str, tmp_path) -> None:
    few = {"epochs": 3, "epoch_steps": 2}  # of disparity's pairs, one batch an epoch
    whole = run_search(**WORLDS[name](tmp_path, out=tmp_path / "whole", **few))
    killed = tmp_path / "killed"
    given = WORLDS[name](tmp_path, out=killed, checkpoint_minutes=0.0, **few)
    done = subprocess.run(
        [sys.executable, "-c", KILLED.replace("GIVEN", repr(given))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(Run.read(killed).metrics) < 3
    assert_same_bits(whole.folder, run_search(resume=killed).folder)


def config_of(given: dict[str, Any]) -> SearchConfig:
    return config_sources.from_settings(SearchConfig, given)


@world
def test_random_search(name: str, tmp_path) -> None:
    metric = METRICS[name]
    given = WORLDS[name](tmp_path, epochs=1, samples=4, sample_batches=1, finalists=2)
    del given["alpha_learning_rate"]
    run = run_random_search(**given)
    costs = [finalist[f"valid_{metric.cost}"] for finalist in run.result["finalists"]]
    assert costs == sorted(costs) and run.result[f"valid_{metric.cost}"] == costs[0]
    assert run.genotype is not None and set(run.genotype.cells) == set(FAMILIES[name])


def test_a_random_search_scores_the_network_that_its_genotype_is(tmp_path) -> None:
    given = small_worlds.language(tmp_path, epochs=2, samples=4, sample_batches=1, finalists=2)
    del given["alpha_learning_rate"]
    run = run_random_search(**given)
    settings = config_sources.stored(RandomSearchConfig, run.folder, "RUN")
    task, cost = tasks.load(settings, torch.device("cpu")), METRICS["language"].cost
    stored = run.load_checkpoint()["supernet"]
    for finalist in run.result["finalists"]:
        genotype = Genotype.from_dict(finalist["genotype"])
        vocabulary, hidden = stored["embedding.weight"].shape
        network = RecurrentNetwork(genotype, vocabulary, hidden).eval()
        network.load_state_dict({k: v for k, v in stored.items() if "norm" not in k})
        sums, carry = Sums(), {}
        with torch.no_grad():
            for rows in task.validation_batches():
                outcome = task.run_network(network, task.holdout_batch(rows), Draws(0), carry)
                carry = outcome.carry
                sums.add(outcome)
        assert finalist[f"valid_{cost}"] == pytest.approx(sums.cost(task.metric), rel=1e-5)


def test_an_architecture_that_computes_no_numbers_is_the_last(tmp_path, monkeypatch) -> None:
    costs = iter((math.nan, 3.0, math.inf, 2.0, 5.0, math.nan))
    monkeypatch.setattr(Sums, "cost", lambda self, metric: next(costs))
    given = small_worlds.language(tmp_path, epochs=1, samples=4, sample_batches=1, finalists=2)
    del given["alpha_learning_rate"]
    run = run_random_search(**given)
    finalists = [(f["sampled_perplexity"], f["valid_perplexity"]) for f in run.result["finalists"]]
    assert finalists[0] == (2.0, 5.0) and finalists[1][0] == 3.0 and finalists[1][1] > 1e290
    monkeypatch.setattr(Sums, "cost", lambda self, metric: math.nan)
    with pytest.raises(UserError, match="no architecture has a finite validation perplexity"):
        run_random_search(**given | {"out": tmp_path / "none"})


@world
def test_robust_chooses_by_the_tasks_own_cost(name: str, tmp_path) -> None:
    metric = METRICS[name]
    given = WORLDS[name](tmp_path)
    sizes = [f"{k}={v}" for k, v in sizes_of(given).items()] + ["threads=1"]
    table = run_robust(
        task=name,
        space=given.get("space", ""),
        data=given["data"],
        out=tmp_path / "robust",
        grid=(1e-4, 1e-3),
        short_epochs=1,
        device="cpu",
        search=("epochs=1", "epoch_steps=2", *sizes),
        retrain=("epochs=1", "epoch_steps=2", *sizes),
    )
    shorts = {row["name"]: row[f"valid_{metric.cost}"] for row in table.rows}
    (best,) = (row for row in table.rows if row["selected"])
    assert shorts[best["name"]] == min(shorts.values())
    assert table.mean == best[f"test_{metric.cost}"]
    assert f"test {metric.cost} of the selected: {metric.text(table.mean)}" in table.to_markdown()


@world
def test_the_hessian_is_that_of_the_loss(name: str, tmp_path) -> None:
    """Its rows against differences of the gradient; in float64, where there are no kinks near."""
    settings = config_of(WORLDS[name](tmp_path))
    task = tasks.load(settings, torch.device("cpu"))
    supernet = task.supernet(settings, load_space(settings.space)).double()
    alphas = supernet.initial_alphas(0)
    key = Draws(0)
    batch = task.training_batch(task.validation_rows(key), key, 0.0, validation=True)
    batch = tuple(part.double() if part.is_floating_point() else part for part in batch)
    buffers = [buffer.clone() for buffer in supernet.buffers()]
    matrix = hessian(task.hessian_operator(supernet, alphas, batch, key))
    assert all(map(torch.equal, buffers, supernet.buffers()))

    leaves = list(alphas.values())

    def gradient() -> torch.Tensor:
        with bilevel.unchanged(list(supernet.buffers())):
            weights = softmax_weights(alphas)
            loss = task.run_supernet(supernet, batch, weights, key, {}).objective
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    direction = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0)).double()
    sides = []
    for sign in (1.0, -1.0):
        parts = direction.split([leaf.numel() for leaf in leaves])
        with torch.no_grad():
            for leaf, part in zip(leaves, parts, strict=True):
                leaf += sign * 1e-6 * part.view_as(leaf)
        sides.append(gradient())
        with torch.no_grad():
            for leaf, part in zip(leaves, parts, strict=True):
                leaf -= sign * 1e-6 * part.view_as(leaf)
    difference = (sides[0] - sides[1]) / 2e-6
    scale = float(difference.abs().max())
    assert scale > 1e-6  # of a recurrent cell's small weights; the differences' own error is 1e-10
    assert (matrix @ direction - difference).abs().max() <= 1e-3 * scale


def test_a_language_search_of_second_order_clips_its_virtual_step(tmp_path, monkeypatch) -> None:
    steps: list[bilevel.VirtualStep] = []
    second_order = bilevel.second_order

    def recorded(train, valid, parameters, alphas, step, **rest):
        steps.append(step)
        return second_order(train, valid, parameters, alphas, step, **rest)

    monkeypatch.setattr(bilevel, "second_order", recorded)
    few: dict[str, Any] = {"order": "second", "epochs": 1, "epoch_steps": 1}
    run_search(**small_worlds.language(tmp_path, **few))
    run_search(**small_worlds.disparity(tmp_path, out=tmp_path / "d", **few))
    assert [step.clip for step in steps] == [0.25, None]


def test_windows_of_a_search_have_the_published_length(tmp_path) -> None:
    settings = config_of(small_worlds.language(tmp_path, batch_size=2, bptt=12))
    task = tasks.load(settings, torch.device("cpu"))
    draws = [Draws(3, step=step) for step in range(20)]
    lengths = {len(rows) for each in draws for rows in task.search_epoch(each)[:-1]}
    assert lengths == {12, 6}
    varied = {len(rows) for each in draws for rows in task.retrain_epoch(each)}
    assert len(varied) > 5


def test_a_window_is_not_divided_among_processes(tmp_path) -> None:
    run = run_search(**small_worlds.language(tmp_path, epochs=1, epoch_steps=1))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "rdarts_fast.retrain", str(run.folder), "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path / "r")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "--task language: a batch cannot be divided: run it on one process" in done.stderr
    assert not (tmp_path / "r").exists()


@world
def test_what_would_fit_is_told_where_rows_fill_a_batch(name: str, tmp_path, monkeypatch) -> None:
    settings = config_of(WORLDS[name](tmp_path))
    task = tasks.load(settings, torch.device("cpu"))
    supernet = task.supernet(settings, load_space(settings.space))
    assert memory.ways_of(settings, task, supernet) == []  # batches of two pairs are too small
    monkeypatch.setattr(memory, "SIZES", (1, 2))
    ways = memory.ways_of(settings, task, supernet)
    assert [way.bytes > 0 for way in ways] == ([True] if task.divisible else [])


# Settings


def test_a_task_has_its_own_settings_and_defaults(tmp_path) -> None:
    language = config_of({"task": "language"})
    assert (language.data, language.space, language.order) == ("pydoc", "rnn", "first")
    published = config_of({"task": "language", "preset": "ptb"})
    assert (published.batch_size, published.learning_rate, published.epochs) == (256, 20.0, 50)
    disparity = config_of({"task": "disparity", "preset": "paper"})
    assert (disparity.space, disparity.learning_rate) == ("disparity_small", 0.025)
    training = {"task": "disparity", "source": "genotype.json"}
    for given, norms in (({}, True), ({"preset": "quick"}, True), ({"preset": "paper"}, False)):
        found = config_sources.from_settings(RetrainConfig, training | given)
        assert isinstance(found, DisparityRetrainConfig) and found.batch_norm == norms
    assert config_of({"task": "classification"}) == config_of({})
    with pytest.raises(UserError, match='unknown task "lang"'):
        config_of({"task": "lang"})
    with pytest.raises(UserError, match="unknown setting"):
        config_of({"hidden": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "language", "channels": 4}, "--channels: --task language has nothing"),
        ({"task": "disparity", "layers": 4}, "--layers: --task disparity has nothing"),
        ({"task": "language", "adaptive": "drop-path", "curvature": "lambda"}, "--adaptive"),
        ({"task": "language", "hidden": 0}, "--hidden: expected a whole number of at least 1"),
        ({"task": "language", "dropout": 1.0}, "--dropout: expected a number of at least 0 and"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(changes)


@world
def test_a_space_and_a_genotype_of_another_task_are_refused(name: str, tmp_path) -> None:
    with pytest.raises(UserError, match="its cells are for --task classification"):
        run_search(**WORLDS[name](tmp_path, space="s4"))
    other = next(key for key in WORLDS if key != name)
    run = run_search(**WORLDS[name](tmp_path / "a", epochs=1, epoch_steps=1))
    given = of_a_training(WORLDS[other](tmp_path / "b"), epochs=1)
    with pytest.raises(UserError, match=f"of --task {name}"):
        run_retraining(source=str(run.folder / "genotype.json"), **given)


def test_the_kinds_of_settings_match(tmp_path) -> None:
    for kind in (SearchConfig, RandomSearchConfig, RetrainConfig):
        for task in tasks.TASKS:
            found = config_sources.kind_for(kind, task)
            assert issubclass(found, kind) and found().task == task
    assert set(tasks.TASKS) == set(FAMILIES) == set(METRICS)


# Metrics


def test_a_metric_says_what_is_better() -> None:
    accuracy, perplexity = METRICS["classification"], METRICS["language"]
    assert accuracy.cost_of(0.9) == pytest.approx(0.1) and accuracy.text(0.123) == "12.30%"
    assert perplexity.score(2.0) == pytest.approx(7.389, abs=1e-3)
    assert perplexity.score(1e4) == perplexity.score(1e5) > 1e290  # json has no infinity
    assert json.loads(json.dumps(perplexity.score(1e4), allow_nan=False)) < 1e300
    assert perplexity.text(perplexity.score(1e4)) == "4.6e+299"
    assert perplexity.text(1234567.891) == "1234567.89"
    assert math.isnan(perplexity.score(math.nan))
    assert METRICS["disparity"].text(1.5) == "1.50 px"
    assert Metric("epe", "epe").cost_of(3.0) == 3.0


def test_sums_weigh_batches_by_their_items() -> None:
    sums = Sums()
    for loss, score, items in ((1.0, 2.0, 2), (4.0, 1.0, 1)):
        value = torch.tensor(loss)
        more = {"bad1": torch.tensor(float(items))}
        sums.add(Outcome(value, value, torch.tensor(score), items, more))
    assert sums.loss == 2.0
    assert sums.score(METRICS["classification"]) == 1.0
    assert sums.more() == {"bad1": 1.0}
