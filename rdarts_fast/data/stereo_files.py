"""Stereo pairs with their disparities, in the published data sets' own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rdarts_fast.data.pfm import read_pfm
from rdarts_fast.data.reading import one_line
from rdarts_fast.errors import UserError

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".ppm", ".bmp", ".tif", ".tiff")
# What Pillow raises for files that it cannot decode.
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

Array = np.ndarray[Any, Any]


class StereoSample(NamedTuple):
    """A rectified pair. left, right: uint8 [3, H, W]. disparity: float32 [H, W] in pixels, 0 or
    more: left[y, x] shows what right[y, x - disparity] shows; inf where it is not known.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor


@dataclass(frozen=True)
class StereoFiles:
    """A pair on disk. decode: the disparity of its file. hidden: masks, where a pixel above 0 makes
    the disparity unknown.
    """

    left: Path
    right: Path
    disparity: Path
    decode: Callable[[Path], Array]
    hidden: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All that is read."""
        return (self.left, self.right, self.disparity, *self.hidden)

    def read(self) -> StereoSample:
        """Read the pair. Raises UserError, which names the file: unreadable, of another size than
        the left image.
        """
        left, right = _colours(self.left), _colours(self.right)
        size = left.shape[:2]
        disparity = self.decode(self.disparity)
        _check_size(self.right, right.shape[:2], self.left, size)
        _check_size(self.disparity, disparity.shape, self.left, size)
        known = np.isfinite(disparity) & (disparity >= 0)
        for file in self.hidden:
            mask = _decoded(file)
            _check_size(file, mask.shape[:2], self.left, size)
            known &= (mask if mask.ndim == 2 else mask.max(axis=2)) == 0
        disparity = np.where(known, disparity, np.inf).astype(np.float32)
        return StereoSample(_planes(left), _planes(right), torch.from_numpy(disparity))


def _check_size(file: Path, found: tuple[int, ...], other: Path, size: tuple[int, ...]) -> None:
    if found != size:
        sizes = ["x".join(map(str, shape)) for shape in (size, found)]
        raise UserError(f"{file}: expected {sizes[0]} (height x width) as {other}, got {sizes[1]}")


def _planes(image: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _decoded(file: Path, mode: str | None = None) -> Array:
    try:
        with Image.open(file) as image:
            return np.array(image if mode is None else image.convert(mode))
    except _UNREADABLE as error:
        raise UserError(f"{file}: not a readable image ({one_line(error)})") from error


def _colours(file: Path) -> Array:
    return _decoded(file, "RGB")  # [H, W, 3]


# ---- Disparity files: each returns float [H, W], not finite or below 0 where it is not known.


def pfm_disparity(file: Path) -> Array:
    """A grey PFM of disparities. Where most of them are below 0, as in a part of FlyingThings3D,
    they are the opposite.
    """
    values = read_pfm(file)
    if values.ndim != 2:
        raise UserError(f"{file}: expected one channel (Pf), found three (PF)")
    finite = values[np.isfinite(values)]
    return -values if 2 * (finite < 0).sum() > finite.size else values


def sintel_disparity(file: Path) -> Array:
    """Sintel's packed PNG: 4 R + G / 2^6 + B / 2^14 (sintel_io.py of the data set)."""
    packed = _decoded(file)
    if packed.ndim != 3 or packed.shape[2] != 3 or packed.dtype != np.uint8:
        raise UserError(f"{file}: expected an RGB image of 8 bits, as Sintel packs disparities")
    values: Array = packed.astype(np.float64) @ np.array([4.0, 2.0**-6, 2.0**-14])
    return values


def kitti_disparity(file: Path) -> Array:
    """KITTI's 16-bit grey PNG: disparity times 256, 0 where it is not known."""
    values = _decoded(file)
    if values.ndim != 2 or values.dtype != np.uint16:
        raise UserError(
            f"{file}: expected a grey PNG of 16 bits (disparity x 256, 0 unknown, as KITTI's), "
            f"found {values.dtype} of shape {values.shape}"
        )
    return np.where(values > 0, values / 256, np.inf)


def npy_disparity(file: Path) -> Array:
    """A NumPy array [H, W] of disparities."""
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: not a readable .npy file ({one_line(error)})") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UserError(f"{file}: expected an array [H, W] of numbers")
    return values.astype(np.float64)


_DISPARITIES = {".pfm": pfm_disparity, ".png": kitti_disparity, ".npy": npy_disparity}


# ---- Layouts: each returns the training and the test pairs, sorted by name.

Split = tuple[list[StereoFiles], list[StereoFiles]]


def flying_things(root: Path, title: str, frames: str) -> Split:
    """FlyingThings3D: `frames`/TRAIN/A/0000/left/0006.png (or .webp) and
    disparity/TRAIN/A/0000/left/0006.pfm; TEST likewise.

    The frames that all_unused_files.txt in `root` names are left away, which leaves the paper's
    21,818 and 4,248.
    """
    unused = _unused(root / "all_unused_files.txt")
    parts = []
    for part in ("TRAIN", "TEST"):
        folder = _folder(root / frames / part, title, f"{frames}/{part}/A/0000/left/0006.png")
        pairs = []
        for left in _sorted_files(folder.glob("*/*/left/*"), (".png", ".webp")):
            scene = left.parent.parent.relative_to(root / frames)
            if (scene / "left" / left.stem).as_posix() in unused:
                continue
            disparity = root / "disparity" / scene / "left" / f"{left.stem}.pfm"
            right = left.parent.parent / "right" / left.name
            pairs.append(StereoFiles(left, right, disparity, pfm_disparity))
        parts.append(_checked(pairs, folder, title))
    return parts[0], parts[1]


