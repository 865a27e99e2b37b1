"""CIFAR-10, CIFAR-100, SVHN and Fashion-MNIST, read and downloaded by torchvision."""

from __future__ import annotations

import fcntl
import http.client
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdarts_fast.data.reading import Decoded, one_line
from rdarts_fast.errors import UserError

# Name: what torchvision reads in the root folder.
PUBLISHED_SETS: dict[str, tuple[str, ...]] = {
    "cifar10": ("cifar-10-batches-py",),
    "cifar100": ("cifar-100-python",),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "fashion_mnist": ("FashionMNIST/raw",),
}
_LOCK = ".download.lock"
_TIMEOUT = 30.0  # seconds; where a firewall drops packets the system's own limit is minutes

# torchvision has no error of its own: these are what missing and damaged files and a failing
# network come out as.
_ERRORS = (
    *(OSError, http.client.HTTPException, RuntimeError, ValueError, TypeError),
    *(KeyError, AssertionError, EOFError, pickle.UnpicklingError),
)


def read_published(name: str, root: Path, download: bool) -> Decoded:
    """Return one of PUBLISHED_SETS from the folder `root`, downloaded into it where it is missing.

    Raises UserError, which says what was looked for and where, without data and network.
    """
    try:
        return _read(name, root, download=False)
    except _ERRORS as error:
        if not download:
            raise _unusable(name, root, error) from error
    try:
        with _download_into(root):
            return _read(name, root, download=True)
    except _ERRORS as error:
        raise _unusable(name, root, error) from error


def _read(name: str, root: Path, *, download: bool) -> Decoded:
    train = _open(name, root, train=True, download=download)
    test = _open(name, root, train=False, download=download)
    names = train.classes if hasattr(train, "classes") else map(str, range(10))
    return Decoded(*_tensors(train), *_tensors(test), tuple(names))


def _open(name: str, root: Path, *, train: bool, download: bool) -> Any:
    from torchvision import datasets

    if name == "svhn":  # without its split "extra", as published
        return datasets.SVHN(str(root), split="train" if train else "test", download=download)
    kinds = {
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
        "fashion_mnist": datasets.FashionMNIST,
    }
    return kinds[name](str(root), train=train, download=download)


def _tensors(data_set: Any) -> tuple[Tensor, Tensor]:
    """Return a torchvision data set's images, uint8 [N, C, H, W], and labels, int64 [N]."""
    images = torch.as_tensor(data_set.data)
    if images.ndim == 3:  # [N, H, W]
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:  # [N, H, W, C]
        images = images.permute(0, 3, 1, 2)
    labels = data_set.labels if hasattr(data_set, "labels") else data_set.targets
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) != len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    return images.contiguous(), labels


@contextmanager
def _download_into(root: Path) -> Iterator[None]:
    """Hold the lock of `root`, so that several runs download once, and limit the waiting."""
    created = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    try:
        with (root / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            socket.setdefaulttimeout(_TIMEOUT)
            yield
    except BaseException:
        if created:
            _remove_empty(root)
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def _remove_empty(root: Path) -> None:
    (root / _LOCK).unlink(missing_ok=True)
    inner = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True)
    for folder in (*inner, root):
        with suppress(OSError):  # not empty: it holds what did arrive
            folder.rmdir()


def _unusable(name: str, root: Path, error: Exception) -> UserError:
    paths = PUBLISHED_SETS[name]
    found = any(os.path.exists(root / path) for path in paths)
    state = "damaged or incomplete" if found else "missing"
    advice = (
        "delete what is there and run"
        if found
        else "put the files there, name another folder with --data-root, or run"
    )
    # The rest is torchvision's hint, in its own words, to turn the download on.
    reason = one_line(error).partition(" You can use download=True")[0]
    return UserError(
        f'data set "{name}" is {state}: looked for {" and ".join(paths)} in {root} '
        f"({reason}); {advice} once with network access"
    )
