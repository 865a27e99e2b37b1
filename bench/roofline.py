"""The floor in time of each kernel at each shape, and of a whole search.

    python -m bench.roofline                            # S4, the published sizes
    python -m bench.roofline --space s2 --precision bf16 --json
    python -m bench.roofline --device cuda              # beside the datasheets, this GPU measured

A floor is the larger of two times: the bytes that work.py counts over the memory's bandwidth, and
the operations over the rate of the unit that does them. A kernel cannot be faster unless a cache
answers. Where tensor cores lower it, the floor with products on the general units stands in
brackets: csrc/cuda/tuning.h uses them where they do on H100 or A100. The rates of these are their
datasheets' (NVIDIA H100 SXM5, A100 SXM4 80 GB); those of this machine are measured: a large copy,
counting bytes read and written, and a large matrix product of float32. A second-order step is five
passes forward and backward, a search --steps of them times --epochs; validation and lambda_max come
on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.contenders import SIZES, Setup
from bench.record import line, processor
from bench.timing import in_turn
from bench.work import Work, forward_backward
from rdarts_fast.errors import UserError, exit_on_user_error, unknown
from rdarts_fast.spaces import load_space
from rdarts_fast.training import select_device

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}  # of a stored activation
PASSES = 5  # forward and backward, in a second-order step
STEPS, EPOCHS = 391, 50  # published: 25,000 training images in batches of 64


@dataclass(frozen=True)
class Machine:
    """What a machine can do at most."""

    name: str
    source: str
    bytes_a_second: float
    vector: float  # operations a second of the general units, float32
    matrix: dict[str, float]  # of 1x1 convolutions, by precision

    def floor(self, work: Work, precision: str) -> float:
        """Return the least time for a work, in seconds."""
        return max(self.times(work, precision))

    def times(self, work: Work, precision: str) -> tuple[float, float]:
        """Return the times of its bytes and of its operations, in seconds."""
        moved = work.numbers * BYTES[precision] / self.bytes_a_second
        return moved, work.vector / self.vector + work.matrix / self.matrix[precision]

    def floor_without(self, work: Work, precision: str) -> float:
        """Return the least time without tensor cores, in seconds."""
        moved, _ = self.times(work, precision)
        return max(moved, work.vector / self.vector + work.matrix / self.vector)


DATASHEETS = (
    Machine(
        "H100",
        "datasheet, H100 SXM5 80 GB",
        3.35e12,
        66.9e12,
        {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12},
    ),
    Machine(
        "A100",
        "datasheet, A100 SXM4 80 GB",
        2.039e12,
        19.5e12,
        {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
    ),
)


def pays(work: Work, precision: str) -> bool:
    """Say whether tensor cores lower a kernel's floor on one of the datasheets' GPUs."""
    return any(
        machine.floor(work, precision) < machine.floor_without(work, precision)
        for machine in DATASHEETS
    )


def measured(device: torch.device, megabytes: int = 512, side: int = 2048) -> Machine:
    """Return what this machine does: a copy of so many megabytes, a product of [side, side]."""
    source = torch.rand(megabytes * 250_000, device=device)
    target = torch.empty_like(source)
    a, b = torch.rand(2, side, side, device=device)
    product = torch.empty_like(a)
    calls = [lambda: target.copy_(source), lambda: torch.mm(a, b, out=product)]
    copy, multiply = (
        times.median / 1e3 for times in in_turn(calls, device, seconds=1.0, warm_up=2)
    )
    rate = 2.0 * side**3 / multiply
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else processor()
    how = f"measured, {torch.get_num_threads()} threads" if not on_gpu else "measured"
    matrix = dict.fromkeys(BYTES, rate)
    if on_gpu:
        matrix["bf16"] = _rate_of_bf16(a, b, device)
    return Machine(name, how, 2 * source.nbytes / copy, rate, matrix)


def _rate_of_bf16(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    a, b = a.bfloat16(), b.bfloat16()
    (times,) = in_turn([lambda: torch.mm(a, b)], device, seconds=0.5, warm_up=2)
    return 2.0 * len(a) ** 3 / (times.median / 1e3)


def table(works: Sequence[Work], machines: Sequence[Machine], precision: str) -> list[str]:
    """Return the rows: a kernel and shape each, the largest floor of the first machine first."""
    heads = "".join(f"{machine.name[:16] + ', ms':>26}" for machine in machines)
    rows = [f"{'kernel':<20}{'shape':<24}{'calls':>6}{'MB':>9}{'GFLOP':>8}{heads}"]
    for work in sorted(works, key=lambda work: -machines[0].floor(work, precision)):
        cells = "".join(f"{_cell(machine, work, precision):>26}" for machine in machines)
        megabytes = work.numbers * BYTES[precision] / 1e6
        operations = (work.vector + work.matrix) / 1e9
        rows.append(
            f"{work.kernel:<20}{work.shape:<24}{work.calls:>6}{megabytes:>9.1f}{operations:>8.2f}{cells}"
        )
    return rows


def _cell(machine: Machine, work: Work, precision: str) -> str:
    moved, computed = machine.times(work, precision)
    floor, without = max(moved, computed), machine.floor_without(work, precision)
    bracket = f" ({1e3 * without:.3f})" if without > floor else ""
    return f"{1e3 * floor:.3f} {'bytes' if moved >= computed else 'operations'}{bracket}"


def totals(
    works: Sequence[Work], machine: Machine, precision: str, steps: int, epochs: int
) -> dict[str, float]:
    """Return the floors of a pass, a step and a search: milliseconds, milliseconds, seconds."""
    once = sum(machine.floor(work, precision) for work in works)
    step = PASSES * once
    return {
        "forward_backward_ms": 1e3 * once,
        "second_order_step_ms": 1e3 * step,
        "search_s": step * steps * epochs,
    }


def shown(machine: Machine, found: dict[str, float], steps: int, epochs: int) -> str:
    """Return a machine's totals in words."""
    tops = machine.matrix["fp32"] / 1e12
    return (
        f"{machine.name} ({machine.source}; {machine.bytes_a_second / 1e9:.4g} GB/s, "
        f"{tops:.3g} TFLOP/s): forward and backward {found['forward_backward_ms']:.3g} ms, "
        f"second-order step {found['second_order_step_ms']:.3g} ms, "
        f"search of {epochs} x {steps} steps {found['search_s']:.4g} s"
    )


