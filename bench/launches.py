"""What one forward and backward of our supernet launches and moves on a GPU, as the machine of
tests/host_cuda counts it on the CPU, beside the least it could move.

    python -m bench.launches                          # S4, the published sizes
    python -m bench.launches --space darts --layers 3 --json

Bytes are those of a few images, scaled to the published batch. They are what kernels ask for: what
a cache answers is among them. The floor: 13 tensors an edge (a convolution's two z written, read by
the next and by the sum, and again backward), in float32.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from bench.contenders import CLASSES, Setup
from bench.record import line
from rdarts_fast.draws import Draws
from rdarts_fast.errors import exit_on_user_error
from rdarts_fast.networks import Supernet, softmax_weights
from rdarts_fast.networks.supernet import is_reduction
from rdarts_fast.spaces import load_space
from tests.host_cuda import Counts, counts, on_host

TENSORS_AN_EDGE = 13
BYTES = 4  # of a number


def floor_bytes(setup: Setup) -> int:
    """Return what 13 tensors an edge come to for the setup's batch."""
    edges = load_space(setup.space).edges("normal")
    channels, size, numbers = setup.channels, setup.size, 0
    for i in range(setup.layers):
        if is_reduction(i, setup.layers):
            channels, size = 2 * channels, -(-size // 2)
        numbers += edges * setup.batch * channels * size * size
    return TENSORS_AN_EDGE * BYTES * numbers


def counted(setup: Setup, images: int) -> dict[str, Counts]:
    """Return each kernel's counts in a forward and backward of so many images."""
    torch.manual_seed(0)
    net = Supernet(setup.space, setup.channels, setup.layers, CLASSES)
    alphas = net.initial_alphas(0)
    batch = torch.randn(images, 3, setup.size, setup.size)
    with on_host():
        logits = net(batch, softmax_weights(alphas), Draws(0))
        F.cross_entropy(logits, torch.arange(images) % CLASSES).backward()
        return counts()


@exit_on_user_error
def main() -> None:
    """Print a row a kernel, the most bytes first, then all and the floor."""
    sizes = Setup("s4")
    parser = argparse.ArgumentParser(
        prog="python -m bench.launches",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--space", default=sizes.space, help="a built-in space or a .json file")
    for name in ("batch", "channels", "layers", "size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(sizes, name))
    parser.add_argument("--images", type=int, default=1, help="that are run; minutes each")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    parsed = parser.parse_args()
    setup = Setup(parsed.space, parsed.batch, parsed.channels, parsed.layers, parsed.size)
    found = counted(setup, parsed.images)
    scale = setup.batch / parsed.images / 1e9
    total = Counts(*(sum(column) for column in zip(*found.values(), strict=True)))
    rows = sorted(found.items(), key=lambda row: -(row[1].bytes_read + row[1].bytes_written))
    if not parsed.json:
        print(f"{'kernel':<28}{'launches':>9}{'read, GB':>10}{'written, GB':>13}")
    for name, row in [*rows, ("all", total)]:
        read, written = row.bytes_read * scale, row.bytes_written * scale
        if parsed.json:
            measured = {"kernel": name, "launches": row.launches}
            gigabytes = {"read_gb": round(read, 3), "written_gb": round(written, 3)}
            print(line("launches", torch.device("cpu"), space=setup.space, **measured, **gigabytes))
        else:
            print(f"{name:<28}{row.launches:>9}{read:>10.2f}{written:>13.2f}")
    floor = floor_bytes(setup) / 1e9
    if parsed.json:
        print(line("launches", torch.device("cpu"), space=setup.space, floor_gb=round(floor, 3)))
    else:
        print(f"floor, read and written: {floor:.2f} GB at batch {setup.batch}")


if __name__ == "__main__":
    main()
