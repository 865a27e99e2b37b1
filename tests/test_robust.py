"""The protocol of R-DARTS: what is run, what is chosen, and that it is gone on with."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rdarts_fast import robust as robust_module
from rdarts_fast.config import RetrainConfig, SearchConfig
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.oracle import Oracle
from rdarts_fast.protocol import RobustConfig, plan, short_epochs, words_of
from rdarts_fast.robust import is_done, robust, run_robust
from rdarts_fast.run_dir import Run, held, write_file
from rdarts_fast.search import run_search
from rdarts_fast.training import Interrupted
from tests.small import settings, write_images

REPOSITORY = Path(__file__).parents[1]
SEARCH = ("channels=2", "layers=3", "epochs=1", "batch_size=6", "threads=1", "epoch_steps=2")
RETRAIN = ("channels=2", "layers=3", "epochs=2", "batch_size=6", "threads=1", "epoch_steps=2")


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a protocol of seconds; `folder` gets the images and the runs."""
    images = folder / "images.npz"
    if not images.exists():
        write_images(images)
    given = {
        "space": "s5",
        "data": f"npz:{images}",
        "grid": (3e-4, 3e-2),
        "short_epochs": 1,
        "search": SEARCH,
        "retrain": RETRAIN,
        "device": "cpu",
        "out": folder / "robust",
    }
    return given | changes


