"""Each public kernel against plain torch, forward and backward: time, peak memory, bandwidth.

    python -m bench.kernels                                  # a table
    python -m bench.kernels --json > bench/results/kernels.json
    python -m bench.kernels --kernels node_sum,normalized_sum --no-memory

First it checks that both compute the same, values and gradients, then it times them in turn. A row
"forward bandwidth" is of tensors that do not fit a cache: the bytes that the forward pass has to
read and write in a second, against those of torch's own copy in the same run. To add a kernel: an
entry in KERNELS (then `pytest bench/` has it too).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rows import HEADER, Row, show
from bench.timing import Times, in_turn, peak_mb
from rdarts_fast.errors import UserError, exit_on_user_error, unknown
from rdarts_fast.kernels import (
    channel_affine,
    channel_sums,
    mixing,
    node_sum,
    node_sum_dq,
    node_sum_dz,
    normalized_sum,
    pools,
    sep_stage,
)
from rdarts_fast.kernels.channel_sums import channel_affine_twin, channel_sums_twin
from rdarts_fast.kernels.node_sum import node_sum_dq_twin, node_sum_dz_twin, node_sum_twin
from rdarts_fast.training import check_kernels, select_device

BENCH = "kernels"
CANDIDATES = 10
EDGES = 4  # that leave a state
SHAPES = {"C16 32x32": (16, 32), "C64 8x8": (64, 8)}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Times the batch: 168 MB of candidates. Not more, since from 32 MiB a tensor on malloc gives each
# new pages, and the time is theirs.
OUT_OF_CACHE = 4
TOLERANCE = 1e-4  # relative to the largest number, in float32


@dataclass(frozen=True)
class Inputs:
    """What a kernel is called on."""

    z: list[Tensor]  # K of [N, C, H, W]
    g: Tensor  # [N, C, H, W]
    scale: Tensor  # [K, C]
    shift: Tensor  # [K, C]
    weights: Tensor  # [K]
    pivot: Tensor  # [K, C], no gradient
    depthwise: list[Tensor]  # K of [C, 1, 3, 3]
    pointwise: list[Tensor]  # K of [C, C, 1, 1]

    @classmethod
    def draw(cls, setup: Setup) -> Inputs:
        """Return the inputs; the same numbers each time."""
        generator = torch.Generator().manual_seed(0)
        c, size = SHAPES[setup.shape]
        k = setup.candidates

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator)
            memory_format = FORMATS[setup.format] if len(shape) == 4 else torch.contiguous_format
            return x.to(setup.device, memory_format=memory_format)

        images = [normal(setup.batch, c, size, size) for _ in range(k + 1)]
        inputs = cls(
            images[:k],
            images[k],
            normal(k, c),
            normal(k, c),
            normal(k).softmax(0),
            normal(k, c),
            [normal(c, 1, 3, 3) for _ in range(k)],
            [normal(c, c, 1, 1) for _ in range(k)],
        )
        for tensor in inputs.differentiable:
            tensor.requires_grad_()
        return inputs

    @property
    def differentiable(self) -> list[Tensor]:
        weights = [*self.depthwise, *self.pointwise]
        return [*self.z, self.g, self.scale, self.shift, self.weights, *weights]


Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel, the same in plain torch, and how many tensors [N, C, H, W] a forward pass of K
    candidates has to read and write; None where it returns so many that new pages take its time.
    """

    ours: Callable[[Inputs], Outputs]
    torch: Callable[[Inputs], Outputs]
    moved: Callable[[int], int] | None = None


def _batch_norms(x: Inputs) -> Outputs:
    norms = (F.batch_norm(z, None, None, training=True) for z in x.z)
    terms = [w * z for w, z in zip(x.weights, norms, strict=True)]
    return [sum(terms[1:], terms[0])]


def _pooled_nodes(x: Inputs) -> Outputs:
    max_pool, avg_pool = pools(x.z[0])
    values, sums = [max_pool.value, avg_pool.value], [max_pool.sums, avg_pool.sums]
    pairs = x.weights.split(2)[:EDGES]
    return [normalized_sum(values, pair, sums=sums) for pair in pairs]


