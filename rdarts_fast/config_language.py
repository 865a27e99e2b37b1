"""The settings of language modelling: DARTS's recurrent cell (paper, appendix E; DARTS, appendix
A.1.2).

Defaults are the published values, for Penn Treebank; `data_defaults` has those of the embedded
text. The published search is of first order, its optimiser plain SGD at a constant rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tyro.conf import Suppress

from rdarts_fast.config import RandomSearchConfig, RetrainConfig, SearchConfig, Values

_EMBEDDED: Values = {
    "hidden": 64,
    "batch_size": 16,
    "epochs": 12,
    "dropout": 0.3,
    "dropout_words": 0.3,
    "dropout_hidden": 0.1,
    "dropout_input": 0.1,
    "learning_rate": 5.0,
    "learning_rate_min": 5.0,
    "threads": 1,
}
_QUICK: Values = {**_EMBEDDED, "hidden": 32, "epochs": 3, "epoch_steps": 30}


@dataclass(frozen=True)
class LanguageConfig:
    """What every run of a language model has, beside what every run has."""

    unused: ClassVar[tuple[str, ...]] = (
        "image_size",
        "channels",
        "layers",
        "drop_path_prob",
        "flip",
        "cutout_length",
        "cutout_prob",
        "cutout_schedule",
        "adaptive_step",
        "adaptive_drop_path_max",
        "skip_unsampled",
        "auxiliary",
        "auxiliary_weight",
        "channels_last",
        "compile",
    )
    own_data: ClassVar[str] = "pydoc"

    task: str = "language"
    """classification, language or disparity: what the network is for."""
    data: str = "pydoc"
    """pydoc (Python's own help texts), or a folder with train.txt, valid.txt and test.txt."""
    epochs: int = 50
    """Passes over the training text."""
    batch_size: int = 256
    """Columns that the text is cut into, read side by side; the published value."""
    learning_rate: float = 20.0
    """SGD's learning rate for a window of bptt words; less for a shorter one, in proportion."""
    momentum: float = 0.0
    """SGD's momentum."""
    weight_decay: float = 5e-7
    """L2 factor on the weights; the paper searches with 5e-7 x 1, 3, 9, 27."""
    grad_clip: float = 0.25
    """Largest norm of the weights' gradient."""
    hidden: int = 300
    """Units of the recurrent cell, and numbers that a word is embedded in."""
    bptt: int = 35
    """Words that are differentiated through at once; half of it in one window of twenty."""
    dropout: float = 0.75
    """Dropout of the cell's output before the decoder."""
    dropout_words: float = 0.75
    """Dropout of the cell's input in each step (published name: dropoutx)."""
    dropout_hidden: float = 0.25
    """Dropout of the cell's hidden state in each step (dropouth)."""
    dropout_input: float = 0.2
    """Dropout of the embedded words (dropouti)."""
    dropout_embedding: float = 0.0
    """Chance of dropping a word of the vocabulary altogether in a window (dropoute)."""
    activation: float = 0.0
    """Weight of the squared outputs in what the weights descend (AR; published name: alpha)."""
    slowness: float = 1e-3
    """Weight of the squared differences between outputs (TAR; published name: beta)."""

    image_size: Suppress[int | None] = None
    channels: Suppress[int] = 16
    layers: Suppress[int] = 8
    drop_path_prob: Suppress[float] = 0.0
    flip: Suppress[bool | None] = None
    cutout_length: Suppress[int | None] = None
    cutout_prob: Suppress[float] = 1.0


@dataclass(frozen=True)
class LanguageSearchConfig(LanguageConfig, SearchConfig):
    """Settings of the search for a recurrent cell."""

    clips_virtual_step: ClassVar[bool] = True
    data_defaults: ClassVar[Mapping[str, Values]] = {
        "pydoc": {**_EMBEDDED, "alpha_learning_rate": 3e-2}
    }
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {},
        "ptb": {},
        "quick": {**_QUICK, "alpha_learning_rate": 3e-2},
    }

    space: str = "rnn"
    """rnn (DARTS's operations), rnn_small (the paper's relu, identity), or a .json file."""
    order: Literal["first", "second"] = "first"
    """first, as published by default; second: alphas through a virtual step of the weights."""
    learning_rate_min: float = 20.0
    """SGD's learning rate at the end; the published one is constant."""
    alpha_learning_rate: float = 3e-3
    """Adam's learning rate on the alphas."""
    alpha_beta1: float = 0.9
    """Adam's first beta."""
    cutout_schedule: Suppress[Literal["constant", "linear"]] = "constant"
    adaptive: Literal["off", "l2"] = "off"
    """DARTS-ADA: where the rule fires, go back to the stop epoch and regularise more."""
    adaptive_step: Suppress[float] = 0.2
    adaptive_drop_path_max: Suppress[float] = 0.6


@dataclass(frozen=True)
class LanguageRandomSearchConfig(LanguageConfig, RandomSearchConfig):
    """Settings of a random search for a recurrent cell."""

    data_defaults: ClassVar[Mapping[str, Values]] = {
        "pydoc": {**_EMBEDDED, "samples": 100, "sample_batches": 5}
    }
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {},
        "ptb": {},
        "quick": {**_QUICK, "samples": 20, "sample_batches": 3, "finalists": 5},
    }

    space: str = "rnn"
    """rnn (DARTS's operations), rnn_small (the paper's relu, identity), or a .json file."""
    learning_rate_min: float = 20.0
    """SGD's learning rate at the end; the published one is constant."""
    skip_unsampled: Suppress[bool] = False


@dataclass(frozen=True)
class LanguageRetrainConfig(LanguageConfig, RetrainConfig):
    """Settings of training a found recurrent cell from scratch."""

    data_defaults: ClassVar[Mapping[str, Values]] = {"pydoc": {**_EMBEDDED, "epochs": 20}}
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {},
        "ptb": {},
        "quick": _QUICK,
    }
    short_epochs: ClassVar[Mapping[str, int]] = {"pydoc": 10}

    data: str = ""
    """As in the search [the run's own; pydoc for a genotype file]."""
    epochs: int = 1600
    """Passes over the training text; the paper's (the code's default is 8000)."""
    batch_size: int = 64
    """Columns that the text is cut into, read side by side."""
    learning_rate_min: float = 20.0
    """SGD's learning rate at the end; the published one is constant."""
    weight_decay: float = 8e-7
    """L2 factor on the weights."""
    hidden: int = 850
    """Units of the recurrent cell, and numbers that a word is embedded in."""
    dropout_embedding: float = 0.1
    """Chance of dropping a word of the vocabulary altogether in a window (dropoute)."""
    patience: int = 5
    """Average the weights once the validation loss has not fallen for so many epochs (nonmono)."""
    test_batch_size: int = 1
    """Columns of the test text; the published value."""
    auxiliary: Suppress[bool] = False
    auxiliary_weight: Suppress[float] = 0.4
    channels_last: Suppress[bool] = False
    compile: Suppress[bool] = False
