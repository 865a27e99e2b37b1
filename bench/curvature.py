"""The Hessian over the alphas and its largest eigenvalue, ours against others' ways.

    python -m bench.curvature --spaces s2                                  # a table
    python -m bench.curvature --json > bench/results/curvature.json

First it checks on a small network in float64 that all give the same Hessian. The baselines (see
curvature_baselines.py) compute on the reference network, in the memory format that is faster; what
they would take for all of the Hessian is extrapolated from a few rows or products (the note says
so). Peak memory, of a baseline that of one row or product, is that of a fresh process.

lambda_max is that of a network trained on digits for --train-steps. Where ours is "dense" it comes
with the whole Hessian, and no start vector makes a difference; else the time is the median of 20
starts. The row loop needs the whole Hessian too. The other baselines need the products of Lanczos:
where one takes less than a second our Lanczos runs on them, else one is timed and multiplied by how
many our Hessian takes (the median of 20 starts).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.contenders import OURS, SIZES, Setup, add_sizes, setups_of
from bench.curvature_baselines import BASELINES, KeptDraws, Loss, Start, trained
from bench.rows import HEADER, Row, show
from bench.timing import Call, Times, in_turn, once_ms, peak_mb
from rdarts_fast.errors import UserError, exit_on_user_error, unknown
from rdarts_fast.spaces import CELL_TYPES, spaces_of

BENCH = "curvature"
CASES = ("hessian", "lambda_max")
ROW_LOOP = "row loop"
FORMATS = ("eager", "channels_last")
ROWS = 3  # timed of each cell type
PRODUCTS = 3  # timed
STARTS = 20  # of Lanczos
SHORT_MS = 1e3  # a product that takes less is repeated as often as Lanczos wants it
VECTORS = 3  # that the check multiplies
TOLERANCE = 1e-9  # of the check, relative to the largest number


@dataclass(frozen=True)
class Measured:
    """What one contender takes for one case."""

    times: Times
    peak_mb: float
    note: str
    more: dict[str, Any] = field(default_factory=dict)


def check(setup: Setup, baselines: Sequence[str]) -> None:
    """Raise RuntimeError unless the Hessian of ours and of the baselines do the same to random
    vectors, on a small network of the space.
    """
    small = replace(setup, batch=4, channels=2, layers=3, size=8)
    ours = Loss(OURS, small, torch.float64).hessian().cpu()
    vectors = torch.randn(len(ours), VECTORS, generator=torch.Generator().manual_seed(0)).double()
    for name in baselines:
        theirs = Loss(OURS, small, torch.float64)
        theirs.supernet = small.supernet("reference").double().requires_grad_(False)
        theirs.draws = KeptDraws(0)  # our noise
        expected = BASELINES[name](theirs) @ vectors
        error = float((ours @ vectors - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise RuntimeError(f"{setup.space}, {name}: the Hessians differ by {error:.1e}")


def of_ours(setup: Setup, start: Start | None, case: str, seconds: float) -> Measured:
    """Return what ours takes."""
    device, loss = torch.device(setup.device), Loss(OURS, setup, start=start)
    (gradient,) = in_turn([loss.gradient], device, seconds=0.0)
    more: dict[str, Any] = {}
    if case == "hessian":
        (times,), which = in_turn([loss.hessian], device, seconds=seconds, least=3), ""
    else:
        top, seeds = loss.top(), itertools.count()
        dense = top.products == getattr(loss.operator(), "dense_products", None)
        which = "dense, " if dense else f"median of {STARTS} starts, "
        least = 3 if dense else STARTS
        calls = [lambda: loss.top(next(seeds))]
        (times,) = in_turn(calls, device, seconds=seconds, least=least)
        more["lambda_max"] = float(f"{top.value:.5g}")
    peak = peak_mb(functools.partial(_ours, setup, case), setup.device)
    more["gradients"] = round(times.median / gradient.median, 1)
    return Measured(times, peak, f"{which}{more['gradients']} of our gradients", more)


def of_row_loop(setup: Setup, start: Start | None) -> Measured:
    """Return what all rows take."""
    name = faster(setup, lambda name: Loss(name, setup, start=start).gradient)
    total, note = _time_rows(setup, start, name)
    peak = peak_mb(functools.partial(_one_row, setup, name), setup.device)
    return Measured(Times((total,)), peak, note)


def _time_rows(setup: Setup, start: Start | None, name: str) -> tuple[float, str]:
    """Return how long all rows take, in milliseconds, and how that was made up."""
    device, loss = torch.device(setup.device), Loss(name, setup, start=start)
    started = time.perf_counter()
    gradient = loss.gradient(create_graph=True)
    total = 1e3 * (time.perf_counter() - started)
    loss.row(gradient, 0, 0)  # warm
    parts = []
    for kind, alphas in enumerate(gradient):
        count = alphas.numel()
        entries = [count * k // ROWS for k in range(ROWS)]
        times = [
            once_ms(functools.partial(loss.row, gradient, kind, entry), device) for entry in entries
        ]
        mean = statistics.mean(times)
        total += count * mean
        parts.append(f"{count} x {mean / 1e3:.3g} s {CELL_TYPES[kind]}")
    return total, f"{name}, extrapolated from {ROWS} + {ROWS} rows: {', '.join(parts)}"


def of_products(
    baseline: str, setup: Setup, start: Start | None, needed: float, seconds: float
) -> dict[str, Measured]:
    """Return what a baseline takes for each case.

    needed: products that Lanczos takes for lambda_max.
    """
    name = faster(setup, functools.partial(_one_product, baseline, setup, start=start))
    found = _time_products(Loss(name, setup, start=start), baseline, needed, seconds)
    peak = peak_mb(functools.partial(_one_product, baseline, setup, name), setup.device)
    return {case: Measured(times, peak, f"{name}, {note}") for case, (times, note) in found.items()}


def _time_products(
    loss: Loss, baseline: str, needed: float, seconds: float
) -> dict[str, tuple[Times, str]]:
    """Return the times of each case, and how they were made up."""
    operator = BASELINES[baseline](loss)
    device, count, seeds = loss.images.device, operator.shape[0], itertools.count()
    columns = torch.eye(count)[[count * k // PRODUCTS for k in range(PRODUCTS)]]
    mean = statistics.mean(
        once_ms(functools.partial(operator.__matmul__, column), device) for column in columns
    )
    each = f"x {mean / 1e3:.3g} s"
    whole = f"extrapolated from {PRODUCTS} products: {count} {each}"
    lanczos = Times((needed * mean,))
    text = f"{needed:g} products of Lanczos, the median of {STARTS} starts: {needed:g} {each}"
    if mean < SHORT_MS:
        calls = [lambda: loss.top_of(operator, next(seeds))]
        (lanczos,) = in_turn(calls, device, seconds=seconds, least=3, warm_up=0)
        text = "Lanczos on its products"
    return {"hessian": (Times((count * mean,)), whole), "lambda_max": (lanczos, text)}


def faster(setup: Setup, prepare: Callable[[str], Call]) -> str:
    """Return the memory format in which prepare(format)'s callable is faster, run once warm."""
    device, found = torch.device(setup.device), []
    for name in FORMATS:
        call = prepare(name)
        once_ms(call, device)
        found.append((once_ms(call, device), name))
    return min(found)[1]


