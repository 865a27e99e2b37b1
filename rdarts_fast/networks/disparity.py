"""AutoDispNet-C: the disparity of a stereo pair, by searched cells (paper, appendix D; Saikia et
al., ICCV 2019; operations/corr_net.py of its code).

    both views   7x7 and 5x5 convolution of stride 2, a reduction cell         1/8 of the size
    correlation  of the two along the rows, ReLU
    encoder      cells N R N R N R of 2, 4, 4, 8, 8, 16 times C channels       1/8 .. 1/64
    decoder      upsampling cells of 8, 4, 2, 1 times C                        1/32 .. 1/4
    heads        3x3 convolution to min(0, x) after the encoder and each upsampling cell

Heads give negative numbers, as published; what a network returns
is their opposite, in pixels of the images it is given: left[y, x] shows what right[y, x - d] shows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import SITE_NETWORK, Draws
from rdarts_fast.errors import UserError, unknown
from rdarts_fast.genotype import Genotype
from rdarts_fast.kernels.correlation import correlation, correlation_twin, displacements
from rdarts_fast.networks.disparity_cells import (
    DisparityCell,
    DisparityDiscreteCell,
    DisparitySearchCell,
    cell_factors,
)
from rdarts_fast.networks.disparity_operations import convolution, he
from rdarts_fast.networks.search_network import SearchNetwork, Weights
from rdarts_fast.networks.supernet import BACKENDS, SITES_PER_CELL, sharing
from rdarts_fast.networks.trained_network import TrainedNetwork
from rdarts_fast.spaces import CELLS, FAMILIES, Space, load_space

CELL_TYPES = FAMILIES["disparity"]
DIVISOR = 64  # the encoder halves height and width six times
VIEWS = 2
ENCODER = ("normal", "reduce") * 3
MOST_DECODERS = 4
Run = Callable[[nn.Module, Sequence[Tensor], int], Tensor]


class Disparities(NamedTuple):
    """What a network makes of a batch, all in pixels of the images given, 0 or more.

    final: [N, H, W]. levels: the predictions from coarse to fine, [N, h, w] each: of 1/64, 1/32, ..
    of the size, H and W rounded up to multiples of 64. The last, enlarged, is the final one.
    """

    final: Tensor
    levels: tuple[Tensor, ...]


@dataclass(frozen=True)
class DisparitySettings:
    """The settings of a disparity network.

    channels: C. The released networks have 42, AutoDispNet searched with 24; the paper does not
    say, but the 9.4 to 13.9 M parameters that it counts fit 24 (over `disparity_small` 6.0 to
    18.1 M), not 42 (18.3 to 55.1 M). decoders: upsampling cells, 1 to 4; AutoDispNet searched with
    3.
    max_displacement: of the correlation, in pixels of 1/8 of the size, to both
    sides (with `one_sided`: to where the right view can have what the left one shows). batch_norm:
    after every leaky ReLU; the released networks have none, what the paper searched with is not
    known. initial_disparity: what a fresh network predicts, but for the weights of its heads: their
    biases are its opposite. At 0, as published, a head may begin with nothing but positive numbers,
    where min(0, x) hands no gradient back.
    """

    channels: int = 24
    image_channels: int = 3
    decoders: int = MOST_DECODERS
    max_displacement: int = 40
    one_sided: bool = False
    batch_norm: bool = False
    initial_disparity: float = 0.0

    def __post_init__(self) -> None:
        if min(self.channels, self.image_channels) < 1:
            raise ValueError("channels and image_channels need to be at least 1")
        if not 1 <= self.decoders <= MOST_DECODERS:
            raise ValueError(f"decoders: expected 1 to {MOST_DECODERS}, got {self.decoders}")
        if self.max_displacement < 0:
            raise ValueError(f"max_displacement: expected 0 or more, got {self.max_displacement}")
        if not 0.0 <= self.initial_disparity < math.inf:
            raise ValueError(f"initial_disparity: expected 0 or more, got {self.initial_disparity}")

    @property
    def stem(self) -> tuple[int, int]:
        """The channels of the two convolutions: 64 and 128 for C = 42."""
        first = max(1, self.channels * 64 // 42)
        return first, 2 * first


class DisparityNet(nn.Module):
    """What the supernet and the discrete network have in common: all but what a cell does.

    backend: "fused" correlates the views on a kernel, "reference" by unfolded rows.
    """

    def build(self, settings: DisparitySettings, nodes: int, backend: str) -> None:
        """Make the modules."""
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        self.settings, self.nodes, self.backend = settings, nodes, backend
        affine = True if settings.batch_norm else None
        small, large = settings.stem
        self.stem = nn.Sequential(
            convolution(settings.image_channels, small, 7, 2, affine),
            convolution(small, large, 5, 2, affine),
        )
        self._site = SITE_NETWORK
        channels = 2 * settings.channels
        self.features = self._next_cell("reduce", (large, large), channels, "same")
        feature = nodes * channels
        _, count = displacements(settings.max_displacement, settings.one_sided)
        inputs, first = (VIEWS * feature, count), "same"
        skips = [large, feature]  # the encoder's features of 1/4, 1/8, .. of the size
        self.encoder = nn.ModuleList()
        for kind in ENCODER:
            channels *= 2 if kind == "reduce" else 1
            self.encoder.append(self._next_cell(kind, inputs, channels, first))
            inputs, first = (inputs[1], nodes * channels), "same"
            if kind == "reduce":
                first = "larger"
                skips.append(nodes * channels)
        self.heads = nn.ModuleList([_head(inputs[1], settings.initial_disparity)])
        inputs, first = (inputs[1], inputs[1]), "same"
        self.decoder = nn.ModuleList()
        for i in range(settings.decoders):
            channels //= 2
            given = (*inputs, 1, skips[-2 - i])
            self.decoder.append(self._next_cell("upsample", given, channels, first))
            inputs, first = (inputs[1], nodes * channels), "smaller"
            self.heads.append(_head(inputs[1], settings.initial_disparity))

    @abstractmethod
    def make_cell(
        self, kind: str, inputs: Sequence[int], channels: int, first: str, site: int
    ) -> DisparityCell:
        """Return a cell; its draws have the sites from `site` on."""

    def _next_cell(
        self, kind: str, inputs: Sequence[int], channels: int, first: str
    ) -> DisparityCell:
        site, self._site = self._site, self._site + SITES_PER_CELL
        return self.make_cell(kind, inputs, channels, first, site)

    def predict(self, views: Tensor, run: Run) -> Disparities:
        """Return the disparities of views [N, 2, C, H, W], left before right.

        run: (cell, its inputs, times) -> its result; times is 2 where the cell sees both views of
        each sample, one after the other. H and W may be anything: the images are resized to
        multiples of 64, and disparities rescaled by the ratio of the widths (AutoDispNet's
        operations/common.py). Raises ValueError for another shape.
        """
        wanted = (VIEWS, self.settings.image_channels)
        if views.dim() != 5 or tuple(views.shape[1:3]) != wanted:
            expected = f"[N, 2, {wanted[1]}, H, W]"
            raise ValueError(f"views: expected {expected}, got shape {tuple(views.shape)}")
        n, (height, width) = views.shape[0], views.shape[3:]
        images = views.transpose(0, 1).flatten(0, 1)  # [2 N, C, H, W]
        resized = [-(-size // DIVISOR) * DIVISOR for size in (height, width)]
        if resized != [height, width]:
            images = F.interpolate(images, resized, mode="bilinear")
        quarter = self.stem(images)
        left, right = run(self.features, [quarter, quarter], VIEWS).chunk(VIEWS)
        skips = [quarter[:n], left]
        s0, s1 = torch.cat([left, right], dim=1), F.relu(self.correlate(left, right))
        for kind, cell in zip(ENCODER, self.encoder, strict=True):
            s0, s1 = s1, run(cell, [s0, s1], 1)
            if kind == "reduce":
                skips.append(s1)
        s0 = s1
        levels = [self.heads[0](s1).clamp(max=0.0)]  # [N, 1, h, w]
        for i, cell in enumerate(self.decoder):
            s0, s1 = s1, run(cell, [s0, s1, levels[-1], skips[-2 - i]], 1)
            levels.append(self.heads[i + 1](s1).clamp(max=0.0))
        positive = [level * (-width / resized[1]) for level in levels]
        final = F.interpolate(positive[-1], (height, width), mode="bilinear")
        return Disparities(final.squeeze(1), tuple(level.squeeze(1) for level in positive))

    def correlate(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the correlation of the views' features, [N, displacements, h, w]."""
        first, count = displacements(self.settings.max_displacement, self.settings.one_sided)
        compute = correlation if self.backend == "fused" else correlation_twin
        return compute(left, right, first, count)


