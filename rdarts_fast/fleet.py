"""Many independent runs: one after the other in this process, or side by side on Ray (an extra)."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import socket
import sys
import sysconfig
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rdarts_fast.config import flag
from rdarts_fast.errors import UserError
from rdarts_fast.gpu_slots import Slots, Workers, visible_gpus
from rdarts_fast.ray_session import connected_ray

FLEETS = Literal["local", "ray"]
_POLL_SECONDS = 1.0  # how soon a node that has joined is used
_PATIENCE_SECONDS = 120.0  # how long runs may take to stop by themselves


@dataclass(frozen=True)
class Job:
    """A run, as whoever starts it sees it; on Ray it is pickled."""

    name: str  # shown in progress; no two jobs of a fleet have the same
    folder: Path  # where the run lies; what it prints in a worker goes to <folder>.log beside it
    call: Callable[[], object]  # starts the run or goes on with it; may be called after a death
    done: Callable[[], bool]  # whether nothing is left to do; asked before and after the call


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    error: str | None  # None: done. Else a line: what the run said, or how its worker died
    retries: int  # how often it was started again after its worker's death


@dataclass(frozen=True)
class FleetConfig:
    """Where many runs run."""

    fleet: FLEETS = "local"
    """local: one after the other in this process; ray: side by side (needs the extra `ray`)."""
    ray_address: str | None = None
    """auto or HOST:PORT of a Ray cluster whose machines share the files [one of our own, here]."""
    ray_cpus: int | None = None
    """Cores that a Ray of our own hands out [all that this process may use]."""
    cpus_per_run: float = 1.0
    """Cores that Ray counts a run for; also its threads where --threads is not given."""
    gpus_per_run: float = 0.0
    """GPUs that Ray counts a run for, and shows it; 0.25: four runs share one."""
    searches_per_gpu: int | None = None
    """Runs that share a GPU, side by side on all GPUs of this machine, or of Ray's; for small ones
    [one after the other]."""
    retries: int = 2
    """How often a run is started again, from its checkpoint, whose own process has died."""


def run_jobs(
    jobs: Sequence[Job], config: FleetConfig, report: Callable[[str], object] = print
) -> list[Outcome]:
    """Do what is left of `jobs` and return how each ended, in their order; `report` gets a line at
    every change, and one that names the failed at the end.

    What a run raises is its outcome and stops no other, except an interrupt: that ends the fleet
    and is passed on, on Ray after the runs have had the time to write their checkpoints.

    Raises UserError (a bad config, no extra, no such cluster, no machine for one run).
    """
    check_fleet(config)
    if len({job.name for job in jobs}) < len(jobs):
        raise ValueError(f"expected a name for each job, got {[job.name for job in jobs]}")
    progress = _Progress(jobs, report)
    missing = progress.missing()
    if missing and config.fleet == "ray":
        _run_on_ray(missing, config, progress)
    elif missing and config.searches_per_gpu is not None:
        _run_on_gpus(missing, config, config.searches_per_gpu, progress)
    else:
        for job in missing:
            progress.started(job)
            progress.ended(job, _attempt(job))
    return progress.outcomes()


def log_of(job: Job) -> Path:
    """Return the text file that has what the job printed in Ray's workers."""
    folder = job.folder.absolute()
    return folder.with_name(folder.name + ".log")


def check_fleet(config: FleetConfig) -> None:
    """Raise UserError, naming the flag, for a setting that is out of its range or has no effect."""
    if config.fleet not in get_args(FLEETS):
        raise UserError(f"--fleet: expected local or ray, got {config.fleet}")
    for name, least in (("ray_cpus", 1), ("searches_per_gpu", 1), ("retries", 0)):
        count = getattr(config, name)
        if count is not None and (type(count) is not int or count < least):
            raise UserError(f"{flag(name)}: expected a whole number from {least}, got {count}")
    _check_share("cpus_per_run", config.cpus_per_run)
    if config.gpus_per_run != 0:
        _check_share("gpus_per_run", config.gpus_per_run)
    address = config.ray_address
    if address is not None and not re.fullmatch(r"auto|[^/\s]+:\d+", address):
        raise UserError(f"--ray-address: expected auto or HOST:PORT, got {address}")
    if address is not None and config.ray_cpus is not None:
        raise UserError("--ray-cpus is for a Ray of our own: leave out --ray-address")
    if config.searches_per_gpu is not None and config.gpus_per_run:
        raise UserError("--searches-per-gpu N is --gpus-per-run 1/N: give one of them")
    for name in ("ray_address", "ray_cpus", "gpus_per_run"):
        if config.fleet == "local" and getattr(config, name):
            raise UserError(f"{flag(name)} has no effect in this process: add --fleet ray")


