"""A data set in memory, its halves, and what is measured or scaled from its training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rdarts_fast.data.augmentation import Augmentation
from rdarts_fast.draws import SITE_SPLIT, Draws


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A whole data set on one device: images uint8 [N, C, H, W], labels int64 [N].

    `halves` holds the sorted indices into the training images for the weights and for the alphas.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    augmentation: Augmentation
    halves: tuple[Tensor, Tensor]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """The number of channels: 1 or 3."""
        return self.train_images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image, in pixels."""
        return self.train_images.shape[2], self.train_images.shape[3]

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the same data set with every tensor on `device`."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
            halves=(self.halves[0].to(device), self.halves[1].to(device)),
        )


def halves_by_index(count: int) -> tuple[Tensor, Tensor]:
    """Return 0 .. N//2 - 1 for the weights and the rest for the alphas, as published."""
    return torch.arange(count // 2), torch.arange(count // 2, count)


def stratified_halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return random sorted halves of N // 2 and N - N // 2 images, each class split evenly.

    The counts of a class in the two halves differ by at most one. `labels` is int64 [N].
    """
    keys = labels << 32 | Draws(seed).bits(SITE_SPLIT, labels.shape[0])
    by_class = torch.argsort(keys, stable=True)  # random within a class
    return by_class[1::2].sort().values, by_class[0::2].sort().values


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation over uint8 [N, C, H, W], scaled to [0, 1].

    Two departures keep what `normalize` makes of the images useful. A channel that varies by less
    than half a grey level gets mean and deviation 1/2, not a division by nearly nothing. And a
    mean on one of the 256 grey levels moves off it by a thousandth of a level, so that no pixel
    becomes exactly 0, which is what cutout leaves.
    """
    channels = [_channel_statistics(images[:, c]) for c in range(images.shape[1])]
    return tuple(mean for mean, _ in channels), tuple(std for _, std in channels)


def _channel_statistics(channel: Tensor) -> tuple[float, float]:
    counts = torch.zeros(256, dtype=torch.int64)
    for part in torch.split(channel, 4096):  # bounds the memory of the counting
        counts += torch.bincount(part.reshape(-1), minlength=256)
    weights = counts.to(torch.float64) / counts.sum()
    levels = torch.arange(256, dtype=torch.float64)
    mean = float((weights * levels).sum())
    std = float((weights * (levels - mean) ** 2).sum().sqrt())
    if std < 0.5:
        return 0.5, 0.5
    if abs(mean - round(mean)) < 1e-3:
        mean = round(mean) + 1e-3
    return mean / 255, std / 255


def scaled_augmentation(
    mean: Sequence[float], std: Sequence[float], flip: bool, size: tuple[int, int]
) -> Augmentation:
    """Return the published crop and cutout, pad 4 and length 16 at 32x32, scaled to `size`.

    The shorter side counts: an eighth of it, rounded, is the pad and half of it, rounded down, is
    the length.
    """
    side = min(size)
    return Augmentation(tuple(mean), tuple(std), (side + 4) // 8, flip, side // 2)


def resize(images: Tensor, side: int) -> Tensor:
    """Return uint8 [N, C, side, side]: the shorter side resized (antialiased), centre-cropped."""
    from torchvision.transforms import functional as transforms

    if images.shape[2:] == (side, side):
        return images
    parts = []
    for part in torch.split(images, 1024):  # bounds the memory of the float32 values in between
        resized = transforms.resize(part, [side], antialias=True)
        parts.append(transforms.center_crop(resized, [side, side]))
    return torch.cat(parts)
