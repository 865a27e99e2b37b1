"""A whole search: what it leaves on disk, that it is reproducible, interrupted and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rdarts_fast
from rdarts_fast import bilevel, search
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, discretize
from rdarts_fast.networks import Supernet
from rdarts_fast.run_dir import Run
from rdarts_fast.search import run_search
from rdarts_fast.spaces import SPACES
from rdarts_fast.tasks.classification import Classification
from tests.small import arguments, settings, write_images

REPOSITORY = Path(__file__).parents[1]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor that a finished search ended with."""
    stored = Run.read(run).load_checkpoint()
    tensors = {f"supernet {k}": v for k, v in stored["supernet"].items()}
    tensors |= {f"alphas {k}": v for k, v in stored["alphas"].items()}
    for name in ("weight_optimizer", "alpha_optimizer"):
        for i, entry in stored[name]["state"].items():
            tensors |= {f"{name} {i} {k}": v for k, v in entry.items()}
    return tensors


def assert_same_bits(a: Path, b: Path) -> None:
    one, other = state_of(a), state_of(b)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    drop = ("seconds",)
    records = [
        [{k: v for k, v in r.items() if k not in drop} for r in Run.read(run).metrics]
        for run in (a, b)
    ]
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    return run_search(**settings(tmp_path_factory.mktemp("finished")))


def test_a_run_leaves_everything_behind(finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl", "genotype.json"}
    assert names >= {"result.json", "cells.svg", "checkpoints"}
    assert [r["epoch"] for r in finished.metrics] == [0, 1, 2]
    for record in finished.metrics:
        alphas = {kind: torch.tensor(a) for kind, a in record["alphas"].items()}
        assert Genotype.from_dict(record["genotype"]) == discretize(SPACES["s5"], alphas)
        assert 0.0 <= record["valid_accuracy"] <= 1.0
        assert record["train_loss"] > 0.0
    assert finished.genotype == Genotype.from_dict(finished.metrics[-1]["genotype"])
    assert Genotype.from_json((finished.folder / "genotype.json").read_text()) == finished.genotype
    assert finished.result["valid_accuracy"] == finished.metrics[-1]["valid_accuracy"]
    rates = [r["learning_rate"] for r in finished.metrics]
    assert rates == pytest.approx([0.025, 0.001 + 0.024 * 0.75, 0.001 + 0.024 * 0.25])
    assert finished.environment["csrc_hash"] == rdarts_fast.native.build_info()["csrc_hash"]
    assert (finished.environment["device"], finished.environment["threads"]) == ("cpu", 1)
    assert rdarts_fast.run_search is run_search


def test_alphas_and_weights_move(finished) -> None:
    first, last = (finished.metrics[i]["alphas"]["normal"] for i in (0, -1))
    assert np.abs(np.subtract(first, last)).max() > 1e-2
    assert finished.metrics[-1]["train_loss"] < finished.metrics[0]["train_loss"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(finished, tmp_path) -> None:
    again = run_search(**settings(tmp_path, data=finished.config["data"]))
    assert_same_bits(finished.folder, again.folder)
    other = run_search(**settings(tmp_path, seed=4, out=tmp_path / "other"))
    assert other.metrics[-1]["alphas"] != again.metrics[-1]["alphas"]


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "s4", "noise_per_pass": "shared"},
        {"order": "first", "space": "s3"},
        {"space": "s1", "drop_path_prob": 0.4, "cutout_schedule": "linear"},
        {
            "space": "darts",
            "layers": 4,
            "epoch_steps": 1,
            "cutout_length": 2,
            "drop_path_prob": 0.2,
        },
    ],
)
def test_every_kind_of_search_runs(changes: dict[str, Any], tmp_path) -> None:
    run = run_search(**settings(tmp_path, epochs=2, **changes))
    assert run.genotype is not None
    drop = changes.get("drop_path_prob", 0.0)
    assert [r["drop_path_prob"] for r in run.metrics] == [0.0, drop]
    if "epoch_steps" in changes:
        assert len(Run.read(run.folder).metrics) == 2


