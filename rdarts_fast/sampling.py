"""Architectures drawn uniformly from a space, as random search draws them (Li & Talwalkar)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from rdarts_fast.draws import SITE_ARCHITECTURE, Draws
from rdarts_fast.genotype import Genotype, NodeInputs, Nodes
from rdarts_fast.spaces import CELLS, Space

Cells = Mapping[str, Nodes]  # a genotype's, but an operation may be `none`


class Architectures:
    """All architectures of `space`: each node has two of its inputs and an operation on each, cell
    types apart; `none` and `noise` are operations like any other.

    whole: without those that no genotype can hold, where a node has nothing but `none`.
    """

    def __init__(self, space: Space, *, whole: bool = False) -> None:
        self._choices = {
            kind: [_choices(space, kind, node, whole) for node in range(space.nodes)]
            for kind in space.cells
        }

    @property
    def count(self) -> int:
        """How many there are."""
        return math.prod(len(node) for nodes in self._choices.values() for node in nodes)

    def draw(self, draws: Draws) -> Cells:
        """Return the architecture of a key; all are equally likely, up to 2**-32 a node."""
        nodes = [node for nodes in self._choices.values() for node in nodes]
        words = iter(draws.bits(SITE_ARCHITECTURE, len(nodes)).tolist())
        return {
            kind: tuple(node[next(words) * len(node) >> 32] for node in nodes)
            for kind, nodes in self._choices.items()
        }


def _choices(space: Space, kind: str, node: int, whole: bool) -> list[NodeInputs]:
    """Return all that a node can be."""
    candidates = [space.cells[kind][e] for e in space.edges_into(kind, node)]
    found = []
    for sources in itertools.combinations(range(len(candidates)), CELLS[kind].kept_by(node)):
        for names in itertools.product(*(candidates[source] for source in sources)):
            if not whole or any(name != "none" for name in names):
                found.append(tuple(zip(names, sources, strict=True)))
    return found


def without_none(cells: Cells) -> Genotype:
    """Return the genotype of an architecture: its edges but those of `none`, which add nothing.

    Raises UserError where that leaves a node without an input.
    """
    return Genotype(
        {
            kind: tuple(tuple(edge for edge in node if edge[0] != "none") for node in nodes)
            for kind, nodes in cells.items()
        }
    )
