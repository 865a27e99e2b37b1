"""The part of the page about one search."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from rdarts_fast import plots
from rdarts_fast.genotype import Genotype, discretize
from rdarts_fast.report import curves, maps
from rdarts_fast.report.markup import Html, Piece, bullets, folded, join, paragraphs, tag
from rdarts_fast.report.pictures import Pictures
from rdarts_fast.report.rows import Row, genotype_of
from rdarts_fast.report.search import Search, edges_of, genotype_found, record_of
from rdarts_fast.spaces import CELLS, Space

_COLUMNS, _STRIP_NODES = 6, 24  # of the strip of cells; nodes in all columns
_MANY_NODES = 5  # from which on a cell takes the whole width
# What gives its input on as it is; too much of it is how a search fails.
_UNCHANGED = {"skip_connect": "skip connections", "identity": "identities"}
_STATES = {"c_{k-2}": "cₖ₋₂", "c_{k-1}": "cₖ₋₁", "s_0": "s₀"}


def about(row: Row, pictures: Pictures, place: int, *, strip: bool, opened: bool) -> Html:
    """Return the part of the page about a search. strip: with its cells over the epochs."""
    search = Search.of(row)
    cards = [
        *_cells(search, pictures),
        *(_strip(search, pictures) if strip else []),
        *curves.course(search, pictures),
        *curves.trajectory(search, pictures),
        *curves.spectrum(search, pictures),
        *_alphas(search, pictures),
        *maps.of_search(search, pictures),
    ]
    cost, shape = curves.analysis(search, pictures)
    notes = [*row.notes, *search.notes]
    parts: list[Piece] = [paragraphs(_summary(row))]
    if notes:
        parts.append(tag("div", bullets(notes), class_="note"))
    parts += [tag("div", join([*cards, *shape]), class_="cards"), paragraphs(*cost)]
    title = join([row.name, tag("span", f"  {_short(row)}", class_="soft")])
    inner = folded(title, *parts, open_=opened)
    opening = f'<details id="run-{place}" class="run"'
    return Html(inner.text.replace("<details", opening, 1))


def _summary(row: Row) -> str:
    asked = "" if row.epochs_asked is None else f" of {row.epochs_asked}"
    text = f"{row.space} on {row.data}, {row.epochs_done}{asked} epochs, {row.found.state}"
    scale = row.scale
    for value, words in (
        (row.supernet_score, f"supernet's {scale.supernet}"),
        (row.valid_cost, f"{scale.valid} after the short retraining"),
        (row.test_cost, f"{scale.test} of the retrained network"),
    ):
        text += "" if value is None else f"; {words} {scale.said(value)}"
    if row.rollbacks:
        text += f"; {row.rollbacks} {'rollback' if row.rollbacks == 1 else 'rollbacks'}"
    return f"{text}."


def _short(row: Row) -> str:
    parts = [row.method, row.space, row.data]
    parts += [] if row.seed is None else [f"seed {row.seed}"]
    return ", ".join(part for part in parts if part)


# Cells


def _cells(search: Search, pictures: Pictures) -> list[Html]:
    genotype, note = genotype_found(search)
    if genotype is None:
        search.notes.append(note)
        return []
    record = record_of(search, genotype)
    alphas = None if record is None else search.alphas.get(record["epoch"])
    edges = edges_of(search, genotype, alphas)
    weighed = any(edge[3] is not None for cell in edges.values() for edge in cell)
    skips = sum(edge[2] in _UNCHANGED for cell in edges.values() for edge in cell)
    total = sum(len(cell) for cell in edges.values())
    several = len(edges) > 1
    caption = f"The found {'cells' if several else 'cell'}{note}. A label is an operation"
    caption += " and its softmax weight" if weighed else ""
    same = " or ".join(_UNCHANGED[name] for name in _UNCHANGED if _is_candidate(name, edges))
    caption += f"; {skips or 'none'} of the {total} kept edges are {same}."
    inputs = {kind: CELLS[kind].inputs for kind in edges}
    kinds = _and([plots.kind_of(kind).short for kind in edges])
    many = genotype.nodes > _MANY_NODES
    return [
        pictures.add(
            f"{search.name}-cells",
            lambda path: plots.save_cells(path, edges, genotype.nodes, "", inputs),
            caption,
            f"{kinds} cell of {search.name}",
            wide=True,
            least=1000 if many else 640,
            most=0 if many else 820,
        )
    ]


def _is_candidate(name: str, cells: Iterable[str]) -> bool:
    return any(name in CELLS[kind].operations for kind in cells)


def _and(words: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _strip(search: Search, pictures: Pictures) -> list[Html]:
    genotypes = {r["epoch"]: g for r in search.history if (g := genotype_of(r)) is not None}
    epochs = sorted(genotypes)
    if len(epochs) < 2 or len({(g.nodes, *g.cells) for g in genotypes.values()}) > 1:
        return []
    last, nodes = len(epochs) - 1, genotypes[epochs[0]].nodes
    count = max(2, min(_COLUMNS, _STRIP_NODES // nodes))
    shown = [epochs[i] for i in sorted({round(k * last / (count - 1)) for k in range(count)})]
    columns = {f"epoch {e}": edges_of(search, genotypes[e], search.alphas.get(e)) for e in shown}
    changes = sum(genotypes[a] != genotypes[b] for a, b in itertools.pairwise(epochs))
    inputs = {kind: CELLS[kind].inputs for kind in genotypes[epochs[0]].cells}
    caption = (
        f"The cells of some epochs; over the whole search they changed {changes} times. "
        f"{_dots(max(inputs.values(), key=len))}; a circle is a node."
    )
    return [
        pictures.add(
            f"{search.name}-epochs",
            lambda path: plots.save_strip(path, columns, nodes, inputs),
            caption,
            f"cells of {search.name} over the epochs",
            wide=True,
            least=820,
        )
    ]


def _dots(inputs: Sequence[str]) -> str:
    """Return in words which input each dot is."""
    names = [_STATES.get(name, name) for name in inputs]
    if len(names) == 1:
        return f"The dot at the left is the input {names[0]}"
    if len(names) == 2:
        return f"The dots at the left are the inputs, above {names[0]}, below {names[1]}"
    return f"The dots at the left are the inputs, from the top {', '.join(names)} where it has them"


# Alphas


def _alphas(search: Search, pictures: Pictures) -> list[Html]:
    space, epochs = search.space, sorted(search.alphas)
    if space is None or not epochs:
        return []
    panels = []
    for kind, candidates in space.cells.items():
        weights = [torch.softmax(search.alphas[epoch][kind], dim=-1).flatten() for epoch in epochs]
        chosen = discretize(space, search.alphas[epochs[-1]])
        names = _edge_names(space, kind)
        panels.append(
            plots.Weights(
                plots.kind_of(kind).title,
                list(zip(names, candidates, strict=True)),
                torch.stack(weights, dim=1).numpy(),
                _kept_rows(space, chosen, kind),
            )
        )
    stop = search.row.stop_epoch
    caption = (
        "Softmax weights over the epochs, a row for each operation on each edge: what darkens is "
        "losing. Bold: kept at the end."
    )
    return [
        pictures.add(
            f"{search.name}-alphas",
            lambda path: plots.save_weights(path, panels, epochs, stop),
            caption,
            f"softmax weights of {search.name} over the epochs",
            wide=True,
            least=860,
        )
    ]


def _edge_names(space: Space, kind: str) -> list[str]:
    inputs = [_STATES.get(name, name) for name in CELLS[kind].inputs]
    names = [*inputs, *(str(node) for node in range(space.nodes))]
    return [
        f"{names[source]} → {node}"
        for node in range(space.nodes)
        for source in range(len(inputs) + node)
    ]


def _kept_rows(space: Space, genotype: Genotype, kind: str) -> list[int]:
    """Return the rows of a genotype's operations, counted by edge and then by operation."""
    rows = []
    for source, target, name in genotype.edges(kind):
        edge = space.edges_into(kind, target - len(CELLS[kind].inputs))[source]
        rows.append(edge * space.operations(kind) + space.cells[kind][edge].index(name))
    return rows
