"""Steps on memory that stays where it is, and recorded ones, against those taken one by one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rdarts_fast import graph_step, search, training
from rdarts_fast.config import SearchConfig
from rdarts_fast.errors import UserError
from rdarts_fast.graph_step import GRAPH, PLAIN, RecordedSteps, StaticSteps
from rdarts_fast.run_dir import Run
from rdarts_fast.search import run_search
from rdarts_fast.search_state import SearchState
from rdarts_fast.tasks import classification
from rdarts_fast.tasks.classification import Classification
from tests.host_cuda import counts, on_host
from tests.small import settings
from tests.tape import FromHost, Tapes
from tests.test_rollback import adaptive, plant
from tests.test_search import assert_same_bits, state_of

# 18 images in batches of 5: the last has 3. Drop path and cutout begin with the second epoch.
SEARCHES: dict[str, dict[str, Any]] = {
    "s4 second": {"space": "s4", "cutout_schedule": "linear", "drop_path_prob": 0.4},
    "s4 first": {"space": "s4", "order": "first", "drop_path_prob": 0.4, "cutout_prob": 0.5},
    "s4 shared noise": {"space": "s4", "noise_per_pass": "shared", "layers": 1},
    "s2 exact": {"space": "s2", "implicit": "exact", "layers": 1, "drop_path_prob": 0.2},
    "s3": {"space": "s3", "layers": 1, "flip": True, "drop_path_prob": 0.3},
    "s4 reference": {"space": "s4", "backend": "reference", "layers": 1, "drop_path_prob": 0.3},
}


def given(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    base = {"epochs": 6, "batch_size": 5, "cutout_length": 2, "out": folder / name}
    return settings(folder, **{**base, **changes})


@pytest.fixture
def capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam as on a GPU, where its bias corrections are made on the device."""
    start = SearchState.start

    def started(settings: SearchConfig, supernet: Any) -> SearchState:
        state = start(settings, supernet)
        state.alpha_optimizer.param_groups[0]["capturable"] = True
        return state

    monkeypatch.setattr(SearchState, "start", staticmethod(started))
    for name in ("torch.optim.adam", "torch.optim.optimizer"):
        monkeypatch.setattr(
            sys.modules[name],
            "_get_capturable_supported_devices",
            lambda supports_xla=True: ["cpu"],
        )


def take_static(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph_step, "taker", lambda step, how, state, run: StaticSteps(step, state, run))


def take_recorded(patch: pytest.MonkeyPatch) -> Tapes:
    tapes = Tapes()

    def taker(step: Any, how: str, state: Any, run: Any) -> RecordedSteps:
        return RecordedSteps(step, state, run, lambda: tapes)

    patch.setattr(graph_step, "taker", taker)
    return tapes


@pytest.mark.parametrize("name", SEARCHES)
def test_static_steps_have_the_bits_of_plain_ones(name: str, tmp_path, monkeypatch) -> None:
    plain = run_search(**given(tmp_path, "plain", **SEARCHES[name]))
    take_static(monkeypatch)
    static = run_search(**given(tmp_path, "static", **SEARCHES[name]))
    assert len(plain.metrics) == 6
    assert_same_bits(plain.folder, static.folder)


@pytest.mark.parametrize("name", SEARCHES)
def test_recorded_steps_have_the_bits_of_plain_ones(
    name: str, tmp_path, monkeypatch, capturable
) -> None:
    """A recorded step reads nothing from the host, so each replay does the present step; and it
    could be a CUDA graph: no value comes to the host, no tensor from it.
    """
    plain = run_search(**given(tmp_path, "plain", **SEARCHES[name]))
    tapes = take_recorded(monkeypatch)
    recorded = run_search(**given(tmp_path, "recorded", **SEARCHES[name]))
    assert_same_bits(plain.folder, recorded.folder)
    # Two sizes; with drop path, two more from the second epoch on.
    shapes = 4 if SEARCHES[name].get("drop_path_prob") else 2
    # Those of the first epoch: the full batch is recorded at its second step, the last one's never.
    recordings = shapes - 1 if shapes == 4 else shapes
    assert tapes.counts["prepared"] == shapes
    assert tapes.counts["recorded"] == recordings
    assert tapes.counts["replayed"] == 6 * 4 - shapes - recordings


