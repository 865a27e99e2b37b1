"""The embedded default data set: scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
import torch

from rdarts_fast.data.reading import Decoded


def read_digits() -> Decoded:
    """Return 1,438 training and 359 test digits, uint8 [N, 1, 8, 8].

    The test images are every fifth of the images in order of class: stratified and always the same.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.rint(data.images * (255 / 16)).astype(np.uint8)  # from 0 .. 16
    images = torch.from_numpy(levels).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    position = torch.empty_like(labels)
    position[torch.argsort(labels, stable=True)] = torch.arange(len(labels))
    test = position % 5 == 4
    return Decoded(
        images[~test], labels[~test], images[test], labels[test], tuple(map(str, range(10)))
    )
