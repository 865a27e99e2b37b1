"""A text and a few stereo pairs, and settings so small that a search on them takes seconds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "birds", "fly", "over")
HEIGHT, WIDTH, SHIFTS = 48, 64, (2, 4, 6, 3)


def write_text(folder: Path) -> Path:
    """Write train.txt, valid.txt and test.txt: each word is followed by the next but one or two."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, sentences in (("train", 60), ("valid", 20), ("test", 10)):
        lines = []
        for _ in range(sentences):
            at = int(random.integers(len(WORDS)))
            line = []
            for _ in range(int(random.integers(4, 9))):
                line.append(WORDS[at % len(WORDS)])
                at += int(random.integers(1, 3))
            lines.append(" ".join(line))
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_pairs(folder: Path) -> Path:
    """Write pairs of random texture, the right view shifted by whole pixels: the lower half by two
    more than the upper.
    """
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 1)):
        for i in range(count):
            wide = random.integers(0, 255, (HEIGHT, 2 * WIDTH, 3), dtype=np.uint8)
            right, disparity = np.empty((HEIGHT, WIDTH, 3), np.uint8), np.empty((HEIGHT, WIDTH))
            for y in range(HEIGHT):
                shift = SHIFTS[i] + 2 * (y >= HEIGHT // 2)
                right[y], disparity[y] = wide[y, shift : shift + WIDTH], shift
                disparity[y, :shift] = np.inf  # what the right view does not show
            for name, view in (("left", wide[:, :WIDTH]), ("right", right)):
                (folder / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(view).save(folder / part / name / f"{i}.png")
            (folder / part / "disparity").mkdir(parents=True, exist_ok=True)
            np.save(folder / part / "disparity" / f"{i}.npy", disparity.astype(np.float32))
    return folder


def language(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a search for a recurrent cell; `folder` gets the text and the run."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    small = {
        "task": "language",
        "space": "rnn_small",
        "data": str(folder / "text"),
        "out": folder / "run",
        "hidden": 6,
        "batch_size": 6,
        "bptt": 8,
        "epochs": 3,
        "seed": 3,
        "learning_rate": 2.0,
        "learning_rate_min": 2.0,
    }
    return small | _EVERYWHERE | changes


def disparity(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a search for disparity cells; `folder` gets the pairs and the run."""
    if not (folder / "pairs").exists():
        write_pairs(folder / "pairs")
    small = {
        "task": "disparity",
        "data": f"folder:{folder / 'pairs'}",
        "out": folder / "run",
        "channels": 1,
        "decoders": 1,
        "max_displacement": 1,
        "crop_height": 32,
        "crop_width": 32,
        "batch_size": 2,
        "epochs": 3,
        "seed": 3,
    }
    return small | _EVERYWHERE | changes


_EVERYWHERE = {"device": "cpu", "threads": 1, "alpha_learning_rate": 3e-2}
