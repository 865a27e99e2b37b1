"""The curvature of the validation loss over the alphas, at the end of epochs (paper, section 2.2).

What is measured is what the published code measures: the Hessian of the loss on the last batch that
the alphas saw in the epoch, augmented and in train mode, at the weights after it; with the alphas'
weight decay on the diagonal, which shifts every eigenvalue by that.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdarts_fast import curvature
from rdarts_fast.config import SearchConfig
from rdarts_fast.curvature.operators import LossOperator, flat


def due(settings: SearchConfig, epoch: int) -> bool:
    """Whether the end of `epoch` has a measurement: every few epochs, and the last."""
    if settings.curvature == "off":
        return False
    return epoch % settings.curvature_every == 0 or epoch == settings.epochs - 1


@dataclass(frozen=True)
class Measurement:
    """What a measurement adds to the epoch's record, and with "full" H [P, P] and g [P]."""

    record: dict[str, Any]
    arrays: dict[str, Tensor] = field(default_factory=dict)

    def to_npz(self) -> bytes:
        """Return the arrays as a file of numpy's."""
        buffer = io.BytesIO()
        arrays: Any = {name: array.numpy() for name, array in self.arrays.items()}
        np.savez(buffer, **arrays)
        return buffer.getvalue()


def measure(
    settings: SearchConfig, operator: LossOperator, alphas: Sequence[Tensor], started: float
) -> Measurement:
    """Return lambda_max and what else `--curvature` asks for.

    operator: of the validation loss over `alphas` ([E, O] each). started: time.monotonic() when
    its making began. Raises FloatingPointError where the Hessian is not finite.
    """
    shift = settings.alpha_weight_decay if settings.curvature_decay else 0.0
    record: dict[str, Any] = {}
    arrays: dict[str, Tensor] = {}
    if settings.curvature == "lambda":
        null = curvature.softmax_null_space([(a.shape[0], a.shape[1]) for a in alphas])
        top = curvature.top_eigenvalue(operator, null_space=null)
        ends = [top.value + shift, top.absolute + shift]
        record["curvature_products"] = top.products
    else:
        matrix = curvature.hessian(operator).to("cpu", torch.float64)
        matrix = matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype)
        values = torch.linalg.eigvalsh(matrix)
        ends = [float(values[-1]), float(values[0])]
        record["eigenvalues"] = values.tolist()
        if settings.curvature == "full":
            arrays["H"] = matrix
            gradient = operator.gradient + shift * flat([alpha.detach() for alpha in alphas])
            arrays["g"] = gradient.to("cpu", torch.float64)
    record["lambda_max"] = ends[0]
    record["lambda_abs"] = max(ends, key=abs)
    record["curvature_seconds"] = round(time.monotonic() - started, 3)
    return Measurement(record, arrays)
