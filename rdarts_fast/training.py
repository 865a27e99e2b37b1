"""What the loops of search, random search and retraining share: device, schedules, sums,
interruption, progress.
"""

from __future__ import annotations

import math
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rdarts_fast import gpu_fit, native
from rdarts_fast.config import RunConfig, SupernetConfig, to_json
from rdarts_fast.errors import UserError
from rdarts_fast.events import Events, TensorBoardEvents, check_tensorboard
from rdarts_fast.native import build_info, cpu_unit
from rdarts_fast.networks.precision import check_precision, torch_precision
from rdarts_fast.run_dir import ENVIRONMENT, Run, RunDir

# The forward passes of a step count up from 0; those of an epoch's end are apart.
EVALUATION_PASS = 64
CURVATURE_PASS = 65
PROGRAMS = {  # kind of run -> what to call
    "search": "search",
    "random search": "random_search",
    "retraining": "retrain",
}


class Interrupted(KeyboardInterrupt):
    """The user asked to stop; the run's checkpoint is written."""


@contextmanager
def prepared(config: RunConfig) -> Iterator[torch.device]:
    """Yield the device, with the config's number of threads inside. Raises UserError for what is
    not here, and where the kernels that it asks for cannot run on it.
    """
    if config.tensorboard:
        check_tensorboard()
    device, before = select_device(config.device), torch.get_num_threads()
    if getattr(config, "backend", None) == "fused":
        check_kernels(device)
    check_precision(config.precision, device, getattr(config, "backend", "torch"))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with torch_precision(config.precision):
            yield device
    finally:
        torch.set_num_threads(before)


def ways(config: SupernetConfig) -> str:
    """Return how a supernet is computed, for a line of output."""
    again = ", cells computed again in the backward" if config.checkpoint_cells else ""
    return f"{config.precision}{again}"


def select_device(name: str) -> torch.device:
    """Return the device that --device names; auto is a GPU where there is one. Raises UserError
    where it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        driver = gpu_fit.driver_version()
        if driver is not None:  # else there is nothing that one could have meant
            reason = gpu_fit.unusable(driver, torch.version.cuda)
            print(f"note: torch sees no GPU, this runs on the CPU: {reason}", file=sys.stderr)
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, got {name}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        reason = gpu_fit.unusable(gpu_fit.driver_version(), torch.version.cuda)
        none = f"torch sees no GPU here ({reason}); --device cpu runs on the CPU"
        raise UserError(f"--device {name}: {f'{count} here' if count else none}")
    return device


def check_kernels(device: torch.device) -> None:
    """Raise UserError where the native module's kernels cannot run on the device."""
    reason = native.misfit(device) if device.type == "cuda" else None
    if reason is not None:
        gpu = torch.cuda.get_device_name(device)
        raise UserError(f"--device {device} ({gpu}): {reason}; {gpu_fit.INSTEAD}")


def environment(
    device: torch.device, config: RunConfig, data: str, ranks: int = 1
) -> dict[str, Any]:
    """Return what environment.json holds, `data` being the images' checksum: everything beside the
    settings that a run's bits can depend on.
    """
    built = build_info()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "rdarts_fast": built["version"],
        "csrc_hash": built["csrc_hash"],
        "cpu_unit": cpu_unit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "device": device.type,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "backend": getattr(config, "backend", "torch"),
        "precision": config.precision,
        "ranks": ranks,
        "data": data,
        "seed": config.seed,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return 'torch 2.9.0 -> 2.14.1' for each entry of the environment that a resumed run finds
    changed.
    """
    return [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]


def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Return the learning rate of `epoch`: from `start` along a half cosine to `end` at `epochs`,
    the same for all steps of an epoch, as published.
    """
    return end + (start - end) * (1.0 + math.cos(math.pi * epoch / epochs)) / 2.0


def linear(epoch: int, last: int, end: float) -> float:
    """Return what grows linearly from 0 at epoch 0 to `end` at `last` (ScheduledDropPath; paper,
    appendix C.1).
    """
    return end * epoch / last if last > 0 else 0.0


def sgd(
    parameters: Iterable[nn.Parameter],
    config: RunConfig,
    kind: type[torch.optim.SGD] = torch.optim.SGD,
) -> torch.optim.SGD:
    """Return the weights' optimiser."""
    return kind(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )


class SGD(torch.optim.SGD):
    """SGD with momentum whose rate may be a tensor, [], on the parameters' device: read as the step
    is taken, and by a replay of a recorded step anew.

    A step is rounded after its product with the rate, whether that is a number or a tensor.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it has no closure
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            move = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
            if group["momentum"] != 0.0:
                states = [self.state[p] for p in parameters]
                for state, part in zip(states, move, strict=True):
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(part)
                momenta = [state["momentum_buffer"] for state in states]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, move)
                move = momenta
            torch._foreach_sub_(parameters, torch._foreach_mul(move, group["lr"]))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    """Set the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def check_finite(value: Tensor, name: str, epoch: int, step: int, run: RunDir) -> None:
    """Raise UserError naming epoch and step where a loss or a gradient's norm is not finite."""
    number = float(value.detach())
    if not math.isfinite(number):
        raise not_finite(number, name, epoch, step, run)


