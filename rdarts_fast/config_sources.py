"""Where settings come from, flags, keywords or a run's folder, and what is checked of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro

from rdarts_fast.config import (
    FREE_ON_RESUME,
    LEAST,
    Config,
    RandomSearchConfig,
    RetrainConfig,
    RunConfig,
    SearchConfig,
    SupernetConfig,
    defaults,
    flag,
)
from rdarts_fast.config_disparity import (
    DisparityRandomSearchConfig,
    DisparityRetrainConfig,
    DisparitySearchConfig,
)
from rdarts_fast.config_language import (
    LanguageConfig,
    LanguageRandomSearchConfig,
    LanguageRetrainConfig,
    LanguageSearchConfig,
)
from rdarts_fast.errors import UserError, unknown

# What a task's programs are set by.
KINDS: Mapping[str, Mapping[type[RunConfig], type[RunConfig]]] = {
    "classification": {kind: kind for kind in (SearchConfig, RandomSearchConfig, RetrainConfig)},
    "language": {
        SearchConfig: LanguageSearchConfig,
        RandomSearchConfig: LanguageRandomSearchConfig,
        RetrainConfig: LanguageRetrainConfig,
    },
    "disparity": {
        SearchConfig: DisparitySearchConfig,
        RandomSearchConfig: DisparityRandomSearchConfig,
        RetrainConfig: DisparityRetrainConfig,
    },
}


def kind_for(kind: type[Config], task: str) -> type[Config]:
    """Return the settings of a program for a task; kind: the program's, for any task. Raises
    UserError for an unknown task.
    """
    if task not in KINDS:
        raise unknown("task", task, KINDS)
    program = next(base for base in KINDS["classification"] if issubclass(kind, base))
    return cast(type[Config], KINDS[task][program])


def _task_of(folders: Iterable[object]) -> str:
    """Return the task of the first of these that is a run's folder."""
    for folder in folders:
        path = Path(str(folder)) / "config.json"
        if path.is_file():
            return str(_read_config(path.parent, "run").get("task", "classification"))
    return "classification"


