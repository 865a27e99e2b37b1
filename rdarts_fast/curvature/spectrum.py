"""Eigenvalues of a symmetric operator: all of them, the largest, their sum and their density.

The quantity of the paper (section 2.2, figure 4) is lambda_max, the largest *signed* eigenvalue of
the validation loss's Hessian with respect to the alphas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rdarts_fast.curvature.operators import DenseOperator, Operator

USUAL_PRODUCTS = 8.0  # that Lanczos needs for lambda_max to 1e-3 on a trained supernet
_CHUNK = 8  # columns of the identity a product takes at once


def hessian(operator: Operator) -> Tensor:
    """Return the whole matrix, [P, P], symmetric: the operator's own way where it has one, else P
    products.

    Raises FloatingPointError where it is not finite.
    """
    if isinstance(operator, DenseOperator):
        matrix = operator.dense()
    else:
        columns = torch.eye(operator.shape[0], dtype=torch.float64).split(_CHUNK, dim=1)
        matrix = torch.cat([operator @ column for column in columns], dim=1)
    _check_finite(matrix)
    return (matrix + matrix.t()) / 2.0


def spectrum(operator: Operator) -> Tensor:
    """Return all eigenvalues, [P], ascending, float64. Raises as `hessian`."""
    values: Tensor = torch.linalg.eigvalsh(hessian(operator).to("cpu", torch.float64))
    return values


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest signed eigenvalue.

    vector: [P], of unit length. residual: |H vector - value vector|. absolute: of the eigenvalues
    found on the way the one of largest absolute value, with its sign; exact where the whole matrix
    was computed, else at most that in size. products: how many it took (a whole matrix counts as
    what it costs).
    """

    value: float
    vector: Tensor
    residual: float
    absolute: float
    products: float


def top_eigenvalue(
    operator: Operator,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    *,
    null_space: Tensor | None = None,
    generator: torch.Generator | None = None,
    most_products: int | None = None,
) -> TopEigenvalue:
    """Return the largest signed eigenvalue to about max(rtol x its size, atol), by Lanczos with
    full re-orthogonalisation; the whole matrix where that is cheaper.

    A Ritz value theta with residual r and distance `gap` to the next is off by at most
    min(r, r^2 / gap); once that is small, one more product makes sure. null_space: [P, K]
    orthonormal columns known to have eigenvalue 0, which the search leaves out; 0 is then the least
    answer. generator: of the start vector [seed 0]. most_products: P where None. Raises
    FloatingPointError where a product is not finite.
    """
    size = operator.shape[0]
    if size == 0:
        raise ValueError("operator: expected at least one row")
    if null_space is not None and null_space.shape[1] >= size:
        return TopEigenvalue(0.0, null_space[:, 0], 0.0, 0.0, 0.0)
    if isinstance(operator, DenseOperator) and operator.dense_products <= USUAL_PRODUCTS:
        return _dense_top(operator, operator.dense_products, null_space)
    if size <= USUAL_PRODUCTS:
        return _dense_top(operator, float(size), null_space)
    krylov = Krylov(operator, _start(size, null_space, generator), null_space)
    sure = False
    most = size if most_products is None else most_products
    theta, weights = krylov.ritz()
    while not krylov.complete and krylov.products < most:
        krylov.extend()
        theta, weights = krylov.ritz()
        error = _error_bound(theta, krylov.residual(weights))
        settled = error <= max(rtol * abs(float(theta[-1])), atol)
        if settled and sure:
            break
        sure = settled
    return _top_of(krylov, theta, weights, null_space)


def _dense_top(operator: Operator, products: float, null_space: Tensor | None) -> TopEigenvalue:
    matrix = hessian(operator).to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    vector, value = vectors[:, -1], float(values[-1])
    residual = float(torch.linalg.vector_norm(matrix @ vector - value * vector))
    absolute = float(values[values.abs().argmax()])
    if null_space is not None:
        value = max(value, 0.0)
    return TopEigenvalue(value, vector, residual, absolute, products)


def _top_of(
    krylov: Krylov, theta: Tensor, weights: Tensor, null_space: Tensor | None
) -> TopEigenvalue:
    value, residual = float(theta[-1]), krylov.residual(weights)
    absolute = float(theta[theta.abs().argmax()])
    vector = krylov.basis() @ weights
    if null_space is not None and value < 0.0:
        value, vector, residual = 0.0, null_space[:, 0].to(vector), 0.0
    return TopEigenvalue(value, vector, residual, absolute, float(krylov.products))


def _error_bound(theta: Tensor, residual: float) -> float:
    """Return how far the largest Ritz value can be from an eigenvalue."""
    if len(theta) < 2:
        return residual
    gap = float(theta[-1] - theta[-2])
    return min(residual, residual**2 / gap) if gap > 0.0 else residual


