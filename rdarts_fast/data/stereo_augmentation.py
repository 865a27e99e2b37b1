"""Spatial and photometric augmentation of stereo pairs under one scale factor (paper, appendix D).

The paper varies one number that multiplies the variances of all parameters' distributions, but does
not give these: the ones here are this project's own. A parameter is

    crop          uniform over the places of the crop in the image; scale 0: its middle
    all others    normal about no change, cut at three deviations

so that at scale 0 nothing changes, and at scale s every deviation is sqrt(s) times its value in
StereoAugmentation (the crop's is held inside the image). Spatial parameters are one map for both
views, under which a row stays a row:

    x_source = x_0 + (x - w/2 - shear (y - h/2)) / zoom,   y_source = y_0 + (y - h/2) / zoom

hence a disparity d becomes zoom d. Photometric ones are the same for both views, but for the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast.data.stereo_files import StereoSample
from rdarts_fast.draws import (
    SITE_STEREO_CROP,
    SITE_STEREO_LIGHT,
    SITE_STEREO_NOISE,
    SITE_STEREO_SPACE,
    Draws,
)
from rdarts_fast.errors import UserError

MEAN = 0.4  # a network's input is grey level / 255 - 0.4, as AutoDispNet's (netdef_slim)
MOST_DEVIATIONS = 3.0


@dataclass(frozen=True)
class StereoAugmentation:
    """The deviations at scale 1, and the scale, which multiplies the variances.

    translate: of the map's centre, in crops. zoom: of its logarithm. shear: pixels across a pixel
    down. noise: of a pixel's noise, itself normal about 0, for grey levels in [0, 1]. brightness:
    added to grey levels. contrast, gamma: of their logarithms. colour: of the logarithm of each
    channel's factor. Raises UserError for a value below 0 or not finite.
    """

    scale: float = 1.0
    translate: float = 0.05
    zoom: float = 0.15
    shear: float = 0.05
    noise: float = 0.02
    brightness: float = 0.05
    contrast: float = 0.15
    gamma: float = 0.15
    colour: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < math.inf:
                raise UserError(f"augmentation {field.name}: expected 0 or more, got {value}")

    def deviation(self, name: str) -> float:
        """Return the deviation of a parameter under the scale."""
        return float(math.sqrt(self.scale) * getattr(self, name))


@dataclass(frozen=True)
class SpatialMap:
    """Where the pixels of a crop [h, w] come from; centre: (y_0, x_0) in pixels of the source."""

    centre: tuple[float, float]
    zoom: float
    shear: float

    def sources(self, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the source of each pixel's middle, in pixels: y [h, w] and x [h, w], float64."""
        h, w = size
        down = torch.arange(h, device=device, dtype=torch.float64) + 0.5 - h / 2
        across = torch.arange(w, device=device, dtype=torch.float64) + 0.5 - w / 2
        y = self.centre[0] + down.view(-1, 1) / self.zoom
        x = self.centre[1] + (across - self.shear * down.view(-1, 1)) / self.zoom
        return (y - 0.5).expand(h, w), x - 0.5


