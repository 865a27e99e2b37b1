"""Curvature of a loss over the alphas: the Hessian as an operator, its eigenvalues, and the rule
that stops a search when the largest one grows.
"""

from rdarts_fast.curvature.operators import (
    DenseOperator,
    HessianOperator,
    Operator,
    softmax_null_space,
)
from rdarts_fast.curvature.spectrum import (
    SpectralDensity,
    TopEigenvalue,
    hessian,
    spectral_density,
    spectrum,
    top_eigenvalue,
    trace,
)
from rdarts_fast.curvature.stopping import EigenvalueTrace

__all__ = [
    "DenseOperator",
    "EigenvalueTrace",
    "HessianOperator",
    "Operator",
    "SpectralDensity",
    "TopEigenvalue",
    "hessian",
    "softmax_null_space",
    "spectral_density",
    "spectrum",
    "top_eigenvalue",
    "trace",
]
