"""The correlation of two views against three ways to write it in plain torch: time, peak memory.

    python -m bench.correlation                              # a table
    python -m bench.correlation --json > bench/results/correlation.json

First it checks that all compute the same, values and gradients, then it times them in turn. The
ways: `unfold`, an einsum over unfolded rows; `unfold multiply`, their product with the left view,
averaged over the channels; `slices`, one such product a displacement, without unfolded rows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rows import HEADER, Row, show
from bench.timing import in_turn, peak_mb
from rdarts_fast.errors import exit_on_user_error, unknown
from rdarts_fast.kernels.correlation import correlation, correlation_twin, displacements
from rdarts_fast.training import select_device

BENCH = "correlation"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCE = 1e-4  # relative to the largest number, in float32


@dataclass(frozen=True)
class Shape:
    """Two images [N, C, H, W] and the displacements -most .. most."""

    n: int
    c: int
    h: int
    w: int
    most: int


# Of networks of 24 channels, which have 3 x 48 at 1/8 of the size.
SHAPES = {
    "960x540": Shape(1, 144, 72, 120, 40),  # FlyingThings3D, as it is trained from scratch
    "480x270 batch 4": Shape(4, 144, 40, 64, 40),  # as it is searched
    "128x64 batch 8": Shape(8, 144, 8, 16, 40),  # crops
}


def unfold_multiply(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    """Return the correlation by a product of the left view with unfolded rows of the right one."""
    padded = F.pad(right, (-first, first + count - 1))
    windows = padded.unfold(3, left.shape[3], 1)  # [N, C, H, count, W]
    return (left.unsqueeze(3) * windows).mean(dim=1).transpose(1, 2)


def slices(left: Tensor, right: Tensor, first: int, count: int) -> Tensor:
    """Return the correlation by a product a displacement."""
    padded = F.pad(right, (-first, first + count - 1))
    width = left.shape[3]
    return torch.stack(
        [(left * padded[..., i : i + width]).mean(dim=1) for i in range(count)], dim=1
    )


WAYS: dict[str, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    "ours": correlation,
    "unfold": correlation_twin,
    "unfold multiply": unfold_multiply,
    "slices": slices,
}
BASELINES = tuple(name for name in WAYS if name != "ours")


@dataclass(frozen=True)
class Setup:
    """A shape by name, a memory format by name."""

    shape: str
    format: str
    device: str = "cpu"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return left, right and the result's cotangent; the same numbers each time."""
        generator = torch.Generator().manual_seed(0)
        size = SHAPES[self.shape]
        _, count = displacements(size.most)

        def normal(channels: int) -> Tensor:
            x = torch.randn((size.n, channels, size.h, size.w), generator=generator)
            return x.to(self.device, memory_format=FORMATS[self.format])

        left, right, g = normal(size.c), normal(size.c), normal(count)
        return left.requires_grad_(), right.requires_grad_(), g

    def run(self, way: str, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> list[Tensor]:
        """Return the correlation, with `backward` the gradients too."""
        left, right, g = inputs
        first, count = displacements(SHAPES[self.shape].most)
        if not backward:
            with torch.no_grad():
                return [WAYS[way](left, right, first, count)]
        out = WAYS[way](left, right, first, count)
        return [out.detach(), *torch.autograd.grad(out, (left, right), g)]


def check(setup: Setup) -> None:
    """Raise AssertionError unless all ways give the same values and gradients."""
    inputs = setup.inputs()
    expected = setup.run("ours", inputs, backward=True)
    for way in BASELINES:
        for a, b in zip(expected, setup.run(way, inputs, backward=True), strict=True):
            error, size = (a - b).abs().max().item(), b.abs().max().item()
            if not error <= TOLERANCE * size:
                raise AssertionError(f"{setup.shape} {setup.format}: {way} is off by {error:.2g}")


def prepare(setup: Setup, way: str, backward: bool) -> Callable[[], object]:
    """Return what is measured in a process of its own."""
    return functools.partial(setup.run, way, setup.inputs(), backward)


def compare(setup: Setup, seconds: float, memory: bool) -> list[Row]:
    """Check, time all ways in turn, and return a row for each baseline and pass."""
    check(setup)
    device, size, rows = torch.device(setup.device), SHAPES[setup.shape], []
    inputs = setup.inputs()
    for case, backward in (("forward", False), ("forward+backward", True)):
        calls = [functools.partial(setup.run, way, inputs, backward) for way in WAYS]
        ours, *theirs = in_turn(calls, device, seconds=seconds, least=3)
        peaks: list[float | None] = [None] * len(WAYS)
        if memory:
            ways = [functools.partial(prepare, setup, way, backward) for way in WAYS]
            peaks = [peak_mb(way, setup.device) for way in ways]
        for name, times, peak in zip(BASELINES, theirs, peaks[1:], strict=True):
            more = asdict(size)
            where = f"{setup.shape} {setup.format}"
            row = Row(BENCH, case, where, name, ours, times, peaks[0], peak, more=more)
            rows.append(row)
    return rows


@exit_on_user_error
def main() -> None:
    """Print a row for each shape, memory format, pass and way."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.correlation",
        description="Time the correlation of two views in turn with plain torch, after a check "
        "that all compute the same.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--seconds", type=float, default=10.0, help="to time a shape's pass for")
    parser.add_argument(
        "--shapes",
        type=lambda text: text.split(","),
        default=list(SHAPES),
        metavar="A,B,...",
        help="which",
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory, a process a row",
    )
    parsed = parser.parse_args()
    for name in parsed.shapes:
        if name not in SHAPES:
            raise unknown("shape", name, SHAPES)
    device = select_device(parsed.device)
    if not parsed.json:
        print(f"float32, {torch.get_num_threads()} threads")
        print(HEADER, flush=True)
    for shape in parsed.shapes:
        for name in FORMATS:
            for row in compare(Setup(shape, name, str(device)), parsed.seconds, parsed.memory):
                show(row, device, parsed.json)


if __name__ == "__main__":
    main()
