"""What a task is: all that the loops of search, random search and retraining leave to it.

A task is loaded with a run's settings. It draws batches, builds the supernet and the network of a
genotype, and runs them: a batch goes in, an `Outcome` comes out. A batch is a tuple of tensors that
only the task looks into. `rows` name a batch's items, whatever an item is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rdarts_fast import bilevel
from rdarts_fast.config import RetrainConfig, RunConfig, SupernetConfig
from rdarts_fast.curvature import HessianOperator
from rdarts_fast.curvature.operators import LossOperator
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.metrics import Metric, Outcome
from rdarts_fast.networks import SearchNetwork, TrainedNetwork, softmax_weights
from rdarts_fast.spaces import Space, family, spaces_of

Batch = tuple[Tensor, ...]
Carry = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]  # cell type -> [E, O]


def check_space(space: Space, task: str) -> None:
    """Raise UserError where a space is another task's."""
    if space.task != task:
        fitting = ", ".join(spaces_of(task))
        raise UserError(
            f"--space {space.name}: its cells are for --task {space.task}, not {task} ({fitting})"
        )


def check_genotype(genotype: Genotype, task: str) -> None:
    """Raise UserError where a genotype's cells are another task's."""
    if family(genotype.cells) != task:
        found = ", ".join(genotype.cells)
        raise UserError(f"the genotype has cells {found}: of --task {family(genotype.cells)}")


class _Held(nn.Module):
    """A network whose buffers functional_call replaces while a function runs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        return run()


class Task(ABC):
    """A data set on a device, and the networks for it. All batches are functions of the draws
    alone.
    """

    metric: ClassVar[Metric]
    divisible: ClassVar[bool] = True  # rows are items of their own, --batch-size of them a batch
    fixed_shapes: ClassVar[bool] = False  # batches of as many rows are alike and carry nothing on

    @classmethod
    @abstractmethod
    def load(cls, config: RunConfig, device: torch.device) -> Task:
        """Load the data that `config` names. Raises UserError (missing, malformed, small)."""

    @property
    @abstractmethod
    def data_name(self) -> str:
        """The data's name, short, for a run's folder."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a checksum of the data."""

    @abstractmethod
    def describe(self) -> str:
        """Return the data's name and size for a line of output."""

    @abstractmethod
    def describe_halves(self, purpose: str = "the alphas") -> str:
        """Return how much of the data is for the weights of a search, how much for `purpose`."""

    @abstractmethod
    def describe_training(self, *, holdout: bool) -> str:
        """Return how much a network is trained on, and tested on."""

    @abstractmethod
    def describe_network(self, settings: RunConfig, network: nn.Module) -> str:
        """Return a network's size in the task's own terms."""

    # Networks

    @abstractmethod
    def supernet(self, config: SupernetConfig, space: Space) -> SearchNetwork:
        """Return the supernet at its start, drawn from the config's seed. Raises UserError for a
        space of another task.
        """

    @abstractmethod
    def network(self, config: RetrainConfig, genotype: Genotype) -> TrainedNetwork:
        """Return the genotype's network at its start, drawn from the config's seed."""

    @abstractmethod
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
        """Return the outcome of a supernet's pass under the operations' weights.

        regularised: whether the objective has what only a step of the weights descends.
        """

    @abstractmethod
    def run_network(
        self, network: Callable[..., Any], batch: Batch, draws: Draws, carry: Carry
    ) -> Outcome:
        """Return the outcome of a network's pass, in its present mode."""

    def hessian_operator(
        self, supernet: SearchNetwork, alphas: Weights, batch: Batch, draws: Draws
    ) -> LossOperator:
        """Return the Hessian of the batch's loss over the alphas, in the supernet's present mode,
        from an empty carried state.
        """
        # Copies, which a pass may move: what is differentiated later must stay as it is.
        buffers = {f"network.{n}": b.clone() for n, b in supernet.named_buffers()}
        held = _Held(supernet)

        def loss() -> Tensor:
            def run() -> Tensor:
                weights = softmax_weights(alphas)
                return self.run_supernet(supernet, batch, weights, draws, {}).objective

            found: Tensor = torch.func.functional_call(held, buffers, (run,))
            return found

        with bilevel.frozen(list(supernet.parameters())):
            return HessianOperator(loss, list(alphas.values()))

    # Optimisers of a network trained from scratch

    @abstractmethod
    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of a retraining."""

    def after_epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
    ) -> dict[str, Any]:
        """Do what the optimiser needs after an epoch of a retraining, and return what the epoch's
        record has of it.
        """
        return {}

    @contextmanager
    def averaged(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Give the network the weights that it is tested with, inside."""
        yield

    # What is left at the end of a retraining

    def baselines(self, *, holdout: bool) -> dict[str, float]:
        """Return the test cost, with `holdout` that on the held-out data, of what a network should
        beat, by a name in words.
        """
        return {}

    def artifacts(self, network: nn.Module) -> dict[str, bytes]:
        """Return files that show what a trained network does, by name."""
        return {}

    def rate_scale(self, rows: Tensor) -> float:
        """Return what a batch's learning rate is multiplied by."""
        return 1.0

    # Batches

    @abstractmethod
    def search_epoch(self, draws: Draws) -> list[Tensor]:
        """Return the rows of each weight batch of an epoch (draws.step is the epoch); the last may
        be smaller.
        """

    @abstractmethod
    def retrain_epoch(self, draws: Draws, *, holdout: bool = False) -> list[Tensor]:
        """Return the rows of each batch of an epoch over all training data, or with `holdout` over
        the weights' part.
        """

    @abstractmethod
    def validation_rows(self, draws: Draws) -> Tensor:
        """Return the rows of the alphas' batch of a step, keyed by draws.step."""

    @abstractmethod
    def validation_sample(self, count: int, draws: Draws) -> list[Tensor]:
        """Return the rows of `count` batches of the alphas' part, keyed by draws.step; all of it
        where that is fewer.
        """

    @abstractmethod
    def validation_batches(self) -> list[Tensor]:
        """Return the rows of the alphas' part in batches; a fixed sample where epoch_steps cuts."""

    @abstractmethod
    def test_batches(self) -> list[Tensor]:
        """Return the test data's rows in batches, in order; where epoch_steps cuts, a fixed
        sample.
        """

    @abstractmethod
    def training_batch(
        self, rows: Tensor, draws: Draws, cutout_prob: float | Tensor, *, validation: bool = False
    ) -> Batch:
        """Return a batch of training data, augmented; `validation` of the alphas' part, which draws
        its augmentation from a stream of its own. cutout_prob: of images, what a search schedules;
        a tensor, float64 [], is above 0.
        """

    @abstractmethod
    def test_batch(self, rows: Tensor) -> Batch:
        """Return a batch of test data as it is."""

    @abstractmethod
    def holdout_batch(self, rows: Tensor) -> Batch:
        """Return a batch of the alphas' part as it is."""

    def about_data(self) -> dict[str, Any]:
        """Return what environment.json says of the data beside its checksum."""
        return {}
