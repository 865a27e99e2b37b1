"""Run folders that hold what a test says, as if a search or a retraining had written them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdarts_fast import metrics
from rdarts_fast.config import RetrainConfig, RunConfig, SearchConfig, to_json
from rdarts_fast.config_sources import KINDS
from rdarts_fast.genotype import discretize
from rdarts_fast.run_dir import GENOTYPE, METRICS, RESULT, SPACE
from rdarts_fast.spaces import SPACES, spaces_of

ENVIRONMENT = {"rdarts_fast": "0.1.0", "torch": "2.9.0", "device": "cpu"}


def plant_search(
    folder: Path,
    epochs: int = 4,
    *,
    lambdas: Mapping[int, float] | None = None,
    result: Mapping[str, Any] | None = None,
    records: Mapping[int, Mapping[str, Any]] | None = None,
    ended: bool = True,
    spectrum: bool = False,
    **settings: Any,
) -> Path:
    """Write a finished search of `epochs` epochs.

    task: as a setting; the space is then the task's first. lambdas: epoch -> lambda_max. records:
    epoch -> more entries of its record. result: more entries of result.json.
    """
    task = settings.get("task", "classification")
    name = metrics.metric_of(task).name
    usual = {"task": task, "space": spaces_of(task)[0], "epochs": epochs, "out": folder}
    usual |= {"space": "s2"} if task == "classification" else {}
    config = replace(_kind_for(SearchConfig, task)(), **(usual | settings))
    space = SPACES[config.space]
    generator = torch.Generator().manual_seed(config.seed)
    lines = []
    alphas = {k: torch.zeros(space.edges(k), space.operations(k)) for k in space.cells}
    for epoch in range(epochs):
        for alpha in alphas.values():
            alpha += 0.1 * torch.randn(alpha.shape, generator=generator)
        record: dict[str, Any] = {
            "epoch": epoch,
            "branch": 0,
            "train_loss": 2.0 / (1 + epoch),
            f"train_{name}": 1.0 - 0.9 / (1 + epoch) if task == "classification" else 2.0,
            "valid_loss": 2.2 / (1 + epoch),
            f"valid_{name}": SCORES[task](epoch),
            "alphas": {kind: alpha.tolist() for kind, alpha in alphas.items()},
            "genotype": discretize(space, alphas).to_dict(),
            "seconds": 1.5,
        }
        if lambdas and epoch in lambdas:
            record["lambda_max"] = lambdas[epoch]
        if spectrum:
            record["eigenvalues"] = [math.sin(k * (epoch + 1)) / (k + 1) for k in range(56)]
        lines.append(record | dict((records or {}).get(epoch, {})))
    folder.mkdir(parents=True)
    write(folder / "config.json", to_json(config))
    write(folder / "environment.json", ENVIRONMENT)
    write(folder / SPACE, space.to_dict())
    write(folder / GENOTYPE, lines[-1]["genotype"])
    write_metrics(folder, lines)
    if ended:
        done = {f"valid_{name}": lines[-1][f"valid_{name}"], "seconds": 1.5 * epochs}
        write(folder / RESULT, done | dict(result or {}))
    return folder


def plant_retraining(
    folder: Path,
    source: Path,
    cost: float,
    epochs: int = 2,
    *,
    ended: bool = True,
    **settings: Any,
) -> Path:
    """Write a finished retraining of what `source` found, with this cost after the last epoch."""
    searched = json.loads((source / "config.json").read_text())
    task = searched.get("task", "classification")
    named = {"source": str(source), "task": task, "data": "digits", "out": folder, "epochs": epochs}
    named |= {} if task == "classification" else {"data": searched["data"]}
    config = replace(_kind_for(RetrainConfig, task)(), **(named | settings))
    on = f"{'valid' if config.holdout else 'test'}_{metrics.metric_of(task).cost}"
    lines = [
        {"epoch": e, "train_loss": 1.0 / (1 + e), on: cost + 0.1 * (epochs - 1 - e)}
        for e in range(epochs)
    ]
    folder.mkdir(parents=True)
    write(folder / "config.json", to_json(config))
    write(folder / "environment.json", ENVIRONMENT)
    genotypes = [record["genotype"] for record in read_metrics(source)]
    write(folder / GENOTYPE, genotypes[int(config.genotypes_at or -1)])
    write_metrics(folder, lines)
    if ended:
        result = {on: cost, f"best_{on}": cost, "seconds": 3.25}
        write(folder / RESULT, result)
    return folder


def accuracy_at(epoch: int) -> float:
    """Return the validation accuracy that a planted search has at an epoch."""
    return 1.0 - 0.8 / (1 + epoch) ** 0.5


# The validation score that a planted search has at an epoch, by task.
SCORES = {
    "classification": accuracy_at,
    "language": lambda epoch: 80.0 + 900.0 / (1 + epoch) ** 2,
    "disparity": lambda epoch: 2.0 + 6.0 / (1 + epoch),
}


def _kind_for(kind: type[RunConfig], task: str) -> Any:
    """Return the settings of a task's runs, those of classification's where it has none here."""
    return KINDS.get(task, KINDS["classification"])[kind]


def plant_maps(folder: Path, height: int = 40, width: int = 30) -> dict[str, np.ndarray]:
    """Write maps.npz into a run's folder; a tenth of the true disparities is unknown, and where it
    is known the prediction is one pixel too large, or five in the lower half.
    """
    y, x = np.mgrid[:height, :width]
    truth = (5.0 + y / height * 20.0 + (x > width / 2) * 10.0).astype(np.float32)
    prediction = truth + np.where(y < height / 2, 1.0, 5.0).astype(np.float32)
    truth[:, : width // 10] = np.where(y[:, : width // 10] % 2, np.inf, np.nan)
    left = np.stack([7 * x, 6 * y, x + y], axis=-1).astype(np.uint8)
    maps = {"left": left, "truth": truth, "prediction": prediction}
    np.savez(folder / "maps.npz", **maps)
    return maps


def write(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def write_metrics(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / METRICS).write_text(text)
