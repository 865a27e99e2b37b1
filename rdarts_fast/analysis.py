"""The paper's analyses of a search: how lambda_max went, the spectrum, what discretising costs, and
the loss around the alphas it ended with.

python -m rdarts_fast.analysis runs/s4-digits-seed0
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rdarts_fast import bilevel, config_sources, curvature, evaluation, plots, tasks, training
from rdarts_fast.config import SearchConfig
from rdarts_fast.curvature import EigenvalueTrace
from rdarts_fast.curvature.operators import flat
from rdarts_fast.draws import SITE_LANDSCAPE, Draws
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.genotype import discretize, one_hot_weights
from rdarts_fast.metrics import metric_of
from rdarts_fast.networks import softmax_weights
from rdarts_fast.networks.precision import in_float32
from rdarts_fast.run_dir import SPACE, Run
from rdarts_fast.search_state import SearchState, new_trace
from rdarts_fast.spaces import load_space
from rdarts_fast.tasks import Batch, Task

ANALYSIS = "analysis"  # the folder in a run's folder


# From what the run wrote


@dataclass(frozen=True)
class Branch:
    """lambda_max along one branch of a search; a rollback begins a new one.

    epochs, values: of the measurements. average_epochs, averages: the local averages that the rule
    compares. stop_epoch: the epoch to go back to, None where the rule did not fire.
    """

    branch: int
    epochs: list[int]
    values: list[float]
    average_epochs: list[int]
    averages: list[float]
    stop_epoch: int | None


def trajectory(run: Run) -> list[Branch]:
    """Return lambda_max over the epochs of each branch of a search, with the local averages and the
    stop (paper, section 3 and figures 3, 8, 12). Empty where nothing was measured.
    """
    trace = new_trace(_settings(run.folder))
    measured: dict[int, list[tuple[int, float]]] = {}
    traces: dict[int, EigenvalueTrace] = {}
    for record in run.metrics:
        branch = record["branch"]
        if branch not in measured:
            measured[branch] = []
            trace = traces[branch] = trace.rolled_back(record["epoch"] - 1)
        if "lambda_max" in record:
            measured[branch].append((record["epoch"], record["lambda_max"]))
            trace.update(record["epoch"], record["lambda_max"])
    return [_branch(b, pairs, traces[b]) for b, pairs in measured.items() if pairs]


def _branch(branch: int, pairs: list[tuple[int, float]], trace: EigenvalueTrace) -> Branch:
    centres = [epoch for epoch, _ in trace.measured[: len(trace.local_average)]]
    epochs, values = [epoch for epoch, _ in pairs], [value for _, value in pairs]
    return Branch(branch, epochs, values, centres, list(trace.local_average), trace.stop_epoch)


def spectrum(run: Run) -> dict[int, list[float]]:
    """Return all eigenvalues of each epoch that has them (`--curvature spectrum` or full), largest
    absolute value first (paper, appendix C.2).
    """
    return {
        record["epoch"]: sorted(record["eigenvalues"], key=abs, reverse=True)
        for record in run.history
        if "eigenvalues" in record
    }


# From its last checkpoint


@dataclass(frozen=True)
class Searched:
    """A search as its last checkpoint has it, ready to be evaluated."""

    settings: SearchConfig
    task: Task
    state: SearchState

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> Searched:
        """Load a search's run folder and its data. Raises UserError where it is none, or has not
        finished an epoch.
        """
        settings, place = _settings(folder), training.select_device(device)
        run, task = Run.read(folder), tasks.load(settings, place)
        if task.fingerprint() != run.environment.get("data"):
            raise UserError(f"{settings.data}: no longer the images that {folder} searched on")
        supernet = task.supernet(settings, load_space(folder / SPACE)).to(place)
        state = SearchState.start(settings, supernet)
        stored = run.load_checkpoint()
        try:
            state.from_checkpoint(stored)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}: the checkpoint does not fit: {error}") from error
        if state.epoch == 0:
            raise UserError(f"{folder}: nothing to analyse: the search has not finished an epoch")
        if state.step > 0:
            raise UserError(
                f"{folder}: the checkpoint is from the middle of epoch {state.epoch}: first go on "
                f"with the search: {training.resume_command('search', folder)}"
            )
        return cls(settings, task, state)

    @property
    def epoch(self) -> int:
        """The last epoch that was finished."""
        return self.state.epoch - 1

    @property
    def cutout(self) -> float:
        """The probability of cutout in that epoch."""
        regularisation = self.state.regularisation
        return evaluation.cutout_probability(self.settings, regularisation, self.epoch)

    def score(self, weights: Mapping[str, Tensor], *, batch_statistics: bool = False) -> float:
        """Return the supernet's score on the alphas' data under the operations' weights."""
        weights = {kind: w.to(self.state.alphas[kind]) for kind, w in weights.items()}
        draws, supernet = Draws(self.settings.seed, self.state.branch), self.state.supernet
        found = evaluation.validate(
            self.task,
            supernet,
            weights,
            draws,
            self.epoch,
            self.cutout,
            batch_statistics=batch_statistics,
        )
        return found.score(self.task.metric)


