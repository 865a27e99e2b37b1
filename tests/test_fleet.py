"""Many runs, here and on a real Ray: what becomes of each, and what Ray leaves behind."""

import contextlib
import dataclasses
import io
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rdarts_fast import fleet
from rdarts_fast.errors import UserError
from rdarts_fast.fleet import FleetConfig, Job, Outcome, log_of, run_jobs
from rdarts_fast.ray_session import connected_ray

RAY = FleetConfig(fleet="ray", ray_cpus=2, retries=1)
REPOSITORY = Path(__file__).parents[1]


# Runs: each gets its folder, and is done once there is a file of that name in it.


def is_done(folder: Path) -> bool:
    return (folder / "done").exists()


def works(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print(f"printed by {folder.name}")
    print("a complaint", file=sys.stderr)
    os.system("echo printed by a child")
    (folder / "done").write_text(f"{os.getpid()} {os.getcwd()}")


def fails(folder: Path) -> None:
    raise TwoArguments("two\nlines", 2)


def cannot(folder: Path) -> None:
    raise UserError("no such\ndata set")


def leaves_something(folder: Path) -> None:
    folder.mkdir(parents=True)


def interrupts(folder: Path) -> None:
    raise KeyboardInterrupt("go on with: this")


def is_killed_once(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "checkpoint").exists():
        (folder / "checkpoint").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "done").touch()


def is_killed(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "calls", "a") as calls:
        calls.write("called\n")
    os.kill(os.getpid(), signal.SIGKILL)


def stops_when_asked(folder: Path) -> None:
    """As a search does: the first interrupt asks, and it ends with a checkpoint."""
    asked = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    folder.mkdir(parents=True)
    (folder / "begun").touch()
    for _ in range(600):
        time.sleep(0.05)
        if asked:
            (folder / "checkpoint").touch()
            raise KeyboardInterrupt("go on with: this")


def follows(folder: Path, file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)
    works(folder)


