"""The run folder survives full disks, damage and SIGKILL, and has one writer."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.run_dir import Run, RunDir

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"space": "s4", "epochs": 3}
ENVIRONMENT = {"device": "cpu"}
CELL = (("noise", 0), ("sep_conv_3x3", 1))
GENOTYPE = Genotype({"normal": (CELL,), "reduce": (CELL,)})
STATE = {"epoch": 2, "alphas": {"normal": torch.arange(6.0).reshape(3, 2)}, "betas": (0.5, 0.999)}
OTHER_STATE = {"epoch": 3, "alphas": {"normal": torch.ones(3, 2)}, "betas": (0.5, 0.999)}
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run_dir(folder: Path) -> Iterator[RunDir]:
    with RunDir.create(folder, CONFIG, ENVIRONMENT) as held:
        yield held


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and what it holds."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def message(action: Callable[[], object]) -> str:
    """The one line that a user sees."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["epoch"] == other["epoch"] and torch.equal(
        one["alphas"]["normal"], other["alphas"]["normal"]
    )


@contextmanager
def failing(
    patch: pytest.MonkeyPatch, name: str, error: OSError, after: int = 0, times: int = 10**6
) -> Iterator[None]:
    """Make os.NAME raise `error`, `times` times, after `after` calls that work."""
    real, calls = getattr(os, name), itertools.count()

    def call(*arguments: Any, **words: Any) -> Any:
        if after <= next(calls) < after + times:
            raise error
        return real(*arguments, **words)

    with patch.context() as inner:
        inner.setattr(os, name, call)
        yield


# A whole run


def test_what_is_written_is_read(run_dir: RunDir) -> None:
    loss = 0.1 + 0.2
    run_dir.append_metrics({"epoch": 0, "loss": loss, "text": "two\nlines é"})
    run_dir.append_metrics({"epoch": 1, "loss": math.pi})
    run_dir.save_checkpoint(STATE)
    run_dir.write_text("genotype.json", GENOTYPE.to_json())
    run_dir.write_json("extra.json", [1, {"a": None}])

    run = Run.read(run_dir.folder)
    assert (run.folder, run.config, run.environment) == (run_dir.folder, CONFIG, ENVIRONMENT)
    assert run.metrics == [
        {"epoch": 0, "loss": loss, "text": "two\nlines é"},
        {"epoch": 1, "loss": math.pi},
    ]
    assert run.genotype == GENOTYPE
    assert json.loads((run.folder / "extra.json").read_text()) == [1, {"a": None}]
    for state in (run_dir.load_checkpoint(), run.load_checkpoint()):
        assert same(state, STATE) and state["betas"] == (0.5, 0.999) and state["format"] == 1
    names = {"config.json", "environment.json", "metrics.jsonl", "genotype.json", "extra.json"}
    assert set(tree(run.folder)) == names | {"lock", "checkpoints/last.pt"}


def test_a_new_run_reads_as_empty(run_dir: RunDir) -> None:
    run = Run.read(run_dir.folder)
    assert run.metrics == [] and run.genotype is None and run.result is None


def test_a_run_can_begin_with_a_checkpoint_and_more_files(folder: Path) -> None:
    texts = {"genotype.json": GENOTYPE.to_json()}
    with RunDir.create(folder, CONFIG, ENVIRONMENT, checkpoint=STATE, texts=texts) as run_dir:
        state = run_dir.load_checkpoint()
        run_dir.write_json("result.json", {"accuracy": 0.5})
    assert same(state, STATE) and state["format"] == 1
    run = Run.read(folder)
    assert run.genotype == GENOTYPE and run.result == {"accuracy": 0.5}
    with pytest.raises(TypeError):
        RunDir.create(folder.with_name("other"), CONFIG, ENVIRONMENT, checkpoint={"path": folder})
    assert os.listdir(folder.parent) == ["run"]


