"""Disparity estimation (paper, appendix D): stereo pairs, cells of three types, end-point error.

Rows are pairs; a batch is views [N, 2, 3, H, W] and disparities [N, H, W] in pixels, not finite
where they are unknown. An item is a pixel whose disparity is known.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rdarts_fast import data
from rdarts_fast.config import RetrainConfig, RunConfig, SupernetConfig
from rdarts_fast.config_disparity import DisparityConfig
from rdarts_fast.data.stereo import StereoSet, load_stereo
from rdarts_fast.data.stereo_augmentation import StereoAugmentation
from rdarts_fast.draws import SITE_SAMPLE, SITE_STREAM_VALIDATION, Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.metrics import METRICS, Outcome
from rdarts_fast.networks.disparity import (
    Disparities,
    DisparityNetwork,
    DisparitySettings,
    DisparitySupernet,
)
from rdarts_fast.networks.disparity_loss import BAD_PIXELS, disparity_sums, multiscale_loss
from rdarts_fast.spaces import Space
from rdarts_fast.tasks.task import Batch, Carry, Task, Weights, check_genotype, check_space


@dataclass(frozen=True)
class Disparity(Task):
    """Stereo pairs, and the device that batches are made on."""

    pairs: StereoSet
    device: torch.device
    settings: RunConfig
    stereo: DisparityConfig  # the same settings, as what they are of a disparity network

    metric = METRICS["disparity"]

    @classmethod
    def load(cls, config: RunConfig, device: torch.device) -> Disparity:
        """Load the pairs that `config` names. Raises UserError (missing, malformed, few)."""
        assert isinstance(config, DisparityConfig)
        pairs = load_stereo(config.data, shrink=config.shrink)
        if not len(pairs.test):
            raise UserError(f"data {config.data}: no pairs to test on")
        return cls(pairs, device, config, config)

    @property
    def data_name(self) -> str:
        """The data set's name."""
        return self.pairs.name

    def fingerprint(self) -> str:
        """Return a checksum of the pairs, or of their files' names and sizes."""
        return self.pairs.fingerprint()

    def describe(self) -> str:
        """Return name and size of the crops."""
        found = self.stereo
        smaller = f", images made smaller {found.shrink} times" if found.shrink > 1 else ""
        return f"{self.pairs.name} (crops of {found.crop_height}x{found.crop_width}{smaller})"

    def describe_halves(self, purpose: str = "the alphas") -> str:
        """Return how many pairs there are for the weights, and for `purpose`."""
        halves = [len(half) for half in self.pairs.halves]
        return f"{halves[0]} crops an epoch for the weights, {halves[1]} for {purpose}"

    def describe_training(self, *, holdout: bool) -> str:
        """Return how many pairs a network is trained and tested on."""
        if holdout:
            halves = [len(half) for half in self.pairs.halves]
            return f"{halves[0]} crops an epoch, {halves[1]} held out; the test pairs are not used"
        return f"{len(self.pairs.train)} crops an epoch, {len(self.pairs.test)} test pairs"

    def describe_network(self, settings: RunConfig, network: nn.Module) -> str:
        """Return cells and channels."""
        return f"6 encoder and {self.stereo.decoders} decoder cells, C = {settings.channels}"

    def supernet(self, config: SupernetConfig, space: Space) -> DisparitySupernet:
        """Return the supernet at its start, drawn from the config's seed."""
        check_space(space, "disparity")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return DisparitySupernet(space, self._network_settings(), config.backend)

    def network(self, config: RetrainConfig, genotype: Genotype) -> DisparityNetwork:
        """Return the genotype's network at its start, drawn from the config's seed."""
        check_genotype(genotype, "disparity")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return DisparityNetwork(genotype, self._network_settings())

    def _network_settings(self) -> DisparitySettings:
        found = self.stereo
        return DisparitySettings(
            channels=found.channels,
            decoders=found.decoders,
            max_displacement=found.max_displacement,
            one_sided=found.one_sided,
            batch_norm=found.batch_norm,
            initial_disparity=self.pairs.median_disparity(),
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
        """Return the outcome of a supernet's pass: the weighted errors of all predictions."""
        views, target = batch
        return outcome(supernet(views, weights, draws), target)

    def run_network(
        self, network: Callable[..., Any], batch: Batch, draws: Draws, carry: Carry
    ) -> Outcome:
        """Return the outcome of a network's pass."""
        views, target = batch
        return outcome(Disparities(*network(views, draws)), target)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return Adam, as published."""
        config = self.settings
        return torch.optim.Adam(
            network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            foreach=True,
        )

    def baselines(self, *, holdout: bool) -> dict[str, float]:
        """Return the EPE of the best constant, the median of the very disparities it is tested
        on.
        """
        rows = self.pairs.halves[1].tolist() if holdout else range(len(self.pairs.test))
        known = [self.pairs.read("train" if holdout else "test", i).disparity for i in rows]
        values = torch.cat([disparity[disparity.isfinite()] for disparity in known])
        return {"best constant": float((values - values.median()).abs().double().mean())}

    @torch.no_grad()
    def artifacts(self, network: nn.Module) -> dict[str, bytes]:
        """Return maps.npz: the first test pair's left view [H, W, 3], its disparity and the
        prediction [H, W], which the report draws.
        """
        network.eval()
        views, target = self.test_batch(torch.tensor([0]))
        found = Disparities(*network(views, Draws(0)))
        network.train()
        file = io.BytesIO()
        np.savez_compressed(
            file,
            left=self.pairs.read("test", 0).left.permute(1, 2, 0).numpy(),
            truth=target[0].cpu().numpy(),
            prediction=found.final[0].cpu().numpy(),
        )
        return {"maps.npz": file.getvalue()}

    # Batches

    def search_epoch(self, draws: Draws) -> list[Tensor]:
        """Return the rows of each weight batch of an epoch (draws.step is the epoch)."""
        return self._epoch(self.pairs.halves[0], draws)

    def retrain_epoch(self, draws: Draws, *, holdout: bool = False) -> list[Tensor]:
        """Return the rows of each batch of an epoch over all training pairs, or the weights'."""
        if holdout:
            return self._epoch(self.pairs.halves[0], draws)
        return self._epoch(torch.arange(len(self.pairs.train)), draws)

    def _epoch(self, rows: Tensor, draws: Draws) -> list[Tensor]:
        batches = data.epoch_batches(rows, self.settings.batch_size, draws)
        return batches[: self.settings.epoch_steps]

    def validation_rows(self, draws: Draws) -> Tensor:
        """Return a random full batch of the alphas' pairs, keyed by draws.step."""
        return data.validation_batch(self.pairs.halves[1], self.settings.batch_size, draws)

    def validation_sample(self, count: int, draws: Draws) -> list[Tensor]:
        """Return `count` random batches of the alphas' pairs, keyed by draws.step."""
        return self._epoch(self.pairs.halves[1], draws)[:count]

    def validation_batches(self) -> list[Tensor]:
        """Return the alphas' pairs in batches; a fixed sample where epoch_steps cuts."""
        rows, size = self.pairs.halves[1], self.settings.batch_size
        return self._sample(rows, size)

    def test_batches(self) -> list[Tensor]:
        """Return the test pairs one by one, as their sizes differ."""
        return self._sample(torch.arange(len(self.pairs.test)), 1)

    def _sample(self, rows: Tensor, size: int) -> list[Tensor]:
        steps = self.settings.epoch_steps
        if steps is not None and steps * size < len(rows):
            order = Draws(0).permutation(SITE_SAMPLE, len(rows))
            rows = rows[order[: steps * size].sort().values]
        return list(rows.split(size))

    def training_batch(
        self, rows: Tensor, draws: Draws, cutout_prob: float | Tensor, *, validation: bool = False
    ) -> Batch:
        """Return augmented crops of training pairs."""
        found = self.stereo
        return self.pairs.training_batch(
            rows,
            (found.crop_height, found.crop_width),
            StereoAugmentation(scale=found.augmentation),
            draws,
            self.device,
            stream=SITE_STREAM_VALIDATION if validation else 0,
        )

    def test_batch(self, rows: Tensor) -> Batch:
        """Return whole test pairs."""
        return self.pairs.whole_batch("test", rows, self.device)

    def holdout_batch(self, rows: Tensor) -> Batch:
        """Return whole training pairs."""
        return self.pairs.whole_batch("train", rows, self.device)


def outcome(found: Disparities, target: Tensor) -> Outcome:
    """Return loss and sums of predictions for disparities [N, H, W]."""
    loss = multiscale_loss(found, target)
    known, error, *bad = disparity_sums(found.final, target)
    more = {f"bad{most:g}": share for most, share in zip(BAD_PIXELS, bad, strict=True)}
    return Outcome(loss, loss.detach(), error, int(known), more)