def test_passes_draw_afresh_unless_shared(tmp_path, monkeypatch) -> None:
    keys: list[tuple[int, int]] = []
    forward = Supernet.forward

    def recorded(self, images, weights, draws=None):
        if self.training:
            keys.append((draws.step, draws.pass_index))
        return forward(self, images, weights, draws)

    monkeypatch.setattr(Supernet, "forward", recorded)
    run_search(**settings(tmp_path, epochs=1, epoch_steps=2))
    assert keys == [(step, p) for step in (0, 1) for p in range(5)]
    keys.clear()
    one = settings(tmp_path, epochs=1, epoch_steps=2, noise_per_pass="shared", out=tmp_path / "b")
    run_search(**one)
    assert keys == [(step, 0) for step in (0, 1) for _ in range(5)]


def test_a_step_is_an_alpha_step_at_the_present_rate_then_a_weight_step(
    tmp_path, monkeypatch
) -> None:
    steps: list[Any] = []
    second_order = bilevel.second_order

    def recorded(train, valid, parameters, alphas, step, **rest):
        steps.append((step.learning_rate, step.momentum, step.weight_decay, rest["epsilon_scale"]))
        assert all((b is None) == (len(steps) == 1) for b in step.buffers)
        before = [p.detach().clone() for p in parameters]
        result = second_order(train, valid, parameters, alphas, step, **rest)
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        return result

    monkeypatch.setattr(bilevel, "second_order", recorded)
    run_search(**settings(tmp_path, epochs=2, weight_decay=0.01, momentum=0.8, epsilon_scale=0.02))
    assert len(steps) == 2 * 3  # 18 images in batches of 6
    assert [s[0] for s in steps] == pytest.approx([0.025] * 3 + [0.013] * 3)
    assert {s[1:] for s in steps} == {(0.8, 0.01, 0.02)}


def test_the_weights_never_see_the_alphas_half(tmp_path, monkeypatch) -> None:
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    batch = Classification.training_batch

    def recorded(self, rows, draws, cutout, *, validation=False):
        seen[validation].update(rows.tolist())
        return batch(self, rows, draws, cutout, validation=validation)

    monkeypatch.setattr(Classification, "training_batch", recorded)
    run_search(**settings(tmp_path))
    assert seen[False] & seen[True] == set()
    assert seen[False] | seen[True] == set(range(36))


@pytest.mark.parametrize("poison", ["weights", "images"])
def test_a_non_finite_loss_names_its_step_and_keeps_a_good_checkpoint(
    poison: str, tmp_path, monkeypatch
) -> None:
    given = settings(tmp_path, checkpoint_minutes=0.0)
    calls = 0
    batch = Classification.training_batch

    def poisoned(self, rows, draws, cutout, *, validation=False):
        nonlocal calls
        images, labels = batch(self, rows, draws, cutout, validation=validation)
        if not validation and draws.step == 4:
            calls += 1
            images = images * float("nan")
        return images, labels

    if poison == "images":
        monkeypatch.setattr(Classification, "training_batch", poisoned)
        message = "epoch 1, batch 1"
    else:
        given["learning_rate"] = 1e30
        message = "epoch 0, batch"
    with pytest.raises(UserError, match=message) as error:
        run_search(**given)
    assert "checkpoint is kept in" in str(error.value)
    for name, tensor in state_of(tmp_path / "run").items():
        if poison == "images":
            assert tensor.isfinite().all(), name
    if poison == "images":
        assert calls == 1
        monkeypatch.setattr(Classification, "training_batch", batch)
        resumed = run_search(resume=tmp_path / "run")
        whole = run_search(**settings(tmp_path, out=tmp_path / "whole", checkpoint_minutes=0.0))
        assert_same_bits(resumed.folder, whole.folder)


