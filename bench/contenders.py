"""What bench.search_step compares: a step of a search, on our network and on those people have."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch._dynamo  # the optimisers import it in their first step: not memory of the step
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast import graph_step
from rdarts_fast.config import SearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.graph_step import StepInput, Tell
from rdarts_fast.networks import Supernet, softmax_weights
from rdarts_fast.networks.operations import Noise
from rdarts_fast.search import Losses, SearchState, alpha_step, weight_step
from rdarts_fast.spaces import load_space
from rdarts_fast.tasks.classification import Classification
from rdarts_fast.training import check_kernels, select_device, set_learning_rate

OURS = "ours"
MEMORY_FORMATS = {
    OURS: torch.channels_last,
    "eager": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "compile": torch.contiguous_format,
}
BASELINES = tuple(name for name in MEMORY_FORMATS if name != OURS)
CLASSES = 10
SIZES = ("batch", "channels", "layers", "size")

# Relative to the largest number. At full size torch differs from itself (NCHW, channels_last) by up
# to 5e-5 in the logits and 2.4e-2 in the gradient, where a ReLU's input near 0 falls either way.
LOGITS_TOLERANCE = 3e-4
GRADIENT_TOLERANCE = 1e-1


@dataclass(frozen=True)
class Setup:
    """A supernet and its batch; the defaults are the published ones."""

    space: str
    batch: int = 64
    channels: int = 16
    layers: int = 8
    size: int = 32
    device: str = "cpu"

    def settings(self) -> SearchConfig:
        """Return the settings of a search with these sizes and the published values otherwise."""
        return SearchConfig(
            space=self.space,
            batch_size=self.batch,
            channels=self.channels,
            layers=self.layers,
            device=self.device,
        )

    def supernet(self, backend: str) -> Supernet:
        """Return the supernet; the same parameters each time."""
        torch.manual_seed(0)
        return Supernet(load_space(self.space), self.channels, self.layers, CLASSES, backend)

    def images(self, seed: int, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
        """Return images [N, 3, size, size] and labels [N], the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(CLASSES, (self.batch,), generator=generator)
        images = images.to(self.device, memory_format=memory_format)
        return images, labels.to(self.device)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the flags of a Setup's sizes and device."""
    sizes = Setup("")
    parser.add_argument("--batch", type=int, default=sizes.batch, help="images a batch")
    parser.add_argument("--channels", type=int, default=sizes.channels, help="of the first cells")
    parser.add_argument("--layers", type=int, default=sizes.layers, help="cells")
    parser.add_argument("--size", type=int, default=sizes.size, help="pixels, height and width")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")


def setups_of(parsed: argparse.Namespace) -> list[Setup]:
    """Return the setup of each space. Raises UserError for what is not there or too small."""
    for name in SIZES:
        if getattr(parsed, name) < 1:
            raise UserError(f"--{name}: expected at least 1, got {getattr(parsed, name)}")
    sizes, device = {name: getattr(parsed, name) for name in SIZES}, select_device(parsed.device)
    check_kernels(device)
    for space in parsed.spaces:
        load_space(space)  # raises for one that is not there
    return [Setup(space, **sizes, device=str(device)) for space in parsed.spaces]


