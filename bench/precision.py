"""What storing tensors in bfloat16 does to the gradient of the alphas and to lambda_max, against
float64, on the CPU (kernels/emulation.py); and what each rule of networks/precision.py is for.

python -m bench.precision --space s2 --data folder:CIFAR --steps 50

Of a supernet after `--steps` steps of its weights. One JSON line a row: the cosine of a gradient to
float64's. "of one pass" is the gradient of the validation loss, of a pass that gives the weights'
gradients too; "second order" the published one. tf32 is emulated by the modules of torch, whose
products have their factors rounded to 10 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import line
from rdarts_fast import bilevel, config_sources, curvature, tasks
from rdarts_fast.config import SearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.kernels import rounding
from rdarts_fast.kernels.emulation import emulated_bfloat16
from rdarts_fast.networks import narrow, softmax_weights, supernet
from rdarts_fast.networks.precision import BF16, FP32, TF32

CLIP, RATE, MOMENTUM, DECAY = 5.0, 0.025, 0.9, 3e-4


@dataclass
class Point:
    """A supernet, its alphas and two batches."""

    net: supernet.Supernet
    alphas: dict[str, Tensor]
    batches: Sequence[tuple[Tensor, Tensor]]  # of the weights' images and the alphas'
    momenta: Sequence[Tensor | None]

    def to(self, dtype: torch.dtype, backend: str = "fused") -> Point:
        """Return a copy in another type."""
        net = supernet.Supernet(self.net.space, backend=backend, **self.sizes()).to(dtype)
        net.load_state_dict(self.net.state_dict())
        alphas = {k: a.detach().to(dtype).requires_grad_() for k, a in self.alphas.items()}
        batches = [(images.to(dtype), labels) for images, labels in self.batches]
        momenta = [None if m is None else m.to(dtype) for m in self.momenta]
        net.train()
        return Point(net, alphas, batches, momenta)

    def sizes(self) -> dict[str, int]:
        """Return what a supernet of these sizes is made with."""
        stem, classifier = self.net.stem[0], self.net.classifier
        return {
            "channels": stem.out_channels // supernet.STEM_MULTIPLIER,
            "layers": len(self.net.cells),
            "classes": classifier.out_features,
            "image_channels": stem.in_channels,
        }

    def loss(self, batch: int, draw: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss on a batch."""
        images, labels = self.batches[batch]
        p = softmax_weights(self.alphas) if weights is None else weights
        return F.cross_entropy(self.net(images, p, Draws(1, step=draw)), labels)

    def of_one_pass(self) -> Tensor:
        """Return the alphas' gradient of the validation loss, [P]."""
        loss, alphas = self.loss(1, 9), list(self.alphas.values())
        with bilevel.unchanged(list(self.net.buffers())):
            found = torch.autograd.grad(loss, [*alphas, *self.net.parameters()])
        return _flat(found[: len(alphas)])

    def second_order(self, precisions: Sequence[str]) -> Tensor:
        """Return the published gradient, [P], its four passes in these precisions."""
        passes: Iterator[int] = iter(range(4))

        def loss(batch: int) -> Tensor:
            i = next(passes)
            TENSOR_CORES.backward = precisions[i] == TF32
            self.net.compute(precisions[i])
            return self.loss(batch, i)

        parameters, alphas = list(self.net.parameters()), list(self.alphas.values())
        step = bilevel.VirtualStep(RATE, MOMENTUM, DECAY, self.momenta)
        found = bilevel.second_order(
            lambda: loss(0),
            lambda: loss(1),
            parameters,
            alphas,
            step,
            buffers=list(self.net.buffers()),
        )
        self.net.compute(FP32)
        TENSOR_CORES.backward = False
        return _flat(found.gradient)

    def lambda_max(self) -> float:
        """Return the Hessian's largest eigenvalue."""
        operator = self.net.hessian_operator(self.alphas, *self.batches[1], Draws(1, step=9))
        null = curvature.softmax_null_space(
            [(a.shape[0], a.shape[1]) for a in self.alphas.values()]
        )
        return float(curvature.top_eigenvalue(operator, null_space=null).value)


@dataclass
class TensorCores:
    """Which passes round the factors of products."""

    forward: bool = False
    backward: bool = False


TENSOR_CORES = TensorCores()


def to_10_bits(x: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _Convolution(torch.autograd.Function):
    """A convolution as TENSOR_CORES says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.given = stride, padding
        if TENSOR_CORES.forward:
            x, weight = to_10_bits(x), to_10_bits(weight)
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, (g,) = *ctx.saved_tensors, grads
        if TENSOR_CORES.backward:
            x, weight, g = to_10_bits(x), to_10_bits(weight), to_10_bits(g)
        of_x = torch.nn.grad.conv2d_input(x.shape, weight, g, *ctx.given)
        return of_x, torch.nn.grad.conv2d_weight(x, weight.shape, g, *ctx.given), None, None


@contextmanager
def emulated_tf32() -> Iterator[None]:
    """Let torch's convolutions that are no depthwise ones follow TENSOR_CORES."""
    own = torch.nn.Conv2d.forward

    def forward(layer: torch.nn.Conv2d, x: Tensor) -> Tensor:
        if layer.groups > 1:
            return own(layer, x)
        return cast(Tensor, _Convolution.apply(x, layer.weight, layer.stride, layer.padding))

    with mock.patch.object(torch.nn.Conv2d, "forward", forward):
        yield


def _flat(gradient: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten().double() for g in gradient])


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(a @ b / (a.norm() * b.norm()))


