"""A data set and settings so small that a whole search takes a second."""

from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 3


def write_images(path: Path, per_class: int = 12) -> Path:
    """Write an npz file of 8x8 grey images, a bright band per class at its own height."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", per_class), ("test", 4)):
        labels = np.tile(np.arange(CLASSES), count)
        images = random.integers(0, 60, (len(labels), 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 1 : 2 * label + 3] += 150
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images, labels
    np.savez(path, **arrays)
    return path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a search on such images; `folder` gets the file and the run."""
    path = folder / "images.npz"
    if not path.exists():
        write_images(path)
    small = {
        "space": "s5",
        "data": f"npz:{path}",
        "out": folder / "run",
        "channels": 2,
        "layers": 3,
        "epochs": 3,
        "batch_size": 6,
        "seed": 3,
        "device": "cpu",
        "threads": 1,
        "alpha_learning_rate": 3e-2,
    }
    return small | changes


def arguments(settings: dict[str, Any]) -> list[str]:
    """Return settings as a command line."""
    words = []
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words
