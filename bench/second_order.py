"""Second order's mixed derivative, by the published difference and exactly: does it matter?

    python -m bench.second_order                                               # a table
    python -m bench.second_order --json > bench/results/second_order.json

Searches are run with either form (`--implicit difference`, whose step is 0.01 / |v|, and `exact`)
from the same seeds, and their genotypes compared. At the end of some epochs of each search both
forms are computed there in float64, on the same batches and with the same draws in all passes:

    gradient = direct - eta * implicit,     direct: of the validation loss at the virtual weights

"share" is eta |implicit| / |direct| by the exact form, "cosine" is between the gradients with the
search's step and with the exact term. "implicit" is the cosine between the terms themselves and
"length" the length of the difference over that of the exact one, for the search's step and for
smaller ones. At the smallest, which no ReLU's kink lies within, the difference is the derivative: a
cosine and a length of 1 there show that the measurement is right. Each is the mean over batches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.record import line
from rdarts_fast import bilevel, config_sources, search, training
from rdarts_fast.config import SearchConfig
from rdarts_fast.curvature.operators import flat
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.events import Events
from rdarts_fast.genotype import Genotype
from rdarts_fast.run_dir import SPACE, Run
from rdarts_fast.search import Losses
from rdarts_fast.search_state import SearchState
from rdarts_fast.spaces import load_space
from rdarts_fast.tasks import Batch
from rdarts_fast.tasks.classification import Classification

BENCH = "second_order"
FORMS = ("difference", "exact")
SMALLER = (1e-4, 1e-6, 1e-9)  # steps times |v|
BATCHES = 2  # that a comparison is the mean over
OF_A_SEARCH = ("epochs", "channels", "layers", "batch_size", "epoch_steps")


class Step:
    """One step of the epoch that a search is in: its batches, and the alphas' gradient at a copy of
    the present weights and alphas, in float64. All passes have the same draws.
    """

    def __init__(
        self,
        settings: SearchConfig,
        task: Classification,
        state: SearchState,
        rate: float,
        number: int,
    ) -> None:
        self._settings, self._task = replace(settings, noise_per_pass="shared"), task
        draws = Draws(settings.seed, state.branch)
        batches = task.search_epoch(draws.at(step=state.epoch))
        self._draws = draws.at(step=state.epoch * len(batches) + number)
        rows = batches[number], task.validation_rows(self._draws)
        self._training, self._validation = (
            self._batch(row, validation=i == 1) for i, row in enumerate(rows)
        )
        self._supernet = task.supernet(settings, state.supernet.space).to(self._training[0])
        self._supernet.load_state_dict(state.supernet.state_dict())
        self._alphas = {
            kind: alpha.detach().double().requires_grad_() for kind, alpha in state.alphas.items()
        }
        optimizer, parameters = state.weight_optimizer, state.supernet.parameters()
        momenta = [optimizer.state[p].get("momentum_buffer") for p in parameters]
        self._virtual = bilevel.VirtualStep(
            rate,
            settings.momentum,
            state.regularisation.weight_decay,
            [None if momentum is None else momentum.double() for momentum in momenta],
        )

    def _batch(self, rows: Tensor, *, validation: bool) -> Batch:
        images, labels = self._task.training_batch(rows, self._draws, 0.0, validation=validation)
        return images.double(), labels

    def _losses(self, alphas: Mapping[str, Tensor]) -> Losses:
        state: Any = SimpleNamespace(supernet=self._supernet, alphas=alphas, carry={})
        return Losses(self._settings, self._task, state, self._draws)

    def gradient(self, scale: float, *, exact: bool = False) -> Tensor:
        """Return the alphas' gradient, [P] float64; `scale` is that of the difference's step."""
        return self._gradient(self._alphas, scale, exact)

    def direct(self) -> Tensor:
        """Return the gradient's direct term, [P] float64."""
        # A training loss that does not move with the alphas has no mixed derivative.
        held = {kind: alpha.detach() for kind, alpha in self._alphas.items()}
        return self._gradient(held, 1.0, False)

    def _gradient(self, in_training: Mapping[str, Tensor], scale: float, exact: bool) -> Tensor:
        found = bilevel.second_order(
            self._losses(in_training).of(self._training, "weights"),
            self._losses(self._alphas).of(self._validation, "alphas"),
            list(self._supernet.parameters()),
            list(self._alphas.values()),
            self._virtual,
            epsilon_scale=scale,
            exact=exact,
            buffers=list(self._supernet.buffers()),
        )
        return flat(found.gradient).double()


