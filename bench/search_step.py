"""One step of a search, ours against what people have: time, and peak memory in a fresh process.

    python -m bench.search_step                                      # a table
    python -m bench.search_step --json > bench/results/search_step.json
    python -m bench.search_step --spaces s5 --baselines eager --batch 8 --channels 4 --layers 3

First it checks that our network and the reference compute the same, then it times them in turn. The
threads are torch's (OMP_NUM_THREADS=1 for one). A row says how many kernels and torch operations a
forward and backward takes (counts.py).
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.contenders import (
    BASELINES,
    CASES,
    OURS,
    SIZES,
    Contender,
    Setup,
    add_sizes,
    check,
    prepare,
    setups_of,
)
from bench.counts import count
from bench.rows import HEADER, Row, show
from bench.timing import (
    Times,
    fresh_process,
    in_turn,
    once_ms,
    peak_mb,
    peak_mb_here,
    receive,
    resident_mb,
)
from rdarts_fast.errors import exit_on_user_error, unknown
from rdarts_fast.spaces import spaces_of

BENCH = "search_step"
COMPILE_SECONDS = 600.0
COUNTS = "launches of forward+backward"


@exit_on_user_error
def main() -> None:
    """Print a row for each space, case and baseline."""
    parsed = _parse()
    setups = setups_of(parsed)
    device = torch.device(setups[0].device)
    if not parsed.json:
        print(f"{_sizes(setups[0])}, {device}, {torch.get_num_threads()} threads")
        print(HEADER, flush=True)
    for setup in setups:
        check(setup)
        for row in compare(setup, parsed):
            show(row, device, parsed.json)


def compare(setup: Setup, parsed: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of one space."""
    in_process = [name for name in parsed.baselines if name != "compile"]
    if parsed.counts and in_process:
        yield counts_row(setup, in_process[0])
    peak = _peak if parsed.memory else _no_peak
    ours_peaks = {case: peak(OURS, setup, case) for case in parsed.cases}
    for case in parsed.cases if in_process else ():
        # A contender of its own for each case: an optimiser's state is part of its memory.
        calls = [prepare(name, setup, case) for name in (OURS, *in_process)]
        ours, *theirs = in_turn(calls, torch.device(setup.device), seconds=parsed.seconds)
        for name, times in zip(in_process, theirs, strict=True):
            peaks = ours_peaks[case], peak(name, setup, case)
            yield _row(setup, case, name, ours, times, peaks)
    if "compile" in parsed.baselines:
        yield from _compare_compiled(setup, parsed, ours_peaks)


def counts_row(setup: Setup, baseline: str) -> Row:
    """Return the row of kernels and operations."""
    (kernels, operations), (their_kernels, theirs) = count(OURS, setup), count(baseline, setup)
    note = (
        f"kernels {kernels:,} against {their_kernels:,} ({their_kernels / kernels:.1f}x fewer), "
        f"torch operations {operations:,} against {theirs:,} ({theirs / operations:.1f}x fewer)"
    )
    more = {
        "kernels": kernels,
        "baseline_kernels": their_kernels,
        "operations": operations,
        "baseline_operations": theirs,
    }
    return _row(setup, COUNTS, baseline, None, None, (None, None), note, **more)


def _peak(name: str, setup: Setup, case: str) -> float:
    return peak_mb(functools.partial(prepare, name, setup, case), setup.device)


def _no_peak(name: str, setup: Setup, case: str) -> None:
    """In place of _peak where it is not wanted."""


def _compare_compiled(
    setup: Setup, parsed: argparse.Namespace, ours_peaks: Mapping[str, float | None]
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as cache:  # empty: nothing is compiled yet
        arguments = (setup, parsed.cases, parsed.seconds, cache)
        with fresh_process(_time_compiled, *arguments) as connection:
            try:
                seconds = receive(connection, parsed.compile_seconds)
            except TimeoutError:
                failure = "did not compile in time"
            except RuntimeError as error:
                failure = f"did not compile: {str(error).splitlines()[0]}"
            else:
                note = f"compiled in {seconds:.0f} s"
                for case in parsed.cases:
                    peak, ours, theirs = receive(connection)
                    peaks = ours_peaks[case], peak
                    yield _row(setup, case, "compile", ours, theirs, peaks, note)
                return
    for case in parsed.cases:
        yield _row(setup, case, "compile", None, None, (ours_peaks[case], None), failure)


def _time_compiled(
    connection: Connection, setup: Setup, cases: Sequence[str], seconds: float, cache: str
) -> None:
    """Compile, send how long it took, then for each case the compiled network's peak memory and the
    times of ours and of it. Its memory counts what the compiler leaves behind.
    """
    imported = resident_mb()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    device = torch.device(setup.device)
    started = time.perf_counter()
    compiled = Contender("compile", setup)
    once_ms(compiled.forward_backward, device)
    connection.send(time.perf_counter() - started)
    for case in cases:
        theirs = functools.partial(CASES[case], compiled)
        theirs()
        peak = peak_mb_here(theirs, device, imported)
        calls = [prepare(OURS, setup, case), theirs]
        connection.send((peak, *in_turn(calls, device, seconds=seconds)))


def _row(
    setup: Setup,
    case: str,
    baseline: str,
    ours: Times | None,
    theirs: Times | None,
    peaks: tuple[float | None, float | None],
    note: str = "",
    **counts: int,
) -> Row:
    more = {name: getattr(setup, name) for name in SIZES} | counts
    return Row(BENCH, case, setup.space, baseline, ours, theirs, *peaks, note, more)


def _sizes(setup: Setup) -> str:
    return (
        f"batch {setup.batch}, {setup.channels} channels, {setup.layers} cells, "
        f"{setup.size}x{setup.size}, float32"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.search_step",
        description="Time one step of a search, ours in turn with what people have, after a check "
        "that both compute the same; the peak memory of each in a fresh process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = {"type": lambda text: text.split(","), "metavar": "A,B,..."}
    parser.add_argument(
        "--spaces",
        default=spaces_of("classification"),
        help="built-in spaces or .json files",
        **several,
    )
    parser.add_argument("--cases", default=list(CASES), help="what to time", **several)
    parser.add_argument(
        "--baselines",
        default=list(BASELINES),
        help="eager: the reference; channels_last: the same in that memory format; compile: "
        "torch.compile of it",
        **several,
    )
    parser.add_argument(
        "--counts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count kernels and torch operations",
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory, a process for each case and contender",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    add_sizes(parser)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="to time a case for, at least 5 rounds"
    )
    parser.add_argument(
        "--compile-seconds", type=float, default=COMPILE_SECONDS, help="at most, to compile"
    )
    parsed = parser.parse_args()
    known: Any
    for name, known in (("cases", CASES), ("baselines", BASELINES)):
        for word in getattr(parsed, name):
            if word not in known:
                raise unknown(name[:-1], word, known)
    return parsed


if __name__ == "__main__":
    main()