def products_needed(setup: Setup, start: Start | None) -> float:
    """Return how many products Lanczos takes for our Hessian's lambda_max, a median."""
    loss = Loss(OURS, setup, start=start)
    matrix = loss.hessian().cpu()  # where Lanczos is
    return statistics.median(loss.top_of(matrix, seed).products for seed in range(STARTS))


def _ours(setup: Setup, case: str) -> Call:
    loss = Loss(OURS, setup)
    return loss.hessian if case == "hessian" else loss.top


def _one_row(setup: Setup, name: str) -> Call:
    loss = Loss(name, setup)
    return lambda: loss.row(loss.gradient(create_graph=True), 0, 0)


def _one_product(baseline: str, setup: Setup, name: str, start: Start | None = None) -> Call:
    operator = BASELINES[baseline](Loss(name, setup, start=start))
    return functools.partial(operator.__matmul__, torch.eye(operator.shape[0])[0])


def compare(setup: Setup, parsed: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of one space."""
    start = trained(setup, parsed.train_steps)
    ours = {case: of_ours(setup, start, case, parsed.seconds) for case in parsed.cases}
    others = any(name != ROW_LOOP for name in parsed.baselines)
    needed = products_needed(setup, start) if others else 0.0
    for name in parsed.baselines:
        if name == ROW_LOOP:
            theirs = dict.fromkeys(CASES, of_row_loop(setup, start))
        else:
            theirs = of_products(name, setup, start, needed, parsed.seconds)
        for case in parsed.cases:
            yield _row(setup, case, name, ours[case], theirs[case], parsed.train_steps, needed)


def _row(
    setup: Setup, case: str, name: str, ours: Measured, theirs: Measured, steps: int, needed: float
) -> Row:
    more: dict[str, Any] = {size: getattr(setup, size) for size in SIZES}
    more |= {"train_steps": steps, **ours.more}
    if case == "lambda_max":
        more["lanczos_products"] = needed
    peaks, note = (ours.peak_mb, theirs.peak_mb), f"{ours.note}; {theirs.note}"
    return Row(BENCH, case, setup.space, name, ours.times, theirs.times, *peaks, note, more)


@exit_on_user_error
def main() -> None:
    """Print a row for each space, baseline and case."""
    parsed = _parse()
    setups = setups_of(parsed)
    device = torch.device(setups[0].device)
    if not parsed.json:
        print(f"batch {parsed.batch}, {device}, {torch.get_num_threads()} threads")
        print(HEADER, flush=True)
    for setup in setups:
        check(setup, parsed.baselines)
        for row in compare(setup, parsed):
            show(row, device, parsed.json)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.curvature",
        description="Time the Hessian over the alphas and its largest eigenvalue, ours against a "
        "row at a time and products of torch.func and curvlinops, after a check that all are the "
        "same.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = {"type": lambda text: text.split(","), "metavar": "A,B,..."}
    default = [  # darts needs an hour, and a smaller batch
        space for space in spaces_of("classification") if space != "darts"
    ]
    parser.add_argument("--spaces", default=default, help="search spaces", **several)
    parser.add_argument("--cases", default=list(CASES), help="what to time", **several)
    parser.add_argument("--baselines", default=list(BASELINES), help="against what", **several)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    add_sizes(parser)
    parser.add_argument(
        "--train-steps", type=int, default=50, help="on digits, before; 0: fresh, random images"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="to time ours, at least thrice")
    parsed = parser.parse_args()
    known: Any
    for name, known in (("cases", CASES), ("baselines", BASELINES)):
        for word in getattr(parsed, name):
            if word not in known:
                raise unknown(name[:-1], word, known)
    if parsed.train_steps < 0:
        raise UserError(f"--train-steps: expected at least 0, got {parsed.train_steps}")
    return parsed


if __name__ == "__main__":
    main()
