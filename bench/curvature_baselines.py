"""What bench.curvature compares: a contender's loss over its alphas, and its Hessian as others
compute it.

"row loop" is what the published code does: one gradient with its graph, then a backward pass
through that for each row. "vmap" is torch.func: `vmap` over directions of `jvp(grad(loss))`, a
product H @ e_i each, as torch.func.hessian does it. The directions go through one at a time: at the
published sizes two, four or eight at once take no less time each, and more memory (tried; they do
in tiny networks). "curvlinops" is that package's HessianLinearOperator, on a module whose only
parameters are the alphas.

torch.func refuses a function that moves buffers in place ("attempted to call in-place operation
that would mutate a captured Tensor"), and a batch norm in train mode does. So for the last two,
torch.func.replace_all_batch_norm_modules_ takes the running statistics away, as torch's
documentation advises; in train mode no result depends on them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contenders import MEMORY_FORMATS, OURS, Contender, Setup, network
from rdarts_fast import data
from rdarts_fast.curvature import (
    HessianOperator,
    Operator,
    TopEigenvalue,
    hessian,
    softmax_null_space,
    top_eigenvalue,
)
from rdarts_fast.curvature.operators import flat
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.networks import softmax_weights


@dataclass(frozen=True)
class Start:
    """Where the curvature is measured: a supernet's state, its alphas, and a batch."""

    supernet: Mapping[str, Tensor]
    alphas: Mapping[str, Tensor]  # cell type -> [E, O]
    batch: tuple[Tensor, Tensor]  # images [N, 3, H, W], labels [N]


def trained(setup: Setup, steps: int) -> Start | None:
    """Return our supernet after `steps` first-order steps of a search, with the published settings,
    on digits enlarged to the setup's size, and a further batch of them; None for no steps.
    """
    if steps == 0:
        return None
    digits = data.load("digits", root=Path("data"), image_size=setup.size)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(digits.train_labels), (setup.batch,), generator=generator)
        images = data.normalize(digits.train_images[rows], digits.augmentation)
        colour = images.expand(-1, 3, -1, -1)
        return colour.to(setup.device), digits.train_labels[rows].to(setup.device)

    contender = Contender(OURS, setup)
    for step in range(steps):
        contender.training, contender.validation = batch(2 * step), batch(2 * step + 1)
        contender.search_step("first")
    state = contender.state
    alphas = {kind: alpha.detach() for kind, alpha in state.alphas.items()}
    return Start(state.supernet.state_dict(), alphas, batch(2 * steps))


@dataclass(frozen=True)
class KeptDraws(Draws):
    """Draws that keep the noise they drew: the native code cannot fill torch.func's tensors."""

    kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def _draw(
        self, fill: str, twin: Any, dtype: Any, site: int, shape: Sequence[int], *where: Any
    ) -> Tensor:
        key = (fill, self.seed, self.branch, self.step, self.pass_index, site, *shape)
        if key not in self.kept:
            self.kept[key] = super()._draw(fill, twin, dtype, site, shape, *where)
        return self.kept[key]


class Loss:
    """A contender's validation loss on one batch, as a function of its alphas; of a fresh network
    on random images without a `start`.
    """

    def __init__(
        self,
        name: str,
        setup: Setup,
        dtype: torch.dtype = torch.float32,
        start: Start | None = None,
    ) -> None:
        self.supernet = network(name, setup).to(dtype)
        alphas = self.supernet.initial_alphas(0)
        images, self.labels = setup.images(0, MEMORY_FORMATS[name])
        if start is not None:
            self.supernet.load_state_dict(start.supernet)
            alphas, (images, self.labels) = start.alphas, start.batch
        self.alphas = {
            kind: alpha.detach().to(dtype, copy=True).requires_grad_()
            for kind, alpha in alphas.items()
        }
        self.images = images.to(dtype, memory_format=MEMORY_FORMATS[name])
        self.supernet.requires_grad_(False)
        self.draws = Draws(0)

    def __call__(self) -> Tensor:
        return self.of(*self.alphas.values())

    def of(self, *alphas: Tensor) -> Tensor:
        """Return the loss at other alphas, in the order of self.alphas."""
        return F.cross_entropy(self.logits(self.images, alphas), self.labels)

    def logits(self, images: Tensor, alphas: tuple[Tensor, ...]) -> Tensor:
        """Return the supernet's logits [N, classes]."""
        weights = softmax_weights(dict(zip(self.alphas, alphas, strict=True)))
        logits: Tensor = self.supernet(images, weights, self.draws)
        return logits

    def gradient(self, *, create_graph: bool = False) -> list[Tensor]:
        """Return the alphas' gradient."""
        alphas = list(self.alphas.values())
        return list(torch.autograd.grad(self(), alphas, create_graph=create_graph))

    def row(self, gradient: list[Tensor], kind: int, entry: int) -> list[Tensor]:
        """Return a row of the Hessian from a gradient with its graph."""
        number = gradient[kind].reshape(-1)[entry]
        alphas = list(self.alphas.values())
        return list(torch.autograd.grad(number, alphas, retain_graph=True, materialize_grads=True))

    def operator(self) -> Operator:
        """Return our Hessian as an operator."""
        return self.supernet.hessian_operator(self.alphas, self.images, self.labels, self.draws)

    def hessian(self) -> Tensor:
        """Return our Hessian."""
        return hessian(self.operator())

    def top(self, start: int = 0) -> TopEigenvalue:
        """Return our largest eigenvalue."""
        return self.top_of(self.operator(), start)

    def top_of(self, operator: Operator, start: int = 0) -> TopEigenvalue:
        """Return the largest eigenvalue of an operator over these alphas; `start` is the seed of
        the vector that Lanczos starts with.
        """
        null_space = softmax_null_space([(a.shape[0], a.shape[1]) for a in self.alphas.values()])
        generator = torch.Generator().manual_seed(start)
        return top_eigenvalue(operator, null_space=null_space, generator=generator)


