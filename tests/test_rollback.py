"""DARTS-ES and DARTS-ADA on small searches, with eigenvalues planted where the rule is to fire."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdarts_fast import bilevel, search, tracking
from rdarts_fast.config import SearchConfig
from rdarts_fast.errors import UserError
from rdarts_fast.events import Events
from rdarts_fast.networks.hessian import SupernetHessian
from rdarts_fast.regularisation import Regularisation
from rdarts_fast.rollback import abandoned
from rdarts_fast.run_dir import Run, RunDir
from rdarts_fast.search import run_search
from tests.small import settings
from tests.test_search import assert_same_bits

REPOSITORY = Path(__file__).parents[1]

# Averages of three, neighbours compared: a branch whose values double from an epoch on fires there
# and goes back two epochs.
RULE = {"curvature_every": 1, "stop_window": 3, "stop_delta": 1, "stop_start_epoch": 1}
DOUBLES_FROM = {0: 4, 1: 6}  # branch -> epoch; the third branch stays at 1


def planted_value(branch: int, epoch: int) -> float:
    """Return the eigenvalue that stands for the end of an epoch of a branch."""
    return 2.0 ** max(0, epoch - DOUBLES_FROM.get(branch, 99) + 1)


def plant(patch: Callable[[Any, str, Any], None]) -> None:
    """Let every measurement find the planted value."""
    here: list[tuple[int, int]] = []
    measure_curvature = search.measure_curvature

    def told(settings: Any, task: Any, state: Any, *rest: Any) -> Any:
        here[:] = [(state.branch, state.epoch)]
        return measure_curvature(settings, task, state, *rest)

    def measure(*given: Any) -> tracking.Measurement:
        return tracking.Measurement({"lambda_max": planted_value(*here[0])})

    patch(search, "measure_curvature", told)
    patch(tracking, "measure", measure)


def adaptive(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"epochs": 10, "curvature": "lambda", "adaptive": "l2", **RULE, **changes}
    return settings(folder, **given)


def tensors_of(state: Any) -> dict[str, torch.Tensor]:
    """Return copies of all that a rollback is to restore."""
    stored = state.to_checkpoint()
    found = {f"supernet {k}": v for k, v in stored["supernet"].items()}
    found |= {f"alphas {k}": v for k, v in stored["alphas"].items()}
    for name in ("weight_optimizer", "alpha_optimizer"):
        for i, entry in stored[name]["state"].items():
            found |= {f"{name} {i} {k}": v for k, v in entry.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def test_two_rollbacks_happen(tmp_path, monkeypatch, capsys) -> None:
    plant(monkeypatch.setattr)
    before: dict[tuple[int, int], Any] = {}  # what each epoch begins with
    after: dict[tuple[int, int], Any] = {}  # what it ends with
    kept: dict[tuple[int, int], set[str]] = {}
    decays: dict[int, set[tuple[float, float]]] = {}
    alpha_step, end_epoch, second_order = search.alpha_step, search.end_epoch, bilevel.second_order

    def stepping(given: Any, state: Any, *rest: Any) -> None:
        before.setdefault((state.branch, state.epoch), tensors_of(state))
        branch[:] = [state]
        alpha_step(given, state, *rest)

    def ending(given: Any, task: Any, state: Any, run: Any, *rest: Any) -> None:
        key = state.branch, state.epoch
        end_epoch(given, task, state, run, *rest)
        after[key] = tensors_of(state)
        kept[key] = {path.stem for path in (run.folder / "checkpoints").glob("epoch-*.pt")}

    def recorded(train: Any, valid: Any, w: Any, alphas: Any, step: Any, **rest: Any) -> Any:
        state = branch[0]
        (group,) = state.weight_optimizer.param_groups
        decays.setdefault(state.branch, set()).add((step.weight_decay, group["weight_decay"]))
        return second_order(train, valid, w, alphas, step, **rest)

    branch: list[Any] = []
    monkeypatch.setattr(search, "alpha_step", stepping)
    monkeypatch.setattr(search, "end_epoch", ending)
    monkeypatch.setattr(bilevel, "second_order", recorded)
    run = run_search(**adaptive(tmp_path))

    lines = [(r["branch"], r["epoch"], r.get("abandoned", False)) for r in run.metrics]
    assert lines == [
        *[(0, epoch, epoch > 2) for epoch in range(5)],
        *[(1, epoch, epoch > 4) for epoch in range(3, 7)],
        *[(2, epoch, False) for epoch in range(5, 10)],
    ]
    assert [r["epoch"] for r in run.history] == list(range(10))
    fired = [(r["branch"], r["epoch"], r["stop_epoch"]) for r in run.metrics if "stop_epoch" in r]
    assert fired == [(0, 4, 2), (1, 6, 4)]
    # The regulariser is raised in the virtual step and in the optimiser at once, on the grid.
    expected = {0: 3e-4, 1: 3e-3, 2: 3e-2}
    for number, value in expected.items():
        assert [pair[0] for pair in decays[number]] == [pytest.approx(value)]
        assert all(virtual == own for virtual, own in decays[number])
    assert [r["weight_decay"] for r in run.metrics] == pytest.approx(
        [expected[r["branch"]] for r in run.metrics]
    )
    # Each branch begins with what the stop epoch ended with, weights, alphas and both optimisers.
    for start, end in (((1, 3), (0, 2)), ((2, 5), (1, 4))):
        assert before[start].keys() == after[end].keys()
        assert [k for k, v in before[start].items() if not torch.equal(v, after[end][k])] == []
    # A new branch draws anew.
    assert not torch.equal(after[0, 3]["alphas normal"], after[1, 3]["alphas normal"])
    # At the end of epoch 4 of the first branch: 2 is named now; after that and one more rollback 1
    # could be. Nothing else is kept, and nothing at all once the cap is reached.
    assert kept[0, 4] == {f"epoch-{e:03d}" for e in (1, 2, 3, 4)}
    assert kept[1, 6] == {f"epoch-{e:03d}" for e in (4, 5, 6)}
    assert kept[2, 9] == set()
    out = capsys.readouterr().out
    assert "lambda_max 2.000 (grown since epoch 2)" in out
    assert "back to the end of epoch 2, from there with weight decay 0.003 and drop path 0" in out
    assert run.result is not None and run.result["rollbacks"] == 2
    assert run.result["early_stop"]["epoch"] == 2
    assert run.result["early_stop"]["genotype"] == run.metrics[2]["genotype"]


def test_a_stop_ends_with_the_stop_epochs_genotype(tmp_path, monkeypatch, capsys) -> None:
    plant(monkeypatch.setattr)
    given = adaptive(tmp_path, adaptive="off", early_stop="stop", alpha_learning_rate=0.3)
    run = run_search(**given)
    assert [r["epoch"] for r in run.metrics] == list(range(5))
    assert run.result is not None and run.result["early_stop"]["epoch"] == 2
    assert run.genotype is not None and run.genotype.to_dict() == run.metrics[2]["genotype"]
    assert run.result["valid_accuracy"] == run.metrics[2]["valid_accuracy"]
    assert "genotype of epoch 2, where lambda_max began to grow" in capsys.readouterr().out
    before = (run.folder / "metrics.jsonl").read_bytes()
    again = run_search(resume=run.folder)  # it has ended
    assert (run.folder / "metrics.jsonl").read_bytes() == before
    assert again.genotype == run.genotype


def test_simulating_a_stop_goes_on(tmp_path, monkeypatch, capsys) -> None:
    plant(monkeypatch.setattr)
    run = run_search(**adaptive(tmp_path, adaptive="off", early_stop="simulate"))
    assert [r["epoch"] for r in run.metrics] == list(range(10))
    assert [r["stop_epoch"] for r in run.metrics if "stop_epoch" in r] == [2]
    assert run.result is not None
    assert run.result["early_stop"] == {"epoch": 2, "genotype": run.metrics[2]["genotype"]}
    assert run.genotype is not None and run.genotype.to_dict() == run.metrics[9]["genotype"]
    assert "DARTS-ES would have stopped with epoch 2's" in capsys.readouterr().out


def test_without_early_stop_the_rule_is_only_logged(tmp_path, monkeypatch, capsys) -> None:
    plant(monkeypatch.setattr)
    run = run_search(**adaptive(tmp_path, adaptive="off"))
    assert [r["stop_epoch"] for r in run.metrics if "stop_epoch" in r] == [2]
    assert run.result is not None and "early_stop" not in run.result
    assert "DARTS-ES" not in capsys.readouterr().out


def test_a_stopped_run_has_its_genotype_before_its_result(tmp_path, monkeypatch) -> None:
    plant(monkeypatch.setattr)
    write_text = RunDir.write_text

    def writing(self: RunDir, name: str, text: str) -> None:
        if name == "result.json":
            stored = json.loads((self.folder / "genotype.json").read_text())
            assert stored == Run.read(self.folder).metrics[2]["genotype"]
            seen.append(name)
        write_text(self, name, text)

    seen: list[str] = []
    monkeypatch.setattr(RunDir, "write_text", writing)
    run_search(**adaptive(tmp_path, adaptive="off", early_stop="stop", alpha_learning_rate=0.3))
    assert seen == ["result.json"]


def test_a_rollback_leaves_what_a_user_put_there_and_rewinds_the_events(
    tmp_path, monkeypatch
) -> None:
    plant(monkeypatch.setattr)
    rewound: list[int] = []
    monkeypatch.setattr(Events, "rewind", lambda self, epoch: rewound.append(epoch))
    end_epoch = search.end_epoch

    def ending(*given: Any) -> None:
        (given[3].folder / "checkpoints" / "mine.pt").touch()
        end_epoch(*given)

    monkeypatch.setattr(search, "end_epoch", ending)
    run = run_search(**adaptive(tmp_path))
    assert (run.folder / "checkpoints" / "mine.pt").exists()
    assert rewound == [3, 5]


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from rdarts_fast import search
from rdarts_fast.run_dir import RunDir
from tests.test_rollback import plant

plant(setattr)
step, left = search.weight_step, [0]

def die(): os.kill(os.getpid(), signal.SIGKILL)

def stepping(settings, state, *rest):
    step(settings, state, *rest)
    if state.branch == BRANCH:
        left[0] += 1
        if left[0] == COUNT: die()

def marking(self, *given):
    if WHERE == "unmarked" and BRANCH == self_branch(self): die()
    mark(self, *given)

def self_branch(run): return run.load_checkpoint()["branch"]

mark = RunDir.mark_metrics
RunDir.mark_metrics = marking
if WHERE == "step": search.weight_step = stepping
search.run_search(**GIVEN)
"""


