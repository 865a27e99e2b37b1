"""The settings of R-DARTS, and the searches that follow from them (paper, section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rdarts_fast import config, config_sources, training
from rdarts_fast.config import Config, RetrainConfig, SearchConfig
from rdarts_fast.errors import UserError, unknown
from rdarts_fast.fleet import FleetConfig, check_fleet
from rdarts_fast.metrics import metric_of
from rdarts_fast.oracle import count_architectures
from rdarts_fast.spaces import load_space

# The published grids: the L2 factors and the drop-path probabilities of R-DARTS(L2) and (DP).
GRIDS: Mapping[str, tuple[float, ...]] = {
    "l2": (3e-4, 9e-4, 27e-4, 81e-4),
    "drop-path": (0.0, 0.2, 0.4, 0.6),
}
METHODS = {
    "l2": "R-DARTS(L2)",
    "drop-path": "R-DARTS(DP)",
    "es": "DARTS-ES",
    "ada": "DARTS-ADA",
    "seeds": "DARTS",
    "exhaustive": "every architecture",
}
SETTINGS = "robust.json"  # the settings of what a folder holds
SEARCHES = 4
MOST_ARCHITECTURES = 1000
_OWN = ("task", "data", "data_root", "image_size", "seed", "out", "resume", "device")
_OWN_SEARCH = ("space", *_OWN)
_OWN_RETRAIN = ("source", "genotypes_at", "holdout", *_OWN)


@dataclass(frozen=True)
class RobustConfig(FleetConfig):
    """Settings of the protocol. Those of a search or a training go through --search, --retrain."""

    task: str = "classification"
    """classification, language or disparity: what the network is for."""
    space: str = ""
    """The search space, as in a search [the task's own: s4, rnn, disparity_small]."""
    method: Literal["l2", "drop-path", "es", "ada", "seeds", "exhaustive"] = "l2"
    """What the searches differ in: L2 factor, drop path, or their seed, as DARTS-ES, DARTS-ADA or
    plain DARTS. exhaustive: no search, every architecture of a small space is trained."""
    data: str = ""
    """The data, as in a search [the task's own, which needs no download]."""
    data_root: Path = Path("data")
    """Where downloaded data sets lie."""
    image_size: int | None = None
    """Resize and crop images to this size."""
    preset: str = "default"
    """Of searches and trainings alike: default (the data set's own), paper, quick."""
    grid: tuple[float, ...] = ()
    """L2 factors, or drop-path probabilities [0.0003 0.0009 0.0027 0.0081; 0 0.2 0.4 0.6]."""
    searches: int | None = None
    """Searches of es, ada and seeds, each with a seed of its own [4, as DARTS chooses among]."""
    short_epochs: int | None = None
    """Epochs of the short training [100; the paper's number is not known; 20 for digits]."""
    seeds: int = 1
    """How often all of it is done, with other seeds; mean and deviation are over these."""
    seed: int = 0
    """The first seed."""
    search: tuple[str, ...] = ()
    """More settings of the searches, such as epochs=25 channels=8 (see search --help)."""
    retrain: tuple[str, ...] = ()
    """More settings of the trainings, such as preset=20x36 epochs=600 (see retrain --help)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    out: Path | None = None
    """The folder; one of an earlier start is gone on with [runs/robust-<space>-<data>-<method>]."""


@dataclass(frozen=True)
class Planned:
    """One search of the protocol: its name, its repetition, and what it differs in."""

    name: str
    seed: int  # of the repetition
    search_seed: int
    regularisation: str
    settings: Mapping[str, Any]


def plan(settings: RobustConfig) -> list[Planned]:
    """Return the searches of all repetitions.

    L2 factor and drop path vary at one seed; the other methods have `searches` seeds each.
    """
    planned, count = [], settings.searches or SEARCHES
    for r, seed in enumerate(seeds(settings)):
        if settings.method in GRIDS:
            short, key = {"l2": ("l2", "weight_decay"), "drop-path": ("dp", "drop_path_prob")}[
                settings.method
            ]
            for value in settings.grid or GRIDS[settings.method]:
                label = f"{'L2' if short == 'l2' else 'drop path'} {value:g}"
                name = f"{short}-{value:g}-seed{seed}"
                planned.append(Planned(name, seed, seed, label, {key: value}))
            continue
        more = {
            "es": {"early_stop": "stop", "curvature": "lambda"},
            "ada": {"adaptive": "l2", "curvature": "lambda"},
            "seeds": {},
        }[settings.method]
        for i in range(count):
            own = settings.seed + r * count + i
            name = f"{settings.method}-seed{own}"
            planned.append(Planned(name, seed, own, f"seed {own}", more))
    return planned


def title(settings: RobustConfig) -> str:
    """Return what is done, in a few words."""
    return f"{METHODS[settings.method]} on {load_space(settings.space).name}, {settings.data}"


def seeds(settings: RobustConfig) -> range:
    """Return the seed of each repetition."""
    return range(settings.seed, settings.seed + settings.seeds)


def short_epochs(settings: RobustConfig) -> int:
    """Return the epochs of the short training."""
    if settings.short_epochs is not None:
        return settings.short_epochs
    if settings.preset == "quick":
        return 5
    own = config_sources.kind_for(RetrainConfig, settings.task).short_epochs
    return own.get(settings.data if settings.preset == "default" else "", 100)


def given(settings: RobustConfig, words: Sequence[str], kind: type[Config]) -> dict[str, Any]:
    """Return the settings of a run: those of the protocol, and the words KEY=VALUE."""
    own = ("task", "data", "data_root", "preset", "device")
    more = words_of(words, config_sources.kind_for(kind, settings.task))
    found = {name: getattr(settings, name) for name in own} | more
    return found if settings.image_size is None else found | {"image_size": settings.image_size}


def words_of(words: Sequence[str], kind: type) -> dict[str, Any]:
    """Return KEY=VALUE words as settings of a run. Raises UserError naming the word."""
    search = issubclass(kind, SearchConfig)
    flag, own = ("--search", _OWN_SEARCH) if search else ("--retrain", _OWN_RETRAIN)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in own]
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        name = key.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise UserError(f"{flag}: expected KEY=VALUE such as epochs=25, got {word}")
        if name in own:
            raise UserError(f"{flag} {word}: the protocol sets {name} itself")
        if name not in names:
            raise UserError(f"{flag}: {unknown('setting', name, names)}")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def checked(settings: RobustConfig) -> RobustConfig:
    """Return the settings with whole paths. Raises UserError naming the flag."""
    check_fleet(settings)
    if settings.method not in METHODS:
        raise unknown("method", settings.method, METHODS)
    own = config_sources.kind_for(SearchConfig, settings.task)()
    settings = dataclasses.replace(
        settings, space=settings.space or own.space, data=settings.data or own.data
    )
    for name, least in (("searches", 1), ("seeds", 1), ("short_epochs", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"{config.flag(name)}: expected at least {least}, got {value}")
    _check_effect(settings)
    if len({f"{value:g}" for value in settings.grid}) != len(settings.grid):
        raise UserError(f"--grid: a value stands there twice, to six digits: {settings.grid}")
    _check_size(settings)
    for planned in plan(settings) if settings.method != "exhaustive" else []:
        asked = given(settings, settings.search, SearchConfig)
        for name in planned.settings:
            if name in asked:
                raise UserError(f"--search: the method {settings.method} sets {name} itself")
        config_sources.from_settings(SearchConfig, {**asked, **planned.settings})
    config_sources.from_settings(RetrainConfig, given(settings, settings.retrain, RetrainConfig))
    if settings.fleet == "local":  # Ray's machines see to their own
        training.select_device(settings.device)
    space = settings.space
    return dataclasses.replace(
        settings,
        data=_absolute(settings.data),
        data_root=Path(settings.data_root).absolute(),
        space=str(Path(space).absolute()) if space.endswith(".json") else space,
    )


def _check_effect(settings: RobustConfig) -> None:
    """Raise UserError for a setting that the method does not have."""
    others = {
        "grid": ("l2", "drop-path"),
        "searches": ("es", "ada", "seeds"),
        "short_epochs": ("l2", "drop-path", "es", "ada", "seeds"),
        "search": ("l2", "drop-path", "es", "ada", "seeds"),
    }
    for name, methods in others.items():
        if getattr(settings, name) not in (None, ()) and settings.method not in methods:
            known = ", ".join(methods)
            raise UserError(
                f"{config.flag(name)} is for the methods {known}, not {settings.method}"
            )


def _check_size(settings: RobustConfig) -> None:
    space = load_space(settings.space)
    count = count_architectures(space)
    metric = metric_of(settings.task)
    if settings.method == "exhaustive" and metric.cost != "error":
        raise UserError(
            f"--method exhaustive compares test errors; {settings.task} has {metric.cost}"
        )
    if settings.method == "exhaustive" and count > MOST_ARCHITECTURES:
        raise UserError(
            f"--method exhaustive: {space.name} has {count:,} architectures, more than "
            f"{MOST_ARCHITECTURES}; s5 has 81"
        )


def never_fires(settings: RobustConfig) -> bool:
    """Whether the rule of DARTS-ES has too few epochs to fire."""
    if settings.method not in ("es", "ada"):
        return False
    asked = {**given(settings, settings.search, SearchConfig), **plan(settings)[0].settings}
    search = config_sources.from_settings(SearchConfig, asked)
    lag = (search.stop_delta + search.stop_window // 2) * search.curvature_every
    first = 0 if search.stop_rule == "paper" else search.stop_start_epoch
    return first + lag >= search.epochs - 1


def _absolute(data: str) -> str:
    loader, _, path = data.partition(":")
    return f"{loader}:{Path(path).absolute()}" if path else data
