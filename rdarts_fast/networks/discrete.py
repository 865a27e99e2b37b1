"""The network that a genotype stands for, trained from scratch (paper, appendix B.1; DARTS's
NetworkCIFAR).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import SITE_NETWORK, Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks.operations import (
    OPERATIONS,
    Noise,
    apply,
    drop_path_factors,
    preprocess,
    stem,
)
from rdarts_fast.networks.supernet import SITES_PER_CELL, STEM_MULTIPLIER, is_reduction
from rdarts_fast.networks.trained_network import TrainedNetwork
from rdarts_fast.spaces import INPUTS

AUXILIARY_SMALLEST = 4  # the auxiliary head needs a feature map of at least this size


def auxiliary_fits(size: tuple[int, int]) -> bool:
    """Whether an image of this height and width, halved twice, is large enough for the head."""
    return min((side + 3) // 4 for side in size) >= AUXILIARY_SMALLEST


class DiscreteCell(nn.Module):
    """A cell with the genotype's operations only; batch norms with affine, none after pools."""

    def __init__(
        self,
        genotype: Genotype,
        kind: str,
        inputs: tuple[int, int],
        channels: int,
        shrunk: bool,
        site: int,
    ) -> None:
        super().__init__()
        self.site = site
        self.preprocess0 = preprocess(inputs[0], channels, shrunk, affine=True)
        self.preprocess1 = preprocess(inputs[1], channels, False, affine=True)
        self.sources = [[source for _, source in node] for node in genotype.cells[kind]]
        self.operations = nn.ModuleList()
        for e, (source, _, name) in enumerate(genotype.edges(kind)):
            stride = 2 if kind == "reduce" and source < INPUTS else 1
            operation = OPERATIONS[name](channels, stride, True)
            if isinstance(operation, Noise):
                operation.site = site + 1 + e
            self.operations.append(operation)

    def factors(self, images: Tensor, draws: Draws, drop_path: float) -> Tensor | None:
        """Return drop path's factors of a batch, [E, N]; None where there are none."""
        if drop_path == 0.0 or not self.training:
            return None
        return drop_path_factors(draws, self.site, len(self.operations), images, drop_path)

    def forward(
        self, s0: Tensor, s1: Tensor, draws: Draws | None, factors: Tensor | None
    ) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        e = 0
        for sources in self.sources:
            terms = []
            for source in sources:
                operation = self.operations[e]
                term = apply(operation, states[source], draws)
                if factors is not None and not isinstance(operation, nn.Identity):
                    term = term * factors[e].view(-1, 1, 1, 1).to(term.dtype)
                terms.append(term)
                e += 1
            states.append(sum(terms[1:], terms[0]))
        return torch.cat(states[INPUTS:], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds up, in train mode only: as published at 8x8, pooled adaptively
    elsewhere.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if x.shape[2:] == (8, 8):
            x = F.avg_pool2d(x, 5, stride=3, count_include_pad=False)
        else:
            x = F.adaptive_avg_pool2d(x, 2)
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class Network(TrainedNetwork):
    """The network of `genotype` with `layers` cells of `channels` channels at the start (paper,
    appendix B.1).

    Call it on images [N, C, H, W]: logits [N, classes]; in train mode with `auxiliary`: (logits,
    auxiliary logits), the second None where the feature map is below 4x4. `drop_path_prob` as in
    the supernet, never on an identity.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 16,
        layers: int = 8,
        classes: int = 10,
        auxiliary: bool = False,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if min(channels, layers, classes, image_channels) < 1:
            raise ValueError("channels, layers, classes and image_channels need to be at least 1")
        self.genotype = genotype
        self.stem = stem(image_channels, STEM_MULTIPLIER * channels)
        inputs = (STEM_MULTIPLIER * channels, STEM_MULTIPLIER * channels)
        self.cells = nn.ModuleList()
        shrunk = False
        self.auxiliary_at = 2 * layers // 3
        self.auxiliary: AuxiliaryHead | None = None
        for i in range(layers):
            kind = "reduce" if is_reduction(i, layers) else "normal"
            channels *= 2 if kind == "reduce" else 1
            site = SITE_NETWORK + i * SITES_PER_CELL
            self.cells.append(DiscreteCell(genotype, kind, inputs, channels, shrunk, site))
            inputs = (inputs[1], genotype.nodes * channels)
            shrunk = kind == "reduce"
            if auxiliary and i == self.auxiliary_at:
                self.auxiliary = AuxiliaryHead(inputs[1], classes)
        self.classifier = nn.Linear(inputs[1], classes)

    def forward(
        self, images: Tensor, draws: Draws | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        if draws is None:
            draws = Draws(seed=int(torch.randint(2**62, ())))
        factors = [cell.factors(images, draws, self.drop_path_prob) for cell in self._cells()]
        return self._compute(images, draws if self.draws_noise else None, factors)

    @property
    def uses_all(self) -> bool:
        """Whether the result depends on all parameters: every cell reads both its inputs."""
        for nodes in self.genotype.cells.values():
            read = {source for node in nodes for name, source in node if name != "noise"}
            if not set(range(INPUTS)) <= read:
                return False
        return True

    @property
    def draws_noise(self) -> bool:
        """Whether an operation of the genotype is noise."""
        return any(isinstance(module, Noise) for module in self.modules())

    def compile(self, *given: Any, **more: Any) -> None:
        """Let torch.compile take all but the draws, from now on. Raises UserError for a genotype
        with noise, which draws inside.
        """
        if self.draws_noise:
            raise UserError("--compile: the genotype has noise, which cannot be compiled")
        self._compute = torch.compile(self._compute, *given, **more)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        # What was compiled is bound to this network: a copy would compute with its weights.
        return {name: value for name, value in self.__dict__.items() if name != "_compute"}

    def _cells(self) -> list[DiscreteCell]:
        return [cell for cell in self.cells if isinstance(cell, DiscreteCell)]

    def _compute(
        self, images: Tensor, draws: Draws | None, factors: Sequence[Tensor | None]
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        s0 = s1 = self.stem(images)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, draws, factors[i])
            if self.training and self.auxiliary is not None and i == self.auxiliary_at:
                fits = min(s1.shape[2:]) >= AUXILIARY_SMALLEST
                auxiliary = self.auxiliary(s1) if fits else None
        logits: Tensor = self.classifier(s1.mean(dim=(2, 3)))
        return (logits, auxiliary) if self.training and self.auxiliary is not None else logits
