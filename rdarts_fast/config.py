"""Every setting, its published value and when to change it; presets.

A field's comment is its help text. Published values are those of the paper and its code. Data sets
that are not 32x32 photographs have defaults of their own (`data_defaults`); `--preset paper` is the
published setting everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tyro

from rdarts_fast.errors import unknown

Values = Mapping[str, Any]  # of settings, by name

# A data set's own defaults, below preset "paper" and the flags. Small images and few of them: a
# smaller network, and alphas that move faster, since a search of a few hundred steps at 3e-4 would
# leave them where they started. One thread: tensors of a few thousand numbers gain next to nothing
# from a second one, and lose much where another program wants the core.
_SMALL_SEARCH: Values = {
    "channels": 8,
    "layers": 4,
    "epochs": 25,
    "learning_rate": 0.05,
    "alpha_learning_rate": 3e-3,
    "threads": 1,
}
_SMALL_RANDOM_SEARCH: Values = {
    "channels": 8,
    "layers": 4,
    "learning_rate": 0.05,
    "samples": 200,
    "sample_batches": 5,
    "threads": 1,
}
_SMALL_RETRAIN: Values = {
    "channels": 8,
    "layers": 4,
    "epochs": 40,
    "batch_size": 64,
    "threads": 1,
}


@dataclass(frozen=True)
class RunConfig:
    """What every run has."""

    data_defaults: ClassVar[Mapping[str, Values]]  # a data set's own, below presets and flags
    presets: ClassVar[Mapping[str, Values | None]]
    unused: ClassVar[tuple[str, ...]] = ()  # of the fields, what the task has no use for
    own_data: ClassVar[str] = "digits"  # where nothing is named; needs no download

    task: str = "classification"
    """classification, language or disparity: what the network is for."""
    data: str = "digits"
    """digits, cifar10, cifar100, svhn, fashion_mnist, folder:PATH or npz:FILE (see README)."""
    data_root: Path = Path("data")
    """Where downloaded data sets lie."""
    image_size: int | None = None
    """Resize (shorter side) and centre-crop images to this size; for folders of mixed sizes."""
    preset: str = "default"
    """A named set of defaults; flags given beside it win. default: the data set's own."""
    out: Path | None = None
    """The run's folder, not there yet [runs/<name>-<time>]."""
    resume: Path | None = None
    """Go on with the run in this folder, with its settings."""
    seed: int = 0
    """Seed of the weights, the alphas, batches, augmentation, noise and masks."""
    epochs: int = 50
    """Passes over the training images."""
    epoch_steps: int | None = None
    """At most this many batches an epoch, training and validation alike, for a quick look [all]."""
    batch_size: int = 64
    """Images a batch; the published value."""
    channels: int = 16
    """Channels of the first cells, doubled at both reductions."""
    layers: int = 8
    """Cells."""
    learning_rate: float = 0.025
    """SGD's learning rate at the start; falls along a cosine."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 3e-4
    """L2 factor on the weights; the paper searches with 3e-4 x 1, 3, 9, 27, 81."""
    grad_clip: float = 5.0
    """Largest norm of the weights' gradient."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32, bf16: for GPUs of compute capability 8.0 or more; see networks/precision.py."""
    drop_path_prob: float = 0.0
    """Chance of dropping an edge at the last epoch, linear from 0 (the paper: 0 to 0.6)."""
    flip: bool | None = None
    """Mirror training images at random [the data set's own: not for digits]."""
    cutout_length: int | None = None
    """Side of the cutout square in pixels [the data set's own: 16 at 32x32]."""
    cutout_prob: float = 1.0
    """Chance of cutout for an image; in a search only where drop_path_prob > 0, as published."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads [torch's default]. The bits of a run depend on it."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints inside an epoch; there is one after every epoch anyway."""
    tensorboard: bool = False
    """Write TensorBoard events into the run's folder (needs the extra `tensorboard`)."""


@dataclass(frozen=True)
class SupernetConfig(RunConfig):
    """What every run that trains a supernet has."""

    space: str = "s4"
    """s1 to s4, s5 (the paper's), darts (8 operations; the official code's s5), or a .json file."""
    backend: Literal["fused", "reference"] = "fused"
    """fused: whole cells on kernels; reference: one torch module per candidate, as published."""
    checkpoint_cells: bool = False
    """Keep a cell's inputs alone and compute it again in the backward: less memory, more time."""
    learning_rate_min: float = 0.001
    """SGD's learning rate at the end of the cosine."""


