"""A file imports only from floors below its own, or from its own folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "rdarts_fast"
SOURCES = Path(__file__).resolve().parent.parent / PACKAGE

# From the ground up. A room is a file or a folder; rooms of one floor do not know each other. The
# first three lines are the ground floor, which everything may use: there the order is its own.
FLOORS = [
    ["errors", "csrc_hash", "gpu_fit"],
    ["native"],
    ["draws"],
    [
        "kernels",
        "curvature",
        "bilevel",
        "data",
        "spaces",
        "config",
        "plots",
        "published",
        "metrics",
        "averaged_sgd",
        "events",
        "ray_session",
        "gpu_slots",
        "recording",
    ],
    ["genotype", "regularisation", "config_language", "config_disparity"],
    ["networks", "run_dir", "oracle", "sampling", "config_sources"],
    ["training", "tracking", "fleet", "tables", "ranks"],
    ["tasks"],
    ["search_state", "evaluation", "memory", "protocol"],
    ["rollback", "graph_step"],
    ["search", "random_search", "retrain", "analysis", "export"],
    ["robust", "report", "info"],
    ["__init__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path, package: Path) -> str:
    """The file's name without .py, or the folder of the package that holds it."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_rooms(path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Every room of the package that the file imports from, wherever in it, with the line."""
    folder = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE:
                yield room_named(parts[1:], package), node.lineno


def room_named(parts: list[str], package: Path) -> str:
    """The room that holds rdarts_fast.<parts>; a name of the package itself is in __init__."""
    if not parts:
        return "__init__"
    is_room = (package / f"{parts[0]}.py").exists() or (package / parts[0]).is_dir()
    return parts[0] if is_room else "__init__"


def violations(package: Path) -> list[str]:
    """One line for each file without a floor and each import that goes across or up."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name, room = path.relative_to(package.parent), room_of(path, package)
        if room not in FLOOR_OF:
            found.append(f"{name}: on no floor")
            continue
        for other, line in imported_rooms(path, package):
            if other == room or (other == "__init__" and reads_version_only(path, line)):
                continue
            if other not in FLOOR_OF:
                found.append(f"{name}:{line}: imports {other}, which is on no floor")
            elif FLOOR_OF[other] >= FLOOR_OF[room]:
                found.append(f"{name}:{line}: imports {other}, which is not below {room}")
    return found


def reads_version_only(path: Path, line: int) -> bool:
    """Whether the import is of the package's version, which is no room's."""
    return path.read_text().splitlines()[line - 1].strip().endswith("import __version__")


def test_imports_go_down() -> None:
    assert violations(SOURCES) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("genotype.py", "from rdarts_fast.search import run_search", "imports search"),
        ("genotype.py", "import rdarts_fast.networks.cells", "imports networks"),
        ("genotype.py", "from rdarts_fast import networks", "imports networks"),
        ("genotype.py", "from rdarts_fast import run_search", "imports __init__"),
        ("genotype.py", "def f():\n    from .search import run_search", ":2: imports search"),
        ("networks/cells.py", "from ..run_dir import Run", "imports run_dir"),
        ("networks/cells.py", "from .. import search", "imports search"),
        ("spaces.py", "from rdarts_fast import config", "imports config"),
        ("errors.py", "from rdarts_fast import native", "imports native"),
        ("utils.py", "", "on no floor"),
        ("helpers/more.py", "", "on no floor"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    package = planted(tmp_path, file, text)
    found = violations(package)
    assert len(found) == 1 and expected in found[0] and file in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("networks/cells.py", "from .operations import OPERATIONS"),
        ("networks/cells.py", "from ..genotype import Genotype\nimport torch.networks.search"),
        ("networks/cells.py", "from rdarts_fast.networks import operations"),
        ("search.py", "from rdarts_fast import errors, networks, run_dir"),
        ("training.py", "from rdarts_fast import __version__"),
        ("__init__.py", "from .search import run_search"),
    ],
)
def test_an_import_that_goes_down_passes(tmp_path: Path, file: str, text: str) -> None:
    assert violations(planted(tmp_path, file, text)) == []


def planted(folder: Path, file: str, text: str) -> Path:
    """A package of empty rooms, but for one file."""
    package = folder / PACKAGE
    (package / "networks").mkdir(parents=True)
    for name in ("__init__", "errors", "native", "spaces", "config", "genotype", "run_dir"):
        (package / f"{name}.py").touch()
    for name in ("search", "training", "networks/__init__", "networks/operations"):
        (package / f"{name}.py").touch()
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(text)
    return package