def compare(step: Step, scale: float) -> dict[str, Any]:
    """Compare the two forms at a step of a search; scale: of the search's difference."""
    direct, exact = step.direct(), step.gradient(scale, exact=True)
    gradients = {f"{s:g}": step.gradient(s) for s in (scale, *SMALLER)}
    term = direct - exact  # eta * implicit
    terms = {s: direct - gradient for s, gradient in gradients.items()}
    return {
        "share": float(term.norm() / direct.norm()),
        "cosine": cosine(gradients[f"{scale:g}"], exact),
        "implicit": {s: cosine(by_difference, term) for s, by_difference in terms.items()},
        "length": {
            s: float(by_difference.norm() / term.norm()) for s, by_difference in terms.items()
        },
    }


def mean(found: Sequence[Any]) -> Any:
    """Return the mean of numbers, of each entry where they are mappings."""
    if isinstance(found[0], Mapping):
        return {name: mean([one[name] for one in found]) for name in found[0]}
    return float(f"{statistics.mean(found):.5g}")


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of the angle between two vectors."""
    found = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return min(1.0, max(-1.0, found))  # rounding can leave it just outside


class Comparing(Events):
    """Compares the two forms at the end of some epochs: every `every`, and the last."""

    def __init__(
        self, settings: SearchConfig, task: Classification, state: SearchState, every: int
    ) -> None:
        self._settings, self._task, self._state, self._every = settings, task, state, every
        self.points: list[dict[str, Any]] = []

    def write(self, record: Mapping[str, Any]) -> None:
        epoch = record["epoch"]
        if epoch % self._every and epoch != self._settings.epochs - 1:
            return
        place = self._settings, self._task, self._state, record["learning_rate"]
        numbers = range(min(BATCHES, self._state.step))
        found = [compare(Step(*place, b), self._settings.epsilon_scale) for b in numbers]
        self.points.append({"epoch": epoch, **mean(found)})


def searched(settings: SearchConfig, every: int) -> tuple[Run, list[dict[str, Any]]]:
    """Search as search.search does, and return the run and how the two forms compared during it."""
    with training.prepared(settings) as device:
        space = load_space(settings.space)
        task = Classification.load(settings, device)
        state = SearchState.start(settings, task.supernet(settings, space).to(device))
        where = training.environment(device, settings, task.fingerprint())
        files = {SPACE: json.dumps(space.to_dict())}
        comparing = Comparing(settings, task, state, every)
        with training.open_run(settings, where, space.name, "search", state, files) as run:
            search.loop(settings, task, state, run, training.Stop(), comparing)
            return search.finish(settings, task, state, run), comparing.points


def rows(parsed: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what is measured: a row a search, then one for each two of the same seed or form."""
    found: dict[tuple[str, int], Genotype] = {}
    space, data = load_space(parsed.space).name, parsed.name or training.plain(parsed.data)
    about = {"space": space, "data": data}
    for seed, form in itertools.product(parsed.seeds, FORMS):
        settings = settings_of(parsed, seed, form, folder / f"{form}-{seed}")
        with contextlib.redirect_stdout(sys.stderr):
            run, points = searched(settings, parsed.every)
        found[form, seed] = Genotype.from_dict(run.history[-1]["genotype"])
        yield {"case": "search", **about, **_of_search(settings, run), "points": points}
    for one, other in itertools.combinations(found, 2):
        if one[0] == other[0] or one[1] == other[1]:
            searches = [f"{form}, seed {seed}" for form, seed in (one, other)]
            shared = agreement(found[one], found[other])
            yield {"case": "agreement", **about, "searches": searches, **shared}


