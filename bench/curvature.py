"""The Hessian over the alphas, ours against differentiating twice, a row at a time.

    python -m bench.curvature --spaces s2                                  # a table
    python -m bench.curvature --json > bench/results/curvature.json

First it checks on a small network in float64 that both are the same. Baseline "row loop" is what
the published code does, on the reference network in the memory format that is faster: one gradient
with its graph, then a backward pass through that for each row. Of the rows, 3 of the normal cells'
alphas and 3 of the reduction cells' are timed, and multiplied (the note says so). Peak memory of
ours and of one row is that of a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import MEMORY_FORMATS, OURS, SIZES, Setup, add_sizes, network, setups_of
from bench.rows import HEADER, Row, show
from bench.timing import Times, in_turn, once_ms, peak_mb
from rdarts_fast.curvature import HessianOperator, hessian, softmax_null_space, top_eigenvalue
from rdarts_fast.draws import Draws
from rdarts_fast.errors import exit_on_user_error, unknown
from rdarts_fast.networks import softmax_weights
from rdarts_fast.spaces import CELL_TYPES, SPACES

BENCH = "curvature"
BASELINE = "row loop"
CASES = ("hessian", "lambda_max")
FORMATS = ("eager", "channels_last")
ROWS = 3  # timed of each cell type
TOLERANCE = 1e-9  # of the check, relative to the largest number


class Loss:
    """A contender's validation loss on one batch, as a function of its alphas."""

    def __init__(self, name: str, setup: Setup, dtype: torch.dtype = torch.float32) -> None:
        self.supernet = network(name, setup).to(dtype)
        images, self.labels = setup.images(0, MEMORY_FORMATS[name])
        self.images = images.to(dtype)
        self.alphas = self.supernet.initial_alphas(0)
        for parameter in self.supernet.parameters():
            parameter.requires_grad_(False)

    def __call__(self) -> Tensor:
        logits = self.supernet(self.images, softmax_weights(self.alphas), Draws(0))
        return F.cross_entropy(logits, self.labels)

    def gradient(self, *, create_graph: bool = False) -> list[Tensor]:
        """Return the alphas' gradient."""
        alphas = list(self.alphas.values())
        return list(torch.autograd.grad(self(), alphas, create_graph=create_graph))

    def hessian(self) -> Tensor:
        """Return our Hessian."""
        operator = self.supernet.hessian_operator(self.alphas, self.images, self.labels, Draws(0))
        return hessian(operator)

    def lambda_max(self) -> float:
        """Return our largest eigenvalue."""
        operator = self.supernet.hessian_operator(self.alphas, self.images, self.labels, Draws(0))
        shapes = [(a.shape[0], a.shape[1]) for a in self.alphas.values()]
        return top_eigenvalue(operator, null_space=softmax_null_space(shapes)).value

    def row(self, gradient: list[Tensor], kind: int, entry: int) -> list[Tensor]:
        """Return a row of the Hessian from a gradient with its graph."""
        number = gradient[kind].reshape(-1)[entry]
        alphas = list(self.alphas.values())
        return list(torch.autograd.grad(number, alphas, retain_graph=True, materialize_grads=True))


def check(setup: Setup) -> None:
    """Raise RuntimeError unless ours and the row loop agree on a small network of the space."""
    small = replace(setup, batch=4, channels=2, layers=3, size=8)
    ours = Loss(OURS, small, torch.float64).hessian()
    theirs = Loss(OURS, small, torch.float64)
    theirs.supernet = small.supernet("reference").double()  # with our noise
    expected = hessian(HessianOperator(theirs, list(theirs.alphas.values())))
    error = float((ours - expected).abs().max() / expected.abs().max())
    if not error < TOLERANCE:
        raise RuntimeError(f"{setup.space}: the Hessians differ by {error:.1e}")


def row_loop(setup: Setup) -> tuple[float, str]:
    """Return how long all rows take in the faster format, in milliseconds, and how that was made
    up.
    """
    device, found = torch.device(setup.device), []
    for name in FORMATS:
        loss = Loss(name, setup)
        once_ms(loss.gradient, device)
        found.append((once_ms(loss.gradient, device), name))
    name = min(found)[1]
    loss = Loss(name, setup)
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
        parts.append(f"{count} x {mean / 1e3:.2f} s {CELL_TYPES[kind]}")
    return total, f"{name}, extrapolated from {ROWS} + {ROWS} rows: {', '.join(parts)}"


def _ours(setup: Setup, case: str) -> Callable[[], object]:
    loss = Loss(OURS, setup)
    return loss.hessian if case == "hessian" else loss.lambda_max


def _one_row(setup: Setup) -> Callable[[], object]:
    loss = Loss("channels_last", setup)
    return lambda: loss.row(loss.gradient(create_graph=True), 0, 0)


def compare(setup: Setup, parsed: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of one space."""
    device = torch.device(setup.device)
    total, note = row_loop(setup)
    theirs_peak = peak_mb(functools.partial(_one_row, setup), setup.device)
    loss = Loss(OURS, setup)
    (gradient,) = in_turn([loss.gradient], device, seconds=0.0)
    for case in parsed.cases:
        (ours,) = in_turn([_ours(setup, case)], device, seconds=parsed.seconds, least=3)
        peak = peak_mb(functools.partial(_ours, setup, case), setup.device)
        more: dict[str, Any] = {name: getattr(setup, name) for name in SIZES}
        more["gradients"] = round(ours.median / gradient.median, 1)
        text = f"{more['gradients']} of our gradients; {note}"
        times = Times((total,))
        yield Row(BENCH, case, setup.space, BASELINE, ours, times, peak, theirs_peak, text, more)


@exit_on_user_error
def main() -> None:
    """Print a row for each space and case."""
    parsed = _parse()
    setups = setups_of(parsed)
    device = torch.device(setups[0].device)
    if not parsed.json:
        print(f"batch {parsed.batch}, {device}, {torch.get_num_threads()} threads")
        print(HEADER, flush=True)
    for setup in setups:
        check(setup)
        for row in compare(setup, parsed):
            show(row, device, parsed.json)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.curvature",
        description="Time the Hessian over the alphas and its largest eigenvalue, ours against a "
        "row at a time, after a check that both are the same.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several = {"type": lambda text: text.split(","), "metavar": "A,B,..."}
    default = [space for space in SPACES if space != "darts"]  # not tried: 224 rows
    parser.add_argument("--spaces", default=default, help="search spaces", **several)
    parser.add_argument("--cases", default=list(CASES), help="what to time", **several)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    add_sizes(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="to time ours, at least thrice")
    parsed = parser.parse_args()
    for word in parsed.cases:
        if word not in CASES:
            raise unknown("case", word, CASES)
    return parsed


if __name__ == "__main__":
    main()