def test_static_steps_have_the_bits_of_plain_ones_on_cuda_kernels(tmp_path, monkeypatch) -> None:
    changes = {"space": "s4", "layers": 1, "epochs": 2, "epoch_steps": 1, "drop_path_prob": 0.4}
    with on_host():
        plain = run_search(**given(tmp_path, "plain", **changes))
        take_static(monkeypatch)
        static = run_search(**given(tmp_path, "static", **changes))
        assert {"philox", "node_sum"} <= counts().keys()
    assert_same_bits(plain.folder, static.folder)


def test_a_recorded_step_is_forgotten_by_a_rollback(tmp_path, monkeypatch, capturable) -> None:
    """It brings other optimiser states and another weight decay, which are part of a recording."""
    plant(monkeypatch.setattr)
    plain = run_search(**adaptive(tmp_path, out=tmp_path / "plain", epochs=8, batch_size=9))
    assert plain.metrics[-1]["branch"] == 2
    tapes = take_recorded(monkeypatch)
    recorded = run_search(**adaptive(tmp_path, out=tmp_path / "recorded", epochs=8, batch_size=9))
    assert_same_bits(plain.folder, recorded.folder)
    assert tapes.counts["recorded"] == 3


@pytest.mark.parametrize("how", ["static", "recorded"])
def test_a_search_that_goes_on_within_an_epoch_ends_with_the_same_bits(
    how: str, tmp_path, monkeypatch, capturable
) -> None:
    whole = run_search(**given(tmp_path, "whole", space="s4", layers=1, drop_path_prob=0.3))
    take_static(monkeypatch) if how == "static" else take_recorded(monkeypatch)
    taker, left = graph_step.taker, [11]

    def stopping(*args: Any) -> Any:
        steps = taker(*args)
        take = type(steps).__call__

        class Stopping(type(steps)):  # type: ignore[misc]
            def __call__(self, inputs: Any) -> None:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                take(self, inputs)

        steps.__class__ = Stopping
        return steps

    monkeypatch.setattr(graph_step, "taker", stopping)
    first = given(tmp_path, "parts", space="s4", layers=1, drop_path_prob=0.3)
    with pytest.raises(training.Interrupted):
        run_search(**first, checkpoint_minutes=0.0)
    stored = Run.read(tmp_path / "parts").load_checkpoint()
    assert (stored["epoch"], stored["step"]) == (2, 2)
    assert stored["sums"]["items"] == 10.0
    parts = run_search(resume=tmp_path / "parts")
    assert_same_bits(whole.folder, parts.folder)


