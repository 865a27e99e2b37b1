"""Runs that share GPUs: which run gets which, how many at once, what becomes of each."""

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from rdarts_fast import fleet, gpu_slots
from rdarts_fast.errors import UserError
from rdarts_fast.fleet import FleetConfig, Job, Outcome, log_of, run_jobs
from rdarts_fast.gpu_slots import Slots


def is_done(folder: Path) -> bool:
    return (folder / "done").exists()


def shares(folder: Path, others: Path, together: int) -> None:
    """Note the GPU, and stay until as many runs have begun as shall be together."""
    folder.mkdir(parents=True)
    begun = time.monotonic()
    (others / f"begun-{folder.name}").touch()
    while len(list(others.glob("begun-*"))) < together and time.monotonic() < begun + 60:
        time.sleep(0.02)
    gpu, threads = os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()
    (folder / "done").write_text(f"{gpu} {threads} {begun} {time.monotonic()} {os.getpid()}")


def fails(folder: Path) -> None:
    raise UserError("no such data set")


def dies_once(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "checkpoint").exists():
        (folder / "checkpoint").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "done").touch()


def dies(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stops_when_asked(folder: Path) -> None:
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    folder.mkdir(parents=True)
    (folder / "begun").touch()
    while not asked:
        time.sleep(0.02)
    time.sleep(0.3)
    (folder / "checkpoint").write_text(str(len(asked)))
    raise KeyboardInterrupt


def job(root: Path, name: str, call: Callable[..., object], *arguments: object) -> Job:
    folder = root / name
    return Job(name, folder, partial(call, folder, *arguments), partial(is_done, folder))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "visible_gpus", lambda: ["0", "3"])


@pytest.mark.usefixtures("two_gpus")
def test_so_many_runs_share_each_gpu_and_no_more(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, shares, tmp_path, 4) for name in "abcdef"]
    lines: list[str] = []
    outcomes = run_jobs(jobs, FleetConfig(searches_per_gpu=2), lines.append)
    assert outcomes == [Outcome(each, None, 0) for each in jobs]
    rows = [(each.folder / "done").read_text().split() for each in jobs]
    assert [row[0] for row in rows[:4]] == ["0", "3", "0", "3"]
    assert len({row[4] for row in rows}) == 6  # processes
    assert {int(row[1]) for row in rows} == {max(1, len(os.sched_getaffinity(0)) // 4)}
    for gpu in ("0", "3"):
        times = [(float(row[2]), float(row[3])) for row in rows if row[0] == gpu]
        at_once = [sum(a <= moment < b for a, b in times) for moment, _ in times]
        assert max(at_once) == 2
    assert "runs: 0 of 6 done, 4 running, 0 failed  (d started)" in lines
    assert not any("5 running" in line for line in lines)
    assert "-- a: done" in log_of(jobs[0]).read_text()


@pytest.mark.usefixtures("two_gpus")
def test_what_becomes_of_each(tmp_path: Path) -> None:
    calls = {"fails": fails, "dies-once": dies_once, "dies": dies}
    jobs = [job(tmp_path, name, call) for name, call in calls.items()]
    lines: list[str] = []
    outcomes = run_jobs(jobs, FleetConfig(searches_per_gpu=1, retries=1), lines.append)
    failed, once, dead = outcomes
    assert failed.error == f"no such data set (see {log_of(jobs[0])})" and failed.retries == 0
    assert (once.error, once.retries) == (None, 1)
    assert dead.error is not None and dead.error.startswith("its process died (exit code -9)")
    assert dead.retries == 1
    assert sum("it is started again" in line for line in lines) == 2


@pytest.mark.usefixtures("two_gpus")
def test_an_interrupt_reaches_each_run_once(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, stops_when_asked) for name in "abc"]

    def interrupt() -> None:
        while not all((tmp_path / name / "begun").exists() for name in "ab"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, FleetConfig(searches_per_gpu=1), lambda line: None)
    thread.join()
    assert [(tmp_path / name / "checkpoint").read_text() for name in "ab"] == ["1", "1"]
    assert not (tmp_path / "c").exists()


def test_the_emptiest_gpu_is_next() -> None:
    slots = Slots(["0", "1"], 2)
    taken = [slots.take() for _ in range(3)]
    assert taken == ["0", "1", "0"] and slots.free
    slots.give("0")
    slots.give("0")
    assert [slots.take() for _ in range(3)] == ["0", "0", "1"]
    assert not slots.free
    assert not Slots([], 2).free


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1"]), ("", ["0", "1"]), ("2, GPU-ab", ["2", "GPU-ab"])]
)
def test_gpus_are_those_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_slots.visible_gpus() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"searches_per_gpu": 0}, "--searches-per-gpu: expected a whole number from 1, got 0"),
        ({"searches_per_gpu": 2}, "--searches-per-gpu: torch sees no GPU here"),
        (
            {"searches_per_gpu": 2, "fleet": "ray", "gpus_per_run": 0.5},
            "--searches-per-gpu N is --gpus-per-run 1/N",
        ),
    ],
)
def test_bad_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(fleet, "visible_gpus", list)
    config = FleetConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        run_jobs([job(tmp_path, "a", fails)], config)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "a").exists()
