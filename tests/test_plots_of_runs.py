"""The pictures of a report: alphas, cells over the epochs, courses, and panels over runs."""

from __future__ import annotations

import base64
import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from rdarts_fast.errors import UserError
from rdarts_fast.plots import (
    Panel,
    Score,
    Weights,
    curves,
    maps,
    panels,
    save_course,
    save_maps,
    save_panels,
    save_strip,
    save_weights,
    sparkline,
)
from rdarts_fast.plots import styles as styling
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
    assert [e.text for e in names] == [styling.kind_of(kind).short for kind in cells]
    for text in names:
        assert 72 * styling.text_width(text.text, 10.0) < min(float(b["x"]) for b in boxes)


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


@pytest.mark.parametrize(
    ("score", "values", "scale"),
    [
        (Score("perplexity", "perplexity", log=True), [880.0, 300.0, 90.0], "log"),
        (Score("perplexity", "perplexity", log=True), [120.0, 110.0, 90.0], "linear"),
        (Score("perplexity", "perplexity", log=True), [900.0, 0.0, 90.0], "linear"),
        (Score("epe", "EPE", "px"), [900.0, 300.0, 90.0], "linear"),
    ],
)
def test_a_score_that_grows_by_factors_has_an_axis_that_does(
    monkeypatch, score: Score, values: list[float], scale: str
) -> None:
    history = [{"epoch": i, f"valid_{score.name}": value} for i, value in enumerate(values)]
    figure = figure_of(monkeypatch, curves, save_course, history, [], score)
    loss, other = figure.axes
    assert (loss.get_yscale(), other.get_yscale()) == ("linear", scale)
    assert list(other.lines[1].get_ydata()) == values
    assert other.get_title() == ("EPE, px" if score.unit else "perplexity")
    figure.draw_without_rendering()
    if scale == "log":
        low, high = other.get_ylim()
        shown = [t.get_text() for t in other.get_yticklabels()]
        at = [text for text, y in zip(shown, other.get_yticks(), strict=True) if low < y < high]
        assert at == ["100", "200", "500"]
        assert not any(t.get_text() for t in other.get_yticklabels(minor=True))


# Disparities


def scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An input, true disparities from 10 to 20 of which some are unknown, and predictions."""
    left = np.arange(height * width * 3, dtype=np.uint64).reshape(height, width, 3) % 251
    truth = np.linspace(10, 20, height * width, dtype=np.float32).reshape(height, width)
    prediction = truth + np.float32(0.5)
    prediction[-1, -1] = 26.0
    truth[0, 1], truth[1, 0] = np.inf, np.nan
    return left.astype(np.uint8), truth, prediction


@pytest.mark.parametrize(("height", "width", "rows"), [(12, 10, 1), (8, 30, 2)])
def test_maps_have_one_scale_and_grey_where_nothing_is_known(
    monkeypatch, height: int, width: int, rows: int
) -> None:
    left, truth, prediction = scene(height, width)
    figure = figure_of(monkeypatch, maps, save_maps, left, truth, prediction)
    axes = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert list(axes) == ["input", "disparity", "prediction", "absolute error"]
    shown = {name: ax.images[0] for name, ax in axes.items()}
    assert (np.asarray(shown["input"].get_array()) == left).all()
    scales = [shown[name].get_clim() for name in ("disparity", "prediction")]
    assert scales[0] == scales[1] == (10.0, pytest.approx(20.0))
    error = shown["absolute error"]
    assert error.get_clim()[0] == 0.0 and 0.5 <= error.get_clim()[1] < 6.0
    unknown = ~np.isfinite(truth)
    for name in ("disparity", "absolute error"):
        assert (np.ma.getmaskarray(shown[name].get_array()) == unknown).all()
        pixels = shown[name].to_rgba(shown[name].get_array(), bytes=True)
        assert (pixels[unknown] == (0x9A, 0x9F, 0xA6, 255)).all()
        assert not (pixels[~unknown] == (0x9A, 0x9F, 0xA6, 255)).all(axis=-1).any()
    assert not np.ma.getmaskarray(shown["prediction"].get_array()).any()
    np.testing.assert_allclose(error.get_array()[~unknown][:-1], 0.5, atol=1e-5)
    labels = [ax.get_ylabel() for ax in figure.axes if not ax.get_title()]
    assert labels == ["px", "px"]
    tops = {round(ax.get_position().y0, 3) for ax in axes.values()}
    assert len(tops) == rows
    for ax in axes.values():  # a pixel is as wide as high
        box = ax.get_window_extent()
        assert box.width / box.height == pytest.approx(width / height)


@pytest.mark.parametrize(("height", "width"), [(12, 10), (8, 30), (40, 8), (30, 40)])
def test_nothing_in_a_picture_of_maps_overlaps(monkeypatch, height: int, width: int) -> None:
    figure = figure_of(monkeypatch, maps, save_maps, *scene(height, width))
    FigureCanvasAgg(figure).draw()
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1.0).overlaps(other)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_maps_are_drawn_where_little_is_known(tmp_path) -> None:
    left, truth, prediction = scene(6, 8)
    none, flat = np.full_like(truth, np.nan), np.full_like(truth, 3.0)
    for one, other in ((none, prediction), (truth, none), (truth, truth), (flat, truth)):
        save_maps(tmp_path / "m.svg", left, one, other)
        found = texts_of(tmp_path / "m.svg")
        assert {"input", "disparity", "prediction", "absolute error", "px"} <= set(found)
    for suffix in ("svg", "png"):
        pictures = []
        for name in ("a", "b"):
            save_maps(tmp_path / f"{name}.{suffix}", left, truth, prediction)
            pictures.append((tmp_path / f"{name}.{suffix}").read_bytes())
        assert pictures[0] == pictures[1]


def test_maps_that_do_not_fit_are_refused(tmp_path) -> None:
    left, truth, prediction = scene(6, 8)
    none = np.full_like(truth, np.inf)
    for one, two, three in (
        (left[:-1], truth, prediction),
        (left[..., 0], truth, prediction),
        (left.astype(np.float32), truth, prediction),
        (left, truth.T, prediction),
        (left[:0], truth[:0], prediction[:0]),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
            save_maps(tmp_path / "m.png", one, two, three)
    with pytest.raises(ValueError, match="expected a known disparity"):
        save_maps(tmp_path / "m.png", left, none, none)
    with pytest.raises(UserError, match=r"ends with \.svg or \.png"):
        save_maps(tmp_path / "m.jpg", left, truth, prediction)
    assert list(tmp_path.iterdir()) == []


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