class TwoArguments(Exception):
    """What pickle cannot make again."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)


def job(root: Path, name: str, call: Callable[..., object], *arguments: object) -> Job:
    folder = root / name
    return Job(name, folder, partial(call, folder, *arguments), partial(is_done, folder))


def errors(outcomes: list[Outcome]) -> dict[str, str | None]:
    return {outcome.job.name: outcome.error for outcome in outcomes}


# In this process


def test_jobs_run_in_order_and_done_ones_do_not_run_again(tmp_path) -> None:
    called: list[str] = []

    def call(folder: Path) -> None:
        called.append(folder.name)
        works(folder)

    jobs = [job(tmp_path, name, call) for name in "dacb"]
    works(tmp_path / "c")
    lines: list[str] = []
    outcomes = run_jobs(jobs, FleetConfig(), lines.append)
    assert called == ["d", "a", "b"]
    assert outcomes == [Outcome(each, None, 0) for each in jobs]
    assert lines == [
        "runs: 1 of 4 done, 0 running, 0 failed  (1 done before)",
        "runs: 1 of 4 done, 1 running, 0 failed  (d started)",
        "runs: 2 of 4 done, 0 running, 0 failed  (d done in 0 s)",
        "runs: 2 of 4 done, 1 running, 0 failed  (a started)",
        "runs: 3 of 4 done, 0 running, 0 failed  (a done in 0 s)",
        "runs: 3 of 4 done, 1 running, 0 failed  (b started)",
        "runs: 4 of 4 done, 0 running, 0 failed  (b done in 0 s)",
    ]
    lines.clear()
    assert run_jobs(jobs, FleetConfig(), lines.append) == outcomes
    assert called == ["d", "a", "b"]
    assert lines == ["runs: 4 of 4 done, 0 running, 0 failed  (4 done before)"]
    assert run_jobs([], FleetConfig(), lines.append) == []


def test_an_error_is_one_line_and_stops_no_other(tmp_path, capsys) -> None:
    damaged = dataclasses.replace(job(tmp_path, "damaged", works), done=partial(cannot, tmp_path))
    calls = {"cannot": cannot, "fails": fails, "leaves": leaves_something, "works": works}
    jobs = [damaged, *(job(tmp_path, name, call) for name, call in calls.items())]
    lines: list[str] = []
    outcomes = run_jobs(jobs, FleetConfig(), lines.append)
    assert errors(outcomes) == {
        "damaged": "no such data set",
        "cannot": "no such data set",
        "fails": "TwoArguments: two lines",
        "leaves": "ended, but something is left to do",
        "works": None,
    }
    assert lines[-1] == (
        "4 of 5 runs failed: damaged: no such data set; cannot: no such data set; "
        "fails: TwoArguments: two lines; leaves: ended, but something is left to do"
    )
    assert lines[-2] == "runs: 1 of 5 done, 0 running, 4 failed  (works done in 0 s)"
    failure = "(cannot failed after 0 s: no such data set)"
    assert f"runs: 0 of 5 done, 0 running, 2 failed  {failure}" in lines
    shown = capsys.readouterr().err
    assert shown.count("Traceback") == 1 and "in fails" in shown  # a bug's, not a UserError's


def test_an_interrupt_ends_the_fleet(tmp_path) -> None:
    calls = {"works": works, "interrupts": interrupts, "later": works}
    jobs = [job(tmp_path, name, call) for name, call in calls.items()]
    with pytest.raises(KeyboardInterrupt, match="go on with: this"):
        run_jobs(jobs, FleetConfig(), lambda line: None)
    assert [is_done(each.folder) for each in jobs] == [True, False, False]


def test_names_are_told_apart(tmp_path) -> None:
    with pytest.raises(ValueError, match="a name for each"):
        run_jobs([job(tmp_path, "a", works)] * 2, FleetConfig())
    assert not (tmp_path / "a").exists()


def test_a_log_lies_beside_its_folder(tmp_path) -> None:
    assert log_of(job(tmp_path, "l2-0.0009", works)) == tmp_path / "l2-0.0009.log"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (599, "599 s"), (600, "10 min"), (7169, "119 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert fleet._duration(seconds) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fleet": "rai"}, "--fleet: expected local or ray, got rai"),
        ({"cpus_per_run": -1.0}, "--cpus-per-run: expected a number above 0, got -1.0"),
        ({"cpus_per_run": 0}, "--cpus-per-run: expected a number above 0, got 0"),
        ({"cpus_per_run": float("nan")}, "--cpus-per-run: expected a number above 0, got nan"),
        ({"cpus_per_run": True}, "--cpus-per-run: expected a number above 0, got True"),
        ({"cpus_per_run": 1.5}, "--cpus-per-run: expected a fraction of 1 or a whole number"),
        ({"gpus_per_run": -0.5}, "--gpus-per-run: expected a number above 0, got -0.5"),
        ({"gpus_per_run": 2.5}, "--gpus-per-run: expected a fraction of 1 or a whole number"),
        ({"retries": -1}, "--retries: expected a whole number from 0, got -1"),
        ({"retries": 1.0}, "--retries: expected a whole number from 0, got 1.0"),
        ({"ray_cpus": 0}, "--ray-cpus: expected a whole number from 1, got 0"),
        ({"ray_address": "local"}, "--ray-address: expected auto or HOST:PORT, got local"),
        ({"ray_address": "ray://host:1"}, "--ray-address: expected auto or HOST:PORT, got ray:"),
        ({"ray_address": "auto", "ray_cpus": 2}, "--ray-cpus is for a Ray of our own"),
        ({"fleet": "local", "ray_address": "auto"}, "--ray-address has no effect in this process"),
        ({"fleet": "local", "gpus_per_run": 1}, "--gpus-per-run has no effect in this process"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path) -> None:
    config = FleetConfig(**{"fleet": "ray", **settings})
    with pytest.raises(UserError) as caught:
        run_jobs([job(tmp_path, "a", works)], config)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "a").exists()


def test_ray_without_the_extra_names_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--fleet ray needs .* pip install 'rdarts-fast\[ray\]'"):
        run_jobs([job(tmp_path, "a", works)], RAY)
    works(tmp_path / "a")
    assert run_jobs([job(tmp_path, "a", works)], RAY)[0].error is None  # nothing to start Ray for


# On Ray


@dataclasses.dataclass
class Session:
    """What a fleet on a Ray of its own came to."""

    root: Path
    outcomes: dict[str, Outcome]
    lines: list[str]
    printed: str  # by anything but the fleet itself
    listening: dict[str, set[str]]  # while it ran: a process's name, the addresses
    changed: dict[str, tuple[object, object]]  # what it left otherwise than it was
    left: list[str]  # processes and files


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Iterator[Session]:
    pytest.importorskip("ray")
    root = tmp_path_factory.mktemp("fleet")
    calls = {
        "killed": is_killed,
        "killed-once": is_killed_once,
        "works": works,
        "fails": fails,
    }
    jobs = [job(root, name, call) for name, call in calls.items()]
    listening: dict[str, set[str]] = {}
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        for name, addresses in listening_addresses().items():
            listening.setdefault(name, set()).update(addresses)

    scratch = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short: Ray's sockets lie in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # the user's, which is not for this Ray
        before, others = surroundings(), descendants()  # other tests' processes
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            outcomes = run_jobs(jobs, RAY, report)
        after = surroundings()
    changed = {k: (v, after[k]) for k, v in before.items() if v != after[k]}
    left = [name for number, name in descendants() if (number, name) not in others]
    left += map(str, scratch.iterdir())
    left += [str(path) for path in root.glob("home/**/*")]
    shutil.rmtree(scratch)
    by_name = {outcome.job.name: outcome for outcome in outcomes}
    yield Session(root, by_name, lines, printed.getvalue(), listening, changed, left)


def surroundings() -> dict[str, object]:
    import resource

    return {
        "environment": dict(os.environ),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "folder": os.getcwd(),
    }


def descendants() -> list[tuple[int, str]]:
    """Return the number and the name of every process below this one that has not ended."""
    children: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        number, _, name = head.partition(" (")
        state, parent = tail.split()[:2]
        if state != "Z":
            children.setdefault(int(parent), []).append((int(number), name))
    found = []
    unseen = [os.getpid()]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += [number for number, _ in below]
    return found


def listening_addresses() -> dict[str, set[str]]:
    """Return on which addresses this process and those below it accept TCP connections."""
    owners: dict[str, str] = {}
    for number, name in [(os.getpid(), "this process"), *descendants()]:
        for path in Path(f"/proc/{number}/fd").glob("*"):
            try:
                target = os.readlink(path)
            except OSError:  # just closed
                continue
            if target.startswith("socket:["):
                owners[target[8:-1]] = name
    found: dict[str, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *more = line.split()
            if state == "0A" and more[5] in owners:
                found.setdefault(owners[more[5]], set()).add(address_of(local))
    return found


def address_of(text: str) -> str:
    """Return the address in an entry of /proc/net: words of four bytes, the last one first."""
    data = bytes.fromhex(text.partition(":")[0])
    address = ipaddress.ip_address(b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4)))
    return str(getattr(address, "ipv4_mapped", None) or address)


def test_jobs_run_in_processes_of_their_own(session) -> None:
    done = session.outcomes["works"]
    assert (done.error, done.retries) == (None, 0)
    process, folder = (session.root / "works" / "done").read_text().split(" ", 1)
    assert int(process) != os.getpid() and folder == os.getcwd()


def test_a_run_whose_worker_was_killed_is_started_again(session) -> None:
    outcome = session.outcomes["killed-once"]
    assert (outcome.error, outcome.retries) == (None, 1)
    again = "(killed-once: its worker died (killed, out of memory, or crashed); it is started again"
    assert sum(again in line for line in session.lines) == 1


def test_ray_does_not_print_into_the_progress(session) -> None:
    assert session.printed == ""


def test_a_run_that_always_dies_is_reported_after_its_retries(session) -> None:
    outcome = session.outcomes["killed"]
    log = session.root / "killed.log"
    assert outcome.error == f"its worker died (killed, out of memory, or crashed) (see {log})"
    assert outcome.retries == 1
    assert (session.root / "killed" / "calls").read_text() == "called\n" * 2


def test_an_error_of_the_runs_own_is_not_retried(session) -> None:
    outcome = session.outcomes["fails"]
    assert outcome.error == f"TwoArguments: two lines (see {session.root / 'fails.log'})"
    assert outcome.retries == 0
    assert session.lines[-1].startswith("2 of 4 runs failed: killed: its worker died")
    assert session.lines[-2].startswith("runs: 2 of 4 done, 0 running, 2 failed  (")


def test_what_a_worker_prints_is_in_its_log(session) -> None:
    lines = (session.root / "works.log").read_text().splitlines()
    assert sorted(lines[1:-1]) == ["a complaint", "printed by a child", "printed by works"]
    assert lines[0].startswith("-- works: process ") and lines[-1] == "-- works: done"
    log = (session.root / "fails.log").read_text()
    assert "in fails" in log and log.endswith("-- fails: TwoArguments: two lines\n")
    log = (session.root / "killed-once.log").read_text()
    assert log.count("-- killed-once: process") == 2 and log.endswith("-- killed-once: done\n")


def test_a_ray_of_our_own_listens_to_this_machine_alone(session) -> None:
    workers = [name for name in session.listening if name.startswith("ray::")]
    assert {"this process", "gcs_server", "raylet"} < set(session.listening) and workers
    assert set().union(*session.listening.values()) <= {"127.0.0.1", "::1"}


def test_ray_leaves_nothing_behind(session) -> None:
    assert session.changed == {}
    assert session.left == []


def test_an_address_where_there_is_no_ray(tmp_path) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(UserError, match=f"--ray-address {address}: ConnectionRefusedError"):
        run_jobs([job(tmp_path, "a", works)], FleetConfig(fleet="ray", ray_address=address))


@pytest.fixture(scope="module")
def connected() -> Iterator[Any]:
    """A Ray that this process is connected to before any fleet."""
    pytest.importorskip("ray")
    with connected_ray(address=None, cpus=2) as ray:
        yield ray


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_runs_write_their_checkpoints(connected, tmp_path, number) -> None:
    first = job(tmp_path, "first", stops_when_asked)
    second = job(tmp_path, "second", follows, first.folder / "begun")
    third = job(tmp_path, "third", works)
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if "second done" in line:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run_jobs([first, second, third], FleetConfig(fleet="ray"), report)
    assert (first.folder / "checkpoint").exists()
    assert lines[-1] == "stopping a run after the step; Ctrl-C again stops at once"
    assert not third.folder.exists()


def test_a_run_that_fits_nowhere_is_refused(connected, tmp_path) -> None:
    for settings, message in {
        ("cpus_per_run", 3): "--cpus-per-run 3: no node of this Ray has more than 2 CPU",
        ("gpus_per_run", 64): "--gpus-per-run 64: no node of this Ray has more than",
    }.items():
        config = dataclasses.replace(FleetConfig(fleet="ray"), **dict([settings]))
        with pytest.raises(UserError) as caught:
            run_jobs([job(tmp_path, "a", works)], config)
        assert str(caught.value).startswith(message)


def test_a_run_that_workers_cannot_import(connected, tmp_path, monkeypatch) -> None:
    module = types.ModuleType("only_here")
    exec("def call(folder): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    [outcome] = run_jobs([job(tmp_path, "a", module.call)], FleetConfig(fleet="ray"))
    assert outcome.retries == 0
    error = "its worker could not begin: RaySystemError: System error: No module named 'only_here'"
    assert outcome.error == error  # and no log is named, since there is none


def test_as_many_runs_as_there_is_room_for(connected) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    for cpus, gpus, room in [(1, 0, 4), (2, 0, 1), (0.1, 0, 40), (0.5, 0.25, 4), (1, 1, 1)]:
        config = FleetConfig(fleet="ray", cpus_per_run=cpus, gpus_per_run=gpus)
        assert sum(fleet._runs_on(node, config) for node in nodes) == room
    config = FleetConfig(fleet="ray", cpus_per_run=0.07)
    assert 7 / 0.07 < 100 == fleet._runs_on({"Alive": True, "Resources": {"CPU": 7.0}}, config)


BY_ADDRESS = """
import sys
from functools import partial
from pathlib import Path
sys.path.append("tests")
import test_fleet
from rdarts_fast.fleet import FleetConfig, run_jobs
address, root = sys.argv[1], Path(sys.argv[2])
config = FleetConfig(fleet="ray", ray_address=address)
print(test_fleet.errors(run_jobs([test_fleet.job(root, "a", test_fleet.works)], config)))
"""


def test_a_ray_with_an_address_is_used_and_left_running(connected, tmp_path) -> None:
    address = connected.get_runtime_context().gcs_address
    with pytest.raises(UserError, match="this process is connected to a Ray already"):
        run_jobs([job(tmp_path, "a", works)], FleetConfig(fleet="ray", ray_address=address))
    # Without the variable Ray looks for a Ray on 127.0.0.1 at the machine's other address.
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-c", BY_ADDRESS, address, str(tmp_path)]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1:] == ["{'a': None}"], ended.stderr
    assert is_done(tmp_path / "a")
    assert [node["Alive"] for node in connected.nodes()] == [True]