def _head(channels: int, disparity: float) -> nn.Module:
    head = nn.Conv2d(channels, 1, 3, padding=1)
    he(head)
    assert head.bias is not None
    nn.init.constant_(head.bias, -disparity)
    return head


class DisparitySupernet(DisparityNet, SearchNetwork):
    """The search network over `space`, a Space of three cell types or the name of one.

    Call it on views [N, 2, C, H, W] and the operations' weights. `drop_path_prob` is the
    probability of dropping an edge per sample, in train mode only. Raises UserError for an unknown
    backend and a space of other cells.
    """

    def __init__(
        self, space: Space | str, settings: DisparitySettings | None = None, backend: str = "fused"
    ) -> None:
        super().__init__(load_space(space) if isinstance(space, str) else space)
        if self.space.task != "disparity":
            found = ", ".join(self.space.cells)
            raise UserError(f"space {self.space.name}: cells for disparity needed, has {found}")
        self.build(settings or DisparitySettings(), self.space.nodes, backend)

    def make_cell(
        self, kind: str, inputs: Sequence[int], channels: int, first: str, site: int
    ) -> DisparityCell:
        norm = self.settings.batch_norm
        return DisparitySearchCell(self.space, kind, inputs, channels, first, site, norm)

    def forward(self, views: Tensor, weights: Weights, draws: Draws | None = None) -> Disparities:
        """Return the disparities under the operations' weights: cell type -> [E, O],
        differentiable.

        draws: the key of drop path and noise; without one, a fresh key from torch's generator.
        Raises ValueError where a shape does not fit.
        """
        self.check_weights(weights)
        drawn = Draws(seed=int(torch.randint(2**62, ()))) if draws is None else draws

        def run(cell: nn.Module, inputs: Sequence[Tensor], times: int) -> Tensor:
            assert isinstance(cell, DisparitySearchCell)
            factors = cell_factors(cell, views, drawn, self.drop_path_prob, times)
            result: Tensor = cell(inputs, weights[cell.kind], drawn, factors)
            return result

        return self.predict(views, run)

    def restricted(self, weights: Weights) -> DisparitySupernet:
        """Return this supernet with `none` for every candidate whose weight is 0: it computes the
        others alone, on the same modules.

        Raises ValueError where a shape does not fit.
        """
        self.check_weights(weights)
        part = sharing(self)
        for name in ("encoder", "decoder"):
            cells = [cell.restricted(weights[cell.kind]) for cell in _search_cells(self, name)]
            part._modules[name] = nn.ModuleList(cells)
        assert isinstance(self.features, DisparitySearchCell)
        part.features = self.features.restricted(weights[self.features.kind])
        return part