@pytest.mark.parametrize(("where", "branch", "count"), [("step", 1, 8), ("unmarked", 1, 0)])
def test_killed_in_the_second_branch_and_resumed(
    where: str, branch: int, count: int, tmp_path, monkeypatch
) -> None:
    plant(monkeypatch.setattr)
    whole = run_search(**adaptive(tmp_path, out=tmp_path / "whole"))
    given = adaptive(tmp_path, out=tmp_path / "killed", checkpoint_minutes=0.0)
    script = KILLED.replace("GIVEN", repr(given)).replace("PosixPath", "Path")
    for name, value in (("WHERE", repr(where)), ("BRANCH", branch), ("COUNT", count)):
        script = script.replace(name, str(value))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    stored = Run.read(tmp_path / "killed").load_checkpoint()
    assert stored["branch"] == 1 and stored["records"] < len(whole.metrics)
    resumed = run_search(resume=tmp_path / "killed")
    assert_same_bits(whole.folder, resumed.folder)
    assert whole.genotype == resumed.genotype


def test_what_is_abandoned() -> None:
    def flags(epochs: list[int], next_epoch: int) -> list[bool]:
        return abandoned([{"epoch": epoch} for epoch in epochs], next_epoch)

    assert flags([], 0) == []
    assert flags([0, 1, 2], 3) == [False] * 3
    assert flags([0, 1, 2], 1) == [False, True, True]
    assert flags([0, 1, 2, 1, 2, 3], 4) == [False, True, True, False, False, False]
    assert flags([0, 1, 2, 1, 2, 3], 1) == [False, *[True] * 5]


