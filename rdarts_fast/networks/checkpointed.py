"""A cell whose forward pass is computed again in the backward: nothing is kept but its inputs.

The second pass draws what the first did, by counter, and moves no buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RandomStates = Sequence[Tensor]  # of torch's generators: the CPU's, then the device's


def checkpointed(
    cell: nn.Module, compute: Callable[..., list[Tensor]], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Return compute(*tensors), the forward pass of a cell of torch's modules or of composed
    kernels, of which autograd keeps the tensors alone.
    """
    found: list[Tensor] = checkpoint(
        compute,
        *tensors,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), BuffersAside(cell)),
    )
    return found


class BuffersAside:
    """Lets a cell's modules move copies of their buffers inside the block; for many blocks in turn,
    as autograd computes a cell again for each derivative.
    """

    def __init__(self, cell: nn.Module) -> None:
        self._cell = cell
        self._tables: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._tables = [(part._buffers, dict(part._buffers)) for part in self._cell.modules()]
        for table, before in self._tables:
            for name, buffer in before.items():
                table[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *error: object) -> None:
        for table, before in self._tables:
            table.update(before)


def random_states(device: torch.device) -> RandomStates:
    """Return the states of torch's generators, which a user's own operations may draw from."""
    own = [torch.get_rng_state()]
    return [*own, torch.cuda.get_rng_state(device)] if device.type == "cuda" else own


@contextmanager
def drawing_from(states: RandomStates | None, device: torch.device) -> Iterator[None]:
    """Let torch's generators begin at `states` inside the block, and go on afterwards as if nobody
    had drawn; nothing where there are none.
    """
    if states is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield
