"""R-DARTS: several searches, a short training of each genotype, and the best of them by validation
error trained in full (paper, section 5).

python -m rdarts_fast.robust --space s4 --method l2

The test images are used by the last step alone. Everything lies in one folder; started again, the
same command does only what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from rdarts_fast import config, training
from rdarts_fast.config import RetrainConfig, SearchConfig
from rdarts_fast.errors import UserError, exit_on_user_error, unknown
from rdarts_fast.fleet import FleetConfig, Job, run_jobs
from rdarts_fast.metrics import Metric, metric_of
from rdarts_fast.oracle import Oracle, architectures, count_architectures, plain
from rdarts_fast.protocol import (
    SETTINGS,
    Planned,
    RobustConfig,
    checked,
    given,
    never_fires,
    plan,
    seeds,
    short_epochs,
    title,
)
from rdarts_fast.retrain import run_retraining
from rdarts_fast.run_dir import LOCK, RESULT, UNFINISHED, Run, held, write_file
from rdarts_fast.search import run_search
from rdarts_fast.spaces import load_space
from rdarts_fast.tables import CLASSIFICATION, Table

ORACLE = "oracle.json"
# What another start may change.
_FREE = {field.name for field in dataclasses.fields(FleetConfig)} | {"out", "device", "data_root"}


def run_robust(**settings: Any) -> Table:
    """Run the protocol and return its table.

    settings: the fields of RobustConfig, such as space="s4", method="l2", seeds=3. Raises UserError
    where a run failed for good (the others are done, and the table has them), and Interrupted.
    """
    names = [field.name for field in dataclasses.fields(RobustConfig)]
    for name in settings:
        if name not in names:
            raise unknown("setting", name, names)
    return robust(RobustConfig(**settings))


def robust(settings: RobustConfig) -> Table:
    """Run the protocol as `settings` say; see run_robust."""
    settings = checked(settings)
    folder = _folder(settings)
    check_free(folder)
    with held(folder):
        begin(settings, folder)
        try:
            if settings.method == "exhaustive":
                return exhaustive(settings, folder)
            return protocol(settings, folder)
        except KeyboardInterrupt as interrupt:  # within a step or not, here or on Ray
            raise training.Interrupted("the same command") from interrupt


def protocol(settings: RobustConfig, folder: Path) -> Table:
    """Search, train each genotype shortly, choose by validation error, train the chosen in full."""
    planned, metric = plan(settings), metric_of(settings.task)
    announce(settings, planned, folder)
    failed = _run(settings, "searches", [_search_job(settings, folder, p) for p in planned])
    found = [p for p in planned if p.name not in failed]
    failed |= _run(settings, "short trainings", [_short_job(settings, folder, p) for p in found])
    trained = [p for p in found if p.name not in failed]
    winners = [best for seed in seeds(settings) if (best := select(folder, trained, seed, metric))]
    failed |= _run(settings, "full trainings", [_full_job(settings, folder, p) for p in winners])

    rows = [_row(folder, p, winners, failed.get(p.name), metric) for p in planned]
    table = Table.of(rows, title(settings), metric)
    table.write(folder)
    print(f"\n{table.to_markdown()}\nfolder: {folder} (table.md, table.csv, table.json)")
    if failed:
        names = ", ".join(failed)
        raise UserError(f"{len(failed)} runs failed ({names}); the same command tries them again")
    return table


def select(
    folder: Path, trained: Sequence[Planned], seed: int, metric: Metric = CLASSIFICATION
) -> Planned | None:
    """Return the search of a repetition whose genotype has the least validation cost (error, ...)
    after the short training, the earlier at a tie; None where there is none.
    """
    costs = [
        (_result(folder / "short" / p.name)[f"valid_{metric.cost}"], i)
        for i, p in enumerate(trained)
        if p.seed == seed
    ]
    return trained[min(costs)[1]] if costs else None


def exhaustive(settings: RobustConfig, folder: Path) -> Table:
    """Train every architecture of a small space from scratch and write their table, an oracle for
    `search --oracle` (paper, section 2.1).
    """
    space = load_space(settings.space)
    count = count_architectures(space)
    print(f"every architecture of {space.name}: {count} x {settings.seeds} trainings in {folder}")
    genotypes = {f"{i:03d}": plain(g) for i, g in enumerate(architectures(space))}
    jobs = []
    for number, genotype in genotypes.items():
        for seed in seeds(settings):
            source = folder / "genotypes" / f"{number}.json"
            write_file(source, genotype.to_json())
            jobs.append(
                _training_job(settings, folder / "final", f"{number}-seed{seed}", source, seed)
            )
    failed = _run(settings, "trainings", jobs)
    if failed:
        raise UserError(f"{len(failed)} trainings failed; the same command tries them again")
    errors = []
    for number, genotype in genotypes.items():
        runs = [_result(folder / "final" / f"{number}-seed{s}") for s in seeds(settings)]
        errors.append((genotype, statistics.mean(run["test_error"] for run in runs)))
    oracle = Oracle.of(space, settings.data, errors)
    write_file(folder / ORACLE, oracle.to_json())
    table = _oracle_table(oracle, settings)
    table.write(folder)
    print(f"\n{table.to_markdown(20)}\noracle: {folder / ORACLE} (search --oracle takes it)")
    return table


# The runs


def _search_job(settings: RobustConfig, folder: Path, planned: Planned) -> Job:
    asked = {
        **given(settings, settings.search, SearchConfig),
        **planned.settings,
        "space": settings.space,
        "seed": planned.search_seed,
    }
    return _job(folder / "searches" / planned.name, run_search, asked)


def _short_job(settings: RobustConfig, folder: Path, planned: Planned) -> Job:
    epochs = short_epochs(settings)
    source = folder / "searches" / planned.name
    more = {"holdout": True, "epochs": epochs}
    return _training_job(settings, folder / "short", planned.name, source, planned.seed, more)


def _full_job(settings: RobustConfig, folder: Path, planned: Planned) -> Job:
    source = folder / "searches" / planned.name
    return _training_job(settings, folder / "final", planned.name, source, planned.seed)


def _training_job(
    settings: RobustConfig,
    folder: Path,
    name: str,
    source: Path,
    seed: int,
    more: Mapping[str, Any] | None = None,
) -> Job:
    asked = given(settings, settings.retrain, RetrainConfig)
    asked |= {"source": str(source), "seed": seed, **(more or {})}
    return _job(folder / name, run_retraining, asked)


def _job(folder: Path, program: Callable[..., object], asked: Mapping[str, Any]) -> Job:
    call = partial(start_or_go_on, program, {**asked, "out": folder})
    return Job(f"{folder.parent.name}/{folder.name}", folder, call, partial(is_done, folder))


def start_or_go_on(program: Callable[..., object], asked: Mapping[str, Any]) -> None:
    """Start a run with its settings, or go on with it where its folder is there."""
    if (asked["out"] / "config.json").is_file():
        program(**{name: asked[name] for name in ("device", "data_root")}, resume=asked["out"])
    else:
        program(**asked)


def is_done(folder: Path) -> bool:
    """Whether a run has ended."""
    return (folder / RESULT).is_file()


def _run(settings: RobustConfig, what: str, jobs: Sequence[Job]) -> dict[str, str]:
    """Run jobs and return the errors of those that failed, by the last part of their names."""
    print(f"\n{what}", flush=True)
    outcomes = run_jobs(jobs, settings, partial(print, flush=True))
    return {o.job.folder.name: o.error for o in outcomes if o.error is not None}


def _result(folder: Path) -> dict[str, Any]:
    run = Run.read(folder)
    if run.result is None:
        raise UserError(f"{folder}: the run has not ended")
    return run.result


# The folder


def _folder(settings: RobustConfig) -> Path:
    words = ("robust", load_space(settings.space).name, settings.data, settings.method)
    name = "-".join(training.plain(word) for word in words)
    return Path(settings.out or Path("runs") / name).absolute()


def check_free(folder: Path) -> None:
    """Raise UserError where a folder holds something else than such runs; a first start that was
    killed may have left its lock and half a file.
    """
    if (folder / SETTINGS).exists() or not folder.exists():
        return
    if any(p.name != LOCK and not p.name.startswith(UNFINISHED) for p in folder.iterdir()):
        raise UserError(f"--out {folder} is not empty: choose another folder")


def begin(settings: RobustConfig, folder: Path) -> None:
    """Write robust.json, or check that the one there is of these settings; there may be more
    repetitions than before.

    Raises UserError naming the setting that differs.
    """
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _FREE}
    values = json.loads(json.dumps(values))
    path = folder / SETTINGS
    text = json.dumps(values, indent=2) + "\n"
    if not path.exists():
        write_file(path, text)
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for name, value in values.items():
        more = name == "seeds" and isinstance(before.get(name), int) and before[name] <= value
        if before.get(name) != value and not more:
            was = f"{folder} was started with {before.get(name)}, not {value}"
            raise UserError(f"{config.flag(name)}: {was}; give another --out")
    write_file(path, text)


# What it says


def announce(settings: RobustConfig, planned: Sequence[Planned], folder: Path) -> None:
    """Print what will be done, once."""
    print(
        f"{title(settings)}: {len(planned)} searches; each genotype is trained "
        f"{short_epochs(settings)} epochs on the weights' part of the training data; of the best "
        f"by the {metric_of(settings.task).cost} on the alphas' part a full training, "
        f"{settings.seeds} in all"
    )
    if settings.short_epochs is None:
        print("(how long the paper's short training was is not known: --short-epochs)")
    if never_fires(settings):
        print("(too few epochs for the early-stopping rule: the searches are plain DARTS)")
    print(f"folder: {folder}", flush=True)


def _row(
    folder: Path,
    planned: Planned,
    winners: Sequence[Planned],
    error: str | None,
    metric: Metric = CLASSIFICATION,
) -> dict[str, Any]:
    """Return a search's row of the table: None where a number is missing."""
    score, valid, test = f"supernet_{metric.name}", f"valid_{metric.cost}", f"test_{metric.cost}"
    row: dict[str, Any] = {
        "name": planned.name,
        "seed": planned.seed,
        "regularisation": planned.regularisation,
        score: None,
        "lambda_max": None,
        valid: None,
        "selected": planned in winners,
        test: None,
        "error": error,
    }
    search = folder / "searches" / planned.name
    if is_done(search):
        row[score] = _result(search)[f"valid_{metric.name}"]
        values = [r["lambda_max"] for r in Run.read(search).history if "lambda_max" in r]
        row["lambda_max"] = values[-1] if values else None
    for part, key in (("short", valid), ("final", test)):
        if is_done(folder / part / planned.name) and (part == "short" or row["selected"]):
            row[key] = _result(folder / part / planned.name)[key]
    return row


def _oracle_table(oracle: Oracle, settings: RobustConfig) -> Table:
    rows = [
        {"name": genotype.to_text(), "test_error": error, "regret": oracle.regret(genotype)}
        for genotype, error in sorted(oracle.errors.items(), key=lambda item: item[1])
    ]
    return Table(title(settings), rows, None, None)


@exit_on_user_error
def main() -> None:
    """The command line."""
    robust(
        tyro.cli(
            RobustConfig,
            prog="python -m rdarts_fast.robust",
            description="R-DARTS: several searches, the best genotype by validation error, "
            "trained in full; or DARTS-ES, DARTS-ADA and DARTS by the same protocol.",
        )
    )


if __name__ == "__main__":
    main()
