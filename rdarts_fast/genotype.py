"""Genotypes: the discrete architecture that a search ends with, as data.

A genotype says, for each intermediate node of each cell type, which inputs it keeps and with which
operation (DARTS, section 2.4). `discretize` reads it off the alphas; JSON is its form on disk; the
official code's text form can be read.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdarts_fast.errors import UserError, unknown
from rdarts_fast.spaces import CELL_TYPES, CELLS, FAMILIES, INPUTS, Space, family

FORMAT = 1
KEPT_INPUTS = 2  # inputs that each node of a normal or reduction cell keeps

NodeInputs = tuple[tuple[str, int], ...]  # (operation, source state) per kept input
Nodes = tuple[NodeInputs, ...]


@dataclass(frozen=True)
class Genotype:
    """Per cell type, for each intermediate node its kept inputs as (operation, source state).

    The first states are the cell's inputs (0 and 1: c_{k-2} and c_{k-1}; others in spaces.CELLS),
    the next is intermediate node 0 and so on. The cell's output is the concatenation of all
    intermediate nodes, a recurrent cell's their mean. The strongest input comes first.
    """

    cells: Mapping[str, Nodes]

    def __post_init__(self) -> None:
        frozen = {
            kind: tuple(tuple((str(op), int(source)) for op, source in node) for node in nodes)
            for kind, nodes in self.cells.items()
        }
        object.__setattr__(self, "cells", frozen)
        _check(self.cells)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.cells.items())))

    @property
    def nodes(self) -> int:
        """Intermediate nodes in a cell."""
        return len(next(iter(self.cells.values())))

    def edges(self, cell_type: str) -> list[tuple[int, int, str]]:
        """Return (source state, target state, operation) of each kept edge."""
        inputs = len(CELLS[cell_type].inputs)
        return [
            (source, inputs + i, op)
            for i, node in enumerate(self.cells[cell_type])
            for op, source in node
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the form on disk as plain data."""
        cells = {
            kind: [[list(e) for e in node] for node in nodes] for kind, nodes in self.cells.items()
        }
        return {"format": FORMAT, "cells": cells}

    def to_json(self) -> str:
        """Return the form on disk; `from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """Read `to_json`'s form. Raises UserError naming the entry that is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"genotype: not JSON: {error}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> Genotype:
        """Read `to_dict`'s form. Raises UserError naming the entry that is wrong."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise UserError(f'genotype: expected an object with "format": {FORMAT}, got {found}')
        return cls(_cells_of(data.get("cells")))

    @classmethod
    def from_text(cls, text: str) -> Genotype:
        """Read the official codes' text forms, `Genotype(normal=[('sep_conv_3x3', 1), ...], ...)`
        and `Genotype(recurrent=[('relu', 0), ...], ...)`.

        The text is parsed, never evaluated. Raises UserError.
        """
        try:
            call = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise UserError(f"genotype text: {error.msg} at column {error.offset}") from error
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise UserError(
                "genotype text: expected Genotype(normal=[...], normal_concat=..., ...)"
            )
        fields = {str(word.arg): _literal(str(word.arg), word.value) for word in call.keywords}
        if "recurrent" in fields:
            return cls(_cells_of({"recurrent": _single("recurrent", fields["recurrent"])}))
        cells = {kind: _paired(kind, fields.get(kind)) for kind in CELL_TYPES}
        for kind in CELL_TYPES:
            concat = fields.get(f"{kind}_concat")
            whole = list(range(INPUTS, INPUTS + len(cells[kind])))
            if concat is not None and (
                not isinstance(concat, list | tuple | range) or list(concat) != whole
            ):
                raise UserError(f"genotype text: {kind}_concat: expected {whole}, got {concat}")
        return cls(_cells_of(cells))

    def to_text(self) -> str:
        """Return the official codes' text form. Raises UserError where they have none for it: a
        cell for disparity, a node of one input in a classifier's cell.
        """
        if set(self.cells) == set(FAMILIES["language"]):
            pairs = [edge for node in self.cells["recurrent"] for edge in node]
            return f"Genotype(recurrent={pairs}, concat=range(1, {self.nodes + 1}))"
        if set(self.cells) != set(CELL_TYPES):
            raise UserError(f"genotype text: has no cells {list(self.cells)}: use the JSON")
        fields = []
        for kind, nodes in self.cells.items():
            for i, node in enumerate(nodes):
                if len(node) != KEPT_INPUTS:
                    found = f"{kind}[{i}] has {len(node)}"
                    raise UserError(f"genotype text: has two inputs a node, {found}: use the JSON")
            pairs = [edge for node in nodes for edge in node]
            fields += [f"{kind}={pairs}", f"{kind}_concat=range({INPUTS}, {INPUTS + len(nodes)})"]
        return f"Genotype({', '.join(fields)})"

    def describe(self) -> str:
        """Return a readable table: a line a node, what it adds up."""
        width = max(8, *(len(kind) + 1 for kind in self.cells))
        lines = []
        for kind, nodes in self.cells.items():
            names = [*CELLS[kind].inputs, *(f"node {i}" for i in range(self.nodes))]
            for i, node in enumerate(nodes):
                sum_of = " + ".join(f"{op}({names[source]})" for op, source in node)
                lines.append(f"  {kind if i == 0 else '':<{width}}node {i} = {sum_of}")
        return "\n".join(lines)


def _literal(name: str, node: ast.expr) -> Any:
    is_range = (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"
    )
    try:
        if is_range:
            assert isinstance(node, ast.Call)
            return range(*[ast.literal_eval(argument) for argument in node.args])
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise UserError(f"genotype text: {name}: not a plain value") from error


def _paired(kind: str, flat: Any) -> list[list[Any]]:
    if not isinstance(flat, list) or not flat or len(flat) % KEPT_INPUTS:
        raise UserError(
            f"genotype text: {kind}: expected two (operation, input) pairs a node, got {flat}"
        )
    return [flat[i : i + KEPT_INPUTS] for i in range(0, len(flat), KEPT_INPUTS)]


def _single(kind: str, flat: Any) -> list[list[Any]]:
    if not isinstance(flat, list) or not flat:
        raise UserError(
            f"genotype text: {kind}: expected an (operation, input) pair a node, got {flat}"
        )
    return [[pair] for pair in flat]


def _cells_of(cells: Any) -> dict[str, Nodes]:
    if not isinstance(cells, dict):
        raise UserError(f"genotype: cells: expected an object, got {type(cells).__name__}")
    checked: dict[str, Nodes] = {}
    for kind, nodes in cells.items():
        if not isinstance(nodes, list):
            raise UserError(
                f"genotype: {kind}: expected a list of nodes, got {type(nodes).__name__}"
            )
        checked[kind] = tuple(
            _node_of(f"genotype: {kind}[{i}]", node) for i, node in enumerate(nodes)
        )
    return checked


def _node_of(where: str, node: Any) -> NodeInputs:
    pairs = node if isinstance(node, list) else []
    for pair in pairs:
        fits = isinstance(pair, list | tuple) and len(pair) == 2
        if not (fits and isinstance(pair[0], str) and type(pair[1]) is int):
            raise UserError(f"{where}: expected [operation, input], got {pair}")
    if not pairs:
        raise UserError(f"{where}: expected a list of [operation, input], got {node}")
    return tuple((op, source) for op, source in pairs)


def _check(cells: Mapping[str, Nodes]) -> None:
    if family(cells) is None:
        known = " or ".join(str(list(kinds)) for kinds in FAMILIES.values())
        raise UserError(f"genotype: expected cells {known}, got {list(cells)}")
    counts_of_nodes = {len(nodes) for nodes in cells.values()}
    if len(counts_of_nodes) != 1 or 0 in counts_of_nodes:
        counts = {kind: len(nodes) for kind, nodes in cells.items()}
        raise UserError(
            f"genotype: all cells need the same number of nodes, at least 1, got {counts}"
        )
    for kind, nodes in cells.items():
        inputs, operations = len(CELLS[kind].inputs), CELLS[kind].operations
        for i, node in enumerate(nodes):
            sources = [source for _, source in node]
            if not sources:
                raise UserError(f"genotype: {kind}[{i}]: a node needs an input")
            if len(set(sources)) != len(sources):
                raise UserError(f"genotype: {kind}[{i}]: an input stands there twice: {sources}")
            for op, source in node:
                if op not in operations or op == "none":
                    names = [name for name in operations if name != "none"]
                    raise UserError(f"genotype: {kind}[{i}]: {unknown('operation', op, names)}")
                if not 0 <= source < inputs + i:
                    raise UserError(
                        f"genotype: {kind}[{i}]: input {source} is not before the node "
                        f"(0 to {inputs + i - 1})"
                    )


def discretize(space: Space, alphas: Mapping[str, Tensor]) -> Genotype:
    """Return the genotype of `alphas`: per node the two strongest inputs (as many as spaces.CELLS
    says of the cell type), per input the best operation.

    alphas: cell type -> [E, O]. An input's strength is the largest softmax weight of its edge;
    `none` counts in the softmax but is never chosen (DARTS, section 2.4). Ties go to the lower
    index. Where a node has no more inputs than it keeps, it keeps all. Raises ValueError where a
    shape does not fit `space`.
    """
    return Genotype(
        {
            kind: _strongest(space, kind, alphas[kind].detach().double().cpu())
            for kind in space.cells
        }
    )


def _strongest(space: Space, kind: str, alpha: Tensor) -> Nodes:
    shape = (space.edges(kind), space.operations(kind))
    if tuple(alpha.shape) != shape:
        raise ValueError(f"alphas[{kind!r}]: expected shape {shape}, got {tuple(alpha.shape)}")
    weights = torch.softmax(alpha, dim=-1).tolist()
    nodes = []
    for node in range(space.nodes):
        inputs = []
        for source, edge in enumerate(space.edges_into(kind, node)):
            names = space.cells[kind][edge]
            candidates = [(w, -o) for o, w in enumerate(weights[edge]) if names[o] != "none"]
            weight, negative = max(candidates)
            inputs.append((weight, source, names[-negative]))
        inputs.sort(key=lambda item: -item[0])  # stable: ties keep the lower source first
        kept = inputs[: CELLS[kind].kept_by(node)]
        nodes.append(tuple((op, source) for _, source, op in kept))
    return tuple(nodes)


def kept_edges(
    space: Space, genotype: Genotype, alphas: Mapping[str, Tensor]
) -> dict[str, list[tuple[int, int, str, float]]]:
    """Return (source, target, operation, softmax weight) of the kept edges of each cell type.

    alphas: cell type -> [E, O], of the search that `genotype` came from.
    """
    kept: dict[str, list[tuple[int, int, str, float]]] = {}
    for kind in genotype.cells:
        weights = torch.softmax(alphas[kind].detach().double(), dim=-1).tolist()
        kept[kind] = []
        for source, target, name in genotype.edges(kind):
            edge = space.edges_into(kind, target - len(CELLS[kind].inputs))[source]
            weight = weights[edge][space.cells[kind][edge].index(name)]
            kept[kind].append((source, target, name, weight))
    return kept


def one_hot_weights(space: Space, cells: Mapping[str, Nodes]) -> dict[str, Tensor]:
    """Return the weights under which a supernet is an architecture: 1 for what it keeps, 0
    elsewhere; cell type -> float32 [E, O].

    cells: a genotype's, but an operation may be `none`. Raises UserError where the space does not
    have it.
    """
    weights = {}
    for kind, nodes in cells.items():
        weights[kind] = torch.zeros(space.edges(kind), space.operations(kind))
        for node, inputs in enumerate(nodes):
            for name, source in inputs:
                edge = space.edges_into(kind, node)[source]
                if node >= space.nodes or name not in space.cells[kind][edge]:
                    at = f"{kind}[{node}]: {name} on input {source}"
                    raise UserError(f"genotype: {at} is not in space {space.name}")
                weights[kind][edge, space.cells[kind][edge].index(name)] = 1.0
    return weights


def read_genotype(path: Path) -> Genotype:
    """Read a genotype file, JSON or the official text form. Raises UserError naming the file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"genotype {path}: {reason}") from error
    try:
        return (
            Genotype.from_text(text) if text.startswith("Genotype(") else Genotype.from_json(text)
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
