"""One training on several processes, as torchrun starts them: which part of a batch is mine, and
what all have to agree on.

A process alone is rank 0 of 1, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, tell
from rdarts_fast.run_dir import RunDir

_PATIENCE = timedelta(seconds=10)


@dataclass(frozen=True)
class Part:
    """A rank's part of a batch: its rows, how to draw for them, and what its mean loss counts for
    in the mean over ranks: that is then the mean over the batch.
    """

    rows: Tensor
    draws: Draws
    weight: float


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run's folder, and prints."""
        return self.rank == 0

    def part(self, rows: Tensor, draws: Draws) -> Part:
        """Return this rank's rows of a batch [N], as many as the others' or one more, and never one
        alone: batch norm needs two.

        A rank that a small batch leaves without any gets the first two, at weight 0.
        """
        if self.count == 1:
            return Part(rows, draws, 1.0)
        total = len(rows)
        working = min(self.count, max(1, total // 2))
        if self.rank < working:
            first, end = (total * r // working for r in (self.rank, self.rank + 1))
            weight = (end - first) * self.count / total
        else:
            first, end, weight = 0, min(2, total), 0.0
        return Part(rows[first:end], draws.at(part=(first, total)), weight)

    def wrapped(
        self, network: nn.Module, device: torch.device, *, all_used: bool = True
    ) -> nn.Module:
        """Return the network, its gradients averaged over the ranks; all begin with the first's
        weights. all_used: whether the loss depends on every parameter.
        """
        if self.count == 1:
            return network
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            network, device_ids=devices, find_unused_parameters=not all_used
        )

    def share_buffers(self, network: nn.Module) -> None:
        """Give all ranks the first one's buffers, as before each forward pass."""
        if self.count > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def any(self, *flags: bool) -> list[bool]:
        """Return of each flag whether it is set on any rank."""
        if self.count == 1:
            return list(flags)
        found = self._reduced([float(flag) for flag in flags])
        return [value > 0.0 for value in found]

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the sums over the ranks."""
        if self.count == 1:
            return dict(values)
        return dict(zip(values, self._reduced(list(values.values())), strict=True))

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value: what a checkpoint may hold."""
        if self.count == 1:
            return value
        box = [value if self.first else None]
        torch.distributed.broadcast_object_list(box, src=0, device=_device())
        return box[0]

    def _reduced(self, values: list[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        torch.distributed.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found


def prints_here() -> bool:
    """Whether this process is the one of torchrun's that prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def told_once() -> Iterator[None]:
    """Let one process say what several of torchrun's find wrong, each by itself: the others end
    with 2 as it does, and say nothing.
    """
    try:
        yield
    except UserError as error:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            with contextlib.suppress(RuntimeError, torch.distributed.DistError):
                _tell_once(error)
                sys.exit(2)
        raise


def _tell_once(error: UserError) -> None:
    """Print the error, or wait until another process has. Raises what a lost torchrun raises."""
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_PATIENCE
    )
    key = f"rdarts_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{error}"
    if store.add(key, 1) == 1:
        tell(error)
        store.set(f"{key}/told", "")
    else:  # torchrun ends all processes once one has ended
        store.wait([f"{key}/told"], _PATIENCE)


@contextmanager
def printing_on_first() -> Iterator[None]:
    """Let the first process alone print, of what is the same for all."""
    with contextlib.ExitStack() as stack:
        if not prints_here():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """Yield this process's place among those of torchrun, and its device's name; alone, `device`.

    Raises UserError where there are more processes than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Ranks(), device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started process {local} on a machine with {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node, or give --device cpu"
        )
    if cuda:
        torch.cuda.set_device(local)
    elif device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: torchrun needs auto, cuda or cpu")
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        with contextlib.ExitStack() as stack:
            if rank > 0:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield Ranks(rank, count), f"cuda:{local}" if cuda else "cpu"
    except (RuntimeError, torch.distributed.DistError) as error:
        if not _lost_another(error):
            raise
        raise UserError(
            f"process {rank} of {count} stops, since another ended: what that one says is the cause"
        ) from error
    finally:
        torch.distributed.destroy_process_group()


def _lost_another(error: Exception) -> bool:
    """Whether a collective failed for the want of another process, by how gloo or NCCL word it."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def _device() -> torch.device:
    """Return where the backend wants its tensors."""
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


class Bystander(RunDir):
    """In place of the run's folder on the ranks that do not write it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # without a lock: it is the first rank's

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def save_checkpoint(self, state: Mapping[str, Any], name: str = "last") -> None:
        """Nothing."""

    def write_json(self, name: str, value: Any) -> None:
        """Nothing."""
