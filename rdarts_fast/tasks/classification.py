"""Image classification (paper, section 2): batches, augmentation, supernet, network, loss."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast import data, training
from rdarts_fast.config import RetrainConfig, RunConfig, SearchConfig, SupernetConfig
from rdarts_fast.curvature.operators import LossOperator
from rdarts_fast.draws import SITE_SAMPLE, SITE_STREAM_VALIDATION, Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.metrics import METRICS, Outcome
from rdarts_fast.networks import Network, SearchNetwork, Supernet, auxiliary_fits
from rdarts_fast.recording import CudaGraphs
from rdarts_fast.spaces import Space
from rdarts_fast.tasks.task import Batch, Carry, Task, Weights, check_genotype, check_space


@dataclass(frozen=True)
class Classification(Task):
    """A data set of images on a device. Rows are images; a batch is images [N, C, H, W] and labels
    [N].
    """

    images: data.ImageSet
    settings: RunConfig

    metric = METRICS["classification"]
    fixed_shapes = True

    @classmethod
    def load(cls, config: RunConfig, device: torch.device) -> Classification:
        """Load the data set that `config` names. Raises UserError (missing, malformed, small)."""
        images = data.load(
            config.data, root=config.data_root, seed=config.seed, image_size=config.image_size
        )
        if config.cutout_length is not None:
            augmentation = replace(images.augmentation, cutout_length=config.cutout_length)
            images = replace(images, augmentation=augmentation)
        if config.flip is not None:
            images = replace(images, augmentation=replace(images.augmentation, flip=config.flip))
        images.augmentation.check_size(*images.size)
        needed = 4 if isinstance(config, SupernetConfig) else 2  # a search halves them
        found = len(images.train_labels)
        if found < needed:
            raise UserError(
                f"data {config.data}: at least {needed} training images needed, found {found}"
            )
        return cls(images.to(device), config)

    @property
    def data_name(self) -> str:
        """The data set's name."""
        return self.images.name

    def fingerprint(self) -> str:
        """Return a checksum of all images and labels."""
        checksum = 0
        images = self.images
        for tensor in (
            images.train_images,
            images.train_labels,
            images.test_images,
            images.test_labels,
        ):
            checksum = zlib.crc32(tensor.cpu().contiguous().numpy().data, checksum)
        return f"{checksum:08x}"

    def describe(self) -> str:
        """Return name, image size and number of classes for a line of output."""
        height, width = self.images.size
        size = f"{self.images.channels}x{height}x{width}"
        return f"{self.images.name} ({size}, {self.images.classes} classes)"

    def describe_halves(self, purpose: str = "the alphas") -> str:
        """Return how many images there are for the weights, and for `purpose`."""
        halves = [len(half) for half in self.images.halves]
        return f"{halves[0]} images for the weights, {halves[1]} for {purpose}"

    def describe_training(self, *, holdout: bool) -> str:
        """Return how many images a network is trained and tested on."""
        images = self.images
        if holdout:
            halves = [len(half) for half in images.halves]
            return (
                f"{halves[0]} training images, {halves[1]} held out; the test images are not used"
            )
        return f"{len(images.train_labels)} training and {len(images.test_labels)} test images"

    def describe_network(self, settings: RunConfig, network: nn.Module) -> str:
        """Return cells and channels, and whether there is an auxiliary head."""
        size = f"{settings.layers} cells of {settings.channels} channels"
        if not isinstance(network, Network):
            return size
        auxiliary = "without" if network.auxiliary is None else "with"
        return f"{size}, {auxiliary} auxiliary head"

    def supernet(self, config: SupernetConfig, space: Space) -> Supernet:
        """Return the supernet at its start, drawn from the config's seed."""
        check_space(space, "classification")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return Supernet(
                space,
                config.channels,
                config.layers,
                self.images.classes,
                config.backend,
                self.images.channels,
            )

    def network(self, config: RetrainConfig, genotype: Genotype) -> Network:
        """Return the genotype's network at its start, drawn from the config's seed.

        The auxiliary head is left away where its feature map would be below 4x4.
        """
        check_genotype(genotype, "classification")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return Network(
                genotype,
                config.channels,
                config.layers,
                self.images.classes,
                config.auxiliary and auxiliary_fits(self.images.size),
                self.images.channels,
            )

    def run_supernet(
        self,
        supernet: nn.Module,
        batch: Batch,
        weights: Weights,
        draws: Draws,
        carry: Carry,
        *,
        regularised: bool = False,
    ) -> Outcome:
        """Return the outcome of a supernet's pass: the mean cross-entropy."""
        images, labels = batch
        return outcome(supernet(images, weights, draws), labels)

    def run_network(
        self, network: Callable[..., Any], batch: Batch, draws: Draws, carry: Carry
    ) -> Outcome:
        """Return the outcome of a network's pass; the auxiliary head's loss is added to the
        objective under its weight.
        """
        images, labels = batch
        outputs = network(images, draws)
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
        found = outcome(logits, labels)
        if auxiliary is None:
            return found
        assert isinstance(self.settings, RetrainConfig)
        more = self.settings.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        return replace(found, objective=found.objective + more)

    def hessian_operator(
        self, supernet: SearchNetwork, alphas: Weights, batch: Batch, draws: Draws
    ) -> LossOperator:
        """Return the Hessian of the batch's cross-entropy, on kernels where the supernet is."""
        assert isinstance(supernet, Supernet)
        images, labels = batch
        recorder = recorder_for(self.settings, images.device)
        return supernet.hessian_operator(alphas, images, labels, draws, recorder=recorder)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return training.sgd(network.parameters(), self.settings)

    def search_epoch(self, draws: Draws) -> list[Tensor]:
        """Return the rows of each weight batch of an epoch (draws.step is the epoch); the last may
        be smaller.
        """
        return self._epoch(self.images.halves[0], draws)

    def retrain_epoch(self, draws: Draws, *, holdout: bool = False) -> list[Tensor]:
        """Return the rows of each batch of an epoch over all training images, or with `holdout`
        over the weights' half.
        """
        if holdout:
            return self._epoch(self.images.halves[0], draws)
        return self._epoch(torch.arange(len(self.images.train_labels)), draws)

    def _epoch(self, rows: Tensor, draws: Draws) -> list[Tensor]:
        batches = data.epoch_batches(rows.cpu(), self.settings.batch_size, draws)
        return batches[: self.settings.epoch_steps]

    def validation_rows(self, draws: Draws) -> Tensor:
        """Return a random full batch of the alphas' half, keyed by draws.step."""
        return data.validation_batch(self.images.halves[1].cpu(), self.settings.batch_size, draws)

    def validation_sample(self, count: int, draws: Draws) -> list[Tensor]:
        """Return the rows of `count` random batches of the alphas' half, keyed by draws.step; all
        of it where that is fewer.
        """
        return self._epoch(self.images.halves[1], draws)[:count]

    def validation_batches(self) -> list[Tensor]:
        """The rows of the alphas' half in batches; a fixed sample where epoch_steps cuts."""
        return self._in_order(self.images.halves[1].cpu())

    def test_batches(self) -> list[Tensor]:
        """Return the test images' rows in batches, in order; where epoch_steps cuts, a fixed
        sample.
        """
        return self._in_order(torch.arange(len(self.images.test_labels)))

    def _in_order(self, rows: Tensor) -> list[Tensor]:
        steps, size = self.settings.epoch_steps, self.settings.batch_size
        count = len(rows) if steps is None else steps * size
        if count < len(rows):  # not the first ones: data sets are often sorted by class
            rows = rows[Draws(0).permutation(SITE_SAMPLE, len(rows))[:count].sort().values]
        return list(rows.split(size))

    def training_batch(
        self, rows: Tensor, draws: Draws, cutout_prob: float | Tensor, *, validation: bool = False
    ) -> Batch:
        """Return augmented images [N, C, H, W] and labels [N] of training rows.

        `validation` draws the augmentation from a stream of its own: the alphas' half is augmented
        like the weights' half, as published, in a step and in the accuracy at the end of an epoch.
        """
        rows = rows.to(self.images.train_labels.device)
        stream = SITE_STREAM_VALIDATION if validation else 0
        images = data.augment(
            self.images.train_images[rows],
            self.images.augmentation,
            draws,
            stream=stream,
            cutout_probability=cutout_prob,
        )
        return images, self.images.train_labels[rows]

    def test_batch(self, rows: Tensor) -> Batch:
        """Return images and labels of test rows, normalised only."""
        return self._plain_batch(self.images.test_images, self.images.test_labels, rows)

    def holdout_batch(self, rows: Tensor) -> Batch:
        """Return images and labels of training rows, normalised only."""
        return self._plain_batch(self.images.train_images, self.images.train_labels, rows)

    def _plain_batch(self, images: Tensor, labels: Tensor, rows: Tensor) -> Batch:
        rows = rows.to(labels.device)
        return data.normalize(images[rows], self.images.augmentation), labels[rows]


def outcome(logits: Tensor, labels: Tensor) -> Outcome:
    """Return the mean cross-entropy of logits [N, classes] and the number of right answers."""
    loss = F.cross_entropy(logits, labels)
    right = (logits.detach().argmax(dim=1) == labels).sum()
    return Outcome(loss, loss.detach(), right, len(labels))


def recorder_for(settings: RunConfig, device: torch.device) -> CudaGraphs | None:
    """Return what records a search's products with the Hessian, on a GPU; None: nothing does."""
    records = isinstance(settings, SearchConfig) and settings.graph and device.type == "cuda"
    return CudaGraphs(device) if records else None