def trained(arguments: argparse.Namespace) -> Point:
    """Return a supernet after some steps of its weights, as a search makes them."""
    names = ("space", "data", "channels", "layers", "batch_size", "seed", "image_size")
    asked = {name: getattr(arguments, name) for name in names} | {"device": "cpu"}
    settings = config_sources.from_settings(SearchConfig, asked)
    task = tasks.load(settings, torch.device("cpu"))
    space = supernet.load_space(settings.space)
    net = task.supernet(settings, space)
    assert isinstance(net, supernet.Supernet)
    alphas = net.initial_alphas(settings.seed)
    optimizer = task.optimizer(net)
    rows: Iterator[Tensor] = iter(())
    for step in range(arguments.steps + 1):
        key = Draws(settings.seed, step=step)
        batch = next(rows, None)
        if batch is None or len(batch) < settings.batch_size:
            rows = iter(task.search_epoch(key))
            batch = next(rows)
        images, labels = task.training_batch(batch, key, 0.0)
        if step == arguments.steps:
            break
        loss = F.cross_entropy(net(images, softmax_weights(alphas), key), labels)
        loss.backward(inputs=list(net.parameters()))
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    chosen = task.validation_rows(key)
    validation = task.training_batch(chosen, key, 0.0, validation=True)
    momenta = [optimizer.state[p].get("momentum_buffer") for p in net.parameters()]
    return Point(net, alphas, [(images, labels), (validation[0], validation[1])], momenta)


@contextmanager
def forward_rounded() -> Iterator[None]:
    """Let cells exchange and compute bfloat16 tensors, forward too."""
    stem, head = supernet.fused_stem, torch.nn.Linear.forward
    with (
        mock.patch.object(supernet, "fused_stem", lambda *given: stem(*given).bfloat16()),
        mock.patch.object(torch.nn.Linear, "forward", lambda layer, x: head(layer, x.float())),
    ):
        yield


@contextmanager
def masks_rounded() -> Iterator[None]:
    """Round what is kept to the nearest, whatever ReLU reads it."""
    with mock.patch.object(narrow, "rounded", lambda z, *maps: rounding.rounded(z)):
        yield


def rows(point: Point) -> Iterator[dict[str, Any]]:
    """Measure."""
    exact, single = point.to(torch.float64), point.to(torch.float32)
    one, two = exact.of_one_pass(), exact.second_order([FP32] * 4)

    def of(what: str, gradient: Tensor, expected: Tensor) -> dict[str, Any]:
        return {"what": what, "cosine": cosine(gradient, expected)}

    yield of("of one pass, fp32", single.of_one_pass(), one)
    with emulated_bfloat16():
        single.net.compute(BF16)
        yield of("of one pass, bf16", single.of_one_pass(), one)
        with masks_rounded():
            yield of("of one pass, bf16, nearest", single.of_one_pass(), one)
        single.net.compute(FP32)
        with forward_rounded():
            yield of("of one pass, bf16, forward too", single.of_one_pass(), one)
        orders: Mapping[str, Sequence[str]] = {
            "fp32": [FP32] * 4,
            "bf16": [FP32, BF16, BF16, BF16],  # as a search has it
            "bf16 in validation alone": [FP32, BF16, FP32, FP32],
            "bf16 in the virtual step too": [BF16] * 4,
        }
        for name, precisions in orders.items():
            yield of(f"second order, {name}", single.second_order(precisions), two)
    modules = point.to(torch.float32, "reference")
    with emulated_tf32():
        for name, forward in (("tf32", False), ("tf32, forward too", True)):
            TENSOR_CORES.forward, TENSOR_CORES.backward = forward, True
            yield of(f"of one pass, {name}", modules.of_one_pass(), one)
        TENSOR_CORES.forward, TENSOR_CORES.backward = False, False
        orders = {
            "fp32, modules": [FP32] * 4,
            "tf32": [FP32, TF32, TF32, TF32],  # as a search has it
            "tf32 in the virtual step too": [TF32] * 4,
        }
        for name, precisions in orders.items():
            yield of(f"second order, {name}", modules.second_order(precisions), two)
    values = exact.lambda_max(), single.lambda_max()
    yield {
        "what": "lambda_max, float32 to float64",
        "float64": values[0],
        "ratio": values[1] / values[0],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add: Callable[..., Any] = parser.add_argument
    add("--space", default="s2")
    add("--data", default="digits")
    add("--image-size", type=int, default=None)
    for name, value in {
        "channels": 16,
        "layers": 8,
        "batch-size": 16,
        "steps": 20,
        "seed": 0,
    }.items():
        add(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    point = trained(arguments)
    for row in rows(point):
        print(line("precision", torch.device("cpu"), **vars(arguments), **row), flush=True)


if __name__ == "__main__":
    main()