def poison(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training images of a step be without value, by the clock where there is one."""
    batch = Classification.training_batch

    def poisoned(self: Any, rows: Any, draws: Any, cutout: Any, *, validation: bool = False) -> Any:
        images, labels = batch(self, rows, draws, cutout, validation=validation)
        now = torch.tensor(draws.step) if draws.clock is None else draws.clock[0]
        bad = torch.full_like(images, float("nan"))
        hit = (now == step) & torch.tensor(not validation)
        return torch.where(hit, bad, images), labels

    patch.setattr(Classification, "training_batch", poisoned)


@pytest.mark.parametrize(("every", "found_by"), [(50, 2 * 4), (2, 6)])
@pytest.mark.parametrize("order", ["first", "second"])
def test_what_is_not_finite_is_named_with_its_step(
    every: int, found_by: int, order: str, tmp_path, monkeypatch
) -> None:
    """At the end of the epoch, or after so many steps; with the words of a plain search."""
    one = given(tmp_path, "one", space="s5", order=order, epochs=3)
    poison(monkeypatch, 5)
    with pytest.raises(UserError, match="nan at epoch 1, batch 1: start anew") as plain:
        run_search(**one)
    taken = []
    step = search.step

    def counted(*args: Any) -> None:
        taken.append(args)
        step(*args)

    monkeypatch.setattr(search, "step", counted)
    monkeypatch.setattr(graph_step, "READ_EVERY", every)
    take_static(monkeypatch)
    with pytest.raises(UserError) as static:
        run_search(**{**one, "out": tmp_path / "two"})
    assert str(static.value) == str(plain.value).replace("/one", "/two")
    assert len(taken) == found_by
    assert all(t.isfinite().all() for t in state_of(tmp_path / "two").values())


def test_no_checkpoint_holds_what_is_not_finite(tmp_path, monkeypatch) -> None:
    poison(monkeypatch, 5)
    take_static(monkeypatch)
    with pytest.raises(UserError, match="the last checkpoint is kept"):
        run_search(**given(tmp_path, "run", space="s5", checkpoint_minutes=0.0))
    stored = Run.read(tmp_path / "run").load_checkpoint()
    assert (stored["epoch"], stored["step"]) == (1, 1)
    assert all(t.isfinite().all() for t in state_of(tmp_path / "run").values())


def test_steps_are_recorded_on_a_gpu_where_shapes_are_fixed(tmp_path, monkeypatch) -> None:
    chosen = SearchConfig()
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    task: Any = Classification
    assert graph_step.kind(chosen, task, gpu) == GRAPH
    assert graph_step.kind(chosen, task, cpu) == PLAIN
    assert graph_step.kind(SearchConfig(graph=False), task, gpu) == PLAIN
    monkeypatch.setattr(Classification, "fixed_shapes", False)
    assert graph_step.kind(chosen, task, gpu) == PLAIN


def test_products_are_recorded_on_a_gpu_but_not_with_no_graph(monkeypatch) -> None:
    monkeypatch.setattr(classification, "CudaGraphs", lambda device: device)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    recorder_for: Any = classification.recorder_for
    assert recorder_for(SearchConfig(), gpu) == gpu
    assert recorder_for(SearchConfig(), cpu) is None
    assert recorder_for(SearchConfig(graph=False), gpu) is None


def test_a_run_says_how_its_steps_were_taken(tmp_path, capsys) -> None:
    run = run_search(**given(tmp_path, "run", space="s5", graph=False, **{"layers": 1}))
    assert run.environment["steps"] == PLAIN
    assert f"steps {PLAIN}" in capsys.readouterr().out
    assert run.config["graph"] is False


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_a_rate_in_a_tensor(momentum: float) -> None:
    def descended(kind: Any, rate: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        w = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in (7, 300)]
        optimizer = kind(w, lr=0.1, momentum=momentum, weight_decay=0.01)
        training.set_learning_rate(optimizer, rate)
        for _ in range(4):
            sum((x**3).sum() for x in w).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [x.detach() for x in w]

    by_number = descended(training.SGD, 0.03, torch.float32)
    by_tensor = descended(training.SGD, torch.tensor(0.03), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(by_number, by_tensor, strict=True))
    ours = descended(training.SGD, 0.03, torch.float64)
    torchs = descended(torch.optim.SGD, 0.03, torch.float64)
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)


def recorded(function: Any) -> Any:
    tapes = Tapes()
    tapes.prepare(function)
    return tapes.record(function)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[[0, 2]],
        lambda x: x + torch.tensor([1.0]),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x[x > 0],
    ],
)
def test_the_tape_refuses_what_a_cuda_graph_cannot_record(waits: Any) -> None:
    x = torch.arange(4.0)
    with pytest.raises(FromHost):
        recorded(lambda: waits(x))


def test_the_tape_runs_again_what_was_recorded_with_the_numbers_of_then() -> None:
    x, out, number = torch.arange(4.0), torch.zeros(4), [2.0]
    replay = recorded(lambda: out.copy_((x * number[0]).relu() + x.neg()))
    replay()
    x.fill_(5.0)
    number[0] = 7.0
    replay()
    assert out.tolist() == [5.0] * 4  # 5 * 2 - 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SEARCHES)
def test_cuda_graphs_have_the_bits_of_plain_steps(name: str, tmp_path) -> None:
    given_here = {**SEARCHES[name], "device": "cuda"}
    plain = run_search(**given(tmp_path, "plain", graph=False, **given_here))
    graphs = run_search(**given(tmp_path, "graphs", **given_here))
    assert (plain.environment["steps"], graphs.environment["steps"]) == (PLAIN, GRAPH)
    assert_same_bits(plain.folder, graphs.folder)