def _unused(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    return {line.strip().rsplit(".", 1)[0] for line in file.read_text().splitlines()}


def sintel(root: Path, title: str, frames: str, visible_only: bool = False) -> Split:
    """Sintel stereo: training/`frames`_left/SCENE/frame_0001.png, `frames`_right, disparities.

    visible_only: occluded pixels, and those whose match is out of the frame, are unknown. Scenes
    have no published split: every fifth tests.
    """
    base = root / "training" if (root / "training").is_dir() else root
    folder = _folder(base / f"{frames}_left", title, f"training/{frames}_left/SCENE/frame_0001.png")
    pairs = []
    for left in _sorted_files(folder.glob("*/*"), (".png",)):
        at = Path(left.parent.name, left.name)
        masks = ("occlusions", "outofframe") if visible_only else ()
        hidden = tuple(base / mask / at for mask in masks)
        right, disparity = base / f"{frames}_right" / at, base / "disparities" / at
        pairs.append(StereoFiles(left, right, disparity, sintel_disparity, hidden))
    return _by_scene(_checked(pairs, folder, title))


def middlebury(root: Path, title: str) -> Split:
    """Middlebury 2014: SCENE/im0.png, im1.png and disp0.pfm (disp0GT.pfm in its evaluation's
    version). Every fifth scene tests.
    """
    _folder(root, title, "SCENE/im0.png")
    pairs = []
    for left in _sorted_files(root.glob("*/im0.png"), (".png",)):
        names = ("disp0.pfm", "disp0GT.pfm")
        found = [left.parent / name for name in names if (left.parent / name).is_file()]
        disparity = found[0] if found else left.parent / names[0]
        pairs.append(StereoFiles(left, left.parent / "im1.png", disparity, pfm_disparity))
    return _by_scene(_checked(pairs, root, title))


def stereo_folder(root: Path, title: str) -> Split:
    """A user's own pairs: left/NAME.png, right/NAME.png and disparity/NAME.pfm (or NAME.png as
    KITTI's, NAME.npy), in train/ and test/; without these every fifth tests.
    """
    _folder(root, title, "left/, right/ and disparity/")
    if not (root / "train").is_dir():
        return _every_fifth(_own_pairs(root, title))
    return _own_pairs(root / "train", title), _own_pairs(root / "test", title)


def _own_pairs(folder: Path, title: str) -> list[StereoFiles]:
    _folder(folder / "left", title, "left/, right/ and disparity/")
    pairs = []
    for left in _sorted_files((folder / "left").iterdir(), _IMAGES):
        rights = [folder / "right" / f"{left.stem}{suffix}" for suffix in _IMAGES]
        right = next((file for file in rights if file.is_file()), folder / "right" / left.name)
        found = [folder / "disparity" / f"{left.stem}{suffix}" for suffix in _DISPARITIES]
        present = [file for file in found if file.is_file()]
        if len(present) > 1:
            raise UserError(f"{title}: {present[0]} and {present[1]}: one of them is needed")
        disparity = present[0] if present else found[0]
        pairs.append(StereoFiles(left, right, disparity, _DISPARITIES[disparity.suffix]))
    return _checked(pairs, folder, title)


def _folder(folder: Path, title: str, layout: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{title}: no such folder: {folder.absolute()}; expected {layout}")
    return folder


def _sorted_files(files: Any, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(
        file
        for file in files
        if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
    )


def _checked(pairs: list[StereoFiles], folder: Path, title: str) -> list[StereoFiles]:
    """Return the pairs. Raises UserError where there are none, or a file of one is missing."""
    if not pairs:
        raise UserError(f"{title}: no images in {folder.absolute()}")
    for pair in pairs:
        for file in pair.files:
            if not file.is_file():
                raise UserError(f"{title}: no {file}, which belongs to {pair.left}")
    return pairs


def _by_scene(pairs: list[StereoFiles]) -> Split:
    scenes = sorted({pair.left.parent for pair in pairs})
    tested = set(scenes[4::5] or scenes[-1:])
    if len(scenes) == 1:
        return _every_fifth(pairs)
    train = [pair for pair in pairs if pair.left.parent not in tested]
    return train, [pair for pair in pairs if pair.left.parent in tested]


def _every_fifth(pairs: list[StereoFiles]) -> Split:
    """Return all pairs but every fifth, and those; of fewer than five the last is tested."""
    tested = set(range(4, len(pairs), 5)) or {len(pairs) - 1}
    train = [pair for i, pair in enumerate(pairs) if i not in tested]
    return train, [pair for i, pair in enumerate(pairs) if i in tested]