def _check_share(name: str, share: float) -> None:
    """Ray divides a core or a GPU, but gives several of them only whole."""
    if type(share) not in (int, float) or not 0 < share < math.inf:
        raise UserError(f"{flag(name)}: expected a number above 0, got {share}")
    if share > 1 and share != int(share):
        raise UserError(f"{flag(name)}: expected a fraction of 1 or a whole number, got {share}")


class _Progress:
    """What became of the jobs, told in a line at every change."""

    def __init__(self, jobs: Sequence[Job], report: Callable[[str], object]) -> None:
        self._jobs, self.report = jobs, report
        self._since: dict[str, float] = {}  # when it was started first
        self._running: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}

    def missing(self) -> list[Job]:
        """Return the jobs that are not done; one that cannot tell has failed."""
        missing = []
        for job in self._jobs:
            try:
                if job.done():
                    self._outcomes[job.name] = Outcome(job, None, 0)
                else:
                    missing.append(job)
            except Exception as error:  # whatever is wrong with one run stops no other
                self.ended(job, _line(error))
        before = sum(outcome.error is None for outcome in self._outcomes.values())
        if before:
            self._tell(f"{before} done before")
        return missing

    def started(self, job: Job) -> None:
        """The job runs."""
        self._since[job.name] = time.monotonic()
        self._running.add(job.name)
        self._tell(f"{job.name} started")

    def died(self, job: Job, how: str) -> None:
        """The job's worker died; it will be started again."""
        self._tell(f"{job.name}: {how}; it is started again")

    def ended(self, job: Job, error: str | None, retries: int = 0) -> None:
        """The job is done, or failed with `error`."""
        seconds = time.monotonic() - self._since.get(job.name, time.monotonic())
        self._running.discard(job.name)
        self._outcomes[job.name] = Outcome(job, error, retries)
        how, reason = ("done in", "") if error is None else ("failed after", f": {error}")
        self._tell(f"{job.name} {how} {_duration(seconds)}{reason}")

    def outcomes(self) -> list[Outcome]:
        """Return how each job ended, after telling which failed."""
        ended = [self._outcomes[job.name] for job in self._jobs]
        failed = [f"{outcome.job.name}: {outcome.error}" for outcome in ended if outcome.error]
        if failed:
            self.report(f"{len(failed)} of {len(ended)} runs failed: {'; '.join(failed)}")
        return ended

    def _tell(self, what: str) -> None:
        failed = sum(outcome.error is not None for outcome in self._outcomes.values())
        done = f"{len(self._outcomes) - failed} of {len(self._jobs)} done"
        self.report(f"runs: {done}, {len(self._running)} running, {failed} failed  ({what})")


def _attempt(job: Job) -> str | None:
    """Call the job; return None where it is done then, else the line that says why not."""
    try:
        job.call()
        return None if job.done() else "ended, but something is left to do"
    except UserError as error:
        return _line(error)
    except Exception as error:  # whatever is wrong with one run stops no other
        traceback.print_exc()
        return _line(error)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


# On the GPUs of this machine


def _run_on_gpus(jobs: Sequence[Job], config: FleetConfig, each: int, progress: _Progress) -> None:
    gpus = visible_gpus()
    if not gpus:
        raise UserError("--searches-per-gpu: torch sees no GPU here; leave it out")
    slots, most = Slots(gpus, each), each * len(gpus)
    workers = Workers[tuple[Job, int]](slots, max(1, len(os.sched_getaffinity(0)) // most))
    waiting = deque((job, 0) for job in jobs)
    try:
        while waiting or workers:
            while waiting and slots.free:
                job, retries = waiting.popleft()
                if not retries:
                    progress.started(job)
                workers.start((job, retries), _work, job, log_of(job), Path.cwd())
            for (job, retries), error, died in workers.ended():
                if died and retries < config.retries:
                    progress.died(job, str(error))
                    waiting.appendleft((job, retries + 1))
                else:
                    progress.ended(job, _with_log(error, job), retries)
    except BaseException:
        progress.report("stopping what runs after the step")
        workers.stop(_PATIENCE_SECONDS)
        raise


# On Ray


def _run_on_ray(jobs: Sequence[Job], config: FleetConfig, progress: _Progress) -> None:
    if config.searches_per_gpu is not None:
        config = dataclasses.replace(config, gpus_per_run=1 / config.searches_per_gpu)
    with connected_ray(config.ray_address, config.ray_cpus) as ray:
        _check_room(ray, config)
        # A process for each run: what one leaves behind (memory, threads, a broken GPU context) is
        # no other's. Ray's own retries are off: it does not tell how many there were.
        work = ray.remote(
            num_cpus=config.cpus_per_run, num_gpus=config.gpus_per_run, max_retries=0, max_calls=1
        )(_work)
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(_source_folders())}}
        waiting = deque((job, 0) for job in jobs)
        running: dict[Any, tuple[Job, int]] = {}  # what Ray calls the running task: job, retries
        try:
            while waiting or running:
                while waiting and len(running) < _room(ray, config):
                    job, retries = waiting.popleft()
                    if not retries:
                        progress.started(job)
                    task = work.options(name=job.name, runtime_env=environment)
                    running[task.remote(job, log_of(job), Path.cwd())] = job, retries
                for ref in ray.wait(list(running), timeout=_POLL_SECONDS)[0]:
                    job, retries = running.pop(ref)
                    error, died = _result(ray, ref)
                    if died and retries < config.retries:
                        progress.died(job, str(error))
                        waiting.appendleft((job, retries + 1))
                    else:
                        progress.ended(job, _with_log(error, job), retries)
        except BaseException:
            _stop(ray, list(running), progress.report)
            raise