@dataclass(frozen=True)
class SearchConfig(SupernetConfig):
    """Settings of a search (paper, section 2.1; the values of DARTS)."""

    clips_virtual_step: ClassVar[bool] = False  # by grad_clip, where the published code does
    data_defaults: ClassVar[Mapping[str, Values]] = {"digits": _SMALL_SEARCH}
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,  # the data set's own
        "paper": {},
        "quick": {
            "channels": 4,
            "layers": 3,
            "epochs": 5,
            "learning_rate": 0.1,
            "alpha_learning_rate": 3e-3,
            "epoch_steps": 12,
            "threads": 1,
        },
    }

    order: Literal["first", "second"] = "second"
    """second: alphas through a virtual step of the weights, as published; first: twice as fast."""
    epsilon_scale: float = 0.01
    """Second order's difference step times the vector's norm (published 0.01, far from exact)."""
    implicit: Literal["difference", "exact"] = "difference"
    """Second order's mixed derivative: by the published difference, or exact by differentiating."""
    noise_per_pass: Literal["fresh", "shared"] = "fresh"
    """fresh: noise and masks anew in each forward pass, as published; shared: once a step."""
    graph: bool = True
    """On a GPU: steps and lambda_max's products as CUDA graphs; --no-graph to look for errors."""
    alpha_learning_rate: float = 3e-4
    """Adam's learning rate on the alphas."""
    alpha_beta1: float = 0.5
    """Adam's first beta."""
    alpha_beta2: float = 0.999
    """Adam's second beta."""
    alpha_weight_decay: float = 1e-3
    """Weight decay on the alphas."""
    cutout_schedule: Literal["constant", "linear"] = "constant"
    """constant: cutout_prob throughout, as the code ran; linear: from 0, as the paper says."""
    curvature: Literal["off", "lambda", "spectrum", "full"] = "off"
    """lambda: largest eigenvalue of the alphas' Hessian; spectrum: all; full: H and g as npz."""
    curvature_every: int = 2
    """Epochs between two measurements; the published value. The last epoch has one anyway."""
    curvature_decay: bool = True
    """Add the alphas' weight decay to the Hessian's diagonal, as published: eigenvalues + 1e-3."""
    early_stop: Literal["off", "stop", "simulate"] = "off"
    """DARTS-ES. stop: end with the genotype of the stop epoch; simulate: note it and go on."""
    stop_rule: Literal["code", "paper"] = "code"
    """code: the published code's rule, by the flags below; paper: 0.75 over 5 epochs, no flags."""
    stop_factor: float = 1.3
    """Stop where the local average of lambda_max has grown by more than this factor."""
    stop_window: int = 5
    """Measurements that a local average takes; odd."""
    stop_delta: int = 4
    """Measurements between the two averages that are compared."""
    stop_start_epoch: int = 10
    """First epoch to go back to."""
    oracle: Path | None = None
    """A table of all architectures (robust --method exhaustive): adds each epoch's test regret."""
    adaptive: Literal["off", "l2", "drop-path", "both"] = "off"
    """DARTS-ADA: where the rule fires, go back to the stop epoch and regularise more by this."""
    adaptive_factor: float = 10.0
    """What a rollback multiplies the weight decay by."""
    adaptive_max: float = 0.03
    """Largest weight decay that a rollback may go on with."""
    adaptive_step: float = 0.2
    """What a rollback adds to the drop-path probability."""
    adaptive_drop_path_max: float = 0.6
    """Largest drop-path probability that a rollback may go on with."""


@dataclass(frozen=True)
class RandomSearchConfig(SupernetConfig):
    """Settings of random search with weight sharing (Li & Talwalkar; the paper's RS-ws)."""

    data_defaults: ClassVar[Mapping[str, Values]] = {"digits": _SMALL_RANDOM_SEARCH}
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {},
        "quick": {
            "channels": 4,
            "layers": 3,
            "epochs": 10,
            "learning_rate": 0.1,
            "epoch_steps": 12,
            "samples": 50,
            "sample_batches": 5,
            "threads": 1,
        },
    }

    steps: int | None = None
    """Training steps, in place of epochs (published: 19531, on every data set) [by the epochs]."""
    skip_unsampled: bool = False
    """Compute only what was sampled: faster at full size; the rest's batch norms stand still."""
    samples: int = 1000
    """Architectures that a round of the selection draws (a round for every 10,000 steps)."""
    sample_batches: int = 10
    """Validation batches that each of them is scored on; all where there are fewer."""
    finalists: int = 10
    """Of those, how many are scored on all validation images; the best one is the result."""


