"""Search for an architecture: DARTS, the loop of the paper (Algorithm 1's search phase), one epoch
a line.

python -m rdarts_fast.search --space s4
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rdarts_fast import (
    bilevel,
    config,
    config_sources,
    evaluation,
    graph_step,
    memory,
    plots,
    tasks,
    tracking,
    training,
)
from rdarts_fast.config import SearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.events import Events
from rdarts_fast.genotype import Genotype, discretize, kept_edges
from rdarts_fast.graph_step import StepInput, Tell
from rdarts_fast.metrics import Outcome, Sums
from rdarts_fast.networks import SearchNetwork, softmax_weights
from rdarts_fast.networks.precision import FP32, in_float32, torch_precision
from rdarts_fast.oracle import Oracle
from rdarts_fast.rollback import early_stop, goes_on, mark_abandoned, save_for_rollback
from rdarts_fast.run_dir import GENOTYPE, RESULT, SPACE, Run, RunDir
from rdarts_fast.search_state import SearchState
from rdarts_fast.spaces import CELLS, load_space
from rdarts_fast.tasks import Batch, Task


def run_search(**settings: Any) -> Run:
    """Search for an architecture and return the finished run.

    settings: the fields of config.SearchConfig, such as space="s4", data="digits", epochs=25,
    seed=1, out="runs/first"; resume="runs/first" goes on with a run. Raises UserError for whatever
    the caller can mend, Interrupted (a KeyboardInterrupt) after Ctrl-C, with a checkpoint written.
    """
    return search(config_sources.from_settings(SearchConfig, settings))


def search(settings: SearchConfig) -> Run:
    """Search as `settings` say; see run_search."""
    with training.prepared(settings) as device:
        return _search(settings, device)


def _search(settings: SearchConfig, device: torch.device) -> Run:
    resumed = settings.resume
    space = load_space(settings.space if resumed is None else resumed / SPACE)
    oracle = None if settings.oracle is None else Oracle.read(settings.oracle)
    if oracle is not None:
        oracle.check(space, settings.data)
    task = tasks.load(settings, device)
    supernet = task.supernet(settings, space).to(device)
    supernet.compute(settings.precision, settings.checkpoint_cells)
    state = SearchState.start(settings, supernet)
    where = training.environment(device, settings, task.fingerprint()) | task.about_data()
    where["steps"] = graph_step.kind(settings, task, device)
    name = f"{space.name}-{training.plain(task.data_name)}-seed{settings.seed}"
    files = {SPACE: json.dumps(space.to_dict())}
    with (
        training.open_run(settings, where, name, "search", state, files) as run,
        training.Stop().watching() as stop,
    ):
        announce(settings, where, task, state.supernet, run)
        with (
            training.event_writer(settings, run, state.epoch) as events,
            memory.explained(
                settings, device, lambda: memory.ways_of(settings, task, state.supernet)
            ),
        ):
            loop(settings, task, state, run, stop, events, oracle)
        return finish(settings, task, state, run)


def loop(
    settings: SearchConfig,
    task: Task,
    state: SearchState,
    run: RunDir,
    stop: training.Stop,
    events: Events,
    oracle: Oracle | None = None,
) -> None:
    """Search from where `state` stands to the last epoch: each step an alpha step, then a weight
    step (Algorithm 1).
    """
    clock = training.Clock(settings.checkpoint_minutes)
    how = graph_step.kind(settings, task, next(state.supernet.parameters()).device)
    take_step = graph_step.taker(functools.partial(step, settings, task, state), how, state, run)
    mark_abandoned(run, state)
    while goes_on(settings, state, run, events):
        epoch = state.epoch
        started = time.monotonic() - state.seconds
        rate = training.cosine(
            epoch, settings.epochs, settings.learning_rate, settings.learning_rate_min
        )
        state.supernet.drop_path_prob = evaluation.drop_path_probability(
            settings, state.regularisation, epoch
        )
        cutout = evaluation.cutout_probability(settings, state.regularisation, epoch)
        draws = Draws(settings.seed, state.branch)
        batches = task.search_epoch(draws.at(step=epoch))
        state.supernet.train()
        for rows in training.progress(batches, state.step, f"epoch {epoch}"):
            key = draws.at(step=epoch * len(batches) + state.step)
            step_rate = rate * task.rate_scale(rows)
            take_step(StepInput(rows, task.validation_rows(key), key, step_rate, cutout))
            state.step += 1
            if stop.asked or clock.due():
                take_step.read()
                state.seconds = time.monotonic() - started
                run.save_checkpoint(state.to_checkpoint())
                clock.reset()
            if stop.asked:
                raise training.Interrupted(training.resume_command("search", run.folder))
        take_step.read()
        end_epoch(settings, task, state, run, events, rate, cutout, started, oracle)
        clock.reset()


def step(
    settings: SearchConfig, task: Task, state: SearchState, given: StepInput, tell: Tell
) -> None:
    """One step of the search: an alpha step, then a weight step (Algorithm 1)."""
    training_batch = task.training_batch(given.rows, given.draws, given.cutout)
    validation_batch = task.training_batch(
        given.validation_rows, given.draws, given.cutout, validation=True
    )
    losses = Losses(settings, task, state, given.draws)
    training.set_learning_rate(state.weight_optimizer, given.rate)

    training_loss = losses.of(training_batch, "weights")
    validation_loss = losses.of(validation_batch, "alphas", carries=True)
    alpha_step(settings, state, training_loss, validation_loss, given.rate, tell.check)
    weight_step(settings, state, losses.of_weights(training_batch, tell.add), tell.check)


@dataclass
class Losses:
    """The losses of one step as closures, each forward pass with draws of its own (or shared, as
    the settings say).
    """

    settings: SearchConfig
    task: Task
    state: SearchState
    draws: Draws

    def __post_init__(self) -> None:
        shared = self.settings.noise_per_pass == "shared"
        self._passes: Iterator[int] = itertools.repeat(0) if shared else itertools.count()

    def of(self, batch: Batch, stream: str, *, carries: bool = False) -> Callable[[], Tensor]:
        """Return the closure of the supernet's loss on `batch` of a stream, "weights" or "alphas".

        carries: whether the stream's next batch goes on with the state that this one ends with.
        """

        def loss() -> Tensor:
            # The virtual step's gradient is float32's: networks/precision.py, "virtual step". The
            # difference's two passes have no gradient of the weights.
            exact = stream == "weights" and next(self.state.supernet.parameters()).requires_grad
            with self.state.supernet.in_float32() if exact else nullcontext():
                return self._run(batch, stream, carries=carries).objective

        return loss

    def of_weights(self, batch: Batch, add: Callable[[Outcome], None]) -> Callable[[], Tensor]:
        """Return the closure of what a step of the weights descends; it adds to the epoch's
        sums.
        """

        def loss() -> Tensor:
            outcome = self._run(batch, "weights", carries=True, regularised=True)
            add(outcome)
            return outcome.objective

        return loss

    def _run(
        self, batch: Batch, stream: str, *, carries: bool, regularised: bool = False
    ) -> Outcome:
        draws = self.draws.at(pass_index=next(self._passes))
        weights, carry = softmax_weights(self.state.alphas), self.state.carry.get(stream, {})
        outcome = self.task.run_supernet(
            self.state.supernet, batch, weights, draws, carry, regularised=regularised
        )
        if carries:
            self.state.carry[stream] = dict(outcome.carry)
        return outcome


def alpha_step(
    settings: SearchConfig,
    state: SearchState,
    training_loss: bilevel.Loss,
    validation_loss: bilevel.Loss,
    rate: float | Tensor,
    check: training.Check,
) -> None:
    """One step of Adam on the alphas, against the validation loss (DARTS, section 2.3)."""
    alphas = list(state.alphas.values())
    parameters, buffers = list(state.supernet.parameters()), list(state.supernet.buffers())
    if settings.order == "first":
        result = bilevel.first_order(validation_loss, alphas, buffers, parameters)
    else:
        momenta = [state.weight_optimizer.state[p].get("momentum_buffer") for p in parameters]
        decay = state.regularisation.weight_decay
        clip = settings.grad_clip if settings.clips_virtual_step else None
        exactly = functools.partial(torch_precision, FP32)
        virtual = bilevel.VirtualStep(rate, settings.momentum, decay, momenta, clip, exactly)
        result = bilevel.second_order(
            training_loss,
            validation_loss,
            parameters,
            alphas,
            virtual,
            epsilon_scale=settings.epsilon_scale,
            exact=settings.implicit == "exact",
            buffers=buffers,
        )
    check(result.validation_loss, "validation loss")
    norm = torch.nn.utils.get_total_norm(result.gradient)
    check(norm, "norm of the alphas' gradient")
    for alpha, gradient in zip(alphas, result.gradient, strict=True):
        alpha.grad = gradient
    state.alpha_optimizer.step()
    state.alpha_optimizer.zero_grad()


def weight_step(
    settings: SearchConfig, state: SearchState, training_loss: bilevel.Loss, check: training.Check
) -> None:
    """One step of SGD on the weights, against the training loss."""
    training.descend(training_loss(), state.supernet, state.weight_optimizer, settings, check)


@in_float32
def measure_curvature(
    settings: SearchConfig,
    task: Task,
    state: SearchState,
    run: RunDir,
    cutout: float,
) -> dict[str, Any]:
    """Return what the epoch's record has of the curvature, nothing where no measurement is due; the
    trace takes lambda_max.

    Measured on the last batch that the alphas saw, with a pass of its own (see tracking.py).
    """
    if not tracking.due(settings, state.epoch):
        return {}
    started = time.monotonic()
    draws = Draws(settings.seed, state.branch)
    batch, key = evaluation.curvature_batch(task, draws, state.epoch, state.step, cutout)

    state.supernet.train()
    try:
        operator = task.hessian_operator(state.supernet, state.alphas, batch, key)
        found = tracking.measure(settings, operator, list(state.alphas.values()), started)
    except FloatingPointError as error:
        raise UserError(
            f"lambda_max at epoch {state.epoch}: {error}: start anew with a lower --learning-rate, "
            f"or look at the data; the last checkpoint is kept in {run.folder}"
        ) from error
    if found.arrays:
        run.write_bytes(f"hessian-{state.branch}-{state.epoch:03d}.npz", found.to_npz())
    fired = state.trace.stop_epoch is not None
    state.trace.update(state.epoch, found.record["lambda_max"])
    if state.trace.stop_epoch is not None and not fired:
        return {**found.record, "stop_epoch": state.trace.stop_epoch}
    return found.record


def more_text(record: Mapping[str, Any]) -> str:
    """Return the part of an epoch's line that tells of its lambda_max and regret."""
    text = ""
    if "lambda_max" in record:
        fired = f" (grown since epoch {record['stop_epoch']})" if "stop_epoch" in record else ""
        text += f"lambda_max {record['lambda_max']:.3f}{fired}  "
    if "regret" in record:
        text += f"regret {record['regret']:.2%}  "
    return text


