"""Train the network of a found genotype from scratch and report its test error (paper, appendix
B.1).

python -m rdarts_fast.retrain runs/s4-digits-seed0 --preset 20x16
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdarts_fast import config, config_sources, memory, tasks, training
from rdarts_fast.config import RetrainConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.events import Events
from rdarts_fast.genotype import Genotype, read_genotype
from rdarts_fast.metrics import Outcome, Sums, metric_of
from rdarts_fast.networks import TrainedNetwork
from rdarts_fast.networks.precision import BF16
from rdarts_fast.ranks import (
    Bystander,
    Part,
    Ranks,
    joined,
    printing_on_first,
    prints_here,
    told_once,
)
from rdarts_fast.run_dir import RESULT, Run, RunDir
from rdarts_fast.tasks import Batch, Carry, Task


def run_retraining(**settings: Any) -> list[Run]:
    """Train genotypes from scratch and return the finished runs, one unless genotypes_at names
    several epochs.

    settings: the fields of config.RetrainConfig, such as source="runs/first", preset="20x16". A
    run's result.json has `test_error`, the share of wrong answers on the test images after the last
    epoch, in [0, 1], as published (the best epoch's beside it); with holdout=True `valid_error`, on
    the half of the training images that it did not see. Raises UserError and Interrupted as
    run_search does.
    """
    return retrain_all(config_sources.from_settings(RetrainConfig, settings))


def retrain_all(settings: RetrainConfig) -> list[Run]:
    """Retrain what `settings` name; see run_retraining."""
    if not settings.source:
        raise UserError("nothing to retrain: give a run's folder or a genotype file")
    epochs = _epochs_of(settings.genotypes_at)
    if len(epochs) < 2:
        return [retrain(settings)]
    for epoch in epochs:  # all there, before the first is trained
        find_genotype(replace(settings, genotypes_at=str(epoch)))
    source = Path(settings.source).resolve()
    folder = settings.out or source.with_name(source.name + "-genotypes")
    runs = []
    for epoch in epochs:
        out = folder / f"epoch-{epoch:03d}"
        one = replace(settings, genotypes_at=str(epoch), out=out)
        if (out / "config.json").is_file():  # begun by an earlier call
            config_sources.check_same(config_sources.stored(RetrainConfig, out, "--out"), one)
            one = replace(one, resume=out)
        try:
            runs.append(retrain(one))
        except training.Interrupted as interrupt:
            raise training.Interrupted("the same command") from interrupt
    if not prints_here():
        return runs
    on = tested_on(settings)
    metric = metric_of(settings.task)
    print(f"\nepoch of the search  {on} {metric.cost}")
    for epoch, run in zip(epochs, runs, strict=True):
        print(f"{epoch:>19}  {metric.text(run.metrics[-1][f'{on}_{metric.cost}'])}")
    return runs


def _epochs_of(text: str) -> list[int]:
    try:
        epochs = [int(word) for word in text.split(",")] if text else []
    except ValueError as error:
        raise UserError(f"--genotypes-at: expected epochs such as 0,5,10, got {text}") from error
    if any(epoch < 0 for epoch in epochs) or len(set(epochs)) != len(epochs):
        raise UserError(f"--genotypes-at: expected different epochs from 0 on, got {text}")
    return epochs


def find_genotype(settings: RetrainConfig) -> Genotype:
    """Return the genotype that `settings` name: a run's last or of one epoch, or a file's. Raises
    UserError.
    """
    if settings.resume is not None:
        return read_genotype(settings.resume / "genotype.json")
    source = Path(settings.source)
    if not source.is_dir():
        if settings.genotypes_at:
            raise UserError(f"--genotypes-at needs a run's folder, {source} is not one")
        return read_genotype(source)
    run = Run.read(source)
    if settings.genotypes_at:
        epoch = int(settings.genotypes_at)
        at = [r for r in run.history if r["epoch"] == epoch]
        if not at:
            raise UserError(
                f"--genotypes-at: {source} has epochs 0 to {len(run.history) - 1}, not {epoch}"
            )
        if "genotype" not in at[-1]:
            raise UserError(f"--genotypes-at: {source} has one genotype, not one an epoch")
        return Genotype.from_dict(at[-1]["genotype"])
    if run.genotype is None:
        raise UserError(f"{source}: no genotype yet: the search has not finished an epoch")
    return run.genotype


def retrain(settings: RetrainConfig) -> Run:
    """Train one genotype from scratch."""
    with (
        joined(settings.device) as (ranks, device_name),
        training.prepared(replace(settings, device=device_name)) as device,
    ):
        return _retrain(settings, device, ranks)


def _retrain(settings: RetrainConfig, device: torch.device, ranks: Ranks) -> Run:
    genotype = find_genotype(settings)
    task = tasks.load(settings, device)
    if ranks.count > 1 and not task.divisible:
        raise UserError(f"--task {settings.task}: a batch cannot be divided: run it on one process")
    network = task.network(settings, genotype).to(device)
    state = RetrainState.start(settings, network, task.optimizer(network))
    if settings.compile:
        state.network.compile()
    where = training.environment(device, settings, task.fingerprint(), ranks.count)
    where |= task.about_data()
    with (
        open_on_ranks(settings, ranks, where, genotype, state) as run,
        training.Stop().watching() as stop,
    ):
        announce(settings, where, task, state, run)
        model = ranks.wrapped(state.network, device, all_used=state.network.uses_all)
        with (
            training.event_writer(settings, run, state.epoch, ranks.first) as events,
            memory.explained(settings, device),
        ):
            loop(settings, task, Model(model, task, settings, ranks), state, run, stop, events)
        if ranks.first:
            finish(settings, task, state, run)
        ranks.from_first(None)  # the others wait for its result.json
        return Run.read(run.folder)


@contextmanager
def open_on_ranks(
    settings: RetrainConfig,
    ranks: Ranks,
    where: dict[str, Any],
    genotype: Genotype,
    state: RetrainState,
) -> Iterator[RunDir]:
    """Yield the run's folder, which the first rank alone writes, with its state on all ranks."""
    source = Path(settings.source).resolve()
    name = f"retrain-{source.name if source.is_dir() else source.stem}"
    files = {"genotype.json": genotype.to_json()}
    if ranks.first:
        with training.open_run(settings, where, name, "retraining", state, files) as run:
            ranks.from_first({"folder": str(run.folder), "state": state.to_checkpoint()})
            yield run
        return
    sent = ranks.from_first(None)
    state.from_checkpoint(sent["state"])
    state.sums = Sums()  # the first has them all
    yield Bystander(Path(sent["folder"]))


@dataclass(frozen=True)
class Model:
    """The network as the settings want it computed, on this rank's part of each batch."""

    network: nn.Module  # the task's, or what averages its gradients over the ranks
    task: Task
    settings: RetrainConfig
    ranks: Ranks

    def __call__(self, batch: Batch, draws: Draws, carry: Carry) -> Outcome:
        """Return the outcome of a pass; what the network returns is float32."""
        if self.settings.channels_last:
            batch = tuple(innermost(part) for part in batch)
        return self.task.run_network(self._called, batch, draws, carry)

    def _called(self, *inputs: Any) -> Any:
        with autocast(self.settings, next(self.network.parameters()).device):
            outputs = self.network(*inputs)
        if isinstance(outputs, Tensor):
            return outputs.float()
        return tuple(part.float() if isinstance(part, Tensor) else part for part in outputs)


def innermost(part: Tensor) -> Tensor:
    """Return a part of a batch, images with their channels innermost."""
    return part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part


def autocast(settings: RetrainConfig, device: torch.device) -> torch.autocast:
    """Return the context that the network is computed in."""
    low = settings.precision == BF16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


@dataclass
class RetrainState:
    """Everything that changes during a retraining, and that a checkpoint holds."""

    network: TrainedNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0  # within the epoch
    records: int = 0  # lines of metrics.jsonl
    best_cost: float = math.inf
    sums: Sums = field(default_factory=Sums)
    seconds: float = 0.0  # spent in the present epoch
    carry: dict[str, Tensor] = field(default_factory=dict)  # an RNN's state

    @classmethod
    def start(
        cls, settings: RetrainConfig, network: TrainedNetwork, optimizer: torch.optim.Optimizer
    ) -> RetrainState:
        """Return the state before the first step."""
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)
        return cls(network, optimizer)

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return {
            "kind": "retraining",
            "epoch": self.epoch,
            "step": self.step,
            "records": self.records,
            "best_cost": self.best_cost,
            "carry": self.carry,
            "sums": dict(self.sums.values),
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def from_checkpoint(self, stored: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises what an entry that is missing or does not fit raises."""
        self.network.load_state_dict(stored["network"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.epoch, self.step, self.records = stored["epoch"], stored["step"], stored["records"]
        self.best_cost, self.seconds = stored["best_cost"], stored["seconds"]
        self.sums, self.carry = Sums(dict(stored["sums"])), dict(stored["carry"])


def loop(
    settings: RetrainConfig,
    task: Task,
    model: Model,
    state: RetrainState,
    run: RunDir,
    stop: training.Stop,
    events: Events,
) -> None:
    """Train from where `state` stands to the last epoch, testing after each."""
    clock = training.Clock(settings.checkpoint_minutes)
    draws = Draws(settings.seed)
    while state.epoch < settings.epochs:
        epoch = state.epoch
        started = time.monotonic() - state.seconds
        rate = training.cosine(
            epoch, settings.epochs, settings.learning_rate, settings.learning_rate_min
        )
        state.network.drop_path_prob = training.linear(
            epoch, settings.epochs, settings.drop_path_prob
        )
        batches = task.retrain_epoch(draws.at(step=epoch), holdout=settings.holdout)
        state.network.train()
        for rows in training.progress(batches, state.step, f"epoch {epoch}"):
            step = draws.at(step=epoch * len(batches) + state.step)
            training.set_learning_rate(state.optimizer, rate * task.rate_scale(rows))
            train_step(settings, task, model, state, model.ranks.part(rows, step), run)

            state.step += 1
            stopping, due = model.ranks.any(stop.asked, clock.due())
            if stopping or due:
                state.seconds = time.monotonic() - started
                gather(state, model.ranks)
                run.save_checkpoint(state.to_checkpoint())
                clock.reset()
            if stopping:
                command = training.resume_command("retrain", run.folder)
                if model.ranks.count > 1:
                    run_on = f"torchrun --nproc-per-node {model.ranks.count} -m"
                    command = command.replace("python -m", run_on)
                raise training.Interrupted(command)
        gather(state, model.ranks)
        model.ranks.share_buffers(state.network)  # what is tested is what the checkpoint holds
        end_epoch(settings, task, model, state, run, events, rate, started)
        clock.reset()


def gather(state: RetrainState, ranks: Ranks) -> None:
    """Let the first rank have the sums of all, and the others begin anew."""
    total = ranks.total(state.sums.values)
    state.sums = Sums(total if ranks.first else {name: 0.0 for name in total})


def train_step(
    settings: RetrainConfig,
    task: Task,
    model: Model,
    state: RetrainState,
    part: Part,
    run: RunDir,
) -> None:
    """One step of the optimiser on the task's objective."""
    batch = task.training_batch(part.rows, part.draws, settings.cutout_prob)
    outcome = model(batch, part.draws, state.carry)
    state.carry = dict(outcome.carry)
    if part.weight > 0.0:
        state.sums.add(outcome)
    loss = part.weight * outcome.objective
    training.descend(loss, state.network, state.optimizer, settings, training.raising(state, run))


def tested_on(settings: RetrainConfig) -> str:
    """Return "test", or "valid" where the error is that on held-out training images."""
    return "valid" if settings.holdout else "test"


@torch.no_grad()
def test(settings: RetrainConfig, task: Task, model: Model, state: RetrainState) -> Sums:
    """Return loss and score on the test data, or on the held-out part of the training data; each
    rank computes its share of the batches.
    """
    carry: Carry = {}
    sums, draws = Sums(), Draws(settings.seed)
    batches = task.validation_batches() if settings.holdout else task.test_batches()
    state.network.eval()
    here = replace(model, network=state.network)  # without a word to the other ranks
    with task.averaged(state.optimizer):
        for b in range(model.ranks.rank, len(batches), model.ranks.count):
            rows = batches[b]
            batch = task.holdout_batch(rows) if settings.holdout else task.test_batch(rows)
            outcome = here(batch, draws.at(step=b, pass_index=training.EVALUATION_PASS), carry)
            carry = outcome.carry
            sums.add(outcome)
    state.network.train()
    return Sums(model.ranks.total(sums.values))


def end_epoch(
    settings: RetrainConfig,
    task: Task,
    model: Model,
    state: RetrainState,
    run: RunDir,
    events: Events,
    rate: float,
    started: float,
) -> None:
    """Test, write the epoch's line, then the checkpoints, and print a line."""
    tested, on = test(settings, task, model, state), tested_on(settings)
    metric, first = task.metric, model.ranks.first
    cost = tested.cost(metric)
    record = {
        "epoch": state.epoch,
        "learning_rate": rate,
        "drop_path_prob": state.network.drop_path_prob,
        "train_loss": state.sums.loss if first else 0.0,
        f"train_{metric.name}": state.sums.score(metric) if first else 0.0,
        f"{on}_loss": tested.loss,
        f"{on}_{metric.cost}": cost,
        **{f"{on}_{name}": value for name, value in tested.more().items()},
        "seconds": round(time.monotonic() - started, 3),
    }
    record |= task.after_epoch(state.network, state.optimizer, state.epoch)
    training.check_finite(torch.tensor(tested.loss), f"{on} loss", state.epoch, state.step, run)
    run.append_metrics(record)
    events.write(record)
    state.epoch, state.step, state.seconds, state.sums = state.epoch + 1, 0, 0.0, Sums()
    state.records, state.carry = state.records + 1, {}
    if cost < state.best_cost or state.records == 1:
        state.best_cost = cost
        run.save_checkpoint(state.to_checkpoint(), "best")
    run.save_checkpoint(state.to_checkpoint())
    beside = f"valid_{metric.cost}"  # of a task that validates as well as tests
    shown = on == "test" and beside in record
    valid = f"validation {metric.cost} {metric.text(record[beside])}  " if shown else ""
    print(
        f"epoch {record['epoch']:>3}/{settings.epochs - 1}  train loss {record['train_loss']:.3f} "
        f"{metric.said(record[f'train_{metric.name}'])}  "
        f"{valid}{on} {metric.cost} {metric.text(cost)} (best {metric.text(state.best_cost)})  "
        f"{record['seconds']:.1f} s",
        flush=True,
    )


def announce(
    settings: RetrainConfig,
    where: dict[str, Any],
    task: Task,
    state: RetrainState,
    run: RunDir,
) -> None:
    """Print what runs, once."""
    sizes = task.describe_training(holdout=settings.holdout)
    print(f"retrain {settings.source} on {task.describe()}: {sizes}")
    print(
        f"network: {task.describe_network(settings, state.network)}, "
        f"{training.count_parameters(state.network):,} parameters; "
        f"{settings.epochs} epochs of batch {settings.batch_size}, seed {settings.seed}"
    )
    if settings.preset == "default" and config.has_own_defaults(type(settings), settings.data):
        smaller = f"these are the smaller defaults of {task.data_name}"
        published = [p for p in type(settings).presets if p not in ("default", "quick")]
        print(f"{smaller}; published ones: --preset {', '.join(published)}")
    ways = [where["precision"], f"{where['threads']} threads"]
    ways += ["channels_last"] if settings.channels_last else []
    ways += ["compiled"] if settings.compile else []
    ways += [f"{where['ranks']} processes"] if where["ranks"] > 1 else []
    print(f"device {where['device']}, {', '.join(ways)}")
    print(f"run folder: {run.folder}", flush=True)


def finish(settings: RetrainConfig, task: Task, state: RetrainState, run: RunDir) -> None:
    """Write result.json and print the cost."""
    metrics, on, metric = Run.read(run.folder).metrics, tested_on(settings), task.metric
    last = metrics[-1][f"{on}_{metric.cost}"]
    result = {
        f"{on}_{metric.cost}": last,
        f"best_{on}_{metric.cost}": state.best_cost,
        "parameters": training.count_parameters(state.network),
        "seconds": sum(record["seconds"] for record in metrics),
    }
    if on == "test" and f"valid_{metric.cost}" in metrics[-1]:  # what choosing by it would report
        best_valid = min(metrics, key=lambda record: record[f"valid_{metric.cost}"])
        result[f"test_{metric.cost}_at_best_valid"] = best_valid[f"test_{metric.cost}"]
    baselines = task.baselines(holdout=settings.holdout)
    if baselines:
        result["baselines"] = baselines
    for file, data in task.artifacts(state.network).items():
        run.write_bytes(file, data)
    run.write_json(RESULT, result)
    best = f"(best epoch: {metric.text(state.best_cost)})"
    name = "validation" if settings.holdout else "test"
    print(f"\n{name} {metric.cost} after the last epoch: {metric.text(last)} {best}")
    for what, cost in baselines.items():
        print(f"for comparison, the {what}: {metric.text(cost)}")
    print(f"run folder: {run.folder}", flush=True)


@exit_on_user_error
def main() -> None:
    """The command line."""
    description = "Train a found architecture from scratch and report its test error."
    program = "python -m rdarts_fast.retrain"
    with told_once():
        with printing_on_first():
            settings = config_sources.parse(RetrainConfig, description, program)
        retrain_all(settings)


if __name__ == "__main__":
    main()