def raises(**changes: Any) -> list[tuple[float, float]]:
    """Return all that a search regularises with, one rollback after the other."""
    given = dataclasses.replace(SearchConfig(), **changes)
    found = [Regularisation.of(given)]
    while (stronger := found[-1].raised(given)) is not None:
        found.append(stronger)
    assert found[0].raises_left(given) == len(found) - 1
    return [(round(r.weight_decay, 8), round(r.drop_path_prob, 8)) for r in found]


def test_the_regularisers_are_raised_to_their_caps() -> None:
    assert raises(adaptive="both", weight_decay=0.0) == [(0.0, d) for d in (0.0, 0.2, 0.4, 0.6)]
    assert raises() == [(3e-4, 0.0)]
    assert raises(adaptive="l2") == [(3e-4, 0.0), (3e-3, 0.0), (3e-2, 0.0)]
    assert raises(adaptive="drop-path") == [(3e-4, d) for d in (0.0, 0.2, 0.4, 0.6)]
    both = [(3e-4, 0.0), (3e-3, 0.2), (3e-2, 0.4), (3e-2, 0.6)]
    assert raises(adaptive="both") == both
    assert raises(adaptive="l2", adaptive_factor=3.0, adaptive_max=0.0027) == [
        (3e-4, 0.0),
        (9e-4, 0.0),
        (2.7e-3, 0.0),
    ]


