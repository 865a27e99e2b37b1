"""What the readers of data sets share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Decoded(NamedTuple):
    """What a reader returns: images uint8 [N, C, H, W], labels int64 [N], the classes' names."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, or its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
