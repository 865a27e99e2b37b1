"""Pictures are written, say what they should, and nothing in them lies on anything else."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from rdarts_fast.errors import UserError
from rdarts_fast.plots import (
    Edge,
    curves,
    draw_cell,
    look,
    save_cells,
    save_curves,
    save_landscape,
    save_spectrum,
    save_trajectory,
)
from rdarts_fast.plots import layout as geometry
from rdarts_fast.plots import styles as styling
from rdarts_fast.spaces import CELLS, OPERATIONS, RECURRENT_OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
SKIP, SEP, DIL3 = "skip_connect", "sep_conv_3x3", "dil_conv_3x3"
DIL5, MAX, NOISE = "dil_conv_5x5", "max_pool_3x3", "noise"


def cell(*pairs: tuple[str, int], weight: float | None = None) -> list[Edge]:
    """Edges from the published flat form: two (operation, input) a node."""
    return [(source, 2 + i // 2, op, weight) for i, (op, source) in enumerate(pairs)]


def upsampling(*pairs: tuple[str, int], weight: float | None = None) -> list[Edge]:
    """Edges of an upsampling cell: four of node 0, two of each that follows."""
    targets = [4] * 4 + [5 + i // 2 for i in range(len(pairs) - 4)]
    return [(source, t, op, weight) for t, (op, source) in zip(targets, pairs, strict=True)]


def recurrent(*pairs: tuple[str, int], weight: float | None = None) -> list[Edge]:
    """Edges of a recurrent cell: one of each node."""
    return [(source, 1 + i, op, weight) for i, (op, source) in enumerate(pairs)]


# The first five are the final genotypes of published runs; skip only is the failure of s2 and s3.
GENOTYPES: dict[str, dict[str, list[Edge]]] = {
    "s1 of many skips": {
        "normal": cell(
            *((SKIP, 1), (SKIP, 0), (SEP, 1), (SKIP, 2)),
            *((SKIP, 3), (SEP, 1), (DIL3, 3), (SKIP, 2)),
        ),
        "reduce": cell(
            *((MAX, 0), (MAX, 1), (MAX, 1), (MAX, 0)),
            *((MAX, 1), (SKIP, 2), (MAX, 1), (MAX, 0)),
        ),
    },
    "s1 regularised": {
        "normal": cell(
            *((SKIP, 0), (DIL5, 1), (SEP, 1), (DIL3, 2)),
            *((MAX, 0), (SEP, 1), (MAX, 1), (DIL3, 2)),
        ),
        "reduce": cell(
            *((MAX, 0), (MAX, 1), (MAX, 1), (DIL5, 2)),
            *((MAX, 0), (DIL5, 3), (DIL5, 2), (MAX, 1)),
        ),
    },
    "s1 with weights": {
        "normal": cell(
            *((SKIP, 1), (SKIP, 0), (SKIP, 1), (DIL3, 2)),
            *((DIL3, 3), (SEP, 2), (DIL3, 2), (SEP, 0)),
            weight=0.52,
        ),
        "reduce": cell(
            *((MAX, 0), (MAX, 1), (MAX, 1), (MAX, 0)),
            *((MAX, 0), (DIL5, 3), (DIL5, 4), (DIL5, 3)),
            weight=0.9,
        ),
    },
    "s2 of convolutions": {
        "normal": cell(
            *((SEP, 1), (SEP, 0), (SEP, 2), (SEP, 0)),
            *((SEP, 1), (SEP, 2), (SEP, 1), (SEP, 2)),
        ),
        "reduce": cell(
            *((SEP, 0), (SEP, 1), (SEP, 2), (SEP, 0)),
            *((SEP, 2), (SEP, 1), (SEP, 4), (SEP, 1)),
        ),
    },
    "skip only": {
        "normal": cell(*((SKIP, 0), (SKIP, 1)) * 4),
        "reduce": cell(*((SKIP, 0), (SKIP, 1)) * 4),
    },
    "s5": {"normal": cell((SKIP, 0), (SEP, 1)), "reduce": cell((MAX, 0), (SKIP, 1))},
    "all operations": {
        "normal": cell(
            *(("sep_conv_5x5", 1), ("avg_pool_3x3", 0), (DIL5, 2), (SKIP, 0)),
            *((NOISE, 1), (MAX, 3), ("conv_7x1_1x7", 2), (SEP, 4)),
        ),
        "reduce": cell(
            *(("sep_conv_7x7", 1), (SEP, 0), ("avg_pool_3x3", 2), (DIL3, 1)),
            *(("none", 2), ("my_operation", 3), (NOISE, 2), ("another_one", 3)),
        ),
    },
    "disparity with weights": {
        "normal": cell(*((SEP, 0), (MAX, 1), (SKIP, 1), (SEP, 2), (SEP, 0), (SEP, 3)), weight=0.4),
        "reduce": cell(*((SEP, 0), (SEP, 1), (MAX, 0), (MAX, 1), (SEP, 2), (MAX, 3)), weight=0.35),
        "upsample": upsampling(
            *((MAX, 0), (SEP, 1), (SKIP, 2), (SEP, 3)),
            *((MAX, 0), (SEP, 1), (MAX, 1), (SKIP, 4)),
            weight=0.36,
        ),
    },
    "disparity of one input beside node 0": {
        "normal": cell(*((SEP, 0), (SEP, 1)) * 3),
        "reduce": cell(*((SKIP, 0), (MAX, 1)) * 3),
        "upsample": upsampling(
            *((SEP, 0), (SEP, 1), (SEP, 2), (SEP, 3)),
            *((MAX, 3), (MAX, 2), (MAX, 3), (SKIP, 2)),
        ),
    },
    # DARTS's published cell (V2), and one of every operation.
    "darts_v2": {
        "recurrent": recurrent(
            *(("sigmoid", 0), ("relu", 1), ("relu", 1), ("identity", 1)),
            *(("tanh", 2), ("sigmoid", 5), ("tanh", 3), ("relu", 5)),
            weight=0.61,
        )
    },
    "recurrent, all from the input": {
        "recurrent": recurrent(
            *(("tanh", 0), ("relu", 0), ("sigmoid", 0), ("identity", 0)),
            *(("none", 0), ("tanh", 0), ("relu", 0), ("identity", 0)),
        )
    },
}
INPUTS = {kind: CELLS[kind].inputs for kind in CELLS}


def inputs_of(kind: str) -> int:
    return len(INPUTS.get(kind, INPUTS["normal"]))


def nodes_of(cells: dict[str, list[Edge]]) -> int:
    return max(edge[1] - inputs_of(kind) + 1 for kind, edges in cells.items() for edge in edges)


def laid_out(name: str, kind: str) -> geometry.Layout:
    """The layout of a cell among the others of its genotype."""
    cells = GENOTYPES[name]
    styles = styling.styles_of(e[2] for edges in cells.values() for e in edges)
    width = max(geometry.input_width(INPUTS[other]) for other in cells)
    return geometry.lay_out(cells[kind], nodes_of(cells), inputs_of(kind), styles, width)


def figure_of(patch: pytest.MonkeyPatch, cells: dict[str, list[Edge]], title: str = "") -> Figure:
    """The drawn figure that `save_cells` would write."""
    figures: list[Figure] = []
    patch.setattr("rdarts_fast.plots.cells.save", lambda figure, path: figures.append(figure))
    save_cells(Path("cells.svg"), cells, nodes_of(cells), title, INPUTS)
    FigureCanvasAgg(figures[0]).draw()
    return figures[0]


def words(svg: Path) -> list[str]:
    """All text elements of an SVG file."""
    texts = ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()).strip() for text in texts]


# Files


def test_svg_holds_every_label_as_text(tmp_path: Path) -> None:
    path = tmp_path / "cells.svg"
    cells = GENOTYPES["s1 with weights"]
    save_cells(path, cells, 4, "s1, 50 epochs")
    found = words(path)
    for edges in cells.values():
        for _, _, op, weight in edges:
            assert f"{styling.STYLES[op].short}  {weight:.2f}" in found
            assert styling.STYLES[op].name in found
    for text in ("s1, 50 epochs", "normal cell", "reduction cell", "concat", *"0123"):
        assert text in found
    assert found.count("dil 5x5  0.90") == 3
    assert [w.replace(" ", "").replace("\n", "") for w in found].count("ck−2") == 2
    assert "3 sep 3x3" not in " ".join(found) and "2 sep 3x3" in " ".join(found)


@pytest.mark.parametrize("name", ["skip only", "s1 with weights", "s5"])
def test_png_is_as_wide_as_a_page_and_white(tmp_path: Path, name: str) -> None:
    path = tmp_path / "cells.png"
    save_cells(path, GENOTYPES[name], nodes_of(GENOTYPES[name]))
    picture = imread(path)
    height, width, _ = picture.shape
    assert 1400 <= width <= 2200 and height < 1.1 * width  # 200 pixels an inch
    assert np.all(picture[0, :, :3] == 1) and np.all(picture[:, 0, 3] == 1)
    if name == "s5":
        assert height < width / 2


def test_titles_stand_as_they_are_given(tmp_path: Path) -> None:
    title = "a_b^2 <i>&amp; $x_1$ 100% {"
    save_cells(tmp_path / "cells.svg", {title: GENOTYPES["s5"]["normal"]}, 1, title)
    assert words(tmp_path / "cells.svg").count(title) == 1
    assert f"{title} cell" in words(tmp_path / "cells.svg")


@pytest.mark.parametrize("name", ["cells.pdf", "cells", "cells.svg.txt"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    for save in (
        lambda path: save_cells(path, GENOTYPES["s5"], 1),
        lambda path: save_curves(path, {"a": ([0], [1])}, "x", "y", "t"),
    ):
        with pytest.raises(UserError, match=r"ends with \.svg or \.png"):
            save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "cells.svg"
    with pytest.raises(UserError, match=f"cannot write {path}: No such file"):
        save_cells(path, GENOTYPES["s5"], 1)


def test_the_same_picture_gives_the_same_bytes_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    before = [matplotlib.rcParams[name] for name in ("svg.fonttype", "svg.hashsalt")]
    for suffix in ("svg", "png"):
        pictures = []
        for name in ("a", "b"):
            path = tmp_path / f"{name}.{suffix}"
            save_cells(path, GENOTYPES["s5"], 1)
            pictures.append(path.read_bytes())
            save_curves(path, {"a": ([0], [1])}, "x", "y", "t")
        assert pictures[0] == pictures[1]
    assert [matplotlib.rcParams[name] for name in ("svg.fonttype", "svg.hashsalt")] == before


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, rdarts_fast.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Nothing lies on anything else


@pytest.mark.parametrize("name", list(GENOTYPES))
def test_no_two_texts_overlap(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figure = figure_of(monkeypatch, GENOTYPES[name], "a title")
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    texts = [
        text for text in texts if text.axes is None or text.axes.axison or text in text.axes.texts
    ]
    boxes = [text.get_window_extent() for text in texts]
    assert len(texts) > 10
    for (one, a), (other, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not a.padded(-0.5).overlaps(b), (one.get_text(), other.get_text())
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    "name", ["s1 with weights", "all operations", "disparity with weights", "darts_v2"]
)
def test_texts_fit_their_boxes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figure = figure_of(monkeypatch, GENOTYPES[name])
    for ax, kind in zip(figure.axes, GENOTYPES[name], strict=True):
        layout = laid_out(name, kind)
        texts = {text.get_position(): text.get_window_extent() for text in ax.texts}
        for place in [*layout.labels, *layout.nodes, *layout.inputs, layout.output]:
            text = texts[place.x, place.y]
            middle, half = np.array([place.x, place.y]), np.array([place.width, place.height]) / 2
            low, high = ax.transData.transform([middle - half, middle + half])
            assert low[0] < text.x0 and text.x1 < high[0]
            assert low[1] - 0.5 < text.y0 and text.y1 < high[1] + 0.5


def clearance(box: geometry.Box, points: np.ndarray) -> float:
    """Distance from `box` to the nearest of `points` [N, 2] along the farther axis."""
    gaps = np.abs(points - (box.x, box.y)) - (box.width / 2, box.height / 2)
    return float(gaps.max(axis=1).min())


def check_layout(edges: list[Edge], nodes: int, names: tuple[str, ...] = INPUTS["normal"]) -> None:
    """Routes keep off the nodes they do not serve, labels off routes, nodes and each other."""
    styles = styling.styles_of(edge[2] for edge in edges)
    layout = geometry.lay_out(edges, nodes, len(names), styles, geometry.input_width(names))
    states = layout.inputs + layout.nodes
    points = [route.points() for route in layout.routes]
    left, right, bottom, top = layout.limits
    for (source, target, _, _), course, label in zip(edges, points, layout.labels, strict=True):
        assert abs(clearance(states[source], course[:1])) < 1e-9
        assert abs(clearance(states[target], course[-1:]) - geometry.ARROW) < 1e-9
        for state, box in enumerate(states):
            assert state in (source, target) or clearance(box, course) > 0.1
            gap = abs(box.x - label.x) - (box.width + label.width) / 2
            assert gap > 0 or abs(box.y - label.y) > (box.height + label.height) / 2
        for other in points:
            assert other is course or clearance(label, other) > 0.03
        assert left < course[:, 0].min() and course[:, 0].max() < right
        assert bottom < course[:, 1].min() and course[:, 1].max() < top
    for one, other in itertools.combinations([*layout.labels, *layout.inputs, *layout.nodes], 2):
        gap = abs(one.x - other.x) - (one.width + other.width) / 2
        assert gap > 0 or abs(one.y - other.y) > (one.height + other.height) / 2
    for place in [*layout.labels, *layout.inputs]:
        assert bottom < place.y - place.height / 2 and place.y + place.height / 2 < top
        assert left < place.x - place.width / 2


def test_every_cell_of_four_nodes_is_laid_out_clearly() -> None:
    choices = [list(itertools.combinations(range(2 + node), 2)) for node in range(4)]
    topologies = list(itertools.product(*choices))
    assert len(topologies) == 180
    for i, topology in enumerate(topologies):
        edges = [(s, 2 + node, MAX, 0.88) for node, pair in enumerate(topology) for s in pair]
        check_layout([(*edge[:3], None) for edge in edges] if i % 2 else edges, 4)


def test_every_upsampling_cell_of_three_nodes_is_laid_out_clearly() -> None:
    pairs = [list(itertools.combinations(range(4 + node), 2)) for node in (1, 2)]
    topologies = list(itertools.product(*pairs))
    assert len(topologies) == 150
    for i, topology in enumerate(topologies):
        weight = None if i % 2 else 0.88
        kept = [(MAX, s) for sources in ((0, 1, 2, 3), *topology) for s in sources]
        edges = upsampling(*kept, weight=weight)
        check_layout(edges, 3, INPUTS["upsample"])


def test_inputs_stand_from_the_top_in_their_order_and_apart() -> None:
    layout = laid_out("disparity of one input beside node 0", "upsample")
    heights = [place.y for place in layout.inputs]
    assert heights == sorted(heights, reverse=True) and heights[1] > 0 > heights[2]
    for one, other in itertools.pairwise(heights):
        assert one - other > layout.inputs[0].height
    for (source, _, _, _), route in zip(
        GENOTYPES["disparity of one input beside node 0"]["upsample"], layout.routes, strict=True
    ):
        assert (route.y > 0) == (source < 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_cells_with_one_input_a_node_are_laid_out_clearly(numbers: list[int]) -> None:
    edges: list[Edge] = [(n % (i + 1), i + 1, MAX, None) for i, n in enumerate(numbers)]
    check_layout(edges, len(edges), INPUTS["recurrent"])


def test_a_whole_supernet_cell_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    edges: list[Edge] = [(s, t, SEP, 0.5) for t in range(2, 6) for s in range(t)]
    figure_of(monkeypatch, {"normal": edges})
    check_layout(edges, 4)
    double: list[Edge] = [
        (0, 2, SEP, None),
        (0, 2, SKIP, None),
        (2, 3, SEP, None),
        (2, 3, SKIP, None),
    ]
    check_layout(double, 2)
    edges = [(s, t, MAX, 0.88) for t in range(4, 7) for s in range(t)]
    figure_of(monkeypatch, {"upsample": edges})
    check_layout(edges, 3, INPUTS["upsample"])


def crossings(layout: geometry.Layout) -> int:
    """How often the drawn courses of two edges cross, by the signs of their pieces' corners."""
    count = 0
    for one, other in itertools.combinations([route.points() for route in layout.routes], 2):
        a, b, c, d = one[:-1, None], one[1:, None], other[None, :-1], other[None, 1:]

        def turn(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
            u, v = q - p, r - p
            return np.sign(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])

        apart = (turn(a, b, c) * turn(a, b, d) < 0) & (turn(c, d, a) * turn(c, d, b) < 0)
        count += int(apart.sum())
    return count


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("skip only", "normal", 0),
        ("s5", "reduce", 0),
        ("s1 of many skips", "normal", 0),
        ("s1 of many skips", "reduce", 1),
        ("s1 with weights", "normal", 0),
        ("s1 with weights", "reduce", 0),
        ("disparity with weights", "upsample", 3),  # as few as inputs in their order allow
        ("darts_v2", "recurrent", 1),  # three edges that cross pairwise on one side
    ],
)
def test_edges_cross_only_where_they_must(name: str, kind: str, expected: int) -> None:
    assert crossings(laid_out(name, kind)) == expected