def end_epoch(
    settings: SearchConfig,
    task: Task,
    state: SearchState,
    run: RunDir,
    events: Events,
    rate: float,
    cutout: float,
    started: float,
    oracle: Oracle | None = None,
) -> None:
    """Measure the curvature, validate, write the epoch's line and genotype, then the checkpoint,
    and print a line.
    """
    curvature = measure_curvature(settings, task, state, run, cutout)
    weights, draws = softmax_weights(state.alphas), Draws(settings.seed, state.branch)
    valid = evaluation.validate(task, state.supernet, weights, draws, state.epoch, cutout)
    genotype, metric = discretize(state.supernet.space, state.alphas), task.metric
    record = {
        "epoch": state.epoch,
        "branch": state.branch,
        "learning_rate": rate,
        "weight_decay": state.regularisation.weight_decay,
        "drop_path_prob": state.supernet.drop_path_prob,
        "train_loss": state.sums.loss,
        f"train_{metric.name}": state.sums.score(metric),
        "valid_loss": valid.loss,
        f"valid_{metric.name}": valid.score(metric),
        **{f"valid_{name}": value for name, value in valid.more().items()},
        **curvature,
        **({} if oracle is None else {"regret": oracle.regret(genotype)}),
        "alphas": {kind: alpha.tolist() for kind, alpha in state.alphas.items()},
        "genotype": genotype.to_dict(),
        "seconds": round(time.monotonic() - started, 3),
    }
    training.check_finite(torch.tensor(valid.loss), "validation loss", state.epoch, state.step, run)
    run.append_metrics(record)
    run.write_text(GENOTYPE, genotype.to_json())
    events.write(record)
    state.epoch, state.step, state.seconds, state.sums = state.epoch + 1, 0, 0.0, Sums()
    state.carry = {}
    state.records += 1
    save_for_rollback(settings, state, run)
    run.save_checkpoint(state.to_checkpoint())
    print(
        f"epoch {record['epoch']:>3}/{settings.epochs - 1}  "
        f"train loss {record['train_loss']:.3f} {metric.said(record[f'train_{metric.name}'])}  "
        f"validation loss {valid.loss:.3f} {metric.said(valid.score(metric))}  "
        f"{more_text(record)}{record['seconds']:.1f} s",
        flush=True,
    )


