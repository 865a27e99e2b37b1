"""The command that starts a run of the same settings."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from rdarts_fast.config import RetrainConfig, RunConfig, SearchConfig, defaults, flag
from rdarts_fast.config_sources import stored
from rdarts_fast.errors import UserError
from rdarts_fast.report.rows import Row

_ELSEWHERE = ("task", "out", "resume", "source", "data", "preset")  # or not at all
_PLACES = (*_ELSEWHERE, "device", "threads", "checkpoint_minutes")


def command_of(row: Row) -> str | None:
    """Return the command, None for a run of another version of this program."""
    folder = row.found.run.folder
    config: SearchConfig | RetrainConfig
    base: SearchConfig | RetrainConfig
    try:
        if row.found.kind == "search":
            config = stored(SearchConfig, folder, "report on")
            base = defaults(type(config), config.data, config.preset)
        elif row.found.kind == "retraining":
            config = stored(RetrainConfig, folder, "report on")
            base = defaults(type(config), config.data, config.preset)
        else:
            return None
    except UserError:
        return None
    words = ["--task", config.task] if config.task != RunConfig.task else []
    words += ["--data", config.data] if config.data != config.own_data else []
    words += ["--preset", config.preset] if config.preset != "default" else []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(base, field.name)
        if field.name not in _PLACES and value != usual and value is not None:
            words += _words(field.name, value, plain_flag=field.type == "bool")
    if isinstance(config, RetrainConfig):
        return shlex.join(["python", "-m", "rdarts_fast.retrain", config.source, *words])
    return shlex.join(["python", "-m", "rdarts_fast.search", *words])


def _words(name: str, value: Any, *, plain_flag: bool) -> list[str]:
    if plain_flag:
        return [flag(name) if value else flag(f"no_{name}")]
    return [flag(name), str(value)]
