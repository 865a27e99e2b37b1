"""The run-book: everything that a GPU is needed for, in one call of less than ten minutes.

    bench/gpu.sh all                       # on a machine with a GPU
    bench/gpu.sh build bench --out results # some of it; results go on in the file of that day
    bench/gpu.sh all --dry                 # every step at a tiny size on the CPU

Steps: build (wheels, the native module for one GPU generation, the program of tests/all_kernels),
test (the kernels' tests on the GPU), sanitize (compute-sanitizer over every kernel), bench
(search_step, kernels, roofline, reached, curvature, slowest) and search (S4 on CIFAR-10). They need
no network. Each has a time box, and is run where an earlier one failed; after each the results are
written, as JSON and as a table, to bench/results/<gpu>-<date>. What was not measured is left out.

What Python lacks is taken from wheels in bench/wheels, which one command fills where there is a
network (--wheels-command prints it). Nothing is installed into Python's own folders: modules go
into the scratch folder (--scratch), which a later call finds again. Variables: CIFAR10 names the
archive of CIFAR-10 that bench.whole_search reads, RDARTS_CUDA_ARCHS the GPU generation [90], COMMIT
the commit where there is no git.

This file knows neither torch nor the package: it has to run before they can be imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_report import Report, Result, head_of, name_of, rows_of
from bench.gpu_steps import GROUPS, ROOT, STEPS, WHEELS_COMMAND, Book, Command, Missing, Step

LIMIT = 570.0  # seconds, of a whole call
LAST = 2000  # characters of a failed step's output that are kept


def run_steps(
    steps: Sequence[Step], book: Book, limit: float, done: Callable[[Result], None]
) -> list[Result]:
    """Run the steps within `limit` seconds in all, handing each result on as it comes."""
    ends, results = time.monotonic() + limit, []
    for i, step in enumerate(steps):
        left = ends - time.monotonic() - sum(later.least for later in steps[i + 1 :])
        result = run_step(step, book, min(book.slack * step.seconds, left))
        results.append(result)
        done(result)
    return results


def run_step(step: Step, book: Book, box: float) -> Result:
    """Run one step's commands within a time box."""
    if box <= 0.0:
        return Result(step.name, "skipped", note="no time was left")
    started = time.monotonic()
    try:
        commands = step.commands(book)
    except Missing as reason:
        return Result(step.name, "skipped", box=box, note=str(reason))
    log = book.scratch / "logs" / f"{step.name.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    status = ""
    with log.open("wb") as file:
        for i, command in enumerate(commands):
            code = run_boxed(command, book, file, started + box - time.monotonic())
            should_fail = step.fails and i == len(commands) - 1
            if code is None:
                status = "timed out"
            elif (code == 0) == should_fail:
                status = "failed"
            if status:
                break
    text = log.read_text(errors="replace")
    note = "" if not status else text[-LAST:]
    if status == "failed" and step.fails:
        note = f"the planted fault was not noticed\n{note}"
    seconds = time.monotonic() - started
    return Result(step.name, status or "ok", round(seconds, 1), round(box, 1), note, rows_of(text))


def run_boxed(command: Command, book: Book, log: Any, seconds: float) -> int | None:
    """Return a command's exit code; None where its time ran out, and it and all that it started
    were killed.
    """
    log.write((" ".join(command) + "\n").encode())
    log.flush()
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=book.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n".encode())
        return 127
    try:
        return process.wait(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            kill_all(process.pid)
            process.wait()


def kill_all(process: int) -> None:
    """Kill a process and all that it started, those in sessions of their own too."""
    with contextlib.suppress(OSError):
        os.kill(process, signal.SIGSTOP)  # so that it starts no more
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            kill_all(int(child))
    with contextlib.suppress(OSError):
        os.kill(process, signal.SIGKILL)


def main() -> None:
    """Run the steps; exit with 1 where one failed or ran out of time."""
    parsed = _parse()
    if parsed.wheels_command:
        print(WHEELS_COMMAND)
        return
    scratch = parsed.scratch.absolute()
    cifar10 = os.environ.get("CIFAR10")
    book = Book(parsed.dry, scratch, Path(cifar10).absolute() if cifar10 else None)
    head = head_of(book)
    if head["gpu"] == "unknown" and parsed.groups != ["build"]:
        sys.exit("error: nvidia-smi names no GPU; --dry does every step at a tiny size on the CPU")
    out = parsed.out or (scratch / "results" if parsed.dry else ROOT / "bench" / "results")
    report = Report.open(out.absolute() / f"{name_of(head)}.json", head)

    def done(result: Result) -> None:
        report.add(result)
        note = " ".join(result.note.split())[-200:]
        print(f"{result.step:<14}{result.status:<10}{result.seconds:>6.0f} s  {note}", flush=True)

    steps = [step for step in STEPS if "all" in parsed.groups or step.group in parsed.groups]
    results = run_steps(steps, book, book.slack * parsed.limit, done)
    print(f"results: {report.path} and {report.path.with_suffix('.md').name}")
    sys.exit(any(result.status in ("failed", "timed out") for result in results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", help=f"of {', '.join((*GROUPS, 'all'))}")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, no measurement")
    parser.add_argument("--out", type=Path, help="folder of the results [bench/results]")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "build" / "gpu", help="[build/gpu in the clone]"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all [570]")
    parser.add_argument("--wheels-command", action="store_true", help="print it, and nothing else")
    parsed = parser.parse_args()
    for group in parsed.groups:
        if group not in (*GROUPS, "all"):
            parser.error(f'unknown step "{group}": one of {", ".join((*GROUPS, "all"))}')
    if not parsed.groups and not parsed.wheels_command:
        parser.error(f"what? some of {', '.join((*GROUPS, 'all'))}")
    return parsed


if __name__ == "__main__":
    main()