def numbers(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "table.json").read_text())["rows"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_robust(**tiny(folder, seeds=2))
    return folder / "robust"


def test_the_protocol_end_to_end(finished) -> None:
    rows = numbers(finished)
    names = [f"l2-{value}-seed{seed}" for seed in (0, 1) for value in ("0.0003", "0.03")]
    assert [row["name"] for row in rows] == names
    for row in rows:
        search = Run.read(finished / "searches" / row["name"])
        assert search.config["weight_decay"] == float(row["name"].split("-")[1])
        assert search.config["seed"] == row["seed"]
        short = Run.read(finished / "short" / row["name"])
        assert short.config["holdout"] is True and short.config["epochs"] == 1
        assert short.genotype == search.genotype
        assert row["valid_error"] == short.result["valid_error"]
        assert "test_error" not in json.dumps([short.result, *short.metrics])
    for seed in (0, 1):
        mine = [row for row in rows if row["seed"] == seed]
        best = min(mine, key=lambda row: row["valid_error"])
        assert [row for row in mine if row["selected"]] == [best]
        full = Run.read(finished / "final" / best["name"])
        assert (full.config["holdout"], full.config["epochs"]) == (False, 2)
        assert best["test_error"] == full.result["test_error"]
        assert full.genotype == Run.read(finished / "searches" / best["name"]).genotype
    assert len(list((finished / "final").iterdir())) == 2
    errors = [row["test_error"] for row in rows if row["selected"]]
    table = json.loads((finished / "table.json").read_text())
    assert table["mean"] == statistics.mean(errors)
    assert table["deviation"] == statistics.stdev(errors)
    with open(finished / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(r["valid_error"]) for r in read] == [row["valid_error"] for row in rows]
    assert f"{table['mean']:.2%}" in (finished / "table.md").read_text()


def test_a_second_start_does_nothing_and_says_the_same(finished, monkeypatch, capsys) -> None:
    before = numbers(finished)
    for name in ("run_search", "run_retraining"):
        monkeypatch.setattr(robust_module, name, None)
    table = run_robust(**tiny(finished.parent, seeds=2))
    assert [dict(row) for row in table.rows] == before
    assert "4 of 4 done" in capsys.readouterr().out


def test_other_settings_are_not_mixed_into_a_folder(finished, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--short-epochs: .* was started with 1, not 2"):
        run_robust(**tiny(finished.parent, seeds=2, short_epochs=2))
    with pytest.raises(UserError, match=r"--search: .* started with"):
        run_robust(**tiny(finished.parent, seeds=2, search=(*SEARCH, "order=first")))
    (tmp_path / "robust").mkdir()
    (tmp_path / "robust" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run_robust(**tiny(tmp_path))
    assert [p.name for p in (tmp_path / "robust").iterdir()] == ["thesis.txt"]
    (tmp_path / "robust" / "thesis.txt").unlink()
    with held(tmp_path / "robust"), pytest.raises(UserError, match="is in use by process"):
        write_file(tmp_path / "robust" / "robust.json", (finished / "robust.json").read_text())
        run_robust(**tiny(finished.parent, seeds=2, out=tmp_path / "robust"))


class Planted:
    """Searches and trainings that only write what they would have found."""

    def __init__(self, monkeypatch, errors: Mapping[str, tuple[float, float]]) -> None:
        self.errors, self.calls = errors, []
        monkeypatch.setattr(robust_module, "run_search", self.search)
        monkeypatch.setattr(robust_module, "run_retraining", self.retrain)

    def search(self, **given: Any) -> None:
        self._write(given, {"valid_accuracy": 0.5, "seconds": 1.0})

    def retrain(self, **given: Any) -> None:
        valid, test = self.errors[Path(given["out"]).name]
        found = {"valid_error": valid} if given.get("holdout") else {"test_error": test}
        self._write(given, found)

    def _write(self, given: dict[str, Any], result: dict[str, float]) -> None:
        self.calls.append(f"{given['out'].parent.name}/{given['out'].name}")
        genotype = {"normal": ((("skip_connect", 0), ("skip_connect", 1)),)}
        for name, text in (
            ("config.json", "{}"),
            ("environment.json", "{}"),
            ("genotype.json", Genotype(genotype | {"reduce": genotype["normal"]}).to_json()),
            ("result.json", json.dumps(result)),
        ):
            write_file(given["out"] / name, text)


def test_a_genotype_that_wins_on_test_and_loses_on_validation_is_not_selected(
    tmp_path, monkeypatch
) -> None:
    planted = Planted(
        monkeypatch,
        {"l2-0.0003-seed0": (0.30, 0.01), "l2-0.03-seed0": (0.20, 0.40)},  # validation, test
    )
    table = run_robust(**tiny(tmp_path))
    assert [row["selected"] for row in table.rows] == [False, True]
    assert table.mean == 0.40 and table.deviation is None
    assert [call for call in planted.calls if call.startswith("final")] == ["final/l2-0.03-seed0"]
    assert table.rows[0]["test_error"] is None


def test_more_repetitions_go_on_with_the_folder_and_fewer_do_not(tmp_path, monkeypatch) -> None:
    names = [f"l2-{value}-seed{seed}" for value in ("0.0003", "0.03") for seed in (0, 1)]
    planted = Planted(monkeypatch, dict.fromkeys(names, (0.2, 0.1)))
    run_robust(**tiny(tmp_path))
    before = len(planted.calls)
    table = run_robust(**tiny(tmp_path, seeds=2))
    assert len(table.rows) == 4 and len(planted.calls) == 2 * before
    assert not [call for call in planted.calls[before:] if "seed0" in call]
    with pytest.raises(UserError, match=r"--seeds: .* was started with 2, not 1"):
        run_robust(**tiny(tmp_path))


def test_each_protocol_has_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = {kind: ["noise", "skip_connect"] for kind in ("normal", "reduce")}
    (tmp_path / "my.v2.json").write_text(json.dumps({"nodes": 1, "cells": cells}))
    names = [f"{kind}-seed0" for kind in ("l2-0.0003", "l2-0.03", "seeds")]
    Planted(monkeypatch, dict.fromkeys(names, (0.2, 0.1)))
    for changes in ({}, {"method": "seeds", "grid": (), "searches": 1}, {"space": "my.v2.json"}):
        run_robust(**tiny(tmp_path, out=None, **changes))
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(found) == 3 and [name.rsplit("-")[-1] for name in found] == ["l2", "l2", "seeds"]
    assert sum("s5" in name for name in found) == 2


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path, monkeypatch) -> None:
    Planted(monkeypatch, {"l2-0.0003-seed0": (0.3, 0.1), "l2-0.03-seed0": (0.2, 0.4)})
    (tmp_path / "robust").mkdir()
    for name in ("lock", ".unfinished-robust.json-1234"):
        (tmp_path / "robust" / name).write_text("{")
    assert run_robust(**tiny(tmp_path)).mean == 0.4


def test_a_rule_that_cannot_fire_is_said(tmp_path, monkeypatch, capsys) -> None:
    Planted(monkeypatch, {"es-seed0": (0.3, 0.1)})
    given = {"method": "es", "grid": (), "searches": 1}
    run_robust(**tiny(tmp_path, **given))
    assert "too few epochs for the early-stopping rule" in capsys.readouterr().out
    long = ("epochs=50", *(word for word in SEARCH if word != "epochs=1"))
    run_robust(**tiny(tmp_path, **given, search=long, out=tmp_path / "long"))
    assert "too few epochs" not in capsys.readouterr().out


def test_a_tie_goes_to_the_earlier(tmp_path, monkeypatch) -> None:
    Planted(monkeypatch, {"l2-0.0003-seed0": (0.25, 0.2), "l2-0.03-seed0": (0.25, 0.1)})
    table = run_robust(**tiny(tmp_path))
    assert [row["selected"] for row in table.rows] == [True, False]


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path, monkeypatch, capsys) -> None:
    planted = Planted(monkeypatch, {"l2-0.0003-seed0": (0.3, 0.1), "l2-0.03-seed0": (0.2, 0.4)})
    search = planted.search

    def failing(**given: Any) -> None:
        if "0.03-" in given["out"].name:
            raise UserError("the training loss is nan: lower --learning-rate")
        search(**given)

    monkeypatch.setattr(robust_module, "run_search", failing)
    with pytest.raises(UserError, match=r"1 runs failed \(l2-0.03-seed0\)"):
        run_robust(**tiny(tmp_path))
    rows = numbers(tmp_path / "robust")
    assert [row["selected"] for row in rows] == [True, False]
    assert (rows[0]["test_error"], rows[1]["valid_error"]) == (0.1, None)
    assert "the training loss is nan" in rows[1]["error"]
    assert "failed: l2-0.03-seed0: the training loss is nan" in capsys.readouterr().out
    monkeypatch.setattr(robust_module, "run_search", search)
    table = run_robust(**tiny(tmp_path))
    assert [row["selected"] for row in table.rows] == [False, True]
    assert [row["test_error"] for row in table.rows] == [None, 0.4]  # of the selected alone


def test_the_plan_of_each_method() -> None:
    l2 = plan(RobustConfig(method="l2"))
    assert [p.settings for p in l2] == [{"weight_decay": 3e-4 * k} for k in (1, 3, 9, 27)] or [
        p.settings["weight_decay"] for p in l2
    ] == pytest.approx([3e-4, 9e-4, 27e-4, 81e-4])
    drop = plan(RobustConfig(method="drop-path"))
    assert [p.settings for p in drop] == [{"drop_path_prob": p} for p in (0.0, 0.2, 0.4, 0.6)]
    assert [p.name for p in drop][1] == "dp-0.2-seed0"
    seeds = plan(RobustConfig(method="seeds", searches=3, seeds=2, seed=5))
    assert [p.search_seed for p in seeds] == [5, 6, 7, 8, 9, 10]
    assert [p.seed for p in seeds] == [5, 5, 5, 6, 6, 6]
    assert {tuple(p.settings) for p in seeds} == {()}
    early = plan(RobustConfig(method="es"))
    assert early[0].settings == {"early_stop": "stop", "curvature": "lambda"}
    adaptive = plan(RobustConfig(method="ada"))
    assert adaptive[3].settings == {"adaptive": "l2", "curvature": "lambda"}
    assert len({p.name for p in [*l2, *drop, *seeds, *early, *adaptive]}) == 4 * 4 + 6


def test_how_long_the_short_training_is() -> None:
    assert short_epochs(RobustConfig(data="cifar10")) == 100
    assert short_epochs(RobustConfig(data="digits", preset="paper")) == 100
    assert short_epochs(RobustConfig(data="digits")) == 20
    assert short_epochs(RobustConfig(short_epochs=7, preset="quick")) == 7


def test_every_architecture_of_a_small_space(tmp_path, capsys) -> None:
    space = {"nodes": 1, "cells": {"normal": ["skip_connect"], "reduce": ["skip_connect"]}}
    space["cells"]["normal"] = [["skip_connect", "sep_conv_3x3"], ["noise", "max_pool_3x3"]]
    (tmp_path / "small.json").write_text(json.dumps(space))
    given = tiny(tmp_path, space=str(tmp_path / "small.json"), method="exhaustive", grid=())
    given |= {"short_epochs": None, "search": ()}
    run_robust(**given)
    oracle = Oracle.read(tmp_path / "robust" / "oracle.json")
    assert len(oracle.errors) == 4
    for path in (tmp_path / "robust" / "final").iterdir():
        run = Run.read(path)
        assert oracle.errors[run.genotype] == run.result["test_error"]
    assert "oracle: " in capsys.readouterr().out
    run = run_search(
        **settings(tmp_path, space=str(tmp_path / "small.json"), epochs=1),
        oracle=tmp_path / "robust" / "oracle.json",
    )
    assert run.metrics[-1]["regret"] == oracle.regret(run.genotype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "l3"}, 'unknown method "l3"'),
        ({"space": "s9"}, 'unknown space "s9"'),
        ({"seeds": 0}, "--seeds: expected at least 1"),
        ({"short_epochs": 0}, "--short-epochs: expected at least 1"),
        ({"method": "es"}, "--grid is for the methods"),
        ({"grid": (0.1, 0.1)}, "--grid: a value stands there twice"),
        ({"grid": (3e-4, 3.0000001e-4)}, "--grid: a value stands there twice"),
        ({"searches": 3}, "--searches is for the methods es, ada, seeds, not l2"),
        ({"method": "exhaustive", "grid": ()}, "--short-epochs is for the methods"),
        ({"method": "exhaustive", "grid": (), "short_epochs": None}, "--search is for the methods"),
        (
            {"method": "exhaustive", "space": "s4", "grid": (), "short_epochs": None, "search": ()},
            r"s4 has .* architectures, more than 1000; s5 has 81",
        ),
        ({"grid": (-0.1,)}, "--weight-decay: expected a number of at least 0"),
        ({"method": "drop-path", "grid": (1.5,)}, "--drop-path-prob"),
        ({"search": ("epochs",)}, "--search: expected KEY=VALUE"),
        ({"search": ("epoch=3",)}, r'--search: unknown setting "epoch".*Did you mean "epochs"'),
        ({"search": ("seed=3",)}, "--search seed=3: the protocol sets seed itself"),
        ({"search": ("weight_decay=1",)}, "--search: the method l2 sets weight_decay itself"),
        ({"search": ("epochs=many",)}, "--epochs: expected a whole number"),
        ({"retrain": ("holdout=true",)}, "the protocol sets holdout itself"),
        ({"retrain": ("layers=0",)}, "--layers"),
        ({"retrain": ("preset=20x63",)}, 'unknown preset "20x63"'),
        ({"device": "gpu"}, "--device"),
        ({"fleet": "slurm"}, "--fleet"),
        ({"colour": "red"}, 'unknown setting "colour"'),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(changes, message, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        run_robust(**tiny(tmp_path, **changes))
    assert not (tmp_path / "robust").exists()


def test_words_become_settings() -> None:
    words = ("epochs=25", "drop-path-prob=0.2", "order=first", "flip=False", "epoch_steps=none")
    assert words_of(words, SearchConfig) == {
        "epochs": 25,
        "drop_path_prob": 0.2,
        "order": "first",
        "flip": False,
        "epoch_steps": None,
    }
    assert words_of(("preset=20x36", "auxiliary=true"), RetrainConfig) == {
        "preset": "20x36",
        "auxiliary": True,
    }


# A protocol for each line read, in a process forked for it, so that torch is imported once.
KILLED = """
import importlib, json, os, signal, sys
import matplotlib.backends.backend_svg, matplotlib.figure, torch._dynamo  # here, not by every fork
from pathlib import Path
from tests.test_robust import run_robust, tiny
torch.set_num_threads(1)
def run(folder, left, module, name):
    module = importlib.import_module("rdarts_fast." + module)
    called = getattr(module, name)
    def counting(*given):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*given)
    setattr(module, name, counting)
    run_robust(**tiny(Path(folder)))
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)  # what is printed is not the answer
        try:
            run(*json.loads(line))
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, flush=True)
"""
Kill = Callable[[Path, int, str, str], None]


@pytest.fixture(scope="module")
def killed() -> Iterator[Kill]:
    """Run the protocol in a process that is killed at one of the calls of a function."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def kill(folder: Path, calls: int, module: str, name: str) -> None:
        process.stdin.write(json.dumps([str(folder), calls, module, name]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{int(signal.SIGKILL)}\n"

    with process:  # closes its input, which ends it
        yield kill
    assert process.returncode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A protocol of one repetition that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_robust(**tiny(folder))
    return folder / "robust"


def test_killed_in_each_stage_and_started_again_the_table_is_the_same(
    whole, killed, tmp_path
) -> None:
    # Two steps a search and a short training, four the full one. What was finished is not done
    # again, and a run that was killed begins anew or from its last epoch.
    order = ["searches/l2-0.0003-seed0", "searches/l2-0.03-seed0"]
    order += ["short/l2-0.0003-seed0", "short/l2-0.03-seed0", "final/"]
    moments = random.Random(0)
    kills = [moments.randint(1, 2), *(2 + moments.randint(1, 2) for _ in range(3))]
    kills.append(2 + moments.randint(1, 4))
    for stage, left in enumerate(kills):
        killed(tmp_path, left, "training", "descend")
        runs = sorted((tmp_path / "robust").glob("[a-z]*/[a-z]*/config.json"))
        names = [str(path.parent.relative_to(tmp_path / "robust")) for path in runs]
        ended = [name for name in names if is_done(tmp_path / "robust" / name)]
        assert sorted(ended) == sorted(order[:stage])
        (cut,) = (name for name in names if name not in ended)
        assert cut.startswith(order[stage])
    run_robust(**tiny(tmp_path))
    assert numbers(tmp_path / "robust") == numbers(whole)


def test_killed_while_it_chooses_and_between_two_files_of_the_table(
    whole, killed, tmp_path
) -> None:
    files = ["table.json", "table.csv", "table.md"]
    killed(tmp_path, 1, "robust", "select")
    assert not (tmp_path / "robust" / "final").exists()
    for count in range(len(files)):
        killed(tmp_path, count + 1, "tables", "write_file")
        assert [name for name in files if (tmp_path / "robust" / name).exists()] == files[:count]
    run_robust(**tiny(tmp_path))
    assert numbers(tmp_path / "robust") == numbers(whole)
    for name in files:
        ours, theirs = (folder / name for folder in (tmp_path / "robust", whole))
        assert ours.read_text().replace(str(tmp_path), str(whole.parent)) == theirs.read_text()


def test_on_ray_with_a_worker_killed_the_table_is_the_same(whole, tmp_path) -> None:
    # Half of the searches and short trainings are there: each worker imports torch anew.
    folder, name = tmp_path / "ray", "l2-0.03-seed0"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("table.*", "final", name))
    script = f"""
from pathlib import Path
from tests.test_robust import run_robust, tiny
run_robust(**tiny(Path({str(whole.parent)!r}), out=Path({str(folder)!r}), fleet="ray"))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    kill_worker(folder / "searches" / name)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed[-3000:]
    assert f"searches/{name}: its worker died" in printed and "is started again" in printed
    assert all((folder / stage / name).exists() for stage in ("searches", "short"))
    assert numbers(folder) == numbers(whole)


def kill_worker(run: Path) -> None:
    """Kill the process that holds a run, once it has begun."""
    for _ in range(18000):
        words = (run / "lock").read_text().split() if (run / "lock").exists() else []
        if len(words) > 1 and words[0] == "process":
            os.kill(int(words[1]), signal.SIGKILL)
            return
        time.sleep(0.01)
    raise AssertionError("no run began within three minutes")


def test_the_command_line_and_its_help(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rdarts_fast.robust", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    shown = run("--help").stdout
    assert all(flag in shown for flag in ("--method", "--seeds", "--fleet", "--short-epochs"))
    bad = run("--search", "epoch=3", "--out", str(tmp_path / "x"))
    assert bad.returncode == 2 and bad.stderr.startswith("error: --search")
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "interrupt", [Interrupted("python -m rdarts_fast.search --resume x"), KeyboardInterrupt()]
)
def test_an_interrupt_says_how_to_go_on(interrupt, tmp_path, monkeypatch) -> None:
    planted = Planted(monkeypatch, {})

    def interrupted(**given: Any) -> None:
        raise interrupt  # within a step, or while data are read

    monkeypatch.setattr(robust_module, "run_search", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        robust(RobustConfig(**tiny(tmp_path)))
    assert caught.value.args == ("the same command",) and planted.calls == []