def _pools_on_each_edge(x: Inputs) -> Outputs:
    nodes = []
    for a, b in x.weights.split(2)[:EDGES]:
        most, mean = F.max_pool2d(x.z[0], 3, 1, 1), _mean(x.z[0])
        norms = [F.batch_norm(z, None, None, training=True) for z in (most, mean)]
        nodes.append(a * norms[0] + b * norms[1])
    return nodes


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _convolutions(x: Inputs) -> Outputs:
    triples = zip(x.z, x.depthwise, x.pointwise, strict=True)
    return [F.conv2d(F.conv2d(z.relu(), d, padding=1, groups=z.shape[1]), p) for z, d, p in triples]


KERNELS: Mapping[str, Kernel] = {
    "node_sum": Kernel(
        lambda x: [node_sum(x.z, x.scale, x.shift)],
        lambda x: [node_sum_twin(x.z, x.scale, x.shift)],
        lambda k: k + 1,
    ),
    "node_sum_dz": Kernel(
        lambda x: node_sum_dz(x.g, x.scale),
        lambda x: node_sum_dz_twin(x.g, x.scale),
    ),
    "node_sum_dq": Kernel(
        lambda x: node_sum_dq(x.g, x.z)[:2],
        lambda x: node_sum_dq_twin(x.g, x.z)[:2],
        lambda k: k + 1,
    ),
    "channel_sums": Kernel(
        lambda x: channel_sums(x.z, x.pivot),
        lambda x: channel_sums_twin(x.z, x.pivot),
        lambda k: k,
    ),
    "channel_affine": Kernel(
        lambda x: channel_affine(x.z, x.scale, x.shift),
        lambda x: channel_affine_twin(x.z, x.scale, x.shift),
    ),
    "normalized_sum": Kernel(
        lambda x: [normalized_sum(x.z, x.weights)],
        _batch_norms,
        lambda k: 2 * k + 1,
    ),
    "pools": Kernel(_pooled_nodes, _pools_on_each_edge),  # max and avg on all edges from a state
    "sep_stage": Kernel(lambda x: sep_stage(x.z, x.depthwise, x.pointwise), _convolutions),
    "mixing": Kernel(
        lambda x: mixing(x.z[:1], [[p] for p in x.pointwise]),
        lambda x: [F.conv2d(x.z[0].relu(), p) for p in x.pointwise],
    ),
}


@dataclass(frozen=True)
class Setup:
    """A kernel's inputs, in words."""

    kernel: str
    shape: str
    format: str
    batch: int = 64
    device: str = "cpu"
    candidates: int = CANDIDATES

    def run(self, whose: str, inputs: Inputs) -> Outputs:
        """Return the outputs, "ours" or "torch"."""
        outputs: Outputs = getattr(KERNELS[self.kernel], whose)(inputs)
        return outputs


def forward_backward(setup: Setup, whose: str, inputs: Inputs) -> list[Tensor]:
    """Return the outputs and the gradients of half the sum of their squares."""
    outputs = setup.run(whose, inputs)
    cotangents = [output.detach() for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs.differentiable, cotangents, allow_unused=True)
    return [*cotangents, *(g for g in gradients if g is not None)]


def prepare(setup: Setup, whose: str) -> Callable[[], object]:
    """Return what runs the case once."""
    return functools.partial(forward_backward, setup, whose, Inputs.draw(setup))


def check(setup: Setup, inputs: Inputs) -> None:
    """Raise AssertionError unless the kernel's values and gradients are plain torch's."""
    ours, theirs = (forward_backward(setup, whose, inputs) for whose in ("ours", "torch"))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error <= TOLERANCE:
            raise AssertionError(
                f"{setup.kernel}, {setup.shape} {setup.format}: output or gradient {i} differs "
                f"from plain torch's by {error:.1e} of the largest, allowed {TOLERANCE:.0e}"
            )


