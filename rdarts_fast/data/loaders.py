"""Data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

from rdarts_fast.data.digits import read_digits
from rdarts_fast.data.folder import read_folder
from rdarts_fast.data.image_set import (
    ImageSet,
    halves_by_index,
    mean_and_std,
    resize,
    scaled_augmentation,
    stratified_halves,
)
from rdarts_fast.data.npz import read_npz
from rdarts_fast.data.published_sets import PUBLISHED_SETS, read_published
from rdarts_fast.data.reading import Decoded
from rdarts_fast.errors import UserError, unknown

DATA_SETS: dict[str, str] = {
    "digits": "1,797 handwritten digits of 8x8, grey; they come with scikit-learn",
    "cifar10": "60,000 photographs of 32x32 in 10 classes; downloaded once",
    "cifar100": "60,000 photographs of 32x32 in 100 classes; downloaded once",
    "svhn": "99,289 house-number digits of 32x32, without the extra ones; downloaded once",
    "fashion_mnist": "70,000 pieces of clothing of 28x28, grey; downloaded once",
    "folder:PATH": "your own images: PATH/train/<class>/*.png and PATH/test/<class>/*.png",
    "npz:FILE": "your own arrays x_train, y_train, x_test, y_test; uint8 N,H,W or N,H,W,C",
}

SMALLEST_SIDE = 8

# Pad and cutout always scale with the images (pad 4, cutout 16 at 32x32, hence 4 and 14 at 28x28
# and 1 and 4 at 8x8). Mean and std are the published ones where there are any, and measured on the
# training images elsewhere; those of fashion_mnist are the customary ones. The flip is on wherever
# the published experiments have it, SVHN included, and for clothes and a user's own images; a
# mirrored handwritten digit is another sign or none.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
_WITHOUT_FLIP = frozenset({"digits"})


def load(
    name: str,
    *,
    root: Path,
    seed: int = 0,
    image_size: int | None = None,
    download: bool = True,
) -> ImageSet:
    """Load one of DATA_SETS into memory, on the CPU.

    `root` is the folder of the downloaded sets, `image_size` the side in pixels to which the
    shorter side is resized before a centre crop. The halves are cut by index for the downloaded
    sets, as published, and are random (by `seed`) and stratified elsewhere; the test images never
    depend on the seed. Raises UserError for an unknown name, missing or unusable data.
    """
    if image_size is not None and image_size < SMALLEST_SIDE:
        raise UserError(f"--image-size {image_size}: choose at least {SMALLEST_SIDE}")
    decoded = _read(name, root, image_size, download)
    if image_size is not None:
        decoded = decoded._replace(
            train_images=resize(decoded.train_images, image_size),
            test_images=resize(decoded.test_images, image_size),
        )
    _check(name, decoded)
    size = decoded.train_images.shape[2], decoded.train_images.shape[3]
    mean, std = _STATISTICS.get(name) or mean_and_std(decoded.train_images)
    by_index = name in PUBLISHED_SETS
    return ImageSet(
        name,
        *decoded,
        augmentation=scaled_augmentation(mean, std, name not in _WITHOUT_FLIP, size),
        halves=halves_by_index(len(decoded.train_labels))
        if by_index
        else stratified_halves(decoded.train_labels, seed),
    )


def _read(name: str, root: Path, image_size: int | None, download: bool) -> Decoded:
    if name == "digits":
        return read_digits()
    if name in PUBLISHED_SETS:
        return read_published(name, Path(os.path.expanduser(root)), download)
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return read_folder(Path(os.path.expanduser(path)), image_size)
    if kind == "npz" and path:
        return read_npz(Path(os.path.expanduser(path)))
    raise unknown("data set", name, DATA_SETS)


def _check(name: str, decoded: Decoded) -> None:
    height, width = decoded.train_images.shape[2:]
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f"{name}: images of {height}x{width} are too small: at least "
            f"{SMALLEST_SIDE}x{SMALLEST_SIDE} is needed; --image-size {SMALLEST_SIDE} enlarges them"
        )
    if len(decoded.class_names) < 2:
        raise UserError(
            f"{name}: only one class, {decoded.class_names[0]}: at least two are needed"
        )
