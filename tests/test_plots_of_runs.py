"""The pictures of a report: alphas, cells over the epochs, courses, and panels over runs."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from rdarts_fast.errors import UserError
from rdarts_fast.plots import (
    Panel,
    Weights,
    curves,
    panels,
    save_course,
    save_panels,
    save_strip,
    save_weights,
    sparkline,
)
from rdarts_fast.plots import cells as drawing
from tests.test_plots import GENOTYPES, INPUTS, SEP, SKIP, nodes_of, texts_of

SVG = "{http://www.w3.org/2000/svg}"
EDGES = [("cₖ₋₂ → 0", (SKIP, SEP)), ("a <b> → 1", (SKIP, SEP))]


def figure_of(
    monkeypatch: pytest.MonkeyPatch, room: object, draw: Callable[..., None], *given: object
) -> Figure:
    """The figure that a function would have saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(room, "save", lambda figure, path: figures.append(figure))
    draw(Path("x.svg"), *given)
    return figures[0]


# Alphas


def pixels_of(path: Path) -> list[np.ndarray]:
    """The images in an SVG file."""
    found = []
    for image in ET.parse(path).iter(f"{SVG}image"):
        data = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
        found.append(np.asarray(Image.open(io.BytesIO(data))))
    return found


def test_weights_are_colours_in_one_scale(tmp_path) -> None:
    values = np.array([[0.2, 0.4, 0.7], [0.8, 0.6, 0.3], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    normal = Weights("normal cell", EDGES, values, kept=[1, 2])
    reduce = Weights("reduction cell", EDGES[:1], 1.0 - 0.9 * values[:2])
    path = tmp_path / "w.svg"
    save_weights(path, [normal, reduce], [0, 5, 9], stop_epoch=5)
    first, second, scale = pixels_of(path)
    low, high = 0.2, 0.82  # over both cells
    for pixels, panel in ((first, values), (second, 1.0 - 0.9 * values[:2])):
        share = (panel - low) / (high - low)
        expected = (colormaps["cividis"](share)[..., :3] * 255).round()
        assert np.abs(pixels.astype(float) - expected).max() <= 1
    assert (first[0, 0] == scale[0, 0]).all() and (second[0, 0] == scale[0, -1]).all()
    found = texts_of(path)
    for text in ("a <b> → 1", "normal cell", "reduction cell", "0.20", "0.82  softmax weight"):
        assert text in found, text
    assert found.count("stop 5") == 2 and found.count("9") == 2
    bold = [t.text for t in ET.parse(path).iter(f"{SVG}text") if t.attrib.get("font-weight")]
    assert bold == ["normal cell", "sep 3x3", "skip", "reduction cell"]


def test_weights_that_are_all_equal_are_drawn(tmp_path) -> None:
    save_weights(tmp_path / "w.svg", [Weights("cell", EDGES[:1], np.full((2, 1), 0.5))], [0])
    assert pixels_of(tmp_path / "w.svg")[0].shape == (2, 1, 3)


def test_weights_of_another_shape_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"cell: expected values \(2, 2\), got \(2, 1\)"):
        save_weights(tmp_path / "w.svg", [Weights("cell", EDGES[:1], np.ones((2, 1)))], [0, 1])
    with pytest.raises(ValueError, match="at least one"):
        save_weights(tmp_path / "w.svg", [], [0])
    assert list(tmp_path.iterdir()) == []


def test_drawings_are_svg_and_say_where_they_cannot_be_written(tmp_path) -> None:
    panel = Weights("cell", EDGES[:1], np.ones((2, 1)))
    with pytest.raises(UserError, match=r"ends with \.svg"):
        save_weights(tmp_path / "w.png", [panel], [0])
    with pytest.raises(UserError, match=r"cannot write .*absent"):
        save_weights(tmp_path / "absent/w.svg", [panel], [0])


# Cells over the epochs


def test_a_strip_has_every_edge_of_every_cell(tmp_path) -> None:
    cells = {
        f"epoch {e}": {
            "normal": [(0, 2, SKIP if e else SEP, 0.5), (1, 2, SEP, None)],
            "reduce": [(0, 2, SEP, 0.5), (1, 2, SEP, 0.5)],
        }
        for e in (0, 3)
    }
    save_strip(tmp_path / "s.svg", cells, 1)
    found = texts_of(tmp_path / "s.svg")
    for text in ("epoch 0", "epoch 3", "normal", "reduction", "skip connection"):
        assert found.count(text) == 1, text
    assert found.count("0") == 4  # the one node of each cell
    courses = [p for p in ET.parse(tmp_path / "s.svg").iter(f"{SVG}path") if "C" in p.attrib["d"]]
    assert len(courses) == 8 + 1  # a skip connection is a hollow line: drawn twice
    assert sum(p.attrib["stroke"] == "#0072B2" for p in courses) == 7
    for path in courses:
        x = [float(value) for value in re.findall(r"[\d.]+(?= [\d.]+)", path.attrib["d"])]
        assert 0 < min(x) < max(x) < 1080
    with pytest.raises(ValueError, match="at least one column"):
        save_strip(tmp_path / "s.svg", {}, 1)


@pytest.mark.parametrize("name", ["disparity with weights", "darts_v2"])
def test_a_strip_has_all_inputs_of_every_cell_type(tmp_path, name: str) -> None:
    cells = GENOTYPES[name]
    save_strip(tmp_path / "s.svg", {"first": cells, "last": cells}, nodes_of(cells), INPUTS)
    drawn = list(ET.parse(tmp_path / "s.svg").iter())
    dots = [e for e in drawn if e.tag == f"{SVG}circle" and e.attrib["r"] == "3.5"]
    assert len(dots) == 2 * sum(len(INPUTS[kind]) for kind in cells)
    boxes = [e.attrib for e in drawn if e.tag == f"{SVG}rect" and "rx" in e.attrib]
    assert len(boxes) == 2 * len(cells)
    for dot in dots:  # each on the ground of a cell, and whole
        x, y = float(dot.attrib["cx"]), float(dot.attrib["cy"])
        assert any(
            float(b["x"]) + 3.5 < x < float(b["x"]) + float(b["width"])
            and float(b["y"]) + 3.5 < y < float(b["y"]) + float(b["height"]) - 3.5
            for b in boxes
        )
    names = [e for e in drawn if e.tag == f"{SVG}text" and e.attrib["x"] == "0.0"]
    assert [e.text for e in names] == [drawing.kind_of(kind).short for kind in cells]
    for text in names:
        assert 72 * drawing.text_width(text.text, 10.0) < min(float(b["x"]) for b in boxes)


# Curves


def test_a_course_has_gaps_and_faint_abandoned_epochs(monkeypatch) -> None:
    history = [
        {"epoch": 0.0, "train_loss": 2.0, "valid_accuracy": 0.5},
        {"epoch": 1.0, "valid_accuracy": 0.6},
        {"epoch": 2.0, "train_loss": 1.0, "valid_accuracy": 0.7},
    ]
    undone = [{"epoch": 1.0, "train_loss": 1.9}]
    figure = figure_of(monkeypatch, curves, save_course, history, [undone])
    loss, accuracy = figure.axes
    assert [len(ax.lines) for ax in (loss, accuracy)] == [4, 4]
    before, now = loss.lines[:2]
    assert (before.get_alpha(), now.get_alpha()) == (0.4, 1.0)
    np.testing.assert_array_equal(now.get_ydata(), [2.0, np.nan, 1.0])
    assert list(accuracy.lines[3].get_ydata()) == [0.5, 0.6, 0.7]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    assert all(float(tick).is_integer() for tick in loss.get_xticks())


# Panels over runs


def test_panels_join_the_means_of_runs(monkeypatch) -> None:
    runs = [[(3e-4, 4.0)], [(3e-4, 6.0)], [(27e-4, 1.0)], [(27e-4, 2.0)]]
    panel = Panel("title", "weight decay", "error", {"a_$x$": runs}, scale="levels")
    figure = figure_of(monkeypatch, panels, save_panels, [panel])
    (ax,) = figure.axes
    *points, mean = ax.lines
    assert [(list(p.get_xdata()), list(p.get_ydata())) for p in points] == [
        *(([0.0], [4.0]), ([0.0], [6.0]), ([1.0], [1.0]), ([1.0], [2.0])),
    ]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([0.0, 1.0], [5.0, 1.5])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0003", "0.0027"]


def test_panels_share_one_legend_and_their_looks(monkeypatch, tmp_path) -> None:
    one = Panel("one", "epoch", "y", {"a_$x$": [[(0, 1), (1, 2)]], "<b>": [[(0, 2), (3, 1)]]})
    other = Panel("other", "x", "y", {"<b>": [[(0.5, 2), (0.25, 1)]]}, join="none")
    save_panels(tmp_path / "p.svg", [one, other])
    found = texts_of(tmp_path / "p.svg")
    assert found.count("a_$x$") == 1 and found.count("<b>") == 1
    figure = figure_of(monkeypatch, panels, save_panels, [one, other])
    first, second = figure.axes
    assert second.lines[0].get_color() == first.lines[-1].get_color() != first.lines[0].get_color()
    assert len(second.lines) == 1  # points alone
    assert all(float(tick).is_integer() for tick in first.get_xticks())
    with pytest.raises(ValueError, match="at least one panel"):
        save_panels(tmp_path / "p.svg", [])


# Small curves


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    drawn = ET.fromstring(sparkline([1.0, float("nan"), 3.0, 2.0], width=100, height=20))
    points = [p.split(",") for p in drawn.find("polyline").attrib["points"].split()]
    x, y = ([float(p[i]) for p in points] for i in (0, 1))
    assert (
        x == sorted(x) and len(x) == 3 and x[1] - x[0] == pytest.approx(2 * (x[2] - x[1]), abs=0.2)
    )
    assert (y[0], y[1]) == (17.0, 3.0) and y[2] == 10.0  # upwards is less
    assert drawn.find("circle").attrib["cx"] == f"{x[-1]:.1f}"
    assert sparkline([]) == "" and sparkline([float("inf")]) == ""
    ET.fromstring(sparkline([0.5, 0.5]))