def announce(
    settings: SearchConfig,
    where: dict[str, Any],
    task: Task,
    supernet: SearchNetwork,
    run: RunDir,
) -> None:
    """Print what runs, once."""
    print(f"search {supernet.space.name} on {task.describe()}: {task.describe_halves()}")
    print(
        f"supernet: {task.describe_network(settings, supernet)}, "
        f"{training.count_parameters(supernet):,} parameters; {settings.epochs} epochs of "
        f"batch {settings.batch_size}, {settings.order} order, seed {settings.seed}"
    )
    if settings.preset == "default" and config.has_own_defaults(type(settings), settings.data):
        smaller = f"these are the smaller defaults of {task.data_name}"
        print(f"{smaller}; --preset paper has the published ones")
    print(
        f"backend {settings.backend}, device {where['device']}, {training.ways(settings)}, "
        f"{where['threads']} threads, steps {where['steps']}"
    )
    print(f"run folder: {run.folder}", flush=True)


def finish(settings: SearchConfig, task: Task, state: SearchState, run: RunDir) -> Run:
    """Write result.json and the picture of the cells, and print the genotype: of the last epoch, or
    of the stop epoch where DARTS-ES ended the search.
    """
    done = Run.read(run.folder)
    follows = settings.early_stop != "off" or settings.adaptive != "off"
    early = early_stop(done.metrics) if follows else None
    found: Mapping[str, Any] = done.history[-1]
    result: dict[str, Any] = {"seconds": sum(r["seconds"] for r in done.metrics)}
    if early is not None:
        result["early_stop"] = {"epoch": early["epoch"], "genotype": early["genotype"]}
        if settings.early_stop == "stop":
            found = early
    if settings.adaptive != "off":
        result["rollbacks"] = state.branch
    space, genotype = state.supernet.space, Genotype.from_dict(found["genotype"])
    run.write_text(GENOTYPE, genotype.to_json())
    alphas = {kind: torch.tensor(values) for kind, values in found["alphas"].items()}
    edges = kept_edges(space, genotype, alphas)
    title = f"{space.name}, {found['epoch'] + 1} epochs"
    inputs = {kind: CELLS[kind].inputs for kind in edges}
    plots.save_cells(run.folder / "cells.svg", edges, genotype.nodes, title, inputs)
    which = f" of epoch {found['epoch']}, where lambda_max began to grow" if found is early else ""
    metric = task.metric
    score = found[f"valid_{metric.name}"]
    run.write_json(RESULT, {f"valid_{metric.name}": score, **result})
    print(f"\ngenotype{which}:")
    print(genotype.describe())
    print(f"validation {metric.name} of the supernet: {metric.text(score)}")
    if early is not None and found is not early:
        print(f"DARTS-ES would have stopped with epoch {early['epoch']}'s: see result.json")
    print(f"run folder: {run.folder} (genotype.json, cells.svg, metrics.jsonl)")
    print(f"train it from scratch: python -m rdarts_fast.retrain {run.folder}", flush=True)
    return Run.read(run.folder)


@exit_on_user_error
def main() -> None:
    """The command line."""
    description = (
        "Search for an architecture on a search space of the paper (or your own), with DARTS."
    )
    search(config_sources.parse(SearchConfig, description, "python -m rdarts_fast.search"))


if __name__ == "__main__":
    main()
