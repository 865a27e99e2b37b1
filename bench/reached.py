"""How near to their floor the kernels come: time against bench.roofline's floor on this machine.

    python -m bench.reached --device cuda            # a row a kernel and shape
    python -m bench.reached --json

The shapes are those of the published supernet's cells. Inputs are drawn once and change from run to
run, so that together they fit no cache. Floors are by this machine's measured copy and matrix
product; 100 % is as fast as it can go.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.record import line
from bench.roofline import Machine, measured
from bench.timing import in_turn
from bench.work import Images, Work
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.kernels import node_sum, node_sum_dq, sep_stage
from rdarts_fast.training import check_kernels, select_device

SHAPES = ((16, 32), (32, 16), (64, 8))  # channels, pixels a side
TERMS = 10  # of a sum
EDGES = 4  # that leave a state
NO_CACHE = 256e6  # bytes of inputs


@dataclass(frozen=True)
class Inputs:
    """One of the sets that take turns."""

    z: list[torch.Tensor]  # [N, C, H, W] each, channels innermost
    scale: torch.Tensor  # [K, C]
    depthwise: list[torch.Tensor]
    pointwise: list[torch.Tensor]

    @classmethod
    def draw(cls, images: Images, device: torch.device) -> Inputs:
        """Return random inputs."""
        n, c, size = images.batch, images.channels, images.size
        z = [
            torch.randn(n, c, size, size, device=device).to(memory_format=torch.channels_last)
            for _ in range(TERMS)
        ]
        weights = [torch.randn(c, 1, 3, 3, device=device) for _ in range(EDGES)]
        mixes = [torch.randn(c, c, 1, 1, device=device) for _ in range(EDGES)]
        return cls(z, torch.randn(TERMS, c, device=device), weights, mixes)


def kernels(images: Images) -> dict[str, tuple[Callable[[Inputs], object], Work]]:
    """Return each kernel and the work of a call."""
    x, shape = images.numbers, str(images)
    stage = Work("sep_stage", shape, 1, (1 + EDGES) * x, 2.0 * 9 * EDGES * x)
    stage.matrix = 2.0 * images.channels * EDGES * x
    return {
        "node_sum": (
            lambda a: node_sum(a.z, a.scale, a.scale),
            Work("node_sum", shape, 1, (TERMS + 1) * x, 2.0 * TERMS * x),
        ),
        "node_sum_dq": (
            lambda a: node_sum_dq(a.z[0], a.z),
            Work("node_sum_dq", shape, 1, (TERMS + 1) * x, 4.0 * TERMS * x),
        ),
        "sep_stage": (
            lambda a: sep_stage(a.z[:1] * EDGES, a.depthwise, a.pointwise),
            stage,
        ),
    }


def rows(
    machine: Machine, batch: int, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield what each kernel takes at each shape, and its floor."""
    for channels, size in SHAPES:
        images = Images(batch, channels, size)
        sets = max(1, min(64, int(NO_CACHE / (4 * TERMS * images.numbers))))
        inputs = itertools.cycle([Inputs.draw(images, device) for _ in range(sets)])
        for name, (kernel, work) in kernels(images).items():
            with torch.no_grad():
                (times,) = in_turn(
                    [lambda kernel=kernel, inputs=inputs: kernel(next(inputs))],
                    device,
                    seconds=seconds,
                    warm_up=3,
                )
            floor = 1e3 * machine.floor(work, "fp32")
            moved, computed = machine.times(work, "fp32")
            yield {
                "kernel": name,
                "shape": work.shape,
                "ms": float(f"{times.median:.4g}"),
                "floor_ms": float(f"{floor:.4g}"),
                "bound_by": "bytes" if moved >= computed else "operations",
                "percent_of_floor": round(100.0 * floor / times.median, 1),
            }


@exit_on_user_error
def main() -> None:
    """Print a row for each kernel and shape."""
    parsed = _parse()
    device = select_device(parsed.device)
    check_kernels(device)
    machine = measured(device, parsed.copy_mb)
    rates = {
        "gb_per_s": float(f"{machine.bytes_a_second / 1e9:.4g}"),
        "tflops": float(f"{machine.vector / 1e12:.4g}"),
    }
    if not parsed.json:
        print(f"{machine.name}: {rates['gb_per_s']} GB/s, {rates['tflops']} TFLOP/s")
    for row in rows(machine, parsed.batch, device, parsed.seconds):
        if parsed.json:
            print(line("reached", device, **row, batch=parsed.batch, **rates), flush=True)
        else:
            print(
                f"{row['kernel']:<14}{row['shape']:<12}{row['ms']:>9.4g} ms, floor "
                f"{row['floor_ms']:.4g} ms ({row['bound_by']}): {row['percent_of_floor']:.0f} %",
                flush=True,
            )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reached",
        description="Print how near to their floor the kernels come on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=64, help="images a batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time a row for")
    parser.add_argument("--copy-mb", type=int, default=512, help="of the measured copy")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    parsed = parser.parse_args()
    for name in ("batch", "copy_mb"):
        if getattr(parsed, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: expected at least 1, got {getattr(parsed, name)}")
    return parsed


if __name__ == "__main__":
    main()