def test_files_can_be_read_by_whom_the_umask_lets(folder: Path) -> None:
    old = os.umask(0o027)
    try:
        with RunDir.create(folder, CONFIG, ENVIRONMENT) as run_dir:
            run_dir.save_checkpoint(STATE)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert (folder / "checkpoints/last.pt").stat().st_mode & 0o777 == 0o640


# Making a folder


def test_create_makes_missing_parents(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "a" / "b" / "run", CONFIG, ENVIRONMENT).close()
    assert Run.read(tmp_path / "a/b/run").config == CONFIG


def test_create_takes_an_empty_folder_and_a_link_to_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    RunDir.create(tmp_path / "link", CONFIG, ENVIRONMENT).close()
    assert Run.read(tmp_path / "empty").config == CONFIG
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_create_refuses_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDir.create(tmp_path / "run", CONFIG, ENVIRONMENT).close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path)
    expected = {
        "run": "already holds a run",
        "full": "is not empty",
        "file": "a file of that name exists",
        "file/below": f"{tmp_path / 'file'} is not a folder",
        "here": "is the current folder",
    }
    for name, words in expected.items():
        text = message(lambda name=name: RunDir.create(tmp_path / name, CONFIG, ENVIRONMENT))
        assert words in text and str(tmp_path / name) in text
    assert tree(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 4


def test_of_two_that_create_the_same_run_one_wins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", real)
        RunDir.create(folder, {"who": "first"}, ENVIRONMENT).close()
        real(source, target)

    monkeypatch.setattr(os, "rename", late)
    text = message(lambda: RunDir.create(folder, {"who": "second"}, ENVIRONMENT))
    assert "by another process" in text
    assert Run.read(folder).config == {"who": "first"}
    assert list(folder.parent.iterdir()) == [folder]


def test_create_names_a_mount_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(monkeypatch, "rename", OSError(errno.EBUSY, "busy")):
        text = message(lambda: RunDir.create(folder, CONFIG, ENVIRONMENT))
    assert "mount point" in text and str(folder) in text


@pytest.mark.parametrize("name", ["mkdir", "open", "write", "fsync", "rename"])
def test_a_failed_create_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "parent" / "run"
    times = 1 if name == "open" else 10**6  # what opens nothing cannot clean up either
    for after in range(100):
        with failing(monkeypatch, name, NO_SPACE, after, times):
            try:
                RunDir.create(folder, CONFIG, ENVIRONMENT, checkpoint=STATE).close()
            except UserError as error:
                assert str(error).startswith("disk full: ") and "ENOSPC" in str(error)
                assert f" {folder} " in str(error)
                assert list(tmp_path.iterdir()) == []
                continue
        break
    assert after > 0
    assert Run.read(folder).config == CONFIG


def test_an_interrupted_create_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RunDir.create(tmp_path / "parent" / "run", CONFIG, ENVIRONMENT)
    assert list(tmp_path.iterdir()) == []


def test_create_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EACCES, errno.EPERM, errno.EROFS):
        with failing(monkeypatch, "mkdir", OSError(code, os.strerror(code))):
            text = message(lambda: RunDir.create(folder, CONFIG, ENVIRONMENT))
        assert text.startswith(f"no permission to create {folder} ({errno.errorcode[code]})")
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("place", ["/sys/run", "/proc/run"])
def test_create_where_nobody_may(place: str) -> None:
    if not Path(place).parent.is_dir():
        pytest.skip(f"no {Path(place).parent} here")
    assert place in message(lambda: RunDir.create(Path(place), CONFIG, ENVIRONMENT))


def test_a_folder_that_syncs_no_folders_is_fine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "not for folders")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with RunDir.create(folder, CONFIG, ENVIRONMENT) as run_dir:
        run_dir.save_checkpoint(STATE)
        assert same(run_dir.load_checkpoint(), STATE)


