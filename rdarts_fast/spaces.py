"""Search spaces: which operations are candidates on which edge of which cell.

S1-S4 are the four spaces of the paper (section 2 and appendix B), operations in the order of the
published alphas. S5 is the paper's small space of 81 architectures (section 2.1). `darts` is the
original space of DARTS. Spaces of other cells than an image classifier's are a disparity network's
(appendix D) and a recurrent cell's (appendix E).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdarts_fast.errors import UserError, nearest, unknown

# Every operation a space may name. The modules behind the names are in networks/operations.py,
# which a test holds to this list.
OPERATIONS = (
    "none",
    "skip_connect",
    "max_pool_3x3",
    "avg_pool_3x3",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "conv_7x1_1x7",
    "noise",
)
CELL_TYPES = ("normal", "reduce")  # of an image classifier
INPUTS = 2  # c_{k-2} and c_{k-1}

RECURRENT_OPERATIONS = ("none", "tanh", "relu", "sigmoid", "identity")

Candidates = tuple[tuple[str, ...], ...]  # [E][O] names


@dataclass(frozen=True)
class CellType:
    """What all cells of a type have in common, whatever the space."""

    inputs: tuple[
        str, ...
    ]  # their names; a node has an edge from each and from the nodes before it
    kept: int  # inputs that a node of a genotype keeps
    operations: tuple[str, ...] = OPERATIONS
    first_keeps_all: bool = False

    def kept_by(self, node: int) -> int:
        """Return how many inputs intermediate node `node` (0-based) of a genotype keeps."""
        available = len(self.inputs) + node
        return available if node == 0 and self.first_keeps_all else min(self.kept, available)


_TWO = ("c_{k-2}", "c_{k-1}")
CELLS: Mapping[str, CellType] = {
    "normal": CellType(_TWO, kept=2),
    "reduce": CellType(_TWO, kept=2),
    # AutoDispNet's decoder: beside two cells the coarser prediction and the encoder's feature map.
    "upsample": CellType((*_TWO, "prediction", "encoder"), kept=2, first_keeps_all=True),
    # DARTS, section 2.1: s_0 is made of the word and the hidden state.
    "recurrent": CellType(("s_0",), kept=1, operations=RECURRENT_OPERATIONS),
}
# The cell types of a network, by the task that it is for.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "classification": CELL_TYPES,
    "disparity": ("normal", "reduce", "upsample"),
    "language": ("recurrent",),
}


def family(cell_types: Iterable[str]) -> str | None:
    """Return the task whose networks have these cell types, None where none has."""
    found = set(cell_types)
    return next((task for task, kinds in FAMILIES.items() if set(kinds) == found), None)


def edge_count(nodes: int, inputs: int = INPUTS) -> int:
    """Return the number of edges of a cell: every node has an edge from each state before it."""
    return sum(inputs + i for i in range(nodes))


def edges_into(node: int, inputs: int = INPUTS) -> range:
    """Return the edge indices that end in intermediate node `node` (0-based), by source."""
    first = edge_count(node, inputs)
    return range(first, first + inputs + node)


@dataclass(frozen=True)
class Space:
    """A search space: per cell type, the candidate operations of each edge.

    Edges are numbered by the node they end in, then by their source: the cell's inputs (c_{k-2},
    c_{k-1}), node 0, node 1, ...
    """

    name: str
    nodes: int  # intermediate nodes in a cell
    cells: Mapping[str, Candidates]  # cell type -> [E][O]
    description: str = ""

    @property
    def task(self) -> str:
        """The task whose networks have these cells."""
        found = family(self.cells)
        assert found is not None, "space_from_dict admits no other"
        return found

    def edges(self, cell_type: str) -> int:
        """E, the number of edges of a `cell_type` cell."""
        return edge_count(self.nodes, len(CELLS[cell_type].inputs))

    def edges_into(self, cell_type: str, node: int) -> range:
        """Return the edge indices that end in node `node` of a `cell_type` cell, by source."""
        return edges_into(node, len(CELLS[cell_type].inputs))

    def operations(self, cell_type: str) -> int:
        """O, the number of candidates on an edge of a `cell_type` cell."""
        return len(self.cells[cell_type][0])

    def to_dict(self) -> dict[str, Any]:
        """Return the form that `--space my.json` reads."""
        cells = {kind: [list(edge) for edge in edges] for kind, edges in self.cells.items()}
        return {
            "name": self.name,
            "nodes": self.nodes,
            "description": self.description,
            "cells": cells,
        }


def _uniform(
    name: str,
    nodes: int,
    operations: tuple[str, ...],
    description: str,
    cell_types: tuple[str, ...] = CELL_TYPES,
) -> Space:
    edges = {kind: edge_count(nodes, len(CELLS[kind].inputs)) for kind in cell_types}
    cells = {kind: (operations,) * count for kind, count in edges.items()}
    return Space(name, nodes, cells, description)


_S1_SHORT = {
    "sk": "skip_connect",
    "d3": "dil_conv_3x3",
    "d5": "dil_conv_5x5",
    "s3": "sep_conv_3x3",
    "mp": "max_pool_3x3",
    "ap": "avg_pool_3x3",
}


def _pairs(text: str) -> Candidates:
    return tuple(tuple(_S1_SHORT[word] for word in pair.split("+")) for pair in text.split())


# One row a node; within a row the edges from c_{k-2}, c_{k-1}, node 0, node 1, node 2.
_S1_NORMAL = _pairs(
    "sk+d3 sk+d5 sk+d5 sk+s3 sk+d3 mp+sk sk+s3 sk+s3 sk+d3 sk+s3 mp+sk sk+d3 d3+d5 d3+d5"
)
_S1_REDUCE = _pairs(
    "mp+ap mp+d3 mp+ap mp+ap sk+d5 mp+ap mp+s3 sk+d3 sk+d5 mp+ap mp+ap sk+d5 sk+d5 sk+d5"
)
_DARTS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)

SPACES: Mapping[str, Space] = {
    space.name: space
    for space in (
        Space(
            "s1",
            4,
            {"normal": _S1_NORMAL, "reduce": _S1_REDUCE},
            "two operations an edge, a different pair on each",
        ),
        _uniform("s2", 4, ("skip_connect", "sep_conv_3x3"), "skip or 3x3 separable convolution"),
        _uniform(
            "s3",
            4,
            ("none", "skip_connect", "sep_conv_3x3"),
            "zero, skip or 3x3 separable convolution",
        ),
        _uniform("s4", 4, ("noise", "sep_conv_3x3"), "Gaussian noise or 3x3 separable convolution"),
        _uniform(
            "s5",
            1,
            ("sep_conv_3x3", "skip_connect", "max_pool_3x3"),
            "the paper's S5: one node, 81 architectures (the official code calls `darts` s5)",
        ),
        _uniform("darts", 4, _DARTS, "the original 8 operations (what the official code calls s5)"),
        _uniform(
            "disparity_small",
            3,
            ("sep_conv_3x3", "max_pool_3x3", "skip_connect"),
            "AutoDispNet's cells with the paper's three operations",
            FAMILIES["disparity"],
        ),
        _uniform(
            "disparity",
            3,
            _DARTS,
            "AutoDispNet's cells with its 8 operations",
            FAMILIES["disparity"],
        ),
        _uniform(
            "rnn",
            8,
            RECURRENT_OPERATIONS,
            "DARTS's recurrent cell with its 5 operations",
            FAMILIES["language"],
        ),
        _uniform(
            "rnn_small",
            8,
            ("relu", "identity"),
            "DARTS's recurrent cell with the paper's two operations",
            FAMILIES["language"],
        ),
    )
}


def spaces_of(task: str) -> list[str]:
    """Return the names of the built-in spaces of a task."""
    return [name for name, space in SPACES.items() if space.task == task]


def load_space(name_or_path: str | Path) -> Space:
    """Return a built-in space by name, or a user's own from a JSON file.

    The file is {"nodes": 4, "cells": {"normal": [[name, ...], ...], "reduce": [...]}}: one list of
    operation names an edge; a single list stands for all edges of the cell. The cell types are
    those of FAMILIES. "name" and "description" are optional. Raises UserError for an unknown name,
    a missing file, or a malformed entry (named).
    """
    text = str(name_or_path)
    if text in SPACES:
        return SPACES[text]
    if not (text.endswith(".json") or "/" in text):
        raise unknown("space", text, [*SPACES, "or a path to a .json file"])
    path = Path(text)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"space {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"space {path}: not JSON: {error}") from error
    return space_from_dict(data, str(path), default_name=path.stem)


def space_from_dict(data: Any, where: str, default_name: str = "custom") -> Space:
    """Return the space that `data` describes; `where` names it in the errors (UserError)."""
    if not isinstance(data, dict):
        raise UserError(f"space {where}: expected an object, got {type(data).__name__}")
    for key in data:
        if key not in ("name", "nodes", "cells", "description"):
            hint = nearest(key, ["name", "nodes", "cells", "description"])
            raise UserError(f'space {where}: unknown entry "{key}".{hint}')
    nodes = data.get("nodes", 4)
    if not isinstance(nodes, int) or isinstance(nodes, bool) or not 1 <= nodes <= 16:
        raise UserError(f"space {where}: nodes: expected a whole number from 1 to 16, got {nodes}")
    cells = data.get("cells")
    if not isinstance(cells, dict) or family(cells) is None:
        got = sorted(cells) if isinstance(cells, dict) else cells
        raise UserError(
            f'space {where}: cells: expected "normal" and "reduce" (and "upsample" for disparity, '
            f'"recurrent" alone for language), got {got}'
        )
    name, description = data.get("name", default_name), data.get("description", "")
    if not isinstance(name, str) or not name or not isinstance(description, str):
        raise UserError(f"space {where}: name and description: expected text, got {name!r}")
    checked = {
        kind: _candidates(cells[kind], nodes, kind, f"space {where}: {kind}")
        for kind in FAMILIES[str(family(cells))]
    }
    return Space(name, nodes, checked, description)


def _candidates(edges: Any, nodes: int, cell_type: str, where: str) -> Candidates:
    expected, operations = (
        edge_count(nodes, len(CELLS[cell_type].inputs)),
        CELLS[cell_type].operations,
    )
    if isinstance(edges, list) and edges and all(isinstance(name, str) for name in edges):
        edges = [edges] * expected
    if not isinstance(edges, list) or len(edges) != expected:
        got = len(edges) if isinstance(edges, list) else type(edges).__name__
        raise UserError(f"{where}: expected {expected} edges for {nodes} nodes, got {got}")
    for e, names in enumerate(edges):
        if not isinstance(names, list) or not names:
            raise UserError(f"{where}[{e}]: expected a list of operation names, got {names!r}")
        for name in names:
            if not isinstance(name, str) or name not in operations:
                raise UserError(f"{where}[{e}]: {unknown('operation', str(name), operations)}")
        if len(set(names)) != len(names):
            raise UserError(f"{where}[{e}]: an operation stands there twice: {names}")
        if len(names) != len(edges[0]):
            raise UserError(
                f"{where}[{e}]: {len(names)} candidates, but {where.split(': ')[-1]}[0] has "
                f"{len(edges[0])}: all edges of a cell need the same number"
            )
        if names == ["none"]:
            raise UserError(f'{where}[{e}]: "none" alone leaves nothing to choose')
    return tuple(tuple(names) for names in edges)
