"""What a user can get wrong: one line on stderr naming the thing, exit code 2, no folder left."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdarts_fast import retrain, search
from rdarts_fast.run_dir import Run, RunDir
from rdarts_fast.search import run_search
from tests.small import arguments, settings

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def failing(tmp_path, monkeypatch, capsys):
    """Run a command line that must fail; return its one line."""

    def run(module: Any, words: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err.strip()

    return run


def search_words(folder: Path, **changes: Any) -> list[str]:
    return arguments(settings(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "s9"}, 'unknown space "s9": one of s1, s2'),
        ({"data": "cifar11"}, 'unknown data set "cifar11"'),
        ({"preset": "papr"}, 'unknown preset "papr"'),
        ({"space": "nowhere.json"}, "nowhere.json: No such file"),
        ({"device": "cuda:99"}, "--device cuda:99: "),
        ({"device": "tpu"}, "--device: expected auto, cpu, cuda or cuda:N, got tpu"),
        ({"data": "npz:/nowhere/x.npz"}, "/nowhere/x.npz"),
        ({"data": "folder:/nowhere"}, "/nowhere"),
        ({"cutout_length": 8, "drop_path_prob": 0.2}, "cutout"),
        ({"out": "/proc/nowhere/run"}, "/proc/nowhere"),
        ({"out": "/dev/null"}, "/dev/null"),
        ({"batch_size": 1}, "--batch-size"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, failing, tmp_path) -> None:
    assert message in failing(search, search_words(tmp_path, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(failing, tmp_path) -> None:
    line = failing(search, search_words(tmp_path, device="cuda"))
    assert "--device cuda: torch sees no GPU here (" in line
    assert line.endswith("); --device cpu runs on the CPU")


def test_a_malformed_space(failing, tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"nodes": 1, "cells": {"normal": ["skip"], "reduce": ["noise"]}}')
    line = failing(search, search_words(tmp_path, space=path))
    assert f'space {path}: normal[0]: unknown operation "skip"' in line


def test_labels_out_of_range(failing, tmp_path) -> None:
    images = np.zeros((6, 8, 8), np.uint8)
    labels = np.array([0, 1, 2] * 2)
    np.savez(tmp_path / "x.npz", x_train=images, y_train=labels, x_test=images, y_test=labels + 1)
    line = failing(search, search_words(tmp_path, data=f"npz:{tmp_path / 'x.npz'}"))
    assert "y_test" in line


def test_a_folder_without_images(failing, tmp_path) -> None:
    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
    line = failing(search, search_words(tmp_path, data=f"folder:{tmp_path / 'pets'}"))
    assert f"folder:{tmp_path / 'pets'}: no images in the class folders of train/" in line


def test_a_genotype_that_does_not_fit(failing, tmp_path) -> None:
    path = tmp_path / "genotype.json"
    path.write_text(
        '{"format": 1, "cells": {"normal": [[["noise", 5]]], "reduce": [[["noise", 0]]]}}'
    )
    line = failing(retrain, [str(path), "--out", str(tmp_path / "run")])
    assert str(path) in line
    assert "input 5 is not before the node" in line


def test_a_folder_that_holds_a_run(failing, tmp_path) -> None:
    run_search(**settings(tmp_path, epochs=1))
    line = failing(search, search_words(tmp_path))
    assert f"{tmp_path / 'run'} already holds a run: resume it" in line


@pytest.mark.parametrize(
    "damage",
    ["truncated", "foreign", "another kind", "another shape", "empty", "no alphas", "few alphas"],
)
def test_damaged_checkpoints(damage: str, failing, tmp_path) -> None:
    run = run_search(**settings(tmp_path, epochs=1))
    path = run.folder / "checkpoints" / "last.pt"
    state = run.load_checkpoint()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif damage == "another kind":
        torch.save(state | {"kind": "retraining"}, path)
    elif damage == "empty":
        torch.save({"format": 1, "kind": "search"}, path)
    elif damage == "no alphas":
        torch.save(state | {"alphas": {}}, path)
    elif damage == "few alphas":
        torch.save(state | {"alphas": {k: a[:1] for k, a in state["alphas"].items()}}, path)
    else:
        torch.save(state | {"supernet": {"stem.0.weight": torch.zeros(3)}}, path)
    line = failing(search, ["--resume", str(run.folder)])
    assert str(run.folder) in line


def test_a_locked_folder(failing, tmp_path) -> None:
    run = run_search(**settings(tmp_path, epochs=1))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.folder)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        line = failing(search, ["--resume", str(run.folder)])
    finally:
        holder.kill()
        holder.communicate()
    assert f"is in use by process {holder.pid} on" in line
    assert run_search(resume=run.folder).genotype == run.genotype


HOLD = """
import sys, time
from pathlib import Path
from rdarts_fast.run_dir import RunDir
with RunDir.open(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_no_permission(failing, tmp_path, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    settings(tmp_path)
    line = failing(search, search_words(tmp_path))
    assert f"no permission to create {tmp_path / 'run'}" in line


def test_a_full_disk_at_the_start(failing, tmp_path, monkeypatch) -> None:
    words = search_words(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert "disk full" in failing(search, words)


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_later_keeps_the_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    words = search_words(tmp_path)
    append = RunDir.append_metrics

    def then_full(self: RunDir, record: dict[str, Any]) -> None:
        append(self, record)
        if record["epoch"] == 1:
            monkeypatch.setattr(os, "fsync", full)

    monkeypatch.setattr(RunDir, "append_metrics", then_full)
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as stop:
        search.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "disk full" in err
    assert err.count("\n") == 1
    assert Run.read(tmp_path / "run").load_checkpoint()["epoch"] == 1
    monkeypatch.undo()
    resumed = run_search(resume=tmp_path / "run")
    whole = run_search(**settings(tmp_path, out=tmp_path / "whole"))
    assert resumed.metrics[-1]["alphas"] == whole.metrics[-1]["alphas"]


def test_a_real_command_line_fails_the_same_way(tmp_path) -> None:
    command = [sys.executable, "-m", "rdarts_fast.search", "--space", "s9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('error: unknown space "s9"')
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SHORT = "from rdarts_fast.errors import exit_on_user_error as told; told(lambda: print(1))()"


@pytest.mark.parametrize("command", [["-c", SHORT], ["-m", "rdarts_fast.search", "--help"]])
def test_a_reader_that_leaves_is_no_traceback(command: list[str]) -> None:
    """Neither where output fits a buffer, nor where it does not."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "wb") as gone:
        python = [sys.executable, *command]
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            python, cwd=REPOSITORY, env=buffered, stdout=gone, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")
