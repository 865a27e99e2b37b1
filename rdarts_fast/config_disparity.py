"""The settings of disparity estimation: AutoDispNet-C's cells (paper, appendix D).

Defaults are the published values where they are known, else AutoDispNet's; `data_defaults` has
those of the embedded pair. What the paper does not say: batch and crop size, the order of the
search, the weights of the losses, the distributions of the augmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Suppress

from rdarts_fast.config import RandomSearchConfig, RetrainConfig, SearchConfig, Values

_EMBEDDED: Values = {
    "channels": 4,
    "shrink": 2,
    "crop_height": 64,
    "crop_width": 128,
    "batch_size": 4,
    "max_displacement": 5,
    "one_sided": True,
    "threads": 1,
}
_QUICK: Values = {**_EMBEDDED, "channels": 2, "epoch_steps": 4}
# With weights of He's small start and no batch norms, the correlation is too weak to be learnt from
# in minutes: the network learns the left part by heart instead (docs/departures.md).
_RETRAIN: Values = {"learning_rate": 3e-3, "batch_norm": True}


@dataclass(frozen=True)
class DisparityConfig:
    """What every run of a disparity network has, beside what every run has."""

    unused: ClassVar[tuple[str, ...]] = (
        "image_size",
        "layers",
        "flip",
        "cutout_length",
        "cutout_prob",
        "cutout_schedule",
        "auxiliary",
        "auxiliary_weight",
        "compile",
    )
    own_data: ClassVar[str] = "motorcycle"

    task: str = "disparity"
    """classification, language or disparity: what the network is for."""
    data: str = "motorcycle"
    """motorcycle (comes with scikit-image), flyingthings:PATH, sintel:PATH, middlebury:PATH or
    folder:PATH (see README)."""
    batch_size: int = 8
    """Pairs a batch; the paper's is not known."""
    channels: int = 24
    """C: the decoder's last cell has C channels, the encoder's last 16 C; AutoDispNet's."""
    shrink: int = 1
    """Make images smaller by this factor; the published search has 2."""
    crop_height: int = 384
    """Rows of a training crop; the paper's is not known."""
    crop_width: int = 768
    """Columns of a training crop."""
    decoders: int = 4
    """Upsampling cells, 1 to 4: the prediction is made at 1/32 .. 1/4 of the size."""
    max_displacement: int = 40
    """Largest displacement of the correlation, in pixels at 1/8 of the size."""
    one_sided: bool = False
    """Correlate to the side alone where the right view has what the left one shows."""
    batch_norm: bool = False
    """A batch norm after every activation; the released networks have none. Trainings on
    motorcycle by its own defaults and by `quick` have them, searches have not."""
    augmentation: float = 1.0
    """Factor of the variances of spatial and photometric augmentation; the paper: 0 to 2."""

    image_size: Suppress[int | None] = None
    layers: Suppress[int] = 8
    flip: Suppress[bool | None] = None
    cutout_length: Suppress[int | None] = None
    cutout_prob: Suppress[float] = 1.0


@dataclass(frozen=True)
class DisparitySearchConfig(DisparityConfig, SearchConfig):
    """Settings of the search for the cells of a disparity network."""

    data_defaults: ClassVar[Mapping[str, Values]] = {
        "motorcycle": {**_EMBEDDED, "epochs": 25, "alpha_learning_rate": 3e-3}
    }
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {"shrink": 2, "crop_height": 192, "crop_width": 384},
        "quick": {**_QUICK, "epochs": 3, "alpha_learning_rate": 3e-3},
    }

    space: str = "disparity_small"
    """disparity_small (the paper's three operations), disparity (all), or a .json file."""
    order: Literal["first", "second"] = "first"
    """first, as AutoDispNet; second: through a virtual step. The paper's is not known."""
    alpha_learning_rate: float = 1e-4
    """Adam's learning rate on the alphas; AutoDispNet's."""
    cutout_schedule: Suppress[Literal["constant", "linear"]] = "constant"


@dataclass(frozen=True)
class DisparityRandomSearchConfig(DisparityConfig, RandomSearchConfig):
    """Settings of a random search for the cells of a disparity network."""

    data_defaults: ClassVar[Mapping[str, Values]] = {
        "motorcycle": {**_EMBEDDED, "epochs": 25, "samples": 50, "sample_batches": 2}
    }
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {"shrink": 2, "crop_height": 192, "crop_width": 384},
        "quick": {**_QUICK, "epochs": 3, "samples": 10, "sample_batches": 1, "finalists": 3},
    }

    space: str = "disparity_small"
    """disparity_small (the paper's three operations), disparity (all), or a .json file."""


@dataclass(frozen=True)
class DisparityRetrainConfig(DisparityConfig, RetrainConfig):
    """Settings of training a found disparity network from scratch."""

    data_defaults: ClassVar[Mapping[str, Values]] = {
        "motorcycle": {**_EMBEDDED, **_RETRAIN, "epochs": 60}
    }
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {},
        "quick": {**_QUICK, **_RETRAIN, "epochs": 3},
    }
    short_epochs: ClassVar[Mapping[str, int]] = {"motorcycle": 20}

    data: str = ""
    """As in the search [the run's own; motorcycle for a genotype file]."""
    epochs: int = 110
    """Passes over the training pairs; 110 of FlyingThings3D are the published 300,000 steps."""
    batch_size: int = 8
    """Pairs a batch; the paper's is not known."""
    learning_rate: float = 1e-4
    """Adam's learning rate at the start; falls along a cosine."""
    weight_decay: float = 3e-4
    """L2 factor on the weights."""
    auxiliary: Suppress[bool] = False
    auxiliary_weight: Suppress[float] = 0.4
    compile: Suppress[bool] = False