def not_finite(number: float, name: str, epoch: int, step: int, run: RunDir) -> UserError:
    """Return the error of a loss or a norm that is not finite."""
    return UserError(
        f"the {name} is {number} at epoch {epoch}, batch {step}: start anew with a lower "
        f"--learning-rate, or look at the data; the last checkpoint is kept in {run.folder}"
    )


Check = Callable[[Tensor, str], None]  # of a loss or a norm and what it is called


class Position(Protocol):
    """Where a loop stands."""

    epoch: int
    step: int  # within the epoch


def raising(at: Position, run: RunDir) -> Check:
    """Return the check that raises UserError at once."""
    return lambda value, name: check_finite(value, name, at.epoch, at.step, run)


def descend(
    loss: Tensor,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    check: Check,
) -> None:
    """One step of the weights down the loss, its gradient clipped; both are checked."""
    check(loss, "training loss")
    parameters = list(network.parameters())
    loss.backward(inputs=parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip, foreach=True)
    check(norm, "norm of the weights' gradient")
    optimizer.step()
    optimizer.zero_grad()


class Stop:
    """Whether the user asked to stop: the first Ctrl-C (or SIGTERM) asks, the second interrupts at
    once.
    """

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    @contextmanager
    def watching(self) -> Iterator[Stop]:
        """Watch the signals inside; threads other than the main one cannot, and watch nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


class Clock:
    """When the next checkpoint inside an epoch is due."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60.0 * minutes
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self.last >= self.seconds

    def reset(self) -> None:
        """A checkpoint was just written."""
        self.last = time.monotonic()


def progress(steps: Sequence[Any], done: int, title: str) -> Iterator[Any]:
    """Go through steps[done:] with a bar, on a terminal only."""
    from tqdm import tqdm

    yield from tqdm(
        steps[done:],
        total=len(steps),
        initial=done,
        desc=title,
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable numbers."""
    return sum(parameter.numel() for parameter in network.parameters())


class State(Protocol):
    """What a loop keeps: it goes into a checkpoint and comes back out of one."""

    def to_checkpoint(self) -> dict[str, Any]: ...

    def from_checkpoint(self, stored: dict[str, Any]) -> None: ...


@contextmanager
def open_run(
    config: RunConfig,
    environment: dict[str, Any],
    name: str,
    kind: str,
    state: State,
    files: Mapping[str, str] | None = None,
) -> Iterator[RunDir]:
    """Yield the run's folder, locked: a new one with its first checkpoint, or --resume's with
    `state` taken from it.

    files: more texts that a new folder starts with, by name.

    Raises UserError (folder there already, locked, no room, no or another kind of checkpoint).
    """
    if config.resume is None:
        folder = config.out or Path("runs") / f"{plain(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunDir.create(folder, to_json(config), environment, state.to_checkpoint(), files)
    else:
        run = RunDir.open(config.resume)
    with run:
        if config.resume is not None:
            _resume(run, environment, kind, state)
        try:
            yield run
        except Interrupted:
            raise
        except KeyboardInterrupt as interrupt:  # at once: the last checkpoint is the one there is
            raise Interrupted(resume_command(PROGRAMS[kind], run.folder)) from interrupt


def plain(name: str) -> str:
    """Return `name` as one folder's name: without the places of files, without odd characters."""
    words = [Path(word).stem if "/" in word or "." in word else word for word in name.split(":")]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(words)).strip("._-") or "run"


def _resume(run: RunDir, environment: dict[str, Any], kind: str, state: State) -> None:
    stored = run.load_checkpoint()
    if stored.get("kind") != kind:
        raise UserError(f"--resume {run.folder}: holds a {stored.get('kind')}, not a {kind}")
    try:
        state.from_checkpoint(stored)
        run.cut_metrics(stored["records"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        what = f"{type(error).__name__}: {reason}"
        raise UserError(f"{run.folder}: the checkpoint does not fit this run: {what}") from error
    before = Run.read(run.folder).environment
    changed = differences(before, environment)
    if changed:
        print(f"warning: the result can differ: {', '.join(changed)}", file=sys.stderr)
        resumed = [*before.get("resumed_on", []), environment]
        run.write_json(ENVIRONMENT, {**before, "resumed_on": resumed})
    print(f"resumed at epoch {stored['epoch']}, batch {stored['step']}")


@contextmanager
def event_writer(
    config: RunConfig, run: RunDir, first_epoch: int, wanted: bool = True
) -> Iterator[Events]:
    """Yield where the epochs' records go beside metrics.jsonl, from `first_epoch` on."""
    tensorboard = config.tensorboard and wanted
    events = TensorBoardEvents(run.folder, first_epoch) if tensorboard else Events()
    try:
        yield events
    finally:
        events.close()


def resume_command(program: str, folder: Path) -> str:
    """Return what to type to go on."""
    return f"python -m rdarts_fast.{program} --resume {folder}"