def test_edges_of_the_two_inputs_keep_to_their_sides() -> None:
    edges = GENOTYPES["skip only"]["normal"]
    layout = geometry.lay_out(edges, 4, 2, styling.styles_of([SKIP]))
    for (source, _, _, _), route in zip(edges, layout.routes, strict=True):
        assert (route.y > 0) == (source == 0)
    for state, place in enumerate(layout.inputs):
        heights = [
            route.y for edge, route in zip(edges, layout.routes, strict=True) if edge[0] == state
        ]
        assert place.y == pytest.approx(np.mean(heights))  # its edges fan out evenly


# Looks


def test_every_operation_has_a_look_of_its_own() -> None:
    assert set(styling.STYLES) == {*OPERATIONS, *RECURRENT_OPERATIONS}
    looks = [(s.color, s.dashes, s.hollow) for s in styling.STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert len({style.short for style in styling.STYLES.values()}) == len(looks)
    grey = {"none": "#999999"}
    for name, style in styling.STYLES.items():
        assert style.color in look.PALETTE or style.color == grey.get(name)


def test_darts_operations_differ_in_colour_alone() -> None:
    darts = [op for op in OPERATIONS if op not in ("none", "sep_conv_7x7", "conv_7x1_1x7", NOISE)]
    assert len({styling.STYLES[op].color for op in darts}) == len(darts) == 7


def test_unknown_operations_get_colours_left_over() -> None:
    styles = styling.styles_of([SKIP, SEP, "b_new", "a_new", *map(str, range(20))])
    assert list(styles)[:2] == [SKIP, SEP]
    known = {styles[SKIP].color, styles[SEP].color}
    assert not known & {style.color for name, style in styles.items() if name not in (SKIP, SEP)}
    assert styles["b_new"].short == "b new"
    looks = [(style.color, style.dashes, style.hollow) for style in styles.values()]
    assert len(set(looks)) == len(looks)


def test_counts_are_said_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        [t.get_text() for t in ax.texts]
        for ax in figure_of(monkeypatch, GENOTYPES["skip only"]).axes
    ]
    assert all("8 skip" in text for text in texts)
    texts = [
        [t.get_text() for t in ax.texts] for ax in figure_of(monkeypatch, GENOTYPES["s5"]).axes
    ]
    assert not any("1 skip" in word for text in texts for word in text)
    assert not any("concat" in text for text in texts)  # one node: nothing to concatenate