class Products:
    """The Hessian over a loss's alphas, by what multiplies it with [P] or [P, V] of the loss's
    dtype.
    """

    def __init__(self, loss: Loss, multiply: Callable[[Tensor], Tensor]) -> None:
        size = sum(alpha.numel() for alpha in loss.alphas.values())
        self.shape = size, size
        self._like, self._multiply = loss.images, multiply

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._multiply(v.to(self._like)).to(v)


def by_rows(loss: Loss) -> Operator:
    """Return the Hessian of the row loop: the gradient's graph is made once."""
    return HessianOperator(loss, list(loss.alphas.values()))


def by_vmap(loss: Loss) -> Operator:
    """Return the Hessian by torch.func. The loss's network loses its running statistics."""
    _prepare(loss)
    alphas = tuple(alpha.detach() for alpha in loss.alphas.values())
    gradient = torch.func.grad(loss.of, argnums=tuple(range(len(alphas))))

    def product(v: Tensor) -> Tensor:  # [P] -> [P]
        parts = v.split([alpha.numel() for alpha in alphas])
        along = tuple(part.view_as(alpha) for part, alpha in zip(parts, alphas, strict=True))
        return flat(torch.func.jvp(gradient, alphas, along)[1])

    columns = torch.func.vmap(product, in_dims=1, out_dims=1, chunk_size=1, randomness="same")
    return Products(loss, lambda v: columns(v.reshape(len(v), -1)).view(v.shape))


class OverAlphas(nn.Module):
    """The logits of a loss's network, as a module whose parameters are the alphas alone."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.alphas = nn.ParameterList(alpha.detach() for alpha in loss.alphas.values())
        self._logits = loss.logits

    def forward(self, images: Tensor) -> Tensor:
        return self._logits(images, tuple(self.alphas))


def by_curvlinops(loss: Loss) -> Operator:
    """Return the Hessian of curvlinops. The loss's network loses its running statistics. Raises
    UserError where the package is not installed.
    """
    try:
        with _deprecated_script():
            from curvlinops import HessianLinearOperator
    except ImportError as error:
        raise UserError(
            'baseline "curvlinops" is not installed: pip install curvlinops-for-pytorch, '
            'or --baselines "row loop,vmap"'
        ) from error
    _prepare(loss)
    module = OverAlphas(loss)
    operator = HessianLinearOperator(
        module,
        nn.CrossEntropyLoss(),
        list(module.parameters()),
        [(loss.images, loss.labels)],
        check_deterministic=False,  # two products more; a baseline's noise is drawn anew
    )
    return Products(loss, operator.__matmul__)


def _prepare(loss: Loss) -> None:
    """Make the loss what torch.func can differentiate, and let that load what its jvp needs."""
    loss()  # where draws are kept, they are drawn here
    torch.func.replace_all_batch_norm_modules_(loss.supernet)
    with _deprecated_script():
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


@contextmanager
def _deprecated_script() -> Iterator[None]:
    """Silence torch about torch.jit.script, which its own jvp and what curvlinops needs use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
        yield


BASELINES: Mapping[str, Callable[[Loss], Operator]] = {
    "row loop": by_rows,
    "vmap": by_vmap,
    "curvlinops": by_curvlinops,
}