def _search_cells(net: nn.Module, name: str) -> list[DisparitySearchCell]:
    cells = net._modules[name]
    assert isinstance(cells, nn.ModuleList)
    return [cell for cell in cells if isinstance(cell, DisparitySearchCell)]


class DisparityNetwork(DisparityNet, TrainedNetwork):
    """The network of `genotype`, trained from scratch.

    Call it on views [N, 2, C, H, W]. `drop_path_prob` as in the supernet, never on an identity.
    Raises UserError for an unknown backend and a genotype of other cells.
    """

    def __init__(
        self, genotype: Genotype, settings: DisparitySettings | None = None, backend: str = "fused"
    ) -> None:
        if set(genotype.cells) != set(CELL_TYPES):
            found = ", ".join(genotype.cells)
            raise UserError(f"genotype: cells for disparity needed, has {found}")
        super().__init__()
        self.genotype = genotype
        self.build(settings or DisparitySettings(), genotype.nodes, backend)

    def make_cell(
        self, kind: str, inputs: Sequence[int], channels: int, first: str, site: int
    ) -> DisparityCell:
        norm = self.settings.batch_norm
        return DisparityDiscreteCell(self.genotype, kind, inputs, channels, first, site, norm)

    def forward(self, views: Tensor, draws: Draws | None = None) -> Disparities:
        """Return the disparities; draws as in the supernet. Raises ValueError for a shape that does
        not fit.
        """
        drawn = Draws(seed=int(torch.randint(2**62, ()))) if draws is None else draws

        def run(cell: nn.Module, inputs: Sequence[Tensor], times: int) -> Tensor:
            assert isinstance(cell, DisparityDiscreteCell)
            factors = cell_factors(cell, views, drawn, self.drop_path_prob, times)
            result: Tensor = cell(inputs, drawn, factors)
            return result

        return self.predict(views, run)

    @property
    def uses_all(self) -> bool:
        """Whether the result depends on all parameters: every cell reads all its inputs."""
        for kind, nodes in self.genotype.cells.items():
            read = {source for node in nodes for name, source in node if name != "noise"}
            if not set(range(len(CELLS[kind].inputs))) <= read:
                return False
        return True
