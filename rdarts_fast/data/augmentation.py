"""Crop, flip, normalise and cutout as tensor operations on a whole batch, on the images' device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from rdarts_fast.draws import SITE_CROP, SITE_CUTOUT, SITE_FLIP, Draws
from rdarts_fast.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """What `augment` does to the images of a data set; `pad` and `cutout_length` are in pixels.

    `mean` and `std` hold one value per channel, for grey levels scaled to [0, 1]. `cutout_length`
    is the side of the square. Raises UserError for values that no image size allows.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    cutout_length: int

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise UserError(
                f"mean and std need one value per channel, found {self.mean} and {self.std}"
            )
        if not all(map(math.isfinite, self.mean)):
            raise UserError(f"mean must be finite, found {self.mean}")
        if not all(math.isfinite(std) and std > 0 for std in self.std):
            raise UserError(f"std must be finite and above 0, found {self.std}")
        if self.pad < 0 or self.cutout_length < 0:
            raise UserError(
                "pad and cutout length must be at least 0, "
                f"found {self.pad} and {self.cutout_length}"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError where the crop or cutout can take a whole image of this size away."""
        for name, value in (("cutout length", self.cutout_length), ("pad", self.pad)):
            if value >= min(height, width):
                raise UserError(
                    f"{name} {value} can take away a whole image of {height}x{width}: "
                    f"choose at most {min(height, width) - 1}"
                )


def augment(
    images: Tensor,
    augmentation: Augmentation,
    draws: Draws,
    *,
    stream: int = 0,
    cutout_probability: float | Tensor = 0.0,
) -> Tensor:
    """Crop, flip, normalise and cut out a batch: uint8 [B, C, H, W] to float32 [B, C, H, W].

    The crop is a window of the image padded with `pad` rows and columns of level 0; the flip has
    probability 1/2; cutout sets a square centred on a uniform pixel, clipped at the border, to 0,
    in each image with probability `cutout_probability`. `stream` is added to the sites of the
    draws (SITE_STREAM_VALIDATION for the validation batch). Image b takes numbers 2b (down) and
    2b+1 (across) of SITE_CROP, b of SITE_FLIP, and 3b (down), 3b+1 (across), 3b+2 (whether) of
    SITE_CUTOUT, so its draws depend on its position and not on the rest of the batch.

    Neither the crop nor cutout can take a whole image away: raises UserError where `pad` or
    `cutout_length` is not smaller than the shorter side. What cutout leaves is nowhere 0 as long
    as no mean is a multiple of 1/255. Raises UserError for a probability outside [0, 1], too, but
    not for one in a tensor, float64 [], which is above 0.
    """
    _check(images, augmentation, cutout_probability)
    cropped = _crop_and_flip(images, augmentation, draws, stream)
    normal = normalize(cropped, augmentation)
    cuts = isinstance(cutout_probability, Tensor) or cutout_probability > 0
    if cuts and augmentation.cutout_length > 0:
        uniform = draws.uniform(SITE_CUTOUT + stream, (images.shape[0], 3), images.device, 0)
        normal.mul_(_cutout_mask(images, augmentation.cutout_length, uniform, cutout_probability))
    return normal


def normalize(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Return (images / 255 - mean) / std: uint8 [B, C, H, W] to float32 [B, C, H, W].

    Raises UserError where `mean` has another number of channels.
    """
    _check_images(images, augmentation)
    shift, scale = _shift_and_scale(augmentation, images.device)
    return images.to(torch.float32).sub_(shift).mul_(scale)


@lru_cache(maxsize=64)
def _shift_and_scale(augmentation: Augmentation, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept, because building them anew would make every batch wait for a copy to the device.
    mean = torch.tensor(augmentation.mean, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(augmentation.std, dtype=torch.float64).view(-1, 1, 1)
    shift, scale = mean * 255, 1 / (std * 255)  # float64 [C, 1, 1]
    return shift.to(device, torch.float32), scale.to(device, torch.float32)


def _crop_and_flip(images: Tensor, augmentation: Augmentation, draws: Draws, stream: int) -> Tensor:
    """Return a random window, maybe mirrored, of each zero-padded image: uint8 [B, C, H, W]."""
    batch, channels, height, width = images.shape
    if batch == 0 or (augmentation.pad == 0 and not augmentation.flip):
        return images
    device, pad = images.device, augmentation.pad
    window = _below(2 * pad + 1, draws.uniform(SITE_CROP + stream, (batch, 2), device, 0))
    down, across = window.view(batch, 2, 1, 1).unbind(1)  # [B, 1, 1] each
    sources, first = images, torch.arange(batch, device=device).view(batch, 1, 1)
    if augmentation.flip:
        flipped = draws.uniform(SITE_FLIP + stream, (batch,), device, 0).view(batch, 1, 1) < 0.5
        # The window of a mirrored image is the mirrored window on the other side of the image.
        sources = torch.cat((images, images.flip(-1)))
        first = first + flipped * batch
        across = torch.where(flipped, 2 * pad - across, across)
    padded = functional.pad(sources, (pad, pad, pad, pad))
    rows = torch.arange(channels * (height + 2 * pad), device=device).view(channels, -1)
    rows = rows[:, :height] + down + first * rows.numel()  # [B, C, H], in all of padded
    starts = rows * (width + 2 * pad) + across
    # Every row of a window is `width` consecutive bytes: copying rows is far cheaper than
    # gathering pixels.
    windows = padded.reshape(-1).unfold(0, width, 1)
    return windows.index_select(0, starts.view(-1)).view(batch, channels, height, width)


def _cutout_mask(
    images: Tensor, length: int, uniform: Tensor, probability: float | Tensor
) -> Tensor:
    """Return 0 in each image's square and 1 elsewhere: float32 [B, 1, H, W], uniform [B, 3]."""
    _, _, height, width = images.shape
    down = _covered(height, length, uniform[:, 0])
    across = _covered(width, length, uniform[:, 1])
    chosen = (uniform[:, 2] < probability).to(torch.float32)
    square = (down * chosen.view(-1, 1)).unsqueeze(2) * across.unsqueeze(1)  # [B, H, W]
    return (1 - square).unsqueeze(1)


def _covered(size: int, length: int, uniform: Tensor) -> Tensor:
    """Return 1 where a random span covers the positions of one axis: float32 [B, size]."""
    first = _below(size, uniform) - length // 2
    offset = torch.arange(size, device=uniform.device) - first.view(-1, 1)
    return ((offset >= 0) & (offset < length)).to(torch.float32)


def _below(count: int, uniform: Tensor) -> Tensor:
    # The largest uniform number is 1 - 2**-24: its product with `count` never rounds up to count.
    return (uniform * count).to(torch.int64)


def _check(images: Tensor, augmentation: Augmentation, cutout_probability: float | Tensor) -> None:
    _check_images(images, augmentation)
    augmentation.check_size(*images.shape[2:])
    if not isinstance(cutout_probability, Tensor) and not 0 <= cutout_probability <= 1:
        raise UserError(f"cutout probability must lie in [0, 1], found {cutout_probability}")


def _check_images(images: Tensor, augmentation: Augmentation) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images: expected uint8 [B, C, H, W], found {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != len(augmentation.mean):
        raise UserError(
            f"images have {images.shape[1]} channels, mean and std are for {len(augmentation.mean)}"
        )