def test_every_cell_type_has_its_title_its_inputs_and_its_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(styling.KINDS) == set(CELLS)
    expected = {
        "normal": ("normal cell", "concat", "$c_{k}$", "$c_{k-2}$", "$c_{k-1}$"),
        "reduce": ("reduction cell", "concat", "$c_{k}$", "$c_{k-2}$", "$c_{k-1}$"),
        "upsample": (
            *("upsampling cell", "concat", "$c_{k}$", "$c_{k-2}$", "$c_{k-1}$"),
            *("prediction", "encoder"),
        ),
        "recurrent": ("recurrent cell", "mean", "output", "$s_0$"),
    }
    for name in ("disparity with weights", "darts_v2"):
        cells = GENOTYPES[name]
        for ax, kind in zip(figure_of(monkeypatch, cells).axes, cells, strict=True):
            texts = [text.get_text() for text in ax.texts]
            assert set(expected[kind]) <= set(texts), kind
            labels = {styling.label_of(e, styling.styles_of([e[2]])) for e in cells[kind]}
            assert labels <= set(texts)


def test_nodes_of_cells_under_each_other_are_in_line() -> None:
    layouts = [laid_out("disparity with weights", kind) for kind in ("normal", "upsample")]
    one, other = ([(p.x - layout.limits[0]) for p in layout.nodes] for layout in layouts)
    assert one == pytest.approx(other)