@exit_on_user_error
def main() -> None:
    """Print a row for each kernel and shape, then a line for each machine."""
    parsed = _parse()
    device = select_device(parsed.device)
    setup = Setup(parsed.space, **{name: getattr(parsed, name) for name in SIZES})
    load_space(setup.space)
    works = forward_backward(setup)
    machines = [*DATASHEETS, measured(device, parsed.copy_mb)]
    if parsed.json:
        for row in _json(setup, works, machines, parsed):
            print(row)
        return
    sizes = f"batch {setup.batch}, {setup.channels} channels, {setup.layers} cells"
    print(f"{setup.space}, {sizes}, {parsed.precision}: floors, one forward and backward")
    print("\n".join(table(works, machines, parsed.precision)))
    for machine in machines:
        found = totals(works, machine, parsed.precision, parsed.steps, parsed.epochs)
        print(shown(machine, found, parsed.steps, parsed.epochs))


def _json(
    setup: Setup, works: Sequence[Work], machines: Sequence[Machine], parsed: argparse.Namespace
) -> list[str]:
    """Return a line for each machine: its rates, its totals and its floors, a kernel each."""
    sizes = {name: getattr(setup, name) for name in SIZES}
    lines = []
    for machine in machines:
        floors = [
            {
                "kernel": work.kernel,
                "shape": work.shape,
                "calls": work.calls,
                "megabytes": round(work.numbers * BYTES[parsed.precision] / 1e6, 3),
                "gflop": round((work.vector + work.matrix) / 1e9, 4),
                "floor_ms": float(f"{1e3 * machine.floor(work, parsed.precision):.4g}"),
                "floor_without_tensor_cores_ms": float(
                    f"{1e3 * machine.floor_without(work, parsed.precision):.4g}"
                ),
            }
            for work in works
        ]
        found = totals(works, machine, parsed.precision, parsed.steps, parsed.epochs)
        more = {key: float(f"{value:.5g}") for key, value in found.items()}
        rates = {"gb_per_s": machine.bytes_a_second / 1e9, "tflops": machine.matrix["fp32"] / 1e12}
        lines.append(
            line(
                "roofline",
                select_device(parsed.device),
                space=setup.space,
                precision=parsed.precision,
                machine=machine.name,
                source=machine.source,
                **{key: float(f"{value:.4g}") for key, value in rates.items()},
                **sizes,
                steps=parsed.steps,
                epochs=parsed.epochs,
                **more,
                floors=floors,
            )
        )
    return lines


def _parse() -> argparse.Namespace:
    sizes = Setup("s4")
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description="Print the least time that each kernel and a whole search can take, for H100 "
        "and A100 by their datasheets and for this machine by what it is measured to do.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--space", default=sizes.space, help="a built-in space or a .json file")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=getattr(sizes, name))
    parser.add_argument("--precision", default="fp32", help=f"one of {', '.join(BYTES)}")
    parser.add_argument("--steps", type=int, default=STEPS, help="an epoch")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--device", default="cpu", help="to measure: cpu, cuda or auto")
    parser.add_argument("--copy-mb", type=int, default=512, help="of the measured copy")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    parsed = parser.parse_args()
    if parsed.precision not in BYTES:
        raise unknown("precision", parsed.precision, BYTES)
    for name in (*SIZES, "steps", "epochs", "copy_mb"):
        if getattr(parsed, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: expected at least 1, got {getattr(parsed, name)}")
    return parsed


if __name__ == "__main__":
    main()
