"""The kernels that take most of a search's time, and what holds the slowest ones up.

    python -m bench.slowest --device cuda            # a row a kernel, the slowest first
    python -m bench.slowest --device cuda --ncu      # and what Nsight Compute reads of them
    python -m bench.slowest --spaces s2 --layers 3   # on a CPU: torch's operations

Times are those of torch's profiler over a few passes forward and backward. Nsight Compute, where it
is found, runs the same passes once more under its own counters: of each launch of the slowest
kernels the time, and the shares of the memory's bandwidth and of the arithmetic units that it
reaches.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.contenders import OURS, SIZES, Contender, Setup, add_sizes, setups_of
from bench.record import line
from rdarts_fast.errors import UserError, exit_on_user_error

PASSES = 3
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent of bandwidth",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "percent of arithmetic",
}
LAUNCHES = 40  # that Nsight Compute reads: it replays each


@dataclass(frozen=True)
class Slow:
    """What all calls of a kernel take in one forward and backward."""

    kernel: str
    calls: float
    ms: float
    percent: float


def slowest(setup: Setup, count: int) -> list[Slow]:
    """Return the slowest kernels; on a CPU the slowest operations."""
    on_gpu = torch.device(setup.device).type == "cuda"
    activities = [getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")]
    contender = Contender(OURS, setup)
    contender.forward_backward()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PASSES):
            contender.forward_backward()
        if on_gpu:
            torch.cuda.synchronize()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: (event.count, getattr(event, kind)) for event in profile.key_averages()}
    total = sum(time for _, time in times.values())
    found = sorted(times.items(), key=lambda item: -item[1][1])[:count]
    return [
        Slow(key, calls / PASSES, time / PASSES / 1e3, 100.0 * time / total if total else 0.0)
        for key, (calls, time) in found
    ]


def base_name(kernel: str) -> str:
    """Return `sep_stage_kernel` for `void rdarts::(anonymous namespace)::sep_stage_kernel<...>`."""
    bare = re.sub(r"\(anonymous namespace\)::", "", kernel)
    return re.split(r"[<(]", bare, maxsplit=1)[0].split("::")[-1].split()[-1]


def counters(setup: Setup, kernels: Sequence[str]) -> list[dict[str, Any]]:
    """Return what Nsight Compute reads of each launch of these kernels. Raises UserError where it
    is not found or fails.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise UserError("--ncu: Nsight Compute (ncu) is not on PATH")
    names = "|".join(sorted({base_name(kernel) for kernel in kernels}))
    sizes = [word for name in SIZES for word in (f"--{name}", str(getattr(setup, name)))]
    command = [
        *(ncu, "--csv", "--page", "raw", "--target-processes", "all", "--clock-control", "none"),
        *("--metrics", ",".join(METRICS), "--launch-count", str(LAUNCHES)),
        *("--kernel-name", f"regex:^({names})$", sys.executable, "-m", "bench.slowest", "--once"),
        *("--spaces", setup.space, "--device", setup.device, *sizes),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = list(table_of(done.stdout))
    if done.returncode != 0 or not rows:
        said = " ".join((done.stdout + done.stderr).split())[-300:]
        raise UserError(f"--ncu: {ncu} gave no counters (exit {done.returncode}): {said}")
    return rows


def table_of(text: str) -> Iterator[dict[str, Any]]:
    """Yield the launches in what `ncu --csv --page raw` prints: a head, a row of units, then a row
    a launch; what the program itself prints comes before.
    """
    lines = text.splitlines()
    heads = [i for i, row in enumerate(lines) if row.startswith('"ID"')]
    for row in csv.DictReader(lines[heads[0] :] if heads else []):
        if not row["ID"]:  # the units
            continue
        values = {name: float(row[metric].replace(",", "")) for metric, name in METRICS.items()}
        yield {"kernel": base_name(row["Kernel Name"]), **values}


@exit_on_user_error
def main() -> None:
    """Print a row for each kernel, then one for each launch that Nsight Compute read."""
    parsed = _parse()
    for setup in setups_of(parsed):
        if parsed.once:
            Contender(OURS, setup).forward_backward()
            continue
        found = slowest(setup, parsed.count)
        device = torch.device(setup.device)
        for slow in found:
            _show(setup, {"case": "slowest", **asdict(slow)}, parsed.json)
        if parsed.ncu and device.type == "cuda":
            for row in counters(setup, [slow.kernel for slow in found]):
                _show(setup, {"case": "counters", **row}, parsed.json)


def _show(setup: Setup, row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sizes = {name: getattr(setup, name) for name in SIZES}
        print(line("slowest", torch.device(setup.device), space=setup.space, **row, **sizes))
        return
    values = (f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
    print(f"{setup.space:<8}{row['kernel'][:70]:<72}{', '.join(values)}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.slowest",
        description="Print the kernels that take most of a forward and backward pass's time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--spaces", type=lambda text: text.split(","), default=["s4"], help="search spaces"
    )
    parser.add_argument("--count", type=int, default=3, help="how many of the slowest")
    parser.add_argument("--ncu", action="store_true", help="read their counters with ncu")
    parser.add_argument("--once", action="store_true", help="one pass and no word, for ncu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    add_sizes(parser)
    parsed = parser.parse_args()
    if parsed.count < 1:
        raise UserError(f"--count: expected at least 1, got {parsed.count}")
    return parsed


if __name__ == "__main__":
    main()