def _work(job: Job, log: Path, folder: Path) -> str | None:
    """Run in a worker: do the job in the driver's `folder`, with everything that this process
    prints at the end of `log`; return None where it is done, else the line that says why not.
    """
    try:
        os.chdir(folder)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    except OSError as error:
        where = f"{socket.gethostname()} does not share the files of this machine"
        return f"{_line(error)}: the node is full, or {where}"
    print(f"-- {job.name}: process {os.getpid()} on {socket.gethostname()}", flush=True)
    error_line = _attempt(job)
    print(f"-- {job.name}: {error_line or 'done'}", flush=True)
    return error_line


def _result(ray: Any, ref: Any) -> tuple[str | None, bool]:
    """Return what a task came to, as `_work` does, and whether its worker died."""
    errors = ray.exceptions
    try:
        return ray.get(ref), False
    except errors.OutOfMemoryError:
        return "its node ran out of memory, and Ray killed its worker", True
    except errors.NodeDiedError:
        return "its node died", True
    except errors.WorkerCrashedError:
        return "its worker died (killed, out of memory, or crashed)", True
    except errors.RayError as error:  # before the job began: it cannot be unpickled there
        cause = getattr(error, "cause", None) or error
        text = str(cause).partition("\n")[0]  # a traceback follows
        return f"its worker could not begin: {type(cause).__name__}: {text}", False


def _with_log(error: str | None, job: Job) -> str | None:
    log = log_of(job)
    return f"{error} (see {log})" if error and log.exists() else error


def _stop(ray: Any, running: list[Any], report: Callable[[str], object]) -> None:
    """Interrupt the running tasks as Ctrl-C would, wait until they end, and kill the rest."""
    if not running:
        return
    runs = "a run" if len(running) == 1 else f"{len(running)} runs"
    report(f"stopping {runs} after the step; Ctrl-C again stops at once")
    for ref in running:
        ray.cancel(ref, force=False)
    for ref in ray.wait(running, num_returns=len(running), timeout=_PATIENCE_SECONDS)[1]:
        ray.cancel(ref, force=True)


def _room(ray: Any, config: FleetConfig) -> int:
    """Return how many runs fit on the nodes that there are now; one is always tried."""
    return max(1, sum(_runs_on(node, config) for node in ray.nodes()))


def _check_room(ray: Any, config: FleetConfig) -> None:
    """Raise UserError where no node has what one run needs: Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, kind in (("cpus_per_run", "CPU"), ("gpus_per_run", "GPU")):
        most = max((node.get(kind, 0) for node in nodes), default=0)
        if getattr(config, name) > most:
            needed = f"{flag(name)} {getattr(config, name):g}"
            raise UserError(f"{needed}: no node of this Ray has more than {most:g} {kind}")


def _runs_on(node: dict[str, Any], config: FleetConfig) -> int:
    if not node["Alive"]:
        return 0
    shares = {"CPU": config.cpus_per_run, "GPU": config.gpus_per_run}
    has = node["Resources"]
    # 1e-6: 7 / 0.07 is a little less than 100.
    return min(int(has.get(kind, 0) / share + 1e-6) for kind, share in shares.items() if share)


def _source_folders() -> list[str]:
    """Return where this process finds code beside what is installed, for workers to find it too."""
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    folders = [Path(entry or ".").resolve() for entry in sys.path]
    return [str(f) for f in folders if f.is_dir() and not installed & {f, *f.parents}]
