"""Stereo data sets by name: pairs read when they are needed, crops and whole images as batches."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rdarts_fast.data import stereo_files
from rdarts_fast.data.image_set import halves_by_index
from rdarts_fast.data.stereo_augmentation import MEAN, StereoAugmentation, augmented_batch
from rdarts_fast.data.stereo_files import Split, StereoFiles, StereoSample
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, unknown

STEREO_SETS: dict[str, str] = {
    "motorcycle": "one pair of 500x741 with its disparity; comes with scikit-image",
    "flyingthings:PATH": "FlyingThings3D, the clean pass (flyingthings_final: the final one)",
    "sintel:PATH": "Sintel stereo, the clean pass (sintel_final: the final one)",
    "middlebury:PATH": "Middlebury 2014: PATH/SCENE/im0.png, im1.png, disp0.pfm",
    "folder:PATH": "your own: PATH/train/{left,right,disparity}/NAME and PATH/test/...; "
    "disparity as .pfm, .npy or KITTI's .png",
}
_LAYOUTS: dict[str, Callable[[Path, str], Split]] = {
    "flyingthings": lambda root, title: stereo_files.flying_things(root, title, "frames_cleanpass"),
    "flyingthings_final": lambda root, title: stereo_files.flying_things(
        root, title, "frames_finalpass"
    ),
    "sintel": lambda root, title: stereo_files.sintel(root, title, "clean"),
    "sintel_final": lambda root, title: stereo_files.sintel(root, title, "final"),
    "middlebury": stereo_files.middlebury,
    "folder": stereo_files.stereo_folder,
}
MOTORCYCLE_BANDS = 4  # of rows; the first and third are the weights' half, the others the alphas'
MOTORCYCLE_CROPS = 16  # training crops that an epoch takes from each band, each of another shift
MOTORCYCLE_SHIFT = 12  # columns, the largest: 0, 1, -1, 3, -3, 4, -4, 6 .. 12
KEPT_BYTES = 2 << 30  # of decoded pairs that stay in memory


@dataclass(frozen=True, eq=False)
class StereoArrays:
    """A pair in memory."""

    sample: StereoSample

    def read(self) -> StereoSample:
        """Return the pair."""
        return self.sample


Source = StereoFiles | StereoArrays


@dataclass(eq=False)
class StereoSet:
    """Pairs for training and for testing. `halves` holds the sorted indices into the training pairs
    for the weights and for the alphas; `shrink` is the factor by which all are made smaller.
    """

    name: str
    train: tuple[Source, ...]
    test: tuple[Source, ...]
    halves: tuple[Tensor, Tensor]
    shrink: int = 1
    _kept: dict[tuple[str, int], StereoSample] = field(default_factory=dict)
    _bytes: int = 0

    def read(self, part: str, index: int) -> StereoSample:
        """Return pair `index` of "train" or "test"; pairs stay in memory while there is room.

        Raises UserError where a file cannot be read.
        """
        key = (part, index)
        if key not in self._kept:
            sample = shrunk(
                (self.train if part == "train" else self.test)[index].read(), self.shrink
            )
            size = sum(tensor.numel() * tensor.itemsize for tensor in sample)
            if self._bytes + size > KEPT_BYTES:
                return sample
            self._kept[key], self._bytes = sample, self._bytes + size
        return self._kept[key]

    def training_batch(
        self,
        rows: Tensor,
        size: tuple[int, int],
        augmentation: StereoAugmentation,
        draws: Draws,
        device: torch.device | str = "cpu",
        *,
        stream: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return augmented crops of training pairs: views [N, 2, 3, h, w], disparities [N, h, w];
        arguments as augmented_batch.
        """
        samples = [self.read("train", row) for row in rows.tolist()]
        return augmented_batch(samples, size, augmentation, draws, device, stream=stream)

    def whole_batch(
        self, part: str, rows: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return whole pairs of "train" or "test" as a network takes them: views [N, 2, 3, H, W],
        disparities [N, H, W].

        Smaller ones are continued by their border to the largest size, their disparity unknown
        there.
        """
        samples = [self.read(part, row) for row in rows.tolist()]
        height, width = (max(s.disparity.shape[axis] for s in samples) for axis in (0, 1))
        views, disparities = [], []
        for left, right, disparity in samples:
            beyond = (0, width - disparity.shape[1], 0, height - disparity.shape[0])
            pair = torch.stack([left, right]).to(device).float() / 255 - MEAN
            views.append(F.pad(pair, beyond, mode="replicate") if any(beyond) else pair)
            disparities.append(F.pad(disparity.to(device), beyond, value=torch.inf))
        return torch.stack(views), torch.stack(disparities)

    def median_disparity(self, part: str = "train", most: int = 64) -> float:
        """Return the median of the known disparities over at most `most` pairs, evenly chosen: the
        constant with the least mean error on them. Raises UserError where none is known.
        """
        count = len(self.train if part == "train" else self.test)
        chosen = sorted({i * count // min(count, most) for i in range(min(count, most))})
        found = [self.read(part, i).disparity.flatten() for i in chosen]
        known = torch.cat(found)
        known = known[known.isfinite()]
        if not len(known):
            raise UserError(f"data {self.name}: no disparity is known in its {part} part")
        return float(known.median())

    def fingerprint(self) -> str:
        """Return a checksum: of the contents in memory, of the names and sizes of files."""
        checksum = 0
        for source in (*self.train, *self.test):
            if isinstance(source, StereoArrays):
                for tensor in source.sample:
                    checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
                continue
            for file in source.files:
                text = f"{file.parent.name}/{file.name} {file.stat().st_size}\n"
                checksum = zlib.crc32(text.encode(), checksum)
        return f"{checksum:08x}"


def shrunk(sample: StereoSample, by: int) -> StereoSample:
    """Return a pair made smaller: the mean of by x by pixels, and of their known disparities, which
    are divided by `by`. Rows and columns that are left over are cut off.
    """
    if by == 1:
        return sample
    height, width = (size // by for size in sample.disparity.shape)
    if height == 0 or width == 0:
        raise UserError(f"shrink {by}: takes all of an image of {list(sample.disparity.shape)}")
    cut = (slice(0, height * by), slice(0, width * by))
    views = [
        F.avg_pool2d(view[:, *cut].float(), by).round().to(torch.uint8)
        for view in (sample.left, sample.right)
    ]
    disparity = sample.disparity[cut]
    known = disparity.isfinite()
    both = torch.stack([known.float(), torch.where(known, disparity, 0.0)]).unsqueeze(0)
    share, mean = F.avg_pool2d(both, by)[0]
    return StereoSample(views[0], views[1], torch.where(share > 0, mean / share / by, torch.inf))


def shifted(sample: StereoSample, by: int) -> StereoSample:
    """Return a pair whose disparities are less by `by` columns (more where it is negative): its
    views are cut by so many, at opposite sides.

    Disparities that would be below 0 become unknown: no network here can predict them.
    """
    kept, partner = (slice(max(s, 0), min(s, 0) or None) for s in (by, -by))
    disparity = sample.disparity[:, kept]
    return StereoSample(
        sample.left[..., kept].contiguous(),
        sample.right[..., partner].contiguous(),
        torch.where(disparity >= by, disparity - by, torch.inf),
    )


def load_stereo(name: str, *, shrink: int = 1) -> StereoSet:
    """Load one of STEREO_SETS. shrink: 2 is the paper's search, on images of half the size.

    The training pairs are halved by index. Raises UserError for an unknown name, missing or
    unusable data.
    """
    if shrink < 1:
        raise UserError(f"shrink: expected 1 or more, got {shrink}")
    if name == "motorcycle":
        return motorcycle(shrink)
    kind, _, path = name.partition(":")
    if kind not in _LAYOUTS or not path:
        raise unknown("data set", name, STEREO_SETS)
    try:
        train, test = _LAYOUTS[kind](Path(os.path.expanduser(path)), name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error}") from error
    if not train:
        raise UserError(f"{name}: one pair alone, at least two are needed")
    return StereoSet(name, tuple(train), tuple(test), halves_by_index(len(train)), shrink)


def motorcycle(shrink: int = 1) -> StereoSet:
    """Return the Motorcycle pair of Middlebury 2014: its left half trains, its right half tests.

    Both views are cut at the same column, so that no part sees pixels of the other. The training
    part is four bands of rows, each many times an epoch because every crop of it is another. Each
    time its views are shifted otherwise, lest a network learn by heart how far away what is.
    Raises UserError without scikit-image.
    """
    try:
        from skimage.data import stereo_motorcycle
    except ImportError as error:
        raise UserError(
            "data motorcycle comes with scikit-image: pip install 'rdarts-fast[disparity]'"
        ) from error
    load: Any = stereo_motorcycle  # untyped
    *views, disparity = load()
    left, right = (torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for x in views)
    whole = StereoSample(left, right, torch.from_numpy(disparity.astype(np.float32)))
    middle = disparity.shape[1] // 2
    edges = [i * disparity.shape[0] // MOTORCYCLE_BANDS for i in range(MOTORCYCLE_BANDS + 1)]
    bands = [_part(whole, slice(*ends), slice(0, middle)) for ends in pairwise(edges)]
    train = [StereoArrays(shifted(band, shift)) for shift in _motorcycle_shifts() for band in bands]
    numbers = torch.arange(MOTORCYCLE_BANDS * MOTORCYCLE_CROPS)
    even = numbers % MOTORCYCLE_BANDS % 2 == 0
    test = StereoArrays(_part(whole, slice(None), slice(middle, None)))
    halves = (numbers[even], numbers[~even])
    return StereoSet("motorcycle", tuple(train), (test,), halves, shrink)


def _motorcycle_shifts() -> list[int]:
    """Return the shifts of a band's crops: of both signs in turn, the first 0."""
    steps = [(i + 1) // 2 for i in range(MOTORCYCLE_CROPS)]
    sizes = [step * MOTORCYCLE_SHIFT // max(steps) for step in steps]
    return [size if i % 2 else -size for i, size in enumerate(sizes)]


def _part(sample: StereoSample, rows: slice, columns: slice) -> StereoSample:
    left, right, disparity = (tensor[..., rows, columns].contiguous() for tensor in sample)
    return StereoSample(left, right, disparity)
