"""Images: data sets loaded once as uint8 tensors, batches drawn and augmented on the device."""

from __future__ import annotations

from rdarts_fast.data.augmentation import Augmentation, augment, normalize
from rdarts_fast.data.batches import epoch_batches, validation_batch
from rdarts_fast.data.image_set import ImageSet
from rdarts_fast.data.loaders import DATA_SETS, load

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "ImageSet",
    "augment",
    "epoch_batches",
    "load",
    "normalize",
    "validation_batch",
]