def test_draw_cell_stands_alone() -> None:
    figure = Figure(figsize=(9, 4))
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    edges: list[Edge] = [(0, 1, "tanh", None), (1, 2, "relu", 0.25)]
    draw_cell(ax, edges, 2, "a cell", inputs=("h_{0}",))
    figure.canvas.draw()
    texts = [text.get_text() for text in ax.texts]
    assert {"a cell", "tanh", "relu  0.25", "$h_{0}$", "output", "0", "1"} <= set(texts)
    assert not ax.axison


@pytest.mark.parametrize(
    ("edges", "nodes", "inputs"),
    [
        ([(3, 2, SEP, None)], 2, 2),
        ([(0, 1, SEP, None)], 2, 2),
        ([(0, 4, SEP, None)], 2, 2),
        ([(-1, 2, SEP, None)], 2, 2),
        ([(0, 1, SEP, None)], 2, 0),
        ([(0, 3, SEP, None)], 2, 4),
        ([], 1, 2),
    ],
)
def test_edges_that_fit_no_cell_are_refused(edges: list[Edge], nodes: int, inputs: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        draw_cell(Figure().add_subplot(), edges, nodes, "", inputs=("x",) * inputs)


# Curves


def test_curves(tmp_path: Path) -> None:
    series = {
        "train": (list(range(30)), [math.sqrt(i) for i in range(30)]),
        "_valid $x$": ([0, 1, 2, 9], [0.3, math.nan, 0.2, 0.4]),
        "nothing yet": ([], []),
    }
    for suffix in ("svg", "png"):
        save_curves(tmp_path / f"curves.{suffix}", series, "epoch_1", "error $%$", "a_title <b>")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = words(tmp_path / "curves.svg")
    for text in (*series, "epoch_1", "error $%$", "a_title <b>"):
        assert found.count(text) == 1
    save_curves(tmp_path / "one.svg", {"alone": ([0, 1], [1, 2])}, "x", "y", "title")
    assert "alone" not in words(tmp_path / "one.svg")


def test_many_curves_look_different(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: figures.append(figure))
    series = {str(i): ([0, 1], [math.nan if i == 3 else 0, i]) for i in range(20)}
    save_curves(Path("c.svg"), series, "x", "y", "t")
    lines = figures[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    assert np.isnan(np.asarray(lines[3].get_ydata())[0])


def test_curves_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a': 2 x values and 1 y values"):
        save_curves(tmp_path / "c.svg", {"a": ([0, 1], [1])}, "x", "y", "t")
    assert list(tmp_path.iterdir()) == []


def branch(stop: int | None, shift: int = 0) -> dict[str, object]:
    epochs = list(range(shift, shift + 20, 2))
    values = [0.1 + 0.01 * epoch for epoch in epochs]
    return {
        "epochs": epochs,
        "values": values,
        "average_epochs": epochs[:-2],
        "averages": values[:-2],
        "stop_epoch": stop,
    }


def test_a_trajectory_shows_its_stops_and_names_its_lines_once(tmp_path: Path) -> None:
    save_trajectory(tmp_path / "t.svg", [branch(10), branch(None, 12)])
    found = texts_of(tmp_path / "t.svg")
    assert found.count("stop 10") == 1 and found.count("local average") == 1
    assert found.count("measured") == 1 and "lambda_max" in found
    save_trajectory(tmp_path / "u.svg", [branch(None)])
    assert not [text for text in texts_of(tmp_path / "u.svg") if "stop" in text]


def test_a_spectrum_has_its_first_middle_and_last_epoch(tmp_path: Path) -> None:
    spectra = {epoch: [1.0 / (k + 1) for k in range(56)] for epoch in range(0, 50, 2)}
    save_spectrum(tmp_path / "s.svg", spectra)
    shown = [text for text in texts_of(tmp_path / "s.svg") if text.startswith("epoch ")]
    assert shown == ["epoch 0", "epoch 24", "epoch 48"]
    save_spectrum(tmp_path / "one.svg", {3: [0.5, -0.2]})
    assert "epoch 3" in texts_of(tmp_path / "one.svg")


def test_a_landscape_has_both_planes_and_may_be_flat(tmp_path: Path) -> None:
    steps = [-1.0, 0.0, 1.0]
    bowl = [[a * a + b * b for b in steps] for a in steps]
    for plane in (bowl, [[0.5] * 3] * 3):
        save_landscape(tmp_path / "l.svg", steps, plane, plane)
        found = texts_of(tmp_path / "l.svg")
        assert {"leading eigenvectors", "random directions"} <= set(found)


def texts_of(path: Path) -> list[str]:
    """Every text of an SVG file."""
    name = "{http://www.w3.org/2000/svg}text"
    return ["".join(node.itertext()).strip() for node in ET.parse(path).iter(name)]