@dataclass(frozen=True)
class Drop:
    """What discretising costs: the metric's scores (accuracies in [0, 1], perplexities, ...) on the
    alphas' data of the supernet under softmax weights, and of the genotype's operations alone,
    weights inherited.

    batch_statistics: the latter with batch norms over each batch, in place of the statistics that
    the whole supernet had. drop: how much worse the second is than the first.
    """

    epoch: int
    supernet: float
    discretised: float
    batch_statistics: float
    drop: float


def discretisation_drop(searched: Searched) -> Drop:
    """Return the drop in the validation score on discretising with inherited weights, nothing
    retrained (paper, figures 6 and 7).

    The genotype's operations have weight 1, all others 0.
    """
    alphas = searched.state.alphas
    space = searched.state.supernet.space
    one_hot = one_hot_weights(space, discretize(space, alphas).cells)
    before, after = searched.score(softmax_weights(alphas)), searched.score(one_hot)
    metric = searched.task.metric
    return Drop(
        searched.epoch,
        before,
        after,
        searched.score(one_hot, batch_statistics=True),
        metric.cost_of(after) - metric.cost_of(before),
    )


@dataclass(frozen=True)
class Landscape:
    """The validation loss on one batch around the last alphas, in two planes.

    steps: [n], how far along each direction. leading, random: [n, n] losses; row i, column j are
    at steps[i] along the first direction and steps[j] along the second. curvatures: the second
    derivatives of the loss along the four directions, those of `leading` are the two largest
    eigenvalues.
    """

    epoch: int
    steps: Tensor
    leading: Tensor
    random: Tensor
    curvatures: tuple[float, float, float, float]

    def to_npz(self) -> bytes:
        """Return the arrays as a file of numpy's."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {
            name: getattr(self, name).numpy() for name in ("steps", "leading", "random")
        }
        np.savez(buffer, epoch=self.epoch, curvatures=np.array(self.curvatures), **arrays)
        return buffer.getvalue()


@in_float32
def landscape(searched: Searched, points: int = 15, radius: float = 1.0) -> Landscape:
    """Return the loss around the last alphas along the Hessian's two leading eigenvectors and along
    two random directions.

    The loss is that of the Hessian: the epoch's last batch of the alphas, train mode, one draw of
    noise and masks. Directions are of unit length and leave out what softmax does not see. radius:
    largest step, in units of alpha. points: a side of the grid, odd.
    """
    if points < 3 or points % 2 == 0 or radius <= 0.0:
        raise UserError(
            f"landscape: expected an odd number of points from 3 on and a radius above 0, got "
            f"{points} and {radius}"
        )
    settings, task, state = searched.settings, searched.task, searched.state
    epoch, supernet = searched.epoch, state.supernet
    draws = Draws(settings.seed, state.branch)
    steps = len(task.search_epoch(draws.at(step=epoch)))
    batch = evaluation.curvature_batch(task, draws, epoch, steps, searched.cutout)
    supernet.drop_path_prob = evaluation.drop_path_probability(
        settings, state.regularisation, epoch
    )
    supernet.train()
    alphas = list(state.alphas.values())
    shapes = [(alpha.shape[0], alpha.shape[1]) for alpha in alphas]
    operator = task.hessian_operator(supernet, state.alphas, *batch)
    hessian = curvature.hessian(operator).to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh(hessian)
    random = _random_directions(curvature.softmax_null_space(shapes), settings.seed)
    curved = [float(values[-1]), float(values[-2]), *(float(v @ hessian @ v) for v in random.t())]

    at = torch.linspace(-radius, radius, points, dtype=torch.float64)
    planes = [_losses(searched, batch, plane, at) for plane in (vectors[:, [-1, -2]], random)]
    first, second, third, fourth = curved
    return Landscape(epoch, at, planes[0], planes[1], (first, second, third, fourth))


@torch.no_grad()
def _losses(searched: Searched, batch: tuple[Batch, Draws], plane: Tensor, at: Tensor) -> Tensor:
    """Return the losses [n, n] in the plane of two directions [P, 2] through the alphas."""
    state, (found, key) = searched.state, batch
    sizes = [alpha.numel() for alpha in state.alphas.values()]
    centre = flat([alpha.detach() for alpha in state.alphas.values()]).to("cpu", torch.float64)
    losses = torch.empty(len(at), len(at), dtype=torch.float64)
    with bilevel.unchanged(list(state.supernet.buffers())):
        for i in training.progress(range(len(at)), 0, "landscape"):
            for j in range(len(at)):
                parts = (centre + at[i] * plane[:, 0] + at[j] * plane[:, 1]).split(sizes)
                pairs = zip(state.alphas.items(), parts, strict=True)
                moved = {kind: part.view(alpha.shape).to(alpha) for (kind, alpha), part in pairs}
                weights = softmax_weights(moved)
                outcome = searched.task.run_supernet(state.supernet, found, weights, key, {})
                losses[i, j] = float(outcome.loss)
    return losses


def _random_directions(null_space: Tensor, seed: int) -> Tensor:
    """Return two orthonormal random directions [P, 2] that softmax sees."""
    normal = Draws(seed).normal(SITE_LANDSCAPE, (null_space.shape[0], 2)).double()
    seen = normal - null_space @ (null_space.t() @ normal)
    directions: Tensor = torch.linalg.qr(seen).Q
    return directions


def _settings(folder: Path) -> SearchConfig:
    return config_sources.stored(SearchConfig, folder, "analysis of")


# All of it, into a folder


def analyse(
    folder: Path,
    out: Path | None = None,
    *,
    points: int = 15,
    radius: float = 1.0,
    device: str = "auto",
) -> dict[str, Any]:
    """Analyse a search's run folder, write pictures and numbers, and return analysis.json's.

    out: where to [the folder `analysis` in the run's]. Written are analysis.json, trajectory.svg
    and spectrum.svg where the search measured them, landscape.npz and landscape.svg. Raises
    UserError where `folder` holds no search.
    """
    folder = Path(folder)
    run, out = Run.read(folder), folder / ANALYSIS if out is None else Path(out)
    branches, eigenvalues = trajectory(run), spectrum(run)
    found: dict[str, Any] = {"trajectory": [asdict(branch) for branch in branches]}
    settings = _settings(folder)
    with training.prepared(replace(settings, device=device, tensorboard=False)):
        searched = Searched.load(folder, device)
        drop, shape = discretisation_drop(searched), landscape(searched, points, radius)
    found["discretisation"] = asdict(drop) | {"task": settings.task}
    found["landscape"] = {"epoch": shape.epoch, "curvatures": list(shape.curvatures)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "landscape.npz").write_bytes(shape.to_npz())
        (out / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror or error}") from error
    if branches:
        plots.save_trajectory(out / "trajectory.svg", [asdict(branch) for branch in branches])
    if eigenvalues:
        plots.save_spectrum(out / "spectrum.svg", eigenvalues)
    plots.save_landscape(
        out / "landscape.svg", shape.steps.tolist(), shape.leading.tolist(), shape.random.tolist()
    )
    return found


def describe(found: Mapping[str, Any]) -> str:
    """Return what `analyse` found in a few lines."""
    lines = []
    for branch in found["trajectory"]:
        stop = branch["stop_epoch"]
        fired = "did not grow" if stop is None else f"grew: the rule stops at epoch {stop}"
        name = f" of branch {branch['branch']}" if len(found["trajectory"]) > 1 else ""
        ends = f"{branch['values'][0]:.3f} at epoch {branch['epochs'][0]}, "
        ends += f"{branch['values'][-1]:.3f} at epoch {branch['epochs'][-1]}"
        lines.append(f"lambda_max{name}: {ends}; its local average {fired}")
    if not lines:
        lines.append("lambda_max: not measured (search with --curvature lambda)")
    drop, shape = found["discretisation"], found["landscape"]["curvatures"]
    metric = metric_of(drop["task"])
    names = ("supernet", "discretised", "drop", "batch_statistics")
    supernet, discretised, lost, other = (metric.text(drop[name]) for name in names)
    lines.append(
        f"discretising: {metric.name} {supernet} of the supernet -> {discretised} with inherited "
        f"weights, a drop of {lost} (to {other} where batch norms take each batch's statistics)"
    )
    lines.append(
        f"curvature of the loss: {shape[0]:.3f} and {shape[1]:.3f} along the leading eigenvectors, "
        f"{shape[2]:.3f} and {shape[3]:.3f} along two random directions"
    )
    return "\n".join(lines)


@exit_on_user_error
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rdarts_fast.analysis",
        description="Analyse a search: lambda_max and its stops, spectrum, the drop on "
        "discretising and the loss around the last alphas; pictures and numbers into a folder.",
    )
    parser.add_argument("run", type=Path, help="a search's folder")
    parser.add_argument("--out", type=Path, help=f"where to [RUN/{ANALYSIS}]")
    parser.add_argument("--points", type=int, default=15, help="side of the landscape's grid [15]")
    parser.add_argument(
        "--radius", type=float, default=1.0, help="its largest step, in units of alpha [1]"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... [auto]")
    given = parser.parse_args()
    more = {"points": given.points, "radius": given.radius, "device": given.device}
    print(describe(analyse(given.run, given.out, **more)))
    print(f"written: {given.out or given.run / ANALYSIS}", flush=True)


if __name__ == "__main__":
    main()