# One writer


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for read in (RunDir.open, Run.read):
        assert "no such run folder" in message(lambda read=read: read(tmp_path / "missing"))
        assert "it has no config.json" in message(lambda read=read: read(tmp_path / "empty"))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_half_made_folder_is_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, real = {}, os.rename

    def killed(built: Path, _: Path) -> None:
        left["folder"] = built.with_name(built.name + "x")  # where the cleaning does not find it
        real(built, left["folder"])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        RunDir.create(folder, CONFIG, ENVIRONMENT)
    monkeypatch.undo()
    assert (left["folder"] / "config.json").exists()
    assert "is not a run folder" in message(lambda: Run.read(left["folder"]))


def test_a_second_writer_is_refused_until_the_first_closes(run_dir: RunDir) -> None:
    text = message(lambda: RunDir.open(run_dir.folder))
    assert f"process {os.getpid()} on {os.uname().nodename}" in text and "in use" in text
    assert Run.read(run_dir.folder).config == CONFIG
    run_dir.close()
    run_dir.close()
    assert (run_dir.folder / "lock").read_text() == ""
    RunDir.open(run_dir.folder).close()


def test_a_closed_folder_is_not_written_to(run_dir: RunDir) -> None:
    run_dir.close()
    before = tree(run_dir.folder)
    for write in (
        lambda: run_dir.append_metrics({"epoch": 0}),
        lambda: run_dir.cut_metrics(0),
        lambda: run_dir.save_checkpoint(STATE),
        lambda: run_dir.write_json("a.json", {}),
    ):
        with pytest.raises(RuntimeError, match="is closed"):
            write()
    assert tree(run_dir.folder) == before


def test_a_writer_whose_folder_was_replaced_stops(run_dir: RunDir) -> None:
    (run_dir.folder / "lock").unlink()
    with RunDir.open(run_dir.folder) as second:
        assert "was replaced" in message(lambda: run_dir.append_metrics({"epoch": 0}))
        assert "was replaced" in message(lambda: run_dir.save_checkpoint(STATE))
        second.append_metrics({"epoch": 1})
    assert Run.read(run_dir.folder).metrics == [{"epoch": 1}]


