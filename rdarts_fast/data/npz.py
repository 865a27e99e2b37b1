"""A user's own arrays in one .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdarts_fast.data.reading import Decoded, one_line
from rdarts_fast.errors import UserError

_NAMES = ("x_train", "y_train", "x_test", "y_test")
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def read_npz(file: Path) -> Decoded:
    """Return x_train, y_train, x_test and y_test of an .npz file; pickles are never read.

    Images are uint8 [N, H, W] or [N, H, W, C] with C 1 or 3; labels are integers 0 .. K - 1, each
    with a training image. Raises UserError, which names the array, for anything else.
    """
    title = f"npz:{file}"
    arrays = _read_arrays(file, title)
    x_train, y_train, x_test, y_test = (arrays[name] for name in _NAMES)
    _check_images(title, "x_train", x_train)
    _check_images(title, "x_test", x_test)
    if _image_shape(x_train) != _image_shape(x_test):
        raise UserError(
            f"{title}: x_test: expected images as in x_train, {_shape(x_train)}, "
            f"found {_shape(x_test)}"
        )
    _check_labels(title, "train", y_train, len(x_train))
    _check_labels(title, "test", y_test, len(x_test))
    classes = _count_classes(title, y_train, y_test)
    return Decoded(
        _to_images(x_train),
        torch.from_numpy(y_train.astype(np.int64)),
        _to_images(x_test),
        torch.from_numpy(y_test.astype(np.int64)),
        tuple(map(str, range(classes))),
    )


def _read_arrays(file: Path, title: str) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with file.open("rb") as stream:
            return _named_arrays(np.load(stream, allow_pickle=False), title)
    except FileNotFoundError as error:
        raise UserError(f"{title}: no such file: {file.absolute()}") from error
    except _UNREADABLE as error:
        raise UserError(f"{title}: not a readable .npz file ({one_line(error)})") from error


def _named_arrays(opened: Any, title: str) -> dict[str, np.ndarray[Any, Any]]:
    names = ", ".join(_NAMES)
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise UserError(f"{title}: one array, not an .npz file: save {names} with savez")
    arrays = {}
    for name in _NAMES:
        if name not in opened.files:
            found = ", ".join(opened.files) or "nothing"
            raise UserError(f"{title}: no array {name}: expected {names}, found {found}")
        try:
            arrays[name] = opened[name]
        except _UNREADABLE as error:
            raise UserError(f"{title}: {name} cannot be read ({one_line(error)})") from error
    return arrays


def _check_images(title: str, name: str, images: np.ndarray[Any, Any]) -> None:
    if images.dtype != np.uint8:
        raise UserError(f"{title}: {name}: expected uint8 (0 .. 255), found {images.dtype}")
    if images.ndim not in (3, 4):
        raise UserError(f"{title}: {name}: expected N,H,W or N,H,W,C, found shape {_shape(images)}")
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise UserError(
            f"{title}: {name}: expected 1 or 3 channels in the last place (N,H,W,C), "
            f"found shape {_shape(images)}"
        )
    if 0 in images.shape:
        raise UserError(
            f"{title}: {name}: expected at least one image, found shape {_shape(images)}"
        )


def _check_labels(title: str, part: str, labels: np.ndarray[Any, Any], images: int) -> None:
    name = f"y_{part}"
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{title}: {name}: expected integers, found {labels.dtype}")
    if labels.ndim != 1:
        raise UserError(
            f"{title}: {name}: expected one label an image, found shape {_shape(labels)}"
        )
    if len(labels) != images:
        raise UserError(
            f"{title}: {name}: expected {images:,} labels, as many as x_{part} has images, "
            f"found {len(labels):,}"
        )
    if labels.min() < 0:
        raise UserError(f"{title}: {name}: expected labels from 0, found {labels.min()}")


def _count_classes(title: str, y_train: np.ndarray[Any, Any], y_test: np.ndarray[Any, Any]) -> int:
    """Return K; every label 0 .. K - 1 has a training image, and no test label is above."""
    present = np.unique(y_train)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if len(gaps):
        raise UserError(
            f"{title}: y_train: expected every label from 0 to {present[-1]}, found no {gaps[0]}: "
            "number the classes without gaps"
        )
    if y_test.max() >= len(present):
        raise UserError(
            f"{title}: y_test: expected labels from 0 to {len(present) - 1}, as in y_train, "
            f"found {y_test.max()}"
        )
    return len(present)


def _to_images(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return uint8 [N, C, H, W] of [N, H, W] or [N, H, W, C]."""
    channels_last = images if images.ndim == 4 else images[..., None]
    return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)))


def _image_shape(images: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return images.shape[1:] if images.ndim == 4 else (*images.shape[1:], 1)


def _shape(array: np.ndarray[Any, Any]) -> str:
    return "[" + ", ".join(map(str, array.shape)) + "]"
