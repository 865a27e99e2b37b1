"""Language modelling (paper, appendix E): windows of text, a recurrent supernet, perplexity.

A batch's rows are the places of a window in columns of text that are read side by side; a batch is
words [T, B] and the words that follow them [T, B]. The hidden state is carried from window to
window, for the weights' text and the alphas' text apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.averaged_sgd import AveragedSGD
from rdarts_fast.config import RandomSearchConfig, RetrainConfig, RunConfig, SupernetConfig
from rdarts_fast.config_language import LanguageConfig, LanguageRetrainConfig
from rdarts_fast.data import text
from rdarts_fast.draws import Draws
from rdarts_fast.genotype import Genotype
from rdarts_fast.metrics import METRICS, Outcome, Sums
from rdarts_fast.networks.recurrent import (
    Dropouts,
    LanguageOutput,
    RecurrentNetwork,
    RecurrentSupernet,
)
from rdarts_fast.spaces import Space
from rdarts_fast.tasks.task import Batch, Carry, Task, Weights, check_genotype, check_space
from rdarts_fast.training import EVALUATION_PASS


@dataclass(frozen=True)
class Language(Task):
    """A text in columns on a device: [T, columns] each."""

    corpus: text.Corpus
    train: Tensor
    valid: Tensor
    test: Tensor
    settings: RunConfig
    words: LanguageConfig  # the same settings, as what they are of a language model

    metric = METRICS["language"]
    divisible = False  # rows are the places of one window

    @classmethod
    def load(cls, config: RunConfig, device: torch.device) -> Language:
        """Load the text that `config` names. Raises UserError (missing, malformed, too short)."""
        assert isinstance(config, LanguageConfig)
        corpus = text.load_corpus(config.data)
        wide = config.test_batch_size if isinstance(config, LanguageRetrainConfig) else None
        sizes = (config.batch_size, config.batch_size, wide or config.batch_size)
        parts = [
            text.columns(getattr(corpus, part), size, f"data {config.data}, {part}").to(device)
            for part, size in zip(text.PARTS, sizes, strict=True)
        ]
        return cls(corpus, parts[0], parts[1], parts[2], config, config)

    @property
    def data_name(self) -> str:
        """The text's name."""
        return self.corpus.name

    def fingerprint(self) -> str:
        """Return a checksum of all words."""
        return f"{zlib.crc32(self.corpus.sha256.encode()):08x}"

    def about_data(self) -> dict[str, Any]:
        """Return the text's SHA-256: pydoc is another one in another version of Python."""
        return {"text_sha256": self.corpus.sha256}

    def describe(self) -> str:
        """Return name and vocabulary."""
        return f"{self.corpus.name} (a vocabulary of {len(self.corpus.vocabulary):,} words)"

    def describe_halves(self, purpose: str = "the alphas") -> str:
        """Return how many words there are for the weights, and for `purpose`."""
        train, valid = len(self.corpus.train), len(self.corpus.valid)
        return f"{train:,} words for the weights, {valid:,} for {purpose}"

    def describe_training(self, *, holdout: bool) -> str:
        """Return how many words a network is trained and tested on."""
        train, valid, test = (len(getattr(self.corpus, part)) for part in text.PARTS)
        if holdout:
            return f"{train:,} words to train on, {valid:,} held out; the test text is not used"
        return f"{train:,} words to train on, {test:,} to test on"

    def describe_network(self, settings: RunConfig, network: nn.Module) -> str:
        """Return nodes and units."""
        assert isinstance(network, RecurrentSupernet | RecurrentNetwork)
        return f"a recurrent cell of {len(network.ws)} nodes and {network.hidden_size} units"

    def supernet(self, config: SupernetConfig, space: Space) -> RecurrentSupernet:
        """Return the supernet at its start, drawn from the config's seed.

        A random search's has no batch norm, as the published one (Li and Talwalkar's): the running
        statistics of all architectures fit none of them, and after some words a state is no number.
        """
        check_space(space, "language")
        normalised = not isinstance(config, RandomSearchConfig)
        vocabulary, hidden = len(self.corpus.vocabulary), self.words.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return RecurrentSupernet(
                *(space, vocabulary, hidden, self._dropouts(), config.backend),
                normalised=normalised,
            )

    def network(self, config: RetrainConfig, genotype: Genotype) -> RecurrentNetwork:
        """Return the genotype's network at its start, drawn from the config's seed."""
        check_genotype(genotype, "language")
        vocabulary, hidden = len(self.corpus.vocabulary), self.words.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return RecurrentNetwork(genotype, vocabulary, hidden, self._dropouts())

    def _dropouts(self) -> Dropouts:
        found = self.words
        return Dropouts(
            found.dropout,
            found.dropout_words,
            found.dropout_hidden,
            found.dropout_input,
            found.dropout_embedding,
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
        """Return the outcome of a supernet's pass over a window: the mean cross-entropy a word.

        regularised: with AR and TAR, which the alphas do not see, as published.
        """
        words, following = batch
        return self._outcome(
            supernet(words, weights, draws, carry.get("hidden")), following, regularised
        )

    def run_network(
        self, network: Callable[..., Any], batch: Batch, draws: Draws, carry: Carry
    ) -> Outcome:
        """Return the outcome of a network's pass over a window, its objective with AR and TAR."""
        words, following = batch
        found = LanguageOutput(*network(words, draws, carry.get("hidden")))
        return self._outcome(found, following, regularised=True)

    def _outcome(self, found: LanguageOutput, following: Tensor, regularised: bool) -> Outcome:
        loss = F.cross_entropy(found.logits, following.flatten())
        objective = loss
        if regularised and self.words.activation > 0.0:
            objective = objective + self.words.activation * found.dropped.pow(2).mean()
        if regularised and self.words.slowness > 0.0 and len(found.raw) > 1:
            steps = found.raw[1:] - found.raw[:-1]
            objective = objective + self.words.slowness * steps.pow(2).mean()
        plain, items = loss.detach(), following.numel()
        return Outcome(
            objective, plain, plain * items, items, carry={"hidden": found.hidden.detach()}
        )

    # Optimiser

    def optimizer(self, network: nn.Module) -> AveragedSGD:
        """Return SGD, which averages the weights once `after_epoch` says so (NT-ASGD)."""
        config = self.settings
        return AveragedSGD(
            network.parameters(), config.learning_rate, config.momentum, config.weight_decay
        )

    @contextmanager
    def averaged(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Give the network the average of its weights, inside, where there is one."""
        assert isinstance(optimizer, AveragedSGD)
        with optimizer.averaged():
            yield

    @torch.no_grad()
    def after_epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
    ) -> dict[str, Any]:
        """Return the validation perplexity; where it has not fallen for `patience` epochs, average
        the weights from now on.
        """
        assert isinstance(optimizer, AveragedSGD)
        assert isinstance(self.settings, LanguageRetrainConfig)
        sums, carry, draws = Sums(), dict[str, Tensor](), Draws(0, pass_index=EVALUATION_PASS)
        network.eval()
        with self.averaged(optimizer):
            for rows in self.validation_batches():
                outcome = self.run_network(network, self.holdout_batch(rows), draws, carry)
                carry = dict(outcome.carry)
                sums.add(outcome)
        network.train()
        optimizer.note(sums.loss, self.settings.patience)
        return {
            "valid_loss": sums.loss,
            "valid_perplexity": sums.score(self.metric),
            "averaging": optimizer.averaging,
        }

    def baselines(self, *, holdout: bool) -> dict[str, float]:
        """Return the perplexity of the training text's word counts."""
        found = self.corpus.unigram_perplexity("valid" if holdout else "test")
        return {"unigram model": found}

    def rate_scale(self, rows: Tensor) -> float:
        """Return a window's length, in windows of `bptt` words."""
        return len(rows) / self.words.bptt

    # Windows

    def search_epoch(self, draws: Draws) -> list[Tensor]:
        """Return the rows of each window of an epoch: `bptt` words, or in one of twenty half as
        many (draws.step is the epoch).
        """
        found = text.random_windows(len(self.train), self.words.bptt, draws, deviation=0.0)
        return found[: self.settings.epoch_steps]

    def retrain_epoch(self, draws: Draws, *, holdout: bool = False) -> list[Tensor]:
        """Return the rows of each window of an epoch, of random length; the held-out text is always
        apart.
        """
        found = text.random_windows(len(self.train), self.words.bptt, draws)
        return found[: self.settings.epoch_steps]

    def validation_rows(self, draws: Draws) -> Tensor:
        """Return the window of the alphas' text of a step: one after the other, and again from the
        start.
        """
        found = text.windows(len(self.valid), self.words.bptt)
        return found[draws.step % len(found)]

    def validation_sample(self, count: int, draws: Draws) -> list[Tensor]:
        """Return `count` windows of the alphas' text, one after another from a random one on."""
        return text.consecutive(self.validation_batches(), count, draws)

    def validation_batches(self) -> list[Tensor]:
        """Return the windows of the alphas' text; where epoch_steps cuts, the first ones."""
        found = text.windows(len(self.valid), self.words.bptt)
        return found[: self.settings.epoch_steps]

    def test_batches(self) -> list[Tensor]:
        """Return the windows of the test text; where epoch_steps cuts, the first ones."""
        found = text.windows(len(self.test), self.words.bptt)
        return found[: self.settings.epoch_steps]

    def training_batch(
        self, rows: Tensor, draws: Draws, cutout_prob: float | Tensor, *, validation: bool = False
    ) -> Batch:
        """Return a window of the training text, with `validation` of the alphas' text."""
        return _window(self.valid if validation else self.train, rows)

    def test_batch(self, rows: Tensor) -> Batch:
        """Return a window of the test text."""
        return _window(self.test, rows)

    def holdout_batch(self, rows: Tensor) -> Batch:
        """Return a window of the alphas' text."""
        return _window(self.valid, rows)


def _window(columns: Tensor, rows: Tensor) -> Batch:
    first, end = int(rows[0]), int(rows[-1]) + 1
    return columns[first:end], columns[first + 1 : end + 1]