def compare(setup: Setup, seconds: float, memory: bool) -> Row:
    """Check, time in turn, and return the row."""
    inputs = Inputs.draw(setup)
    check(setup, inputs)
    calls = [functools.partial(forward_backward, setup, who, inputs) for who in ("ours", "torch")]
    ours, theirs = in_turn(calls, torch.device(setup.device), seconds=seconds, warm_up=3)
    peaks: list[float | None] = [None, None]
    if memory:
        whose = ("ours", "torch")
        peaks = [peak_mb(functools.partial(prepare, setup, who), setup.device) for who in whose]
    return _row(setup, "forward+backward", "torch", ours, theirs, *peaks)


def bandwidth(setup: Setup, seconds: float) -> Row:
    """Time the forward pass in turn with torch's copy of as many tensors, out of cache."""
    inputs = Inputs.draw(setup)
    half = setup.candidates // 2

    def copy() -> None:
        for source, target in zip(inputs.z[:half], inputs.z[half:], strict=True):
            target.copy_(source)

    with torch.no_grad():
        calls = [lambda: setup.run("ours", inputs), copy]
        ours, theirs = in_turn(calls, torch.device(setup.device), seconds=seconds)
    moved = KERNELS[setup.kernel].moved
    assert moved is not None
    speeds = [
        count * inputs.g.nbytes / times.median / 1e6
        for count, times in ((moved(setup.candidates), ours), (2 * half, theirs))
    ]
    percent = 100 * speeds[0] / speeds[1]
    note = f"{speeds[0]:.1f} GB/s, {percent:.0f} % of copy ({speeds[1]:.1f} GB/s)"
    more = {"gb_per_s": speeds[0], "copy_gb_per_s": speeds[1], "percent_of_copy": percent}
    return _row(setup, "forward bandwidth", "copy", ours, None, note=note, **more)


def _row(
    setup: Setup,
    case: str,
    baseline: str,
    ours: Times,
    theirs: Times | None,
    *peaks: float | None,
    note: str = "",
    **more: float,
) -> Row:
    case = f"{setup.kernel} {case}"
    sizes = {"batch": setup.batch, "candidates": setup.candidates}
    space = f"{setup.shape} {setup.format}"
    ours_peak, their_peak = peaks or (None, None)
    return Row(
        BENCH, case, space, baseline, ours, theirs, ours_peak, their_peak, note, {**sizes, **more}
    )


@exit_on_user_error
def main() -> None:
    """Print a row for each kernel, shape and memory format, and one for its bandwidth."""
    parsed = _parse()
    device = select_device(parsed.device)
    check_kernels(device)
    if not parsed.json:
        print(f"K = {CANDIDATES}, batch {parsed.batch}, float32, {torch.get_num_threads()} threads")
        print(HEADER, flush=True)
    for kernel in parsed.kernels:
        for shape in SHAPES:
            for name in FORMATS:
                setup = Setup(kernel, shape, name, parsed.batch, str(device))
                show(compare(setup, parsed.seconds, parsed.memory), device, parsed.json)
        large = OUT_OF_CACHE * parsed.batch
        for name in FORMATS if KERNELS[kernel].moved is not None else ():
            setup = Setup(kernel, "C16 32x32", name, large, str(device))
            show(bandwidth(setup, parsed.seconds), device, parsed.json)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description="Time each public kernel in turn with plain torch, forward and backward, after "
        "a check that both compute the same; and its share of the bandwidth of a copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--kernels",
        type=lambda text: text.split(","),
        default=list(KERNELS),
        metavar="A,B,...",
        help="which",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    parser.add_argument("--batch", type=int, default=64, help="images a batch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time a row for")
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory, two processes a row",
    )
    parsed = parser.parse_args()
    for name in parsed.kernels:
        if name not in KERNELS:
            raise unknown("kernel", name, KERNELS)
    if parsed.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {parsed.batch}")
    return parsed


if __name__ == "__main__":
    main()
