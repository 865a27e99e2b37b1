"""Random search with weight sharing: train the supernet on one random architecture a step, then
look for the one that does best with the weights that all of them share (Li & Talwalkar; the
paper's RS-ws).

python -m rdarts_fast.random_search --space s4
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rdarts_fast import config, config_sources, memory, plots, tasks, training
from rdarts_fast.config import RandomSearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.events import Events
from rdarts_fast.genotype import Genotype, one_hot_weights
from rdarts_fast.metrics import LARGEST, Sums
from rdarts_fast.networks import SearchNetwork
from rdarts_fast.run_dir import GENOTYPE, RESULT, SPACE, Run, RunDir
from rdarts_fast.sampling import Architectures, without_none
from rdarts_fast.spaces import CELLS, load_space
from rdarts_fast.tasks import Batch, Carry, Task

STEPS_PER_ROUND = 10_000  # of training, for each round of the selection


def run_random_search(**settings: Any) -> Run:
    """Search for an architecture at random, with shared weights, and return the finished run.

    settings: the fields of config.RandomSearchConfig, such as space="s2", data="digits", epochs=25,
    samples=100; resume="runs/first" goes on with a run. Its result.json has `valid_error`, the
    found genotype's on the half of the images that the weights did not see, in [0, 1], and the
    table of all `finalists`. Raises UserError and Interrupted as run_search does.
    """
    return random_search(config_sources.from_settings(RandomSearchConfig, settings))


def random_search(settings: RandomSearchConfig) -> Run:
    """Search as `settings` say; see run_random_search."""
    with training.prepared(settings) as device:
        return _random_search(settings, device)


def _random_search(settings: RandomSearchConfig, device: torch.device) -> Run:
    resumed = settings.resume
    space = load_space(settings.space if resumed is None else resumed / SPACE)
    task = tasks.load(settings, device)
    supernet = task.supernet(settings, space).to(device)
    supernet.compute(settings.precision, settings.checkpoint_cells)
    state = RandomSearchState.start(settings, supernet)
    where = training.environment(device, settings, task.fingerprint()) | task.about_data()
    name = f"random-{space.name}-{training.plain(task.data_name)}-seed{settings.seed}"
    files = {SPACE: json.dumps(space.to_dict())}
    with (
        training.open_run(settings, where, name, "random search", state, files) as run,
        training.Stop().watching() as stop,
    ):
        announce(settings, where, task, state.supernet, run)
        with (
            training.event_writer(settings, run, state.epoch) as events,
            memory.explained(
                settings, device, lambda: memory.ways_of(settings, task, state.supernet)
            ),
        ):
            loop(settings, task, state, run, stop, events)
        finalists = select(settings, task, state, run, stop)
        return finish(settings, task, state, run, finalists)


@dataclass
class RandomSearchState:
    """Everything that changes during a random search, and that a checkpoint holds."""

    supernet: SearchNetwork
    optimizer: torch.optim.SGD
    epoch: int = 0
    step: int = 0  # within the epoch
    records: int = 0  # lines of metrics.jsonl
    sums: Sums = field(default_factory=Sums)
    seconds: float = 0.0  # spent in the present epoch; after the last, in the selection
    carry: dict[str, Tensor] = field(default_factory=dict)  # an RNN's state
    costs: list[list[float]] = field(default_factory=list)  # of the selection, a list a stage

    @classmethod
    def start(cls, settings: RandomSearchConfig, supernet: SearchNetwork) -> RandomSearchState:
        """Return the state before the first step."""
        return cls(supernet, training.sgd(supernet.parameters(), settings))

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return {
            "kind": "random search",
            "epoch": self.epoch,
            "step": self.step,
            "records": self.records,
            "sums": dict(self.sums.values),
            "seconds": self.seconds,
            "carry": self.carry,
            "costs": self.costs,
            "supernet": self.supernet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def from_checkpoint(self, stored: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises what an entry that is missing or does not fit raises."""
        self.supernet.load_state_dict(stored["supernet"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.epoch, self.step, self.records = stored["epoch"], stored["step"], stored["records"]
        self.seconds, self.costs = stored["seconds"], [list(costs) for costs in stored["costs"]]
        self.sums, self.carry = Sums(dict(stored["sums"])), dict(stored["carry"])


@dataclass(frozen=True)
class Budget:
    """How long the training lasts: so many epochs, the last one perhaps in part."""

    epoch_steps: int  # of a whole epoch
    steps: int  # in all

    @classmethod
    def of(cls, settings: RandomSearchConfig, task: Task) -> Budget:
        """Return `steps`, or `epochs` passes over the weights' half."""
        epoch_steps = len(task.search_epoch(Draws(settings.seed)))
        return cls(epoch_steps, settings.steps or settings.epochs * epoch_steps)

    @property
    def epochs(self) -> int:
        """Epochs, begun ones too."""
        return -(-self.steps // self.epoch_steps)

    def steps_of(self, epoch: int) -> int:
        """Return the steps of an epoch."""
        return min(self.epoch_steps, self.steps - epoch * self.epoch_steps)

    @property
    def rounds(self) -> int:
        """Rounds of the selection."""
        return max(1, self.steps // STEPS_PER_ROUND)


def loop(
    settings: RandomSearchConfig,
    task: Task,
    state: RandomSearchState,
    run: RunDir,
    stop: training.Stop,
    events: Events,
) -> None:
    """Train the weights from where `state` stands to the last epoch, each step on an architecture
    of its own.
    """
    clock = training.Clock(settings.checkpoint_minutes)
    budget = Budget.of(settings, task)
    architectures = Architectures(state.supernet.space)
    draws = Draws(settings.seed)
    while state.epoch < budget.epochs:
        epoch = state.epoch
        started = time.monotonic() - state.seconds
        rate = training.cosine(
            epoch, budget.epochs, settings.learning_rate, settings.learning_rate_min
        )
        training.set_learning_rate(state.optimizer, rate)
        state.supernet.drop_path_prob = training.linear(
            epoch, budget.epochs - 1, settings.drop_path_prob
        )
        batches = task.search_epoch(draws.at(step=epoch))[: budget.steps_of(epoch)]
        state.supernet.train()
        for rows in training.progress(batches, state.step, f"epoch {epoch}"):
            step = draws.at(step=epoch * budget.epoch_steps + state.step)
            batch = task.training_batch(rows, step, cutout_probability(settings))
            weights = one_hot_weights(state.supernet.space, architectures.draw(step))

            train_step(settings, task, state, batch, weights, step, run)

            state.step += 1
            if stop.asked or clock.due():
                state.seconds = time.monotonic() - started
                run.save_checkpoint(state.to_checkpoint())
                clock.reset()
            if stop.asked:
                raise training.Interrupted(training.resume_command("random_search", run.folder))
        end_epoch(task, budget, state, run, events, rate, started)
        clock.reset()


def train_step(
    settings: RandomSearchConfig,
    task: Task,
    state: RandomSearchState,
    batch: Batch,
    weights: dict[str, Tensor],
    draws: Draws,
    run: RunDir,
) -> None:
    """One step of SGD on the shared weights, against the loss under one-hot `weights`.

    What was not sampled has weight 0 and no gradient, but weight decay and momentum, with
    --skip-unsampled too; that leaves away to compute it, which would move its batch norms.
    """
    weights = on_network(weights, state.supernet)
    supernet = state.supernet
    if settings.skip_unsampled:
        supernet = supernet.restricted(weights)
        for parameter in state.supernet.parameters():
            parameter.grad = torch.zeros_like(parameter)
    outcome = task.run_supernet(supernet, batch, weights, draws, state.carry, regularised=True)
    state.carry = dict(outcome.carry)
    state.sums.add(outcome)
    check = training.raising(state, run)
    training.descend(outcome.objective, state.supernet, state.optimizer, settings, check)


def on_network(weights: dict[str, Tensor], supernet: SearchNetwork) -> dict[str, Tensor]:
    """Return the operations' weights on the supernet's device."""
    parameter = next(supernet.parameters())
    return {kind: tensor.to(parameter) for kind, tensor in weights.items()}


def cutout_probability(settings: RandomSearchConfig) -> float:
    """Return the probability of cutout: only beside drop path, as in a search."""
    return settings.cutout_prob if settings.drop_path_prob > 0.0 else 0.0


def end_epoch(
    task: Task,
    budget: Budget,
    state: RandomSearchState,
    run: RunDir,
    events: Events,
    rate: float,
    started: float,
) -> None:
    """Write the epoch's line, then the checkpoint, and print a line."""
    metric = task.metric
    record: dict[str, Any] = {
        "epoch": state.epoch,
        "learning_rate": rate,
        "drop_path_prob": state.supernet.drop_path_prob,
        "train_loss": state.sums.loss,
        f"train_{metric.name}": state.sums.score(metric),
        "seconds": round(time.monotonic() - started, 3),
    }
    run.append_metrics(record)
    events.write(record)
    state.epoch, state.step, state.seconds, state.sums = state.epoch + 1, 0, 0.0, Sums()
    state.records, state.carry = state.records + 1, {}
    run.save_checkpoint(state.to_checkpoint())
    print(
        f"epoch {record['epoch']:>3}/{budget.epochs - 1}  train loss {record['train_loss']:.3f} "
        f"{metric.said(record[f'train_{metric.name}'])} under random architectures  "
        f"{record['seconds']:.1f} s",
        flush=True,
    )


@dataclass(frozen=True)
class Finalist:
    """One of the best of a round, with its validation costs under the shared weights."""

    genotype: Genotype
    sampled: float  # on the sample of batches
    valid: float  # on all


def select(
    settings: RandomSearchConfig,
    task: Task,
    state: RandomSearchState,
    run: RunDir,
    stop: training.Stop,
) -> list[Finalist]:
    """Return the finalists of all rounds, the best first.

    A round scores random architectures on a few validation batches, the same ones for all, and the
    best of them on the whole alphas' half. It draws architectures that a genotype can hold, and
    scores one that it draws twice once.
    """
    rounds = Budget.of(settings, task).rounds
    architectures = Architectures(state.supernet.space, whole=True)
    selection = Selection(settings, task, state, run, stop)
    found: list[Finalist] = []
    for i in range(rounds):
        key = Draws(settings.seed, pass_index=training.EVALUATION_PASS)
        steps = range(i * settings.samples, (i + 1) * settings.samples)
        drawn = [without_none(architectures.draw(key.at(step=step))) for step in steps]
        sampled = list(dict.fromkeys(drawn))
        few = task.validation_sample(settings.sample_batches, key.at(step=i))
        costs = selection.costs_of(2 * i, sampled, few, f"round {i}, random architectures")
        order = sorted(range(len(sampled)), key=costs.__getitem__)[: settings.finalists]
        best = [sampled[k] for k in order]
        whole = task.validation_batches()
        finals = selection.costs_of(2 * i + 1, best, whole, f"round {i}, finalists")
        scores = zip(best, (costs[k] for k in order), finals, strict=True)
        found += [Finalist(*score) for score in scores]
    return sorted(found, key=lambda finalist: finalist.valid)


@dataclass
class Selection:
    """What the stages of a selection share."""

    settings: RandomSearchConfig
    task: Task
    state: RandomSearchState
    run: RunDir
    stop: training.Stop

    def costs_of(
        self, stage: int, genotypes: Sequence[Genotype], batches: Sequence[Tensor], title: str
    ) -> list[float]:
        """Return each architecture's validation cost on `batches`, from where the state stands in
        this stage; print a line.
        """
        state = self.state
        state.costs += [[] for _ in range(stage + 1 - len(state.costs))]
        costs, metric = state.costs[stage], self.task.metric
        clock = training.Clock(self.settings.checkpoint_minutes)
        started = time.monotonic() - state.seconds
        missing = len(costs) < len(genotypes)
        for genotype in training.progress(genotypes, len(costs), title):
            costs.append(validation_cost(self.settings, self.task, state, genotype, stage, batches))
            state.seconds = time.monotonic() - started
            if self.stop.asked or clock.due():
                self.run.save_checkpoint(state.to_checkpoint())
                clock.reset()
            if self.stop.asked:
                folder = self.run.folder
                raise training.Interrupted(training.resume_command("random_search", folder))
        if missing:
            self.run.save_checkpoint(state.to_checkpoint())
        print(
            f"{title}: {len(genotypes)} on {len(batches)} batches, validation {metric.cost} "
            f"{metric.text(min(costs))} to {metric.text(max(costs))}  after {state.seconds:.1f} s",
            flush=True,
        )
        return costs


@torch.no_grad()
def validation_cost(
    settings: RandomSearchConfig,
    task: Task,
    state: RandomSearchState,
    genotype: Genotype,
    stage: int,
    batches: Sequence[Tensor],
) -> float:
    """Return the cost (share of wrong answers, ...) of an architecture with the shared weights, in
    eval mode, augmented as published; the largest where it is no finite number.
    """
    carry: Carry = {}
    sums, draws = Sums(), Draws(settings.seed, pass_index=training.EVALUATION_PASS)
    cutout = cutout_probability(settings)
    weights = on_network(one_hot_weights(state.supernet.space, genotype.cells), state.supernet)
    supernet = state.supernet.eval().restricted(weights)
    for b, rows in enumerate(batches):
        key = draws.at(step=(stage << 16) | b)
        batch = task.training_batch(rows, key, cutout, validation=True)
        outcome = task.run_supernet(supernet, batch, weights, key, carry)
        carry = outcome.carry
        sums.add(outcome)
    cost = sums.cost(task.metric)
    return cost if math.isfinite(cost) else LARGEST


def announce(
    settings: RandomSearchConfig,
    where: dict[str, Any],
    task: Task,
    supernet: SearchNetwork,
    run: RunDir,
) -> None:
    """Print what runs, once."""
    budget = Budget.of(settings, task)
    print(
        f"random search {supernet.space.name} on {task.describe()}: "
        f"{task.describe_halves('the selection')}; one of "
        f"{Architectures(supernet.space, whole=True).count:.2g} architectures"
    )
    print(
        f"supernet: {task.describe_network(settings, supernet)}, "
        f"{training.count_parameters(supernet):,} parameters; {budget.steps} steps "
        f"({budget.epochs} epochs) of batch {settings.batch_size}, then {budget.rounds} x "
        f"{settings.samples} architectures; seed {settings.seed}"
    )
    if settings.preset == "default" and config.has_own_defaults(type(settings), settings.data):
        smaller = f"these are the smaller defaults of {task.data_name}"
        print(f"{smaller}; --preset paper has the published ones")
    print(
        f"backend {settings.backend}, device {where['device']}, {training.ways(settings)}, "
        f"{where['threads']} threads"
    )
    print(f"run folder: {run.folder}", flush=True)


def finish(
    settings: RandomSearchConfig,
    task: Task,
    state: RandomSearchState,
    run: RunDir,
    finalists: Sequence[Finalist],
) -> Run:
    """Write the best finalist's genotype, the picture of its cells and result.json, and print
    it.
    """
    best, space, metric = finalists[0], state.supernet.space, task.metric
    if best.valid >= LARGEST:
        raise UserError(
            f"no architecture has a finite validation {metric.cost} with the shared weights: start "
            "anew with a lower --learning-rate"
        )
    table = [
        {
            f"sampled_{metric.cost}": finalist.sampled,
            f"valid_{metric.cost}": finalist.valid,
            "genotype": finalist.genotype.to_dict(),
        }
        for finalist in finalists
    ]
    training_seconds = sum(record["seconds"] for record in Run.read(run.folder).metrics)
    result = {
        f"valid_{metric.cost}": best.valid,
        "finalists": table,
        "training_seconds": training_seconds,
        "seconds": training_seconds + round(state.seconds, 3),
    }
    run.write_text(GENOTYPE, best.genotype.to_json())
    edges = {
        kind: [(*edge, None) for edge in best.genotype.edges(kind)] for kind in best.genotype.cells
    }
    inputs, title = {kind: CELLS[kind].inputs for kind in edges}, f"{space.name}, random search"
    plots.save_cells(run.folder / "cells.svg", edges, best.genotype.nodes, title, inputs)
    run.write_json(RESULT, result)
    print("\ngenotype:")
    print(best.genotype.describe())
    print(f"validation {metric.cost} with the shared weights: {metric.text(best.valid)}")
    print(f"run folder: {run.folder} (genotype.json, cells.svg, result.json: all finalists)")
    print(f"train it from scratch: python -m rdarts_fast.retrain {run.folder}", flush=True)
    return Run.read(run.folder)


@exit_on_user_error
def main() -> None:
    """The command line."""
    description = (
        "Search for an architecture at random, scored with weights that all architectures share "
        "(RS-ws)."
    )
    random_search(
        config_sources.parse(RandomSearchConfig, description, "python -m rdarts_fast.random_search")
    )


if __name__ == "__main__":
    main()