@dataclass(frozen=True)
class RetrainConfig(RunConfig):
    """Settings of training a found network from scratch (paper, appendix B.1)."""

    data_defaults: ClassVar[Mapping[str, Values]] = {"digits": _SMALL_RETRAIN}
    short_epochs: ClassVar[Mapping[str, int]] = {"digits": 20}  # of R-DARTS, by data set
    presets: ClassVar[Mapping[str, Values | None]] = {
        "default": None,
        "paper": {},  # 8 cells of 16 channels: CIFAR-100, SVHN, and CIFAR-10's L2 sweep on S2-S4
        "8x16": {},
        "20x16": {"layers": 20},  # CIFAR-10 on S2 and S4
        "20x36": {"layers": 20, "channels": 36},  # CIFAR-10 on S1 and S3
        "quick": {
            "channels": 4,
            "layers": 3,
            "epochs": 5,
            "batch_size": 64,
            "epoch_steps": 12,
            "threads": 1,
        },
    }

    source: tyro.conf.Positional[str] = ""
    """A run's folder, or a genotype file (JSON or the official text form)."""
    genotypes_at: str = ""
    """Retrain the run's genotypes of these epochs, such as 0,5,10, each in its own folder."""
    data: str = ""
    """As in the search [the run's own; digits for a genotype file]."""
    epochs: int = 600
    """Passes over the training images."""
    batch_size: int = 96
    """Images a batch."""
    learning_rate_min: float = 0.0
    """SGD's learning rate at the end of the cosine."""
    drop_path_prob: float = 0.2
    """Chance of dropping an operation (never an identity) at the last epoch, linear from 0."""
    holdout: bool = False
    """Train on the weights' half of the training images and report the error on the other half."""
    auxiliary: bool = True
    """A second classifier after two thirds of the cells; off below a 4x4 feature map."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary loss."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: products in TF32; bf16: by autocast, weights in float32; for GPUs."""
    channels_last: bool = False
    """Keep images and weights with channels innermost; faster on GPUs, other bits."""
    compile: bool = False
    """Let torch.compile have the network: minutes at the start, then faster; other bits."""


Config = TypeVar("Config", SearchConfig, RandomSearchConfig, RetrainConfig)

# The least that a whole number may be.
LEAST: Mapping[str, int] = {
    "epochs": 1,
    "epoch_steps": 1,
    "batch_size": 2,
    "channels": 1,
    "layers": 1,
    "threads": 1,
    "image_size": 8,
    "cutout_length": 1,
    "curvature_every": 1,
    "stop_window": 1,
    "stop_delta": 1,
    "stop_start_epoch": 0,
    "steps": 1,
    "samples": 1,
    "sample_batches": 1,
    "finalists": 1,
    "hidden": 1,
    "shrink": 1,
    "crop_height": 1,
    "crop_width": 1,
    "decoders": 1,
    "max_displacement": 0,
    "bptt": 1,
    "patience": 1,
    "test_batch_size": 1,
}
# What a resumed run may change without changing what it computes.
FREE_ON_RESUME = (
    *("resume", "device", "threads", "checkpoint_minutes", "tensorboard", "data_root"),
    "graph",
)


def defaults(kind: type[Config], data: str, preset: str) -> Config:
    """Return the settings that hold before any flag. Raises UserError for an unknown preset."""
    if preset not in kind.presets:
        raise unknown("preset", preset, kind.presets)
    values = kind.presets[preset]
    if values is None:
        values = kind.data_defaults.get(data.split(":")[0], {})
    return kind(**{"data": data, "preset": preset, **values})


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def to_json(config: RunConfig) -> dict[str, Any]:
    """Return the config as config.json holds it."""
    values = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k != "resume"}


def has_own_defaults(kind: type[Config], data: str) -> bool:
    """Whether the data set has defaults of its own, other than the published ones."""
    return data.split(":")[0] in kind.data_defaults
