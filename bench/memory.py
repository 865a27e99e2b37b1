"""What a supernet's pass keeps, and the peak of a process that makes one step, each way to compute.

python -m bench.memory --space s2 --batch-size 64

One JSON line a way. kept_bytes: what autograd holds between forward and backward. peak_bytes: the
most that the process had resident during a forward and a backward pass, less what it had before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import line
from rdarts_fast.draws import Draws
from rdarts_fast.kernels.emulation import emulated_bfloat16
from rdarts_fast.networks import softmax_weights
from rdarts_fast.networks.precision import BF16, FP32
from rdarts_fast.networks.supernet import Supernet

WAYS = [
    ("fused", FP32, False),
    ("fused", FP32, True),
    ("fused", BF16, False),
    ("fused", BF16, True),
    ("reference", FP32, False),
    ("reference", FP32, True),
]


def measured(space: str, size: int, backend: str, precision: str, again: bool) -> tuple[int, int]:
    """Return the bytes kept and the peak, in this process."""
    net = Supernet(space, backend=backend)
    net.compute(precision, again)
    alphas, found = net.initial_alphas(1), dict[int, int]()
    images, labels = torch.randn(size, 3, 32, 32), torch.arange(size) % 10

    def count(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with emulated_bfloat16() if precision == BF16 else nullcontext():
        before = peak()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = F.cross_entropy(net(images, softmax_weights(alphas), Draws(1)), labels)
        kept = sum(found.values())
        loss.backward(inputs=list(net.parameters()))
    return kept, peak() - before


def peak() -> int:
    """Return the most that this process has had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--space", default="s2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--way", type=int, default=None, help="this one, in this process")
    given = parser.parse_args(arguments)
    if given.way is not None:
        print(json.dumps(measured(given.space, given.batch_size, *WAYS[given.way])))
        return
    plain: dict[str, tuple[int, int]] = {}
    for i, (backend, precision, again) in enumerate(WAYS):
        size = str(given.batch_size)
        command = ["-m", "bench.memory", "--space", given.space, "--batch-size", size]
        done = subprocess.run(
            [sys.executable, *command, "--way", str(i)], capture_output=True, text=True, check=True
        )
        kept, most = json.loads(done.stdout)
        first = plain.setdefault(backend, (kept, most))
        way = {"backend": backend, "precision": precision, "checkpoint_cells": again}
        found = {"kept_bytes": kept, "peak_bytes": most}
        ratios = {"kept_ratio": first[0] / kept, "peak_ratio": first[1] / most}
        where = {"space": given.space, "batch_size": given.batch_size}
        print(line("memory", torch.device("cpu"), **where, **way, **found, **ratios), flush=True)


if __name__ == "__main__":
    main()