def test_ctrl_c_ends_with_a_checkpoint_and_says_how_to_resume(finished, tmp_path) -> None:
    given = settings(tmp_path, data=finished.config["data"], epochs=400)
    command = [sys.executable, "-m", "rdarts_fast.search", *arguments(given)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: (tmp_path / "run" / "genotype.json").exists(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    line = f"python -m rdarts_fast.search --resume {tmp_path / 'run'}"
    assert err.splitlines()[-1] == f"interrupted; go on with: {line}"
    assert "Traceback" not in err
    done = Run.read(tmp_path / "run").load_checkpoint()
    assert done["epoch"] >= 1
    assert "epoch   0/399" in out


def wait_for(condition, process: subprocess.Popen, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


# Killed at any moment. The child forks per kill, so that torch is imported once.

KILLS = """
import os, signal, sys
import matplotlib.backends.backend_svg, matplotlib.figure, torch._dynamo  # here, not by every fork
from pathlib import Path
torch.set_num_threads(1)
from rdarts_fast import run_dir, search, training

def arm(moment, count):
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    left = [count]
    def after(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            result = function(*args, **kwargs)
            if left[0] == 0: die()
            return result
        return wrapped
    if moment == "weight step":
        search.weight_step = after(search.weight_step)
    elif moment == "alpha step":
        search.alpha_step = after(search.alpha_step)
    elif moment == "inside a checkpoint write":
        write = run_dir._write_all
        def part_of(file, data):
            if len(data) > 10_000:  # a checkpoint; the other files are smaller
                left[0] -= 1
                if left[0] == 0:
                    write(file, data[: len(data) * (count % 4) // 4])
                    die()
            write(file, data)
        run_dir._write_all = part_of
    elif moment == "after a checkpoint":
        run_dir.RunDir.save_checkpoint = after(run_dir.RunDir.save_checkpoint)
    elif moment == "between metrics and checkpoint":
        run_dir.RunDir.append_metrics = after(run_dir.RunDir.append_metrics)
    else:
        signal.setitimer(signal.ITIMER_REAL, count / 1000.0)
        signal.signal(signal.SIGALRM, lambda *_: die())

def forked(action):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    return os.WEXITSTATUS(status)

def begin(given, moment, count):
    arm(moment, count)
    search.run_search(**given)

for given, moment, count, again in CASES:
    first = forked(lambda: begin(given, moment, count))
    out = Path(given["out"])
    results = [first]
    if not out.exists():  # killed before the folder appeared: nothing is lost, begin again
        results.append(forked(lambda: search.run_search(**given)))
    else:
        if again:
            results.append(forked(lambda: begin({"resume": out}, *again)))
        results.append(forked(lambda: search.run_search(resume=out)))
    print(moment, count, again, results, flush=True)
"""
MOMENTS = [
    ("inside a checkpoint write", 4),
    ("between metrics and checkpoint", 3),
    ("weight step", 9),
    ("alpha step", 9),
    ("after a checkpoint", 3),
    ("milliseconds", 1000),
]


def kill(folder: Path, seed: int, count: int) -> int:
    """Kill `count` searches at seeded moments, resume each, compare with one never killed."""
    rng = random.Random(seed)
    data = f"npz:{write_images(folder / 'images.npz')}"
    given = settings(folder, data=data, space="s4", drop_path_prob=0.3, checkpoint_minutes=0.0)
    whole = run_search(**given | {"out": folder / "whole"})
    cases = []
    for i in range(count):
        moment, most = MOMENTS[i % len(MOMENTS)]
        again = None
        if rng.random() < 0.3:
            other, most_again = rng.choice(MOMENTS[:5])
            again = (other, rng.randint(1, max(1, most_again // 2)))
        minutes = rng.choice([0.0, 5.0])
        case = given | {"out": folder / f"killed-{i}", "checkpoint_minutes": minutes}
        cases.append((case, moment, rng.randint(1, most), again))
    script = KILLS.replace("CASES", repr(cases)).replace("PosixPath", "Path")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == count, done.stderr
    for line, (case, *_) in zip(lines, cases, strict=True):
        assert line.endswith(" 0]"), (line, done.stderr)
        assert_same_bits(case["out"], whole.folder)
    return sum("killed" in line for line in lines)


def test_killed_at_five_seeded_moments_and_resumed(tmp_path) -> None:
    assert kill(tmp_path, seed=1, count=5) == 5


@pytest.mark.slow
def test_killed_at_a_hundred_seeded_moments_and_resumed(tmp_path) -> None:
    killed = kill(tmp_path, seed=2, count=100)
    print(f"{killed} of 100 runs were killed before they ended; all ended with the same bits")
    assert killed > 80


def test_resuming_a_finished_run_changes_nothing(finished, capsys) -> None:
    before = (finished.folder / "metrics.jsonl").read_bytes()
    run = run_search(resume=finished.folder)
    assert (finished.folder / "metrics.jsonl").read_bytes() == before
    assert run.genotype == finished.genotype


def test_a_changed_environment_is_a_warning(finished, tmp_path, capsys) -> None:
    run_search(**settings(tmp_path, data=finished.config["data"], epochs=1))
    path = tmp_path / "run" / "environment.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.3.1 or '))
    run_search(resume=tmp_path / "run")
    err = capsys.readouterr().err
    assert "warning: the result can differ: torch 0.3.1 or" in err
    (resumed_on,) = Run.read(tmp_path / "run").environment["resumed_on"]
    assert resumed_on["torch"] == torch.__version__


def test_other_images_under_the_same_name_are_a_warning(tmp_path, capsys) -> None:
    run_search(**settings(tmp_path, epochs=1))
    write_images(tmp_path / "images.npz", per_class=13)
    run_search(resume=tmp_path / "run")
    assert "warning: the result can differ: data " in capsys.readouterr().err


def test_a_run_keeps_its_space_and_is_resumed_from_any_folder(tmp_path, monkeypatch) -> None:
    cell = ["skip_connect", "noise"]
    space = {"nodes": 1, "cells": {"normal": cell, "reduce": cell}}
    (tmp_path / "mine.json").write_text(json.dumps(space))
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images.npz")
    given = settings(tmp_path, space="mine.json", data="npz:images.npz", epochs=1)
    run = run_search(**given)
    (tmp_path / "mine.json").unlink()
    monkeypatch.chdir("/")
    assert run_search(resume=run.folder).genotype == run.genotype


def test_flip_can_be_chosen(tmp_path) -> None:
    for flip in (None, False, True):
        given = settings(tmp_path, flip=flip)
        configured = search.config_sources.from_settings(search.SearchConfig, given)
        task = Classification.load(configured, torch.device("cpu"))
        assert task.images.augmentation.flip == (flip is not False)


def test_tensorboard_events_are_written(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    run_search(**settings(tmp_path, epochs=1, tensorboard=True))
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_tensorboard_without_the_extra_names_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard needs the extra: pip install '\.\[tens"):
        run_search(**settings(tmp_path, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_validation_batches_are_keyed_by_the_step(tmp_path) -> None:
    given = settings(tmp_path)
    configured = search.config_sources.from_settings(search.SearchConfig, given)
    task = Classification.load(configured, torch.device("cpu"))
    draws = Draws(3)
    first, again = (task.validation_rows(draws.at(step=5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, task.validation_rows(draws.at(step=6)))
    assert len(first) == 6
    assert set(first.tolist()) <= set(task.images.halves[1].tolist())


def test_progress_is_a_bar_on_a_terminal_only(finished, tmp_path) -> None:
    given = settings(tmp_path, data=finished.config["data"], epochs=1)
    command = [sys.executable, "-m", "rdarts_fast.search", *arguments(given)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "genotype:" in done.stdout
    assert str(tmp_path / "run") in done.stdout
    assert os.isatty(0) or "\r" not in done.stdout


@pytest.mark.parametrize("name", ["npz:{}", "npz:../{}"])
def test_the_default_folder_is_one_folder_below_runs(name: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    path = write_images(tmp_path / "images.npz")
    monkeypatch.chdir(tmp_path / "here")
    data = name.format(path if "/" not in name else path.name)
    run = run_search(**settings(tmp_path, data=data, out=None, epochs=1))
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["runs"]
    assert run.folder.parent == Path("runs")
    assert run.folder.name.startswith("s5-npz-images-seed3-")


def test_a_sample_for_a_quick_look_is_not_the_first_classes(tmp_path) -> None:
    images = np.load(write_images(tmp_path / "images.npz"))
    order = {split: np.argsort(images[f"y_{split}"]) for split in ("train", "test")}
    by_class = {f"{a}_{s}": images[f"{a}_{s}"][order[s]] for a in "xy" for s in order}
    np.savez(tmp_path / "sorted.npz", **by_class)
    given = settings(tmp_path, data=f"npz:{tmp_path / 'sorted.npz'}", epoch_steps=1)
    configured = search.config_sources.from_settings(search.SearchConfig, given)
    task = Classification.load(configured, torch.device("cpu"))
    for batches, labels in (
        (task.validation_batches(), task.images.train_labels),
        (task.test_batches(), task.images.test_labels),
    ):
        assert len(torch.cat(batches)) == 6
        assert len(labels[torch.cat(batches)].unique()) > 1


def test_the_callers_number_of_threads_comes_back(tmp_path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run = run_search(**settings(tmp_path, epochs=1, epoch_steps=1))
        assert run.environment["threads"] == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
