"""A user's own image files in class folders (torchvision's ImageFolder layout)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from rdarts_fast.data.reading import Decoded, one_line
from rdarts_fast.errors import UserError

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"))
_LAYOUT = "expected train/<class>/ and test/<class>/ with images"
_BAR_DELAY = 2.0  # seconds: less decoding than that needs no bar
_MOST_THREADS = 8
# What Pillow raises for files that it cannot decode.
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # [H, W] grey or [H, W, 3]


def read_folder(folder: Path, image_size: int | None) -> Decoded:
    """Return the images of `folder`/train/<class>/ and `folder`/test/<class>/, decoded once.

    Classes are the folders of train/, sorted by name. Where every image is grey there is one
    channel, otherwise three. `image_size` resizes the shorter side and crops the centre. Raises
    UserError, which names the folder or file: a missing or empty folder, a test class without
    training images, an unreadable image, images of different sizes.
    """
    title = f"folder:{folder}"
    try:
        if not folder.is_dir():
            raise UserError(f"{title}: no such folder: {folder.absolute()}; {_LAYOUT}")
        train, test = _class_files(folder / "train", title), _class_files(folder / "test", title)
    except OSError as error:
        raise UserError(f"{title}: cannot be read: {one_line(error)}") from error
    numbers = {name: k for k, name in enumerate(train)}
    for name in test:
        if name not in numbers:
            raise UserError(f"{title}: class {name} of test/ is not in train/: remove it or add it")
    files = [file for part in (train, test) for group in part.values() for file in group]
    images = torch.from_numpy(_decode_all(files, image_size, title))
    labels = torch.tensor(
        [numbers[name] for part in (train, test) for name in part for _ in part[name]]
    )
    count = sum(map(len, train.values()))
    return Decoded(images[:count], labels[:count], images[count:], labels[count:], tuple(train))


def _class_files(part: Path, title: str) -> dict[str, list[Path]]:
    """Return the image files of each class folder of `part`, all sorted by name."""
    if not part.is_dir():
        raise UserError(f"{title}: no folder {part.name}/ in it; {_LAYOUT}")
    folders = sorted(path for path in part.iterdir() if path.is_dir() and _visible(path.name))
    files = {folder.name: _image_files(folder) for folder in folders}
    if not any(files.values()):
        raise UserError(f"{title}: no images in the class folders of {part.name}/; {_LAYOUT}")
    for name, group in files.items():
        if not group:
            raise UserError(f"{title}: {part.name}/{name}/ holds no images: add some or remove it")
    return files


def _image_files(folder: Path) -> list[Path]:
    """Return the image files under `folder`, links followed, as ImageFolder does."""

    def fail(error: OSError) -> None:
        raise error

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=fail, followlinks=True)
        for name in names
        if _visible(name) and Path(name).suffix.lower() in _SUFFIXES
    )


def _visible(name: str) -> bool:
    return not name.startswith(".")


def _decode_all(files: list[Path], image_size: int | None, title: str) -> Pixels:
    """Return every image in order, uint8 [N, C, H, W], C = 1 where all are grey, otherwise 3."""
    from tqdm import tqdm

    images: list[Pixels] = []
    pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    decoded = pool.map(lambda file: _decode(file, image_size, title), files)
    bar = tqdm(decoded, "decoding", len(files), leave=False, disable=None, delay=_BAR_DELAY)
    try:
        for file, image in zip(files, bar, strict=True):
            if not images:
                _check_memory(image, len(files), title)
            elif image.shape[:2] != images[0].shape[:2]:
                raise UserError(
                    f"{title}: images differ in size (height x width): {_size(images[0])} in "
                    f"{files[0]}, {_size(image)} in {file}; --image-size N resizes and crops all"
                )
            images.append(image)
    finally:
        pool.shutdown(cancel_futures=True)
    return _stack(images)


def _stack(images: list[Pixels]) -> Pixels:
    """Return uint8 [N, C, H, W] and empty the list on the way: twice the images may not fit."""
    count, channels = len(images), 3 if any(image.ndim == 3 for image in images) else 1
    stacked = np.empty((count, channels, *images[0].shape[:2]), np.uint8)
    images.reverse()
    for i in range(count):
        image = images.pop()
        stacked[i] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return stacked


def _decode(file: Path, image_size: int | None, title: str) -> Pixels:
    """Return one image as uint8: [H, W] where the file is grey, otherwise [H, W, 3]."""
    try:
        with Image.open(file) as opened:
            image = _to_8_bits(opened)
    except _UNREADABLE as error:
        raise UserError(f"{title}: {file} is not a readable image ({one_line(error)})") from error
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit grey where its file is grey, otherwise as RGB."""
    if image.mode.startswith("I;16"):  # which convert("L") would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel: convert it to 8 bits")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _check_memory(image: Pixels, count: int, title: str) -> None:
    needed = image.size * count
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"{title}: {count:,} images of {_size(image)} take {needed / 1e9:.1f} GB, this machine "
            f"has {available / 1e9:.1f} GB: choose a smaller --image-size"
        )


def _size(image: Pixels) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