def from_settings(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """Return the config of keyword settings, such as run_search's. Raises UserError for an unknown
    or a bad one.
    """
    folders = [settings[name] for name in ("resume", "source") if settings.get(name)]
    kind = kind_for(kind, str(settings.get("task") or _task_of(folders)))
    names = [field.name for field in dataclasses.fields(kind)]
    for name in settings:
        if name not in names:
            raise unknown("setting", name, names)
    values = _with_paths(settings)
    first = kind(**values)
    _check_types(first)
    base = _base(first)
    return _finished(base, dataclasses.replace(base, **values))


def parse(
    kind: type[Config], description: str, program: str, arguments: Sequence[str] | None = None
) -> Config:
    """Return the config of a command line; --help shows the defaults that the other flags given
    beside it mean.

    Raises UserError for a bad value; an unknown flag ends the process with 2 and the nearest flags.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    kind = kind_for(kind, _task_given(given))
    without_help = [word for word in given if word not in ("-h", "--help")]
    first = tyro.cli(kind, prog=program, args=without_help)
    base = _base(first)
    config = tyro.cli(kind, prog=program, description=description, args=given, default=base)
    return _finished(base, config)


def _task_given(arguments: Sequence[str]) -> str:
    """Return the task that a command line names, or that of the run that it goes on with."""
    words = [part for word in arguments for part in word.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name == "--task":
            return value
    resumed = [value for name, value in itertools.pairwise(words) if name == "--resume"]
    return _task_of([*resumed, *words])


def _base(first: Config) -> Config:
    """Return the defaults for what was given: of a resumed run, of a source run's data set, of data
    and preset.
    """
    kind = type(first)
    if first.resume is not None:
        return stored(kind, first.resume, "--resume")
    source = Path(getattr(first, "source", ""))
    if first.data or not (source / "config.json").is_file():
        return defaults(kind, first.data or kind.own_data, first.preset)
    run = _read_config(source, "source")  # of any kind and version: what it trained on is enough
    base = defaults(kind, str(run.get("data", kind.own_data)), first.preset)
    root = Path(str(run.get("data_root", base.data_root)))
    return dataclasses.replace(base, data_root=root, image_size=run.get("image_size"))


def _finished(base: Config, config: Config) -> Config:
    config = _absolute(config)  # a run is resumed from any folder
    if config.resume is not None:
        check_same(base, config)
    return checked(config)


def _absolute(config: Config) -> Config:
    loader, _, path = config.data.partition(":")
    data = f"{loader}:{Path(path).absolute()}" if path else config.data
    if isinstance(config, LanguageConfig) and data != config.own_data and not path:
        data = str(Path(data).absolute())  # a folder, without a loader's name
    changes: dict[str, Any] = {"data": data, "data_root": config.data_root.absolute()}
    if isinstance(config, SupernetConfig) and config.space.endswith(".json"):
        changes["space"] = str(Path(config.space).absolute())
    if isinstance(config, SearchConfig) and config.oracle is not None:
        changes["oracle"] = config.oracle.absolute()
    return dataclasses.replace(config, **changes)


def stored(kind: type[Config], folder: Path, what: str) -> Config:
    """Return the config of the run in `folder`; `what` names it in the UserError where there is
    none, or one of another kind or version.
    """
    values = _read_config(folder, what)
    kind = kind_for(kind, str(values.get("task", "classification")))
    names = {field.name for field in dataclasses.fields(kind)} - {"resume"}
    strange = sorted(set(values) ^ names)
    if strange:
        words = re.findall("[A-Z][a-z]*", kind.__name__.removesuffix("Config"))
        name = " ".join(words).lower()  # a random search
        raise UserError(
            f"{what} {folder}: not a {name} of this version of rdarts_fast "
            f"(config.json differs in {', '.join(strange[:5])})"
        )
    config = kind(**_with_paths(values))
    try:
        _check_types(config)
    except UserError as error:
        raise UserError(f"{what} {folder}: config.json: {error}") from error
    return config


def _read_config(folder: Path, what: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{what} {folder}: not a run's folder ({path}: {error.strerror})"
        ) from error
    except ValueError as error:
        raise UserError(f"{what} {folder}: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{what} {folder}: {path} is not an object")
    return values


def _with_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    paths = ("data_root", "out", "resume", "oracle")
    texts = ("space", "data", "source")  # where a Path is as good as its text
    return {
        k: Path(v)
        if k in paths and isinstance(v, str)
        else str(v)
        if k in texts and isinstance(v, Path)
        else v
        for k, v in values.items()
    }


def check_same(run: Config, given: Config) -> None:
    """Raise UserError naming the first setting that `given` changes of a begun `run`."""
    for field in dataclasses.fields(run):
        before, now = getattr(run, field.name), getattr(given, field.name)
        if now != before and field.name not in FREE_ON_RESUME:
            raise UserError(
                f"{flag(field.name)}: the run was started with {before}, got {now}; "
                "a resumed run keeps its settings"
            )


def _check_types(config: RunConfig) -> None:
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, hint = field.name, hints[field.name]
        value = getattr(config, name)
        options = get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            fits, expected = value in options, " or ".join(options)
        elif float in options:
            fits, expected = type(value) in (int, float), "a number"
        elif int in options:
            fits, expected = type(value) in options, "a whole number"
        else:
            fits = isinstance(value, options)
            expected = {str: "text", bool: "True or False"}.get(options[0], "a path")
        if not fits:
            raise UserError(f"{flag(name)}: expected {expected}, got {value!r}")


def checked(config: Config) -> Config:
    """Return the config after checking its ranges. Raises UserError naming the flag."""
    for name, least in LEAST.items():
        value = getattr(config, name, None)
        if value is not None and value < least:
            raise UserError(
                f"{flag(name)}: expected a whole number of at least {least}, got {value}"
            )
    if not 0 <= config.seed < 2**64:
        raise UserError(f"--seed: expected 0 to 2**64 - 1, got {config.seed}")
    for field in dataclasses.fields(config):
        if field.type == "float":
            _check_number(field.name, getattr(config, field.name))
    for name in ("epsilon_scale", "grad_clip"):
        if getattr(config, name, 1.0) == 0.0:
            raise UserError(f"{flag(name)}: expected a number above 0, got 0")
    for name in config.unused:
        if hasattr(config, name) and getattr(config, name) != getattr(type(config), name):
            raise UserError(f"{flag(name)}: --task {config.task} has nothing that it could set")
    if isinstance(config, SearchConfig):
        _check_curvature(config)
    return config


def _check_curvature(config: SearchConfig) -> None:
    for name in ("early_stop", "adaptive"):
        if getattr(config, name) != "off" and config.curvature == "off":
            got = f"{flag(name)} {getattr(config, name)}"
            raise UserError(f"{got} follows the eigenvalue: add --curvature lambda")
    if config.early_stop == "stop" and config.adaptive != "off":
        raise UserError(
            f"--early-stop stop ends where --adaptive {config.adaptive} would go back: choose one "
            "(an adaptive search notes the early stop's genotype too)"
        )
    if config.stop_rule == "paper" and config.curvature_every != 1:
        raise UserError(
            "--stop-rule paper needs the eigenvalue of every epoch: add --curvature-every 1"
        )
    if config.stop_window % 2 == 0:
        raise UserError(f"--stop-window: expected an odd number, got {config.stop_window}")
    _check_adaptive(config)


def _check_adaptive(config: SearchConfig) -> None:
    if config.adaptive in ("l2", "both") and config.adaptive_factor < 1.01:
        got = config.adaptive_factor
        raise UserError(f"--adaptive-factor: expected at least 1.01, got {got}")
    if config.adaptive in ("drop-path", "both") and config.adaptive_step < 0.01:
        raise UserError(f"--adaptive-step: expected at least 0.01, got {config.adaptive_step}")


def _check_number(name: str, value: float) -> None:
    below_one = name in (
        "drop_path_prob",
        "adaptive_drop_path_max",
        "momentum",
        "alpha_beta1",
        "alpha_beta2",
    )
    below_one = below_one or name.startswith("dropout")
    most = 1.0 if below_one or name == "cutout_prob" else sys.float_info.max
    if not 0.0 <= value <= most or (below_one and value == 1.0):
        limit = " and below 1" if below_one else " and at most 1" if most == 1.0 else ""
        raise UserError(f"{flag(name)}: expected a number of at least 0{limit}, got {value}")
