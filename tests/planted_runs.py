"""Run folders that hold what a test says, as if a search or a retraining had written them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rdarts_fast.config import RetrainConfig, SearchConfig, to_json
from rdarts_fast.genotype import discretize
from rdarts_fast.run_dir import GENOTYPE, METRICS, RESULT, SPACE
from rdarts_fast.spaces import SPACES

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

    lambdas: epoch -> lambda_max. records: epoch -> more entries of its record. result: more entries
    of result.json.
    """
    config = replace(SearchConfig(space="s2", epochs=epochs, out=folder), **settings)
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
            "train_accuracy": 1.0 - 0.9 / (1 + epoch),
            "valid_loss": 2.2 / (1 + epoch),
            "valid_accuracy": accuracy_at(epoch),
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
        done = {"valid_accuracy": lines[-1]["valid_accuracy"], "seconds": 1.5 * epochs}
        write(folder / RESULT, done | dict(result or {}))
    return folder


def plant_retraining(
    folder: Path,
    source: Path,
    error: float,
    epochs: int = 2,
    *,
    ended: bool = True,
    **settings: Any,
) -> Path:
    """Write a finished retraining of what `source` found, with this error after the last epoch."""
    named = {"source": str(source), "data": "digits", "out": folder, "epochs": epochs}
    config = replace(RetrainConfig(), **(named | settings))
    on = "valid" if config.holdout else "test"
    lines = [
        {"epoch": e, "train_loss": 1.0 / (1 + e), f"{on}_error": error + 0.1 * (epochs - 1 - e)}
        for e in range(epochs)
    ]
    folder.mkdir(parents=True)
    write(folder / "config.json", to_json(config))
    write(folder / "environment.json", ENVIRONMENT)
    genotypes = [record["genotype"] for record in read_metrics(source)]
    write(folder / GENOTYPE, genotypes[int(config.genotypes_at or -1)])
    write_metrics(folder, lines)
    if ended:
        result = {f"{on}_error": error, f"best_{on}_error": error, "seconds": 3.25}
        write(folder / RESULT, result)
    return folder


def accuracy_at(epoch: int) -> float:
    """Return the validation accuracy that a planted search has at an epoch."""
    return 1.0 - 0.8 / (1 + epoch) ** 0.5


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