def test_a_file_system_without_locks(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.close()

    def flock(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    for folder, action in (
        (run_dir.folder, lambda: RunDir.open(run_dir.folder)),
        (tmp_path / "new", lambda: RunDir.create(tmp_path / "new", CONFIG, ENVIRONMENT)),
    ):
        assert message(action).startswith(f"{folder}: its file system cannot lock files")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_open_without_permission_or_space_lets_go(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.close()
    leftover = run_dir.folder / ".unfinished-config.json-0"
    leftover.touch()
    for name, code in (("unlink", errno.EACCES), ("write", errno.ENOSPC)):
        with failing(monkeypatch, name, OSError(code, os.strerror(code))):
            assert str(run_dir.folder) in message(lambda: RunDir.open(run_dir.folder))
    RunDir.open(run_dir.folder).close()
    assert not leftover.exists()


# Killed


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `code`, which ends by printing a line or by killing itself."""
    text = "import os, signal, sys, time, torch\nfrom rdarts_fast.run_dir import RunDir\n"
    command = [sys.executable, "-c", text + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_frees_the_lock(run_dir: RunDir) -> None:
    run_dir.close()
    code = "run_dir = RunDir.open(sys.argv[1]); print('held', flush=True); time.sleep(60)"
    with child(code, run_dir.folder) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        text = message(lambda: RunDir.open(run_dir.folder))
        process.kill()
    assert f"process {process.pid} on " in text
    RunDir.open(run_dir.folder).close()


def test_killed_inside_a_checkpoint_write(run_dir: RunDir) -> None:
    run_dir.append_metrics({"epoch": 2})
    run_dir.save_checkpoint(STATE)
    run_dir.close()
    code = """
        def killed(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        with RunDir.open(sys.argv[1]) as run_dir:
            run_dir.append_metrics({"epoch": 3})
            metrics = os.open(run_dir.folder / "metrics.jsonl", os.O_WRONLY | os.O_APPEND)
            os.write(metrics, b'{"epo')
            os.replace = killed
            run_dir.save_checkpoint({"epoch": 3, "alphas": {"normal": torch.ones(3, 2)}})
    """
    with child(code, run_dir.folder) as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    leftovers = list((run_dir.folder / "checkpoints").glob(".unfinished-last.pt-*"))
    assert len(leftovers) == 1 and torch.load(leftovers[0], weights_only=True)["epoch"] == 3

    with RunDir.open(run_dir.folder) as reopened:
        assert os.listdir(run_dir.folder / "checkpoints") == ["last.pt"]
        state = reopened.load_checkpoint()
        assert same(state, STATE)
        assert Run.read(run_dir.folder).metrics == [{"epoch": 2}, {"epoch": 3}]
        reopened.cut_metrics(1)
        reopened.append_metrics({"epoch": 3, "again": True})
    assert Run.read(run_dir.folder).metrics == [{"epoch": 2}, {"epoch": 3, "again": True}]


# Metrics


def test_half_a_last_line_is_dropped(run_dir: RunDir) -> None:
    path = run_dir.folder / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n{"epoch": 1}')
    assert Run.read(run_dir.folder).metrics == [{"epoch": 0}]
    run_dir.append_metrics({"epoch": 7})
    assert Run.read(run_dir.folder).metrics == [{"epoch": 0}, {"epoch": 7}]
    path.write_bytes(b'{"epo')
    run_dir.append_metrics({"epoch": 8})
    assert Run.read(run_dir.folder).metrics == [{"epoch": 8}]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(run_dir: RunDir, number: float) -> None:
    before = tree(run_dir.folder)
    with pytest.raises(ValueError):
        run_dir.append_metrics({"loss": [number]})
    with pytest.raises(ValueError):
        run_dir.write_json("a.json", {"loss": number})
    assert tree(run_dir.folder) == before


def test_cut_metrics(run_dir: RunDir) -> None:
    path = run_dir.folder / "metrics.jsonl"
    lines = [b'{"epoch": %d}\n' % epoch for epoch in range(3)]
    path.write_bytes(b"".join(lines) + b'{"ep')
    run_dir.cut_metrics(3)
    assert path.read_bytes() == b"".join(lines)
    run_dir.cut_metrics(2)
    assert path.read_bytes() == b"".join(lines[:2])
    text = message(lambda: run_dir.cut_metrics(5))
    assert "metrics.jsonl has 2 epochs, the checkpoint needs 5" in text
    with pytest.raises(ValueError):
        run_dir.cut_metrics(-1)
    assert path.read_bytes() == b"".join(lines[:2])
    run_dir.cut_metrics(0)
    assert path.read_bytes() == b""
    path.unlink()
    run_dir.cut_metrics(0)
    assert "has 0 epochs" in message(lambda: run_dir.cut_metrics(1))


# Writes that fail


WRITES: dict[str, Callable[[RunDir], None]] = {
    "metrics.jsonl": lambda run_dir: run_dir.append_metrics({"epoch": 2}),
    "checkpoints/last.pt": lambda run_dir: run_dir.save_checkpoint(OTHER_STATE),
    "config.json": lambda run_dir: run_dir.write_json("config.json", {"new": 1}),
    "metrics.jsonl cut": lambda run_dir: run_dir.cut_metrics(1),
}
FAILURES = [(what, name) for what in WRITES for name in ("open", "write", "fsync", "replace")]
FAILURES.remove(("metrics.jsonl", "replace"))  # a line is added in place


@pytest.mark.parametrize(("what", "name"), FAILURES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_failed_write_leaves_the_old_file(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, what: str, name: str, code: int
) -> None:
    run_dir.append_metrics({"epoch": 0})
    run_dir.append_metrics({"epoch": 1})
    run_dir.save_checkpoint(STATE)
    before = tree(run_dir.folder)
    with failing(monkeypatch, name, OSError(code, os.strerror(code))):
        text = message(lambda: WRITES[what](run_dir))
    starts = {errno.EACCES: "no permission", errno.EIO: "cannot write"}
    path = run_dir.folder / what.removesuffix(" cut")
    assert text.startswith(starts.get(code, "disk full")) and str(path) in text
    assert errno.errorcode[code] in text
    assert tree(run_dir.folder) == before
    WRITES[what](run_dir)
    assert tree(run_dir.folder) != before


def test_a_half_written_line_is_taken_back(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.append_metrics({"epoch": 0})
    real, before = os.write, tree(run_dir.folder)

    def short(file: int, data: bytes) -> int:
        if len(data) < 8:
            raise NO_SPACE
        return real(file, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        assert "disk full" in message(lambda: run_dir.append_metrics({"epoch": 1}))
    assert tree(run_dir.folder) == before


def test_short_writes_are_continued(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:100]))
    run_dir.save_checkpoint(STATE)
    assert same(run_dir.load_checkpoint(), STATE)


def test_a_file_is_synced_before_its_name_and_the_folder_after(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    def recorded(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*arguments: Any) -> None:
            last = arguments[-1]
            path = Path(os.readlink(f"/proc/self/fd/{last}") if name == "fsync" else last)
            events.append(f"{name} {path.name.partition('-')[0]}")
            real(*arguments)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    with RunDir.create(folder, CONFIG, ENVIRONMENT, checkpoint=STATE) as run_dir:
        files = {"config.json", "environment.json", "metrics.jsonl", "last.pt"}
        folders = [
            "fsync checkpoints",
            "fsync .unfinished",
            "rename run",
            f"fsync {folder.parent.name}",
        ]
        assert set(events[:4]) == {f"fsync {name}" for name in files}
        assert events[4:] == [event.partition("-")[0] for event in folders]
        del events[:]
        run_dir.save_checkpoint(STATE)
        run_dir.append_metrics({"epoch": 0})
    assert events == [
        "fsync .unfinished",
        "replace last.pt",
        "fsync checkpoints",
        "fsync metrics.jsonl",
    ]


# Checkpoints


def test_checkpoints_have_names(run_dir: RunDir) -> None:
    run_dir.save_checkpoint(STATE)
    run_dir.save_checkpoint(OTHER_STATE, "best")
    assert same(run_dir.load_checkpoint(), STATE)
    assert same(run_dir.load_checkpoint("best"), OTHER_STATE)
    for name in ("", "../last", "a/b", ".hidden"):
        with pytest.raises(ValueError):
            run_dir.save_checkpoint(STATE, name)
    for name in ("lock", "a/b.json", "../b.json", ""):
        with pytest.raises(ValueError):
            run_dir.write_json(name, {})


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"a": [1, np.float64(2.0)]}, "state['x']['a'][1]: .* not float64"),
        (Path("p"), r"state\['x'\]: .* not P"),
        ({np.int64(1): 2}, r"state\['x'\]: .* not int64"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(run_dir: RunDir, entry: object, where: str) -> None:
    with pytest.raises(TypeError, match=where.replace("['x']['a'][1]", r"\['x'\]\['a'\]\[1\]")):
        run_dir.save_checkpoint({"x": entry})
    with pytest.raises(ValueError, match="format"):
        run_dir.save_checkpoint({"format": 2})
    assert os.listdir(run_dir.folder / "checkpoints") == []


def test_states_of_modules_and_optimisers_pass(run_dir: RunDir) -> None:
    module = torch.nn.BatchNorm1d(2)
    adam = torch.optim.Adam(module.parameters(), betas=(0.5, 0.999))
    module(torch.ones(3, 2)).sum().backward()
    adam.step()
    run_dir.save_checkpoint({"module": module.state_dict(), "adam": adam.state_dict()})
    state = run_dir.load_checkpoint()
    adam.load_state_dict(state["adam"])
    assert torch.equal(state["module"]["running_mean"], module.running_mean)


def test_a_missing_checkpoint(run_dir: RunDir) -> None:
    text = message(run_dir.load_checkpoint)
    assert "no checkpoint" in text and "checkpoints/last.pt" in text


def test_every_damage_of_a_checkpoint_is_noticed(run_dir: RunDir) -> None:
    run_dir.save_checkpoint(STATE)
    path = run_dir.folder / "checkpoints/last.pt"
    data = path.read_bytes()
    for size in [*range(0, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:size])
        assert str(path) in message(run_dir.load_checkpoint)
    noticed = 0
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert same(run_dir.load_checkpoint(), STATE)  # the flipped bit was padding
        except UserError as error:
            noticed += str(path) in str(error)
    assert noticed > len(data) // 6


def test_foreign_checkpoints(run_dir: RunDir) -> None:
    def saved(value: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    path = run_dir.folder / "checkpoints/last.pt"
    foreign = {
        b"hello": "not a checkpoint",
        pickle.dumps({"format": 1}): "not a checkpoint",
        saved({"state_dict": {}}): 'it has no "format"',
        saved([1]): 'it has no "format"',
        saved({"format": 2}): "has format 2, this version reads 1",
        saved({"format": 1, "code": os.system}): "not a checkpoint",
    }
    for data, words in foreign.items():
        path.write_bytes(data)
        text = message(run_dir.load_checkpoint)
        assert words in text and str(path) in text


# Damage that readers meet


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "genotype.json", "result.json"]
)
@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff"])
def test_damaged_files_are_named(run_dir: RunDir, name: str, data: bytes) -> None:
    (run_dir.folder / name).write_bytes(data)
    assert str(run_dir.folder / name) in message(lambda: Run.read(run_dir.folder))


def test_a_damaged_metrics_line_is_named(run_dir: RunDir) -> None:
    (run_dir.folder / "metrics.jsonl").write_bytes(b'{"epoch": 0}\nnonsense\n')
    assert "metrics.jsonl line 2: damaged" in message(lambda: Run.read(run_dir.folder))


# What is left of a damaged folder


def test_salvage_reads_a_whole_folder_as_read_does(run_dir: RunDir) -> None:
    run_dir.append_metrics({"epoch": 0})
    run_dir.write_text("genotype.json", GENOTYPE.to_json())
    assert Run.salvage(run_dir.folder) == (Run.read(run_dir.folder), [])


def test_salvage_leaves_out_what_is_damaged_and_names_it(run_dir: RunDir) -> None:
    for epoch in range(3):
        run_dir.append_metrics({"epoch": epoch})
    folder = run_dir.folder
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(f"{lines[0]}\n[1]\n{lines[2]}\n" + '{"epoch"')
    (folder / "genotype.json").write_text("{")
    (folder / "result.json").write_bytes(b"\xff")
    (folder / "environment.json").write_text("[" * 100_000)
    run, notes = Run.salvage(folder)
    assert [record["epoch"] for record in run.metrics] == [0, 2]
    assert (run.genotype, run.result, run.environment) == (None, None, {})
    assert run.config == CONFIG
    assert len(notes) == 5
    assert f"{folder}/metrics.jsonl line 2: damaged, expected an object, got list" in notes
    assert any("metrics.jsonl: half a line at the end" in note for note in notes)
    assert any("genotype.json: genotype: not JSON" in note for note in notes)
    (folder / "metrics.jsonl").unlink()
    run, notes = Run.salvage(folder)
    assert run.metrics == [] and any("metrics.jsonl: No such file" in note for note in notes)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        Run.salvage(folder)


def test_the_lock_names_who_holds_a_folder(run_dir: RunDir) -> None:
    assert Run.read(run_dir.folder).holder == f"process {os.getpid()} on {socket.gethostname()}"
    run_dir.close()
    assert Run.read(run_dir.folder).holder is None
    (run_dir.folder / "lock").unlink()
    assert Run.read(run_dir.folder).holder is None