def cropped(
    sample: StereoSample, size: tuple[int, int], where: SpatialMap, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return views, float32 [2, 3, h, w] of grey levels in [0, 1], and their disparity [h, w].

    Images are read bilinearly, disparities at the nearest pixel and multiplied by the zoom. Outside
    the image its border goes on, and disparities are unknown.
    """
    y, x = where.sources(size, device)
    height, width = sample.disparity.shape
    near = [at.round().long() for at in (y, x)]
    inside = (near[0] >= 0) & (near[0] < height) & (near[1] >= 0) & (near[1] < width)
    # Only what lies under the crop goes to the device and becomes float.
    top, bottom = _span(y, height)
    first, last = _span(x, width)
    window = (slice(top, bottom), slice(first, last))
    rows = (near[0].clamp(0, height - 1) - top, near[1].clamp(0, width - 1) - first)
    known = sample.disparity[window].to(device)[rows]
    disparity = torch.where(inside & known.isfinite(), where.zoom * known, torch.inf)
    images = torch.stack([sample.left[:, *window], sample.right[:, *window]]).to(device)
    views = images.flatten(0, 1).unsqueeze(0).float() / 255
    grid = torch.stack(
        [
            (2 * (x - first) + 1) / (last - first) - 1,
            (2 * (y - top) + 1) / (bottom - top) - 1,
        ],
        dim=-1,
    )
    found = F.grid_sample(
        views.double(), grid.unsqueeze(0), padding_mode="border", align_corners=False
    )
    return found.float().view(2, 3, *size), disparity.float()


def _span(at: Tensor, size: int) -> tuple[int, int]:
    """Return the pixels that positions `at` are read from, as a slice's ends."""
    first = min(max(int(at.min().floor()), 0), size - 1)
    return first, min(max(int(at.max().floor()) + 2, first + 1), size)


def augmented_batch(
    samples: Sequence[StereoSample],
    size: tuple[int, int],
    augmentation: StereoAugmentation,
    draws: Draws,
    device: torch.device | str = "cpu",
    *,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return augmented crops: views [N, 2, 3, h, w], grey levels - 0.4, and disparities [N, h, w].

    `stream` is added to the sites of the draws (SITE_STREAM_VALIDATION for a validation batch). A
    sample's draws depend on its position in the batch alone.
    """
    where, n = torch.device(device), len(samples)
    views = torch.empty(n, 2, 3, *size, device=where)
    disparities = torch.empty(n, *size, device=where)
    maps = spatial_maps(samples, size, augmentation, draws, stream)
    for i, (sample, spatial) in enumerate(zip(samples, maps, strict=True)):
        views[i], disparities[i] = cropped(sample, size, spatial, where)
    if augmentation.scale > 0:
        views = relit(views, augmentation, draws, stream)
    return views - MEAN, disparities


def _normals(draws: Draws, site: int, count: int, columns: int) -> Tensor:
    drawn = draws.normal(site, (count, columns), "cpu", 0).double()
    return drawn.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)


def spatial_maps(
    samples: Sequence[StereoSample],
    size: tuple[int, int],
    augmentation: StereoAugmentation,
    draws: Draws,
    stream: int = 0,
) -> list[SpatialMap]:
    """Return where each sample's crop comes from. Sample i takes the uniform numbers 2i (down) and
    2i+1 (across) of SITE_STEREO_CROP and the normal ones 4i (down), 4i+1 (across), 4i+2 (zoom) and
    4i+3 (shear) of SITE_STEREO_SPACE.
    """
    n = len(samples)
    uniform = draws.uniform(SITE_STEREO_CROP + stream, (n, 2), "cpu", 0).tolist()
    normal = _normals(draws, SITE_STEREO_SPACE + stream, n, 4).tolist()
    spread, maps = math.sqrt(augmentation.scale), []
    for i, sample in enumerate(samples):
        centre = []
        for axis, (whole, side) in enumerate(zip(sample.disparity.shape, size, strict=True)):
            room = max(whole - side, 0)
            first = (0.5 + spread * (uniform[i][axis] - 0.5)) * room
            start = round(min(max(first, 0.0), room))  # whole pixels: plain crops are not blurred
            moved = augmentation.deviation("translate") * normal[i][axis] * side
            centre.append(start + min(side, whole) / 2 + moved)
        zoom = math.exp(augmentation.deviation("zoom") * normal[i][2])
        shear = augmentation.deviation("shear") * normal[i][3]
        maps.append(SpatialMap((centre[0], centre[1]), zoom, shear))
    return maps


def relit(views: Tensor, augmentation: StereoAugmentation, draws: Draws, stream: int = 0) -> Tensor:
    """Return views [N, 2, 3, h, w] of grey levels in [0, 1] in another light, with noise.

    In this order: colour, contrast about the sample's mean, brightness, gamma, noise; levels are
    held in [0, 1] before gamma and at the end. Sample i takes the normal numbers 7i .. 7i+6 of
    SITE_STEREO_LIGHT: colour (3), contrast, brightness, gamma, noise.
    """
    normal = _normals(draws, SITE_STEREO_LIGHT + stream, views.shape[0], 7)
    normal = normal.to(views).view(-1, 7, 1, 1, 1, 1)

    def drawn(name: str, column: int) -> Tensor:  # [N, 1, 1, 1, 1]
        return augmentation.deviation(name) * normal[:, column]

    colour = augmentation.deviation("colour") * normal[:, :3].view(-1, 1, 3, 1, 1)
    views = views * colour.exp()
    mean = views.mean(dim=(1, 2, 3, 4), keepdim=True)
    views = (views - mean) * drawn("contrast", 3).exp() + mean + drawn("brightness", 4)
    views = views.clamp(0, 1).pow(drawn("gamma", 5).exp())
    noise = draws.normal(SITE_STEREO_NOISE + stream, views.shape, views.device, 0).to(views)
    return (views + drawn("noise", 6).abs() * noise).clamp(0, 1)