class TorchNoise(nn.Module):
    """The noise operation as people have it, drawn by torch in the order of memory: randn_like of
    channels_last images takes several times as long on a CPU.
    """

    def __init__(self, stride: int, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.stride, self.memory_format = stride, memory_format

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x[:, :, :: self.stride, :: self.stride].shape
        if self.memory_format == torch.channels_last:
            drawn = torch.randn(n, h, w, c, device=x.device, dtype=x.dtype)
            return drawn.permute(0, 3, 1, 2)
        return torch.randn(n, c, h, w, device=x.device, dtype=x.dtype)


def network(name: str, setup: Setup) -> Supernet:
    """Return the contender's supernet: ours is on kernels, a baseline is the reference with torch's
    noise.
    """
    memory_format = MEMORY_FORMATS[name]
    supernet = setup.supernet("fused" if name == OURS else "reference")
    if name != OURS:
        for module in list(supernet.modules()):
            for child_name, child in module.named_children():
                if isinstance(child, Noise):
                    setattr(module, child_name, TorchNoise(child.stride, memory_format))
    supernet.to(setup.device, memory_format=memory_format)
    if name == "compile":
        supernet.compile()
    return supernet.train()


# A pass as the task has it, which looks at none of its images.
run_supernet = functools.partial(Classification.run_supernet, cast(Classification, None))


class Contender:
    """A search in its first epoch, as search.py runs it; every batch is the same two."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.settings = setup.settings()
        self.state = SearchState.start(self.settings, network(name, setup))
        self.training, self.validation = (
            setup.images(seed, MEMORY_FORMATS[name]) for seed in (1, 2)
        )
        # Ours gains from bits that are the same each time, as in a search; cuDNN's choice by trial
        # is what the published code has.
        self.flags = {"deterministic": name == OURS, "benchmark": name != OURS}
        self._task: Any = SimpleNamespace(run_supernet=run_supernet)  # all that Losses asks of one
        graphs = name == OURS and self.training[0].is_cuda
        self._how = graph_step.GRAPH if graphs else graph_step.PLAIN
        self._takers: dict[str, graph_step.Taker] = {}
        self._leaves = [*self.state.supernet.parameters(), *self.state.alphas.values()]

    def losses(self) -> Losses:
        """Return the next step's losses, its noise drawn afresh."""
        self.state.step += 1
        return Losses(self.settings, self._task, self.state, Draws(0, step=self.state.step))

    def forward_backward(self) -> None:
        """The loss and its gradient in the weights and the alphas."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, **self.flags):
            self.losses().of(self.training, "weights")().backward()
        for tensor in self._leaves:
            tensor.grad = None

    def search_step(self, order: str) -> None:
        """One step of the search: the alphas', then the weights'; on a GPU ours by CUDA graph."""
        self.state.step += 1
        if order not in self._takers:
            step = functools.partial(self._step, replace(self.settings, order=order))
            nowhere = SimpleNamespace(folder="nowhere")
            self._takers[order] = graph_step.taker(step, self._how, self.state, nowhere)
        labels, draws = (self.training[1], self.validation[1]), Draws(0, step=self.state.step)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, **self.flags):
            self._takers[order](StepInput(*labels, draws, self.settings.learning_rate, 0.0))

    def _step(self, settings: SearchConfig, given: StepInput, tell: Tell) -> None:
        losses = Losses(settings, self._task, self.state, given.draws)
        set_learning_rate(self.state.weight_optimizer, given.rate)
        pair = (losses.of(batch, "weights") for batch in (self.training, self.validation))
        alpha_step(settings, self.state, *pair, given.rate, tell.check)
        weight_step(settings, self.state, losses.of_weights(self.training, tell.add), tell.check)


CASES: Mapping[str, Callable[[Contender], None]] = {
    "forward+backward": Contender.forward_backward,
    "first-order step": lambda contender: contender.search_step("first"),
    "second-order step": lambda contender: contender.search_step("second"),
}


def prepare(name: str, setup: Setup, case: str) -> Callable[[], None]:
    """Return what runs the case once."""
    contender = Contender(name, setup)
    return lambda: CASES[case](contender)


def check(setup: Setup) -> None:
    """Raise AssertionError unless our network has the reference's parameters and buffers, and under
    the same draws its logits and its gradient in the alphas, in train mode.
    """
    nets = {OURS: network(OURS, setup), "reference": setup.supernet("reference").to(setup.device)}
    states = [net.state_dict() for net in nets.values()]
    same = list(states[0]) == list(states[1])
    if not same or not all(torch.equal(states[0][name], states[1][name]) for name in states[0]):
        raise AssertionError(f"{setup.space}: our parameters are not the reference's")
    found = {name: _logits_and_gradient(net, setup, name) for name, net in nets.items()}
    tolerances = {"logits": LOGITS_TOLERANCE, "gradient": GRADIENT_TOLERANCE}
    for what, got, expected in zip(tolerances, *found.values(), strict=True):
        error = ((got - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerances[what]:
            raise AssertionError(
                f"{setup.space}: our {what} differ from the reference's by {error:.1e} of the "
                f"largest, allowed {tolerances[what]:.0e}"
            )


def _logits_and_gradient(net: Supernet, setup: Setup, name: str) -> tuple[Tensor, Tensor]:
    memory_format = MEMORY_FORMATS.get(name, torch.contiguous_format)
    images, labels = setup.images(1, memory_format)
    # Far from equal weights, at which a search starts: there two swapped candidates would not show.
    alphas = {kind: 1e3 * alpha.detach() for kind, alpha in net.initial_alphas(3).items()}
    for alpha in alphas.values():
        alpha.requires_grad_()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        logits = net(images, softmax_weights(alphas), Draws(5))
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(alphas.values()), materialize_grads=True)
    return logits.detach(), torch.cat([g.flatten() for g in gradients])