def _start(size: int, null_space: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    if null_space is not None:
        v -= null_space @ (null_space.t() @ v)
    unit: Tensor = v / torch.linalg.vector_norm(v)
    return unit


class Krylov:
    """Lanczos' orthonormal basis of the products of an operator with a start vector of unit length,
    in which the operator is a tridiagonal matrix.

    `complete` once the basis holds every product: its Ritz values are then eigenvalues.
    """

    def __init__(self, operator: Operator, start: Tensor, null_space: Tensor | None) -> None:
        self._operator, self._null_space = operator, null_space
        self._basis: list[Tensor] = []
        self._next = start  # what to extend it by
        self._diagonal: list[float] = []
        self._beside: list[float] = []  # the diagonal's neighbours; the last belongs to _next
        self.complete = False
        self.extend()

    @property
    def products(self) -> int:
        """How many there were."""
        return len(self._basis)

    def extend(self) -> None:
        """Add a vector to the basis, by one product."""
        q = self._next
        self._basis.append(q)
        product = (self._operator @ q).to("cpu", torch.float64)
        _check_finite(product)
        self._diagonal.append(float(q @ product))
        size = float(torch.linalg.vector_norm(product))
        for _ in range(2):  # twice is enough
            for columns in (self.basis(), self._null_space):
                if columns is not None:
                    product = product - columns @ (columns.t() @ product)
        length = float(torch.linalg.vector_norm(product))
        self._beside.append(length)
        # Products in float32 leave more than this; the basis then grows by harmless rounding.
        self.complete = length <= 1e-12 * size or length == 0.0
        if not self.complete:
            self._next = product / length

    def basis(self) -> Tensor:
        """Return the vectors, [P, K]."""
        return torch.stack(self._basis, dim=1)

    def decomposition(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values [K], ascending, and their vectors in the basis, [K, K]."""
        matrix = torch.diag(torch.tensor(self._diagonal, dtype=torch.float64))
        beside = torch.tensor(self._beside[:-1], dtype=torch.float64)
        matrix = matrix + torch.diag(beside, 1) + torch.diag(beside, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values [K], ascending, and the largest one's vector in the basis, [K]."""
        values, vectors = self.decomposition()
        return values, vectors[:, -1]

    def residual(self, weights: Tensor) -> float:
        """Return |H x - theta x| for the Ritz vector x of these weights."""
        return 0.0 if self.complete else self._beside[-1] * abs(float(weights[-1]))


def trace(
    operator: Operator, samples: int | None = None, generator: torch.Generator | None = None
) -> float:
    """Return the sum of the eigenvalues: exactly, or as Hutchinson's estimate from `samples`
    products with random signs (mean of v H v; Hutchinson, 1990).

    Raises FloatingPointError where a product is not finite.
    """
    if samples is None:
        return float(hessian(operator).diagonal().double().sum())
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    generator = generator or torch.Generator().manual_seed(0)
    shape = (operator.shape[0], samples)
    signs = torch.randint(0, 2, shape, generator=generator).double() * 2.0 - 1.0  # [P, samples]
    products = operator @ signs
    _check_finite(products)
    return float((signs * products.to(signs)).sum() / samples)


@dataclass(frozen=True)
class SpectralDensity:
    """A density of eigenvalues: values [points] and densities [points], whose integral is 1."""

    values: Tensor
    densities: Tensor


def spectral_density(
    operator: Operator,
    probes: int = 4,
    steps: int = 30,
    *,
    points: int = 512,
    width: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Return the density of the eigenvalues by stochastic Lanczos quadrature (Lin, Saad and Yang,
    2016), smoothed by a Gaussian.

    It takes probes x steps products. width: of the Gaussian, in eigenvalues [a hundredth of their
    range]. Raises FloatingPointError where a product is not finite.
    """
    if min(probes, steps, points) < 1:
        raise ValueError("probes, steps and points: expected at least 1")
    generator = generator or torch.Generator().manual_seed(0)
    nodes, weights = [], []
    for _ in range(probes):
        krylov = Krylov(operator, _start(operator.shape[0], None, generator), None)
        while not krylov.complete and krylov.products < min(steps, operator.shape[0]):
            krylov.extend()
        values, vectors = krylov.decomposition()
        nodes.append(values)
        weights.append(vectors[0] ** 2 / probes)
    node, weight = torch.cat(nodes), torch.cat(weights)
    span = float(node.max() - node.min())
    scale = width or max(span / 100.0, 1e-12 + 1e-3 * float(node.abs().max()))
    grid = torch.linspace(
        float(node.min()) - 5.0 * scale, float(node.max()) + 5.0 * scale, points
    ).double()
    bumps = torch.exp(-0.5 * ((grid[:, None] - node) / scale) ** 2)
    densities = (bumps * weight).sum(dim=1) / (scale * (2.0 * torch.pi) ** 0.5)
    return SpectralDensity(grid, densities)


def _check_finite(found: Tensor) -> None:
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError("the Hessian has values that are not finite")