def _of_search(settings: SearchConfig, run: Run) -> dict[str, Any]:
    measured = [record for record in run.history if "lambda_max" in record]
    return {
        "implicit": settings.implicit,
        "seed": settings.seed,
        **{name: getattr(settings, name) for name in OF_A_SEARCH},
        "seconds": round(sum(record["seconds"] for record in run.history), 1),
        "valid_accuracy": [round(record["valid_accuracy"], 4) for record in run.history],
        "lambda_max": [[r["epoch"], float(f"{r['lambda_max']:.5g}")] for r in measured],
        "genotype": run.history[-1]["genotype"]["cells"],
        "batches_a_point": BATCHES,
        "run_threads": run.environment["threads"],
    }


def agreement(one: Genotype, other: Genotype) -> dict[str, int]:
    """Return how many kept edges two genotypes share, how many with the same operation, and how
    many each keeps.
    """
    kept = [
        {(kind, source, target): name for kind in g.cells for source, target, name in g.edges(kind)}
        for g in (one, other)
    ]
    shared = kept[0].keys() & kept[1].keys()
    same = sum(kept[0][edge] == kept[1][edge] for edge in shared)
    return {"edges": len(shared), "operations": same, "of": len(kept[0])}


def settings_of(parsed: argparse.Namespace, seed: int, form: str, out: Path) -> SearchConfig:
    """Return a search's settings: the data set's own where no flag is given."""
    given = {name: getattr(parsed, name) for name in OF_A_SEARCH}
    given = {name: value for name, value in given.items() if value is not None}
    more = {"space": parsed.space, "data": parsed.data, "curvature": "lambda"}
    return config_sources.from_settings(
        SearchConfig, {**given, **more, "seed": seed, "implicit": form, "out": out}
    )


def text(row: Mapping[str, Any]) -> str:
    """Return a row as a table has it."""
    if row["case"] == "agreement":
        searches = " and ".join(row["searches"])
        return (
            f"{searches}: of {row['of']} kept edges {row['edges']} the same, "
            f"{row['operations']} with the same operation"
        )
    curve = [value for _, value in row["lambda_max"]]
    head = (
        f"{row['space']}, {row['data']}, {row['implicit']}, seed {row['seed']}: "
        f"{row['seconds']:.0f} s, validation accuracy {row['valid_accuracy'][-1]:.1%}, "
        f"lambda_max {curve[0]:.3g} to {curve[-1]:.3g}, at most {max(curve):.3g}"
    )
    table = [f"{'epoch':>7}{'share':>8}{'cosine':>8}   implicit and length by step * |v|"]
    for point in row["points"]:
        steps = "".join(
            f"   {step}: {point['implicit'][step]:.3f} {point['length'][step]:.3g}x"
            for step in point["implicit"]
        )
        table.append(f"{point['epoch']:>7}{point['share']:>8.3f}{point['cosine']:>8.3f}{steps}")
    return "\n".join([head, *table])


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Leave out how to resume a search: its folder is gone."""
    try:
        yield
    except training.Interrupted:
        raise KeyboardInterrupt from None


@exit_on_user_error
def main() -> None:
    """Search, and print a row a search and a row a comparison of two."""
    parsed = _parse()
    with tempfile.TemporaryDirectory() as folder, _interrupted():
        for row in rows(parsed, Path(folder)):
            print(line(BENCH, **row) if parsed.json else text(row), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.second_order",
        description="Search with both forms of second order's mixed derivative, and compare them "
        "on the way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--space", default="s2", help="a search space")
    parser.add_argument("--data", default="digits", help="as a search takes it")
    parser.add_argument("--name", help="what the rows call the data, where that is not --data")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(word) for word in text.split(",")],
        default=[0, 1],
        metavar="A,B,...",
        help="of the searches",
    )
    parser.add_argument("--every", type=int, default=5, help="epochs between two comparisons")
    for name in OF_A_SEARCH:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="as a search takes it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, not a table")
    parsed = parser.parse_args()
    if parsed.every < 1:
        raise UserError(f"--every: expected at least 1, got {parsed.every}")
    load_space(parsed.space)  # raises for one that is not there
    return parsed


if __name__ == "__main__":
    main()