def test_drop_path_is_raised_with_its_schedule_and_cutout(tmp_path, monkeypatch) -> None:
    plant(monkeypatch.setattr)
    cutouts: dict[int, set[float]] = {}
    end_epoch = search.end_epoch

    def ending(*given: Any) -> None:
        cutouts.setdefault(given[2].branch, set()).add(given[6])
        end_epoch(*given)

    monkeypatch.setattr(search, "end_epoch", ending)
    run = run_search(**adaptive(tmp_path, adaptive="drop-path"))
    for record in run.metrics:
        expected = 0.2 * record["branch"] * record["epoch"] / 9
        assert record["drop_path_prob"] == pytest.approx(expected)
    assert cutouts == {0: {0.0}, 1: {1.0}, 2: {1.0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curvature": "off"}, "--adaptive l2 follows the eigenvalue: add --curvature lambda"),
        ({"early_stop": "stop"}, "--early-stop stop ends where --adaptive l2 would go back"),
        ({"stop_rule": "paper", "curvature_every": 2}, "add --curvature-every 1"),
        ({"stop_window": 4}, "--stop-window: expected an odd number, got 4"),
        ({"adaptive_factor": 1.0}, r"--adaptive-factor: expected at least 1\.01"),
        ({"adaptive": "both", "adaptive_step": 0.0}, r"--adaptive-step: expected at least 0\.01"),
        ({"weight_decay": 0.0}, "--adaptive l2 cannot regularise more than it begins with"),
        ({"weight_decay": 0.01}, "--adaptive l2 cannot regularise more than it begins with"),
        ({"adaptive": "drop-path", "drop_path_prob": 0.5}, "--adaptive drop-path cannot"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        run_search(**adaptive(tmp_path) | changes)
    assert not (tmp_path / "run").exists()


def test_everything_about_the_curvature_is_written(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    given = {"epochs": 4, "curvature": "full", "curvature_every": 2}
    run = run_search(**settings(tmp_path, tensorboard=True, **given))
    measured = {r["epoch"]: r for r in run.metrics if "lambda_max" in r}
    assert list(measured) == [0, 2, 3]
    for epoch, record in measured.items():
        with np.load(run.folder / f"hessian-0-{epoch:03d}.npz") as stored:
            h, g = stored["H"], stored["g"]
        assert h.shape == (12, 12) and g.shape == (12,)
        values = np.linalg.eigvalsh(h)
        np.testing.assert_allclose(record["eigenvalues"], values, atol=1e-12)
        assert record["lambda_max"] == pytest.approx(values[-1], abs=1e-12)
        # Softmax does not see a shift of an edge: what is left there is the alphas' weight decay.
        sums = h.reshape(4, 3, 12).sum(axis=1)
        own = np.kron(np.eye(4), np.ones((1, 3)))
        np.testing.assert_allclose(sums, 1e-3 * own, atol=1e-6)
    off = run_search(**settings(tmp_path, out=tmp_path / "b", curvature_decay=False, **given))
    for epoch, record in measured.items():
        lower = off.metrics[epoch]["lambda_max"]
        assert record["lambda_max"] == pytest.approx(lower + 1e-3, abs=1e-9)


def test_measuring_changes_nothing(tmp_path) -> None:
    base = settings(tmp_path, epochs=2, epoch_steps=1, space="s4", drop_path_prob=0.3)
    plain = run_search(**base)
    for kind in ("lambda", "spectrum"):
        given = base | {"out": tmp_path / kind, "curvature": kind, "curvature_every": 1}
        measured = run_search(**given)
        assert [r["alphas"] for r in measured.metrics] == [r["alphas"] for r in plain.metrics]
        assert [r["valid_loss"] for r in measured.metrics] == [
            r["valid_loss"] for r in plain.metrics
        ]
    # lambda_max by Lanczos is the spectrum's last.
    both = [Run.read(tmp_path / kind).metrics for kind in ("lambda", "spectrum")]
    for quick, whole in zip(*both, strict=True):
        assert quick["lambda_max"] == pytest.approx(whole["eigenvalues"][-1], rel=2e-3)
        assert quick["curvature_products"] < 28


def test_a_hessian_that_is_not_finite_stops_the_search(tmp_path, monkeypatch) -> None:
    dense = SupernetHessian.dense
    monkeypatch.setattr(SupernetHessian, "dense", lambda self: dense(self) * float("nan"))
    message = "lambda_max at epoch 0: the Hessian has values that are not finite: start anew"
    with pytest.raises(UserError, match=message):
        run_search(**settings(tmp_path, curvature="lambda"))
