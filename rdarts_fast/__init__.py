"""Robust differentiable architecture search on a handful of fused kernels.

    run = rdarts_fast.run_search(space="s4", data="digits")
    run.genotype, run.folder, run.metrics

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdarts_fast.analysis import analyse
    from rdarts_fast.genotype import Genotype, discretize
    from rdarts_fast.networks import Network, Supernet
    from rdarts_fast.random_search import run_random_search
    from rdarts_fast.report import write_report
    from rdarts_fast.retrain import run_retraining
    from rdarts_fast.robust import run_robust
    from rdarts_fast.run_dir import Run
    from rdarts_fast.search import run_search
    from rdarts_fast.spaces import load_space

    __version__: str

__all__ = [
    "Genotype",
    "Network",
    "Run",
    "Supernet",
    "__version__",
    "analyse",
    "discretize",
    "load_space",
    "run_random_search",
    "run_retraining",
    "run_robust",
    "run_search",
    "write_report",
]

_HOMES = {
    "Genotype": "genotype",
    "Network": "networks",
    "Run": "run_dir",
    "Supernet": "networks",
    "analyse": "analysis",
    "discretize": "genotype",
    "load_space": "spaces",
    "run_random_search": "random_search",
    "run_retraining": "retrain",
    "run_robust": "robust",
    "run_search": "search",
    "write_report": "report",
}
_MODULES = ("bilevel", "genotype", "networks", "search", "spaces")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _installed_version()
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _installed_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("rdarts-fast")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"
