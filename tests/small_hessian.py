"""A small supernet whose Hessian can be computed in several ways."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast import bilevel
from rdarts_fast.curvature import HessianOperator, hessian
from rdarts_fast.draws import Draws
from rdarts_fast.networks import Supernet, softmax_weights
from rdarts_fast.networks.hessian import SupernetHessian
from rdarts_fast.spaces import OPERATIONS, Space

DOUBLE = torch.float64

# Every operation on each edge of cells with one node: the darts space's 224 rows take two minutes.
ALL = Space("all", 1, dict.fromkeys(("normal", "reduce"), (OPERATIONS,) * 2))
SPACES: list[Space | str] = ["s1", "s2", "s3", "s4", "s5", ALL]


class Net:
    """A small supernet in float64 and a batch; the published network and the one on kernels have
    the same weights.
    """

    def __init__(
        self, space: Space | str, backend: str, dtype: torch.dtype = DOUBLE, seed: int = 1
    ) -> None:
        torch.manual_seed(seed)
        self.supernet = Supernet(space, 4, 3, classes=5, backend=backend).to(dtype)
        self.supernet.drop_path_prob = 0.3
        generator = torch.Generator().manual_seed(2)
        self.alphas = [
            (300.0 * alpha.detach()).requires_grad_()  # far from the middle of softmax
            for alpha in self.supernet.initial_alphas(3).values()
        ]
        self.images = torch.randn(6, 3, 8, 8, generator=generator, dtype=DOUBLE).to(dtype)
        self.labels = torch.randint(5, (6,), generator=generator)

    def loss(self) -> Tensor:
        weights = softmax_weights(dict(zip(("normal", "reduce"), self.alphas, strict=True)))
        return F.cross_entropy(self.supernet(self.images, weights, Draws(7)), self.labels)

    def hessian(self) -> Tensor:
        parameters, buffers = list(self.supernet.parameters()), list(self.supernet.buffers())
        with bilevel.unchanged(buffers), bilevel.frozen(parameters):
            return hessian(HessianOperator(self.loss, self.alphas))

    def operator(self, draws: Draws = Draws(7), **more: Any) -> SupernetHessian | HessianOperator:  # noqa: B008
        alphas = dict(zip(("normal", "reduce"), self.alphas, strict=True))
        return self.supernet.hessian_operator(alphas, self.images, self.labels, draws, **more)

    def by_rows(self) -> Tensor:
        """Return the Hessian by differentiating twice, a row at a time."""
        gradient = torch.autograd.grad(self.loss(), self.alphas, create_graph=True)
        rows = [
            torch.cat(
                [
                    row.reshape(-1)
                    for row in torch.autograd.grad(entry, self.alphas, retain_graph=True)
                ]
            )
            for part in gradient
            for entry in part.reshape(-1)
        ]
        return torch.stack(rows)
