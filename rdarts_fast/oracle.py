"""A table of the test errors of all architectures of a small space, and what a genotype regrets
(paper, section 2.1 and figure 2).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, Nodes
from rdarts_fast.spaces import CELLS, Space, space_from_dict

FORMAT = 1


def architectures(space: Space) -> Iterator[Genotype]:
    """Yield every genotype of a space once, in a fixed order: 81 of S5."""
    kinds = [_cells(space, kind) for kind in space.cells]
    for cells in itertools.product(*kinds):
        yield Genotype(dict(zip(space.cells, cells, strict=True)))


def count_architectures(space: Space) -> int:
    """Return how many genotypes a space has."""
    return math.prod(
        sum(1 for _ in _node(space, kind, node))
        for kind in space.cells
        for node in range(space.nodes)
    )


def _cells(space: Space, kind: str) -> list[Nodes]:
    nodes = [list(_node(space, kind, node)) for node in range(space.nodes)]
    return list(itertools.product(*nodes))


def _node(space: Space, kind: str, node: int) -> Iterator[tuple[tuple[str, int], ...]]:
    edges = space.edges_into(kind, node)
    for sources in itertools.combinations(range(len(edges)), CELLS[kind].kept_by(node)):
        names = [
            [name for name in space.cells[kind][edges[source]] if name != "none"]
            for source in sources
        ]
        for chosen in itertools.product(*names):
            yield tuple(zip(chosen, sources, strict=True))


@dataclass(frozen=True)
class Oracle:
    """The test error, in [0, 1], of every architecture of a space."""

    space: Space
    data: str
    errors: Mapping[Genotype, float]  # by genotypes in plain order

    @classmethod
    def of(cls, space: Space, data: str, errors: Sequence[tuple[Genotype, float]]) -> Oracle:
        """Return the table of these errors, whatever the order of a node's inputs."""
        return cls(space, data, {plain(genotype): error for genotype, error in errors})

    @classmethod
    def read(cls, path: Path) -> Oracle:
        """Read a table that `to_json` wrote. Raises UserError naming the file and what is wrong."""
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"oracle {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"oracle {path}: not JSON: {error}") from error
        if not isinstance(table, dict) or table.get("format") != FORMAT:
            raise UserError(f"oracle {path}: not a table of robust --method exhaustive")
        space = space_from_dict(table.get("space"), f"of oracle {path}")
        try:
            rows = table["architectures"]
            found = [(Genotype.from_dict(r["genotype"]), float(r["test_error"])) for r in rows]
            oracle = cls.of(space, str(table["data"]), found)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"oracle {path}: damaged: {type(error).__name__}: {error}") from error
        if any(not 0.0 <= error <= 1.0 for error in oracle.errors.values()):
            raise UserError(f"oracle {path}: a test error is not in [0, 1]")
        missing = [g for g in architectures(space) if g not in oracle.errors]
        if missing or len(found) != len(oracle.errors):
            raise UserError(
                f"oracle {path}: {len(missing)} of {count_architectures(space)} architectures are "
                "missing, or one stands there twice: run robust --method exhaustive to its end"
            )
        return oracle

    def to_json(self) -> str:
        """Return the table as text, best architecture first."""
        rows: list[dict[str, Any]] = [
            {"genotype": genotype.to_dict(), "test_error": error}
            for genotype, error in sorted(self.errors.items(), key=lambda item: item[1])
        ]
        table = {"format": FORMAT, "space": self.space.to_dict(), "data": self.data}
        return json.dumps({**table, "architectures": rows}, indent=1) + "\n"

    @property
    def best(self) -> float:
        """The least test error."""
        return min(self.errors.values())

    def regret(self, genotype: Genotype) -> float:
        """Return the genotype's test error over the least one, in [0, 1]. Raises UserError where
        the table does not have it.
        """
        error = self.errors.get(plain(genotype))
        if error is None:
            raise UserError(f"the oracle of space {self.space.name} has no {genotype.to_text()}")
        return error - self.best

    def check(self, space: Space, data: str) -> None:
        """Raise UserError unless the table is of this space and these data."""
        if self.space.cells != space.cells:
            raise UserError(f"--oracle: a table of space {self.space.name}, not of {space.name}")
        if self.data != data:
            raise UserError(f"--oracle: a table of {self.data}, the search is on {data}")


def plain(genotype: Genotype) -> Genotype:
    """Return the genotype with each node's inputs in order: which is stronger makes no other
    network.
    """
    return Genotype(
        {
            kind: tuple(tuple(sorted(node, key=lambda pair: pair[1])) for node in nodes)
            for kind, nodes in genotype.cells.items()
        }
    )
