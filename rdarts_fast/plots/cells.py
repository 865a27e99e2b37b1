"""Pictures of cells as graphs.

A cell's nodes stand on one line. Edges from the first half of the inputs run above it and those
from the others below it (one input stands on the line), each in a lane of its own, the longer the
farther out; an edge between neighbours is straight. So edges meet only where one climbs through
another's lane, and a label lies on its lane where none does. Lengths are in inches, one unit of an
axis.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdarts_fast.plots.look import FAINT, INK, PALETTE, check_suffix, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Edge = tuple[int, int, str, float | None]  # from, to, operation, weight
Point = tuple[float, float]
Inputs = Mapping[str, Sequence[str]]  # cell type -> the names of its inputs

_SOLID, _DASHED, _DOTTED, _MIXED = (), (3.2, 1.4), (1.2, 1.4), (4.0, 1.3, 1.2, 1.3)


@dataclass(frozen=True)
class Style:
    """How an operation's edges look; dashes in units of the line's width."""

    short: str
    name: str
    color: str
    dashes: tuple[float, ...] = _SOLID
    hollow: bool = False


_STYLES: Mapping[str, Style] = {
    "skip_connect": Style("skip", "skip connection", "#D55E00", hollow=True),
    "sep_conv_3x3": Style("sep 3x3", "separable convolution 3x3", "#0072B2"),
    "sep_conv_5x5": Style("sep 5x5", "separable convolution 5x5", "#56B4E9"),
    "sep_conv_7x7": Style("sep 7x7", "separable convolution 7x7", "#56B4E9", _MIXED),
    "dil_conv_3x3": Style("dil 3x3", "dilated convolution 3x3", "#009E73", _DASHED),
    "dil_conv_5x5": Style("dil 5x5", "dilated convolution 5x5", "#E69F00", _DASHED),
    "conv_7x1_1x7": Style("1x7 7x1", "convolutions 1x7, 7x1", "#F0E442", _MIXED),
    "max_pool_3x3": Style("max pool", "maximum pooling 3x3", "#CC79A7", _DOTTED),
    "avg_pool_3x3": Style("avg pool", "average pooling 3x3", "#F0E442", _DOTTED),
    "noise": Style("noise", "Gaussian noise", "#000000", _MIXED),
    "none": Style("none", "zero", "#999999", _DOTTED),
    "tanh": Style("tanh", "hyperbolic tangent", "#0072B2", _MIXED),
    "relu": Style("relu", "rectified linear", "#D55E00", _DASHED),
    "sigmoid": Style("sigmoid", "logistic sigmoid", "#009E73", _DOTTED),
    "identity": Style("identity", "identity", "#CC79A7", hollow=True),
}


@dataclass(frozen=True)
class Kind:
    """What a cell of a type is called, and how its output is made of its nodes."""

    title: str
    joined: str = "concat"

    @property
    def short(self) -> str:
        """The title without the word that all have."""
        return self.title.removesuffix(" cell")


_KINDS: Mapping[str, Kind] = {
    "normal": Kind("normal cell"),
    "reduce": Kind("reduction cell"),
    "upsample": Kind("upsampling cell"),
    "recurrent": Kind("recurrent cell", joined="mean"),
}
_TWO = ("c_{k-2}", "c_{k-1}")  # the inputs of a cell of which nothing is said
_PANEL, _END_FILL = "#F4F5F7", "#DFE2E7"
_PALE = 0.75  # luminance above which a line on white needs an outline

_NODE, _END = (0.46, 0.36), (0.64, 0.36)  # width, height of a node, of an input or the output
_FIRST_LANE, _LANE = 0.56, 0.32
_FIRST_GAP, _GAP, _WEIGHT_GAP = 1.80, 1.45, 0.40  # from an input; between nodes; more with weights
_FAN, _MARGIN, _OUTPUT = 0.42, 0.48, 0.86  # an input's edges spread; panel border; panel to output
_APART = 0.48  # middles of inputs one above the other, at the least
_CORNER, _SLOT, _ARROW = 0.24, 0.15, 0.11
_LABEL_HEIGHT, _LABEL_PAD, _CLEAR, _FONT = 0.21, 0.06, 0.12, 10.0
_TITLE = 0.34


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class _Route:
    """An edge's course: cubic pieces, and the level part that carries the label."""

    pieces: tuple[tuple[Point, Point, Point, Point], ...]
    level: tuple[float, float]  # from x, to x
    y: float

    def points(self) -> np.ndarray:
        """The course as points [N, 2]."""
        t = np.linspace(0, 1, 25)[:, None]
        basis = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3])
        return np.concatenate([basis @ np.array(piece) for piece in self.pieces])


@dataclass(frozen=True)
class Layout:
    """Where the parts of a cell are, in inches."""

    inputs: list[_Box]
    nodes: list[_Box]
    output: _Box
    panel: _Box
    routes: list[_Route]
    labels: list[_Box]

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the picture."""
        margin = 0.04
        left = self.inputs[0].x - self.inputs[0].width / 2 - margin
        right = self.output.x + _END[0] / 2 + margin
        bottom, top = self.height
        return left, right, bottom - margin, max(top, self._over[1] + _TITLE - margin) + margin

    @property
    def height(self) -> Point:
        """Bottom and top of panel and inputs."""
        low, high = self._over
        places = [place.y for place in self.inputs]
        return min(low, min(places) - _END[1] / 2), max(high, max(places) + _END[1] / 2)

    @property
    def _over(self) -> Point:
        half = self.panel.height / 2
        return self.panel.y - half, self.panel.y + half


def draw_cell(
    ax: Axes,
    edges: Sequence[Edge],
    nodes: int,
    title: str,
    inputs: Sequence[str] = _TWO,
) -> None:
    """Draw one cell on `ax`, which loses its frame; `save_cells` makes axes of the right size.

    edges: (from, to, operation, weight or None); states 0 .. len(inputs)-1 are the inputs, the
    intermediate nodes follow. inputs: their names, words or math text such as c_{k-1}. Raises
    ValueError at an edge that does not lead from an earlier state to an intermediate node.
    """
    styles = styles_of(edge[2] for edge in edges)
    layout = lay_out(edges, nodes, len(inputs), styles, input_width(inputs))
    _draw(ax, edges, layout, Kind(title), inputs, styles)


def save_cells(
    path: Path,
    cells: Mapping[str, Sequence[Edge]],
    nodes: int,
    title: str = "",
    inputs: Inputs | None = None,
) -> None:
    """Write a picture of a genotype, one panel a cell type, as .svg or .png.

    cells: cell type -> edges as in `draw_cell`. inputs: cell type -> the names of its inputs; those
    of a normal cell where it is not there. Raises UserError at another suffix, or where the file
    cannot be written.
    """
    check_suffix(path)
    styles = styles_of(edge[2] for edges in cells.values() for edge in edges)
    names = {kind: inputs_of(inputs, kind) for kind in cells}
    width = max(map(input_width, names.values()))  # the same for all, to have their nodes in line
    layouts = [
        lay_out(edges, nodes, len(names[kind]), styles, width) for kind, edges in cells.items()
    ]
    sizes = [(box[1] - box[0], box[3] - box[2]) for box in (layout.limits for layout in layouts)]
    figure, axes = _panels(sizes, title, styles)
    for ax, (kind, edges), layout in zip(axes, cells.items(), layouts, strict=True):
        _draw(ax, edges, layout, kind_of(kind), names[kind], styles)
    save(figure, path)


def kind_of(cell_type: str) -> Kind:
    """Return what to call cells of a type; one that is not known by its name."""
    return _KINDS.get(cell_type, Kind(f"{cell_type} cell"))


def inputs_of(inputs: Inputs | None, cell_type: str) -> Sequence[str]:
    """Return the names of a cell type's inputs; those of a normal cell where none are given."""
    return (inputs or {}).get(cell_type, _TWO)


def input_width(inputs: Sequence[str]) -> float:
    """Return how wide the boxes of inputs of these names are."""
    words = [text_width(name) + 2 * _LABEL_PAD for name in inputs if not _is_math(name)]
    return max([_END[0], *words])


def _is_math(name: str) -> bool:
    return "_" in name or len(name) == 1


# Layout


def lay_out(
    edges: Sequence[Edge],
    nodes: int,
    inputs: int,
    styles: Mapping[str, Style],
    width: float = _END[0],
) -> Layout:
    """Return where everything of a cell goes; see draw_cell. inputs: how many. width: of the
    inputs' boxes.
    """
    _check_edges(edges, nodes, inputs)
    columns = [0] * inputs + list(range(1, nodes + 1))  # of each state
    spans = [(columns[source], columns[target]) for source, target, _, _ in edges]
    lanes = _assign_lanes(edges, spans, inputs)
    extra = _WEIGHT_GAP if any(edge[3] is not None for edge in edges) else 0.0
    xs = [_FIRST_GAP + extra + i * (_GAP + extra) for i in range(nodes)]
    at = (_END[0] - width) / 2
    boxes = [_Box(at, y, width, _END[1]) for y in _input_heights(edges, lanes, inputs)]
    boxes += [_Box(x, 0.0, *_NODE) for x in xs]
    slots = _assign_slots(edges, lanes, inputs)
    widths = [text_width(_label(edge, styles)) + 2 * _LABEL_PAD for edge in edges]
    routes = [
        _route(boxes[edge[0]], boxes[edge[1]], lane, *slot, fan=inputs > 1 and edge[0] < inputs)
        for edge, lane, slot in zip(edges, lanes, slots, strict=True)
    ]
    left, right = _END[0] / 2 + 0.75 * _FAN, xs[-1] + _MARGIN
    top, bottom = (_lane_y(max([1, *(side * lane for lane in lanes)])) + 0.27 for side in (1, -1))
    return Layout(
        inputs=boxes[:inputs],
        nodes=boxes[inputs:],
        output=_Box(right + _OUTPUT, 0.0, *_END),
        panel=_Box((left + right) / 2, (top - bottom) / 2, right - left, top + bottom),
        routes=routes,
        labels=_place_labels(routes, widths),
    )


def _check_edges(edges: Sequence[Edge], nodes: int, inputs: int) -> None:
    if inputs < 1 or nodes < 1 or not edges:
        counts = f"{inputs} inputs, {nodes} nodes, {len(edges)} edges"
        raise ValueError(f"expected an input, a node and an edge, got {counts}")
    for edge in edges:
        if not (0 <= edge[0] < edge[1] and inputs <= edge[1] < inputs + nodes):
            last = inputs + nodes - 1
            raise ValueError(f"edge {edge}: expected 0 <= from < to and to in {inputs}..{last}")


def _lane_y(lane: int) -> float:
    if lane == 0:
        return 0.0
    return math.copysign(_FIRST_LANE + _LANE * (abs(lane) - 1), lane)


def _assign_lanes(
    edges: Sequence[Edge], spans: Sequence[tuple[int, int]], inputs: int
) -> list[int]:
    """Give each edge its lane: 1, 2, ... upwards, -1, -2, ... downwards, 0 straight.

    Edges between nodes that are not neighbours take the sides with the fewest crossings.
    """
    sides, free = [0] * len(edges), []
    for i, (source, _, _, _) in enumerate(edges):
        if inputs > 1 and source < inputs:
            sides[i] = 1 if source < _above(inputs) else -1
        elif spans[i][1] - spans[i][0] > 1 or spans[i] in spans[:i]:
            free.append(i)
    ranks = [_rank(source, inputs) for source, _, _, _ in edges]
    stacks = []
    for choice in itertools.product((1, -1), repeat=min(len(free), 8)):
        for i, side in zip(free, itertools.chain(choice, itertools.cycle((1, -1))), strict=False):
            sides[i] = side
        stacks.append(_stack(sides, spans, ranks))
    return min(stacks, key=lambda stack: (stack[1], max(stack[0]) - min(stack[0])))[0]


def _above(inputs: int) -> int:
    """Return how many of a cell's inputs stand above the line, from the top."""
    return (inputs + 1) // 2 if inputs > 1 else 0


def _rank(state: int, inputs: int) -> int:
    """Return how many inputs stand between this state and the line; none where it is a node."""
    above = _above(inputs)
    return 0 if state >= inputs else above - 1 - state if state < above else state - above


def _stack(
    sides: Sequence[int], spans: Sequence[tuple[int, int]], ranks: Sequence[int]
) -> tuple[list[int], int]:
    """Return the lanes for given sides, edges from inner inputs and shorter ones inside, and how
    often edges cross.
    """
    lanes, crossings = [0] * len(sides), 0
    placed: list[int] = []
    for i in sorted(range(len(sides)), key=lambda i: (ranks[i], spans[i][1] - spans[i][0], i)):
        start, end = spans[i]
        beside = [
            j for j in placed if sides[j] == sides[i] and spans[j][0] < end and start < spans[j][1]
        ]
        lanes[i] = sides[i] * (1 + max((abs(lanes[j]) for j in beside), default=0))
        crossings += sum((start - spans[j][0]) * (end - spans[j][1]) > 0 for j in beside)
        placed.append(i)
    return lanes, crossings


def _input_heights(edges: Sequence[Edge], lanes: Sequence[int], inputs: int) -> list[float]:
    """Return each input's height: in the middle of its edges, but clear of the inputs inside."""
    if inputs == 1:
        return [0.0]
    heights = [0.0] * inputs
    least = {1: _lane_y(1), -1: _lane_y(1)}
    for state in sorted(range(inputs), key=lambda state: _rank(state, inputs)):
        side = 1 if state < _above(inputs) else -1
        ys = [_lane_y(lane) for edge, lane in zip(edges, lanes, strict=True) if edge[0] == state]
        height = max(side * float(np.mean(ys or [0.0])), least[side])
        heights[state], least[side] = side * height, height + _APART
    return heights


def _assign_slots(
    edges: Sequence[Edge], lanes: Sequence[int], inputs: int
) -> list[tuple[float, float]]:
    """Where each edge leaves its source's side and meets its target's, off the middle.

    Left to right on a node: arrivals, inner lanes first, then departures, outer lanes first; then
    edges at one node do not cross.
    """
    slots = [[0.0, 0.0] for _ in edges]
    for state, side in itertools.product({state for edge in edges for state in edge[:2]}, (1, -1)):
        ends = []
        for i, (source, target, _, _) in enumerate(edges):
            if lanes[i] * side > 0 and target == state:
                ends.append((0, abs(lanes[i]), i, 1))
            if lanes[i] * side > 0 and source == state:
                upwards = inputs > 1 and state < inputs
                ends.append((1, lanes[i] if upwards else -abs(lanes[i]), i, 0))
        ends.sort()
        step = min(_SLOT, 0.32 / max(1, len(ends) - 1))
        for place, (_, _, i, end) in enumerate(ends):
            slots[i][end] = step * (place - (len(ends) - 1) / 2)
    return [(leave, meet) for leave, meet in slots]


def _route(source: _Box, target: _Box, lane: int, leave: float, meet: float, fan: bool) -> _Route:
    if lane == 0:
        start, end = source.x + source.width / 2, target.x - target.width / 2 - _ARROW
        return _Route((_line((start, 0.0), (end, 0.0)),), (start, end), 0.0)
    side, y = (1 if lane > 0 else -1), _lane_y(lane)
    edge_y = side * target.height / 2
    corner = min(_CORNER, 0.9 * (abs(y) - abs(edge_y) - _ARROW))
    pieces = []
    if fan:
        begin = (source.x + source.width / 2, source.y + leave)
        start, middle = begin[0] + _FAN, begin[0] + _FAN / 2
        pieces.append((begin, (middle, begin[1]), (middle, y), (start, y)))
    else:
        x, start = source.x + leave, source.x + leave + corner
        pieces.append(_line((x, side * source.height / 2), (x, y - side * corner)))
        pieces.append(_turn((x, y - side * corner), (x, y), (start, y)))
    x, end = target.x + meet, target.x + meet - corner
    pieces.append(_line((start, y), (end, y)))
    pieces.append(_turn((end, y), (x, y), (x, y - side * corner)))
    pieces.append(_line((x, y - side * corner), (x, edge_y + side * _ARROW)))
    return _Route(tuple(pieces), (start, end), y)


def _line(a: Point, b: Point) -> tuple[Point, Point, Point, Point]:
    return a, _between(a, b, 1 / 3), _between(a, b, 2 / 3), b


def _turn(a: Point, corner: Point, b: Point) -> tuple[Point, Point, Point, Point]:
    return a, _between(a, corner, 0.5523), _between(b, corner, 0.5523), b  # a quarter circle


def _between(a: Point, b: Point, part: float) -> Point:
    return a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])


def _place_labels(routes: Sequence[_Route], widths: Sequence[float]) -> list[_Box]:
    """Put each label on its edge's level part, clear of the other edges, else near the middle."""
    points = [route.points() for route in routes]
    labels = []
    for i, (route, width) in enumerate(zip(routes, widths, strict=True)):
        others = np.concatenate([np.empty((0, 2)), *points[:i], *points[i + 1 :]])
        middle = sum(route.level) / 2
        room = max(0.0, route.level[1] - route.level[0] - width) / 2
        xs = np.linspace(middle - room, middle + room, 41)
        aside = np.abs(others[:, 0] - xs[:, None]) - width / 2  # [41, points]
        above = np.abs(others[:, 1] - route.y) - _LABEL_HEIGHT / 2
        clearance = np.maximum(aside, above).min(axis=1, initial=_CLEAR)
        best = np.argmax(clearance - 0.02 * np.abs(xs - middle))
        labels.append(_Box(float(xs[best]), route.y, width, _LABEL_HEIGHT))
    return labels


def _label(edge: Edge, styles: Mapping[str, Style]) -> str:
    short = styles[edge[2]].short
    return short if edge[3] is None else f"{short}  {edge[3]:.2f}"


def text_width(text: str, size: float = _FONT, weight: str = "normal") -> float:
    """Return how wide a text is; size: of its font in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def styles_of(operations: Iterable[str]) -> dict[str, Style]:
    """The style of each operation, in the table's order; unknown ones get the colours left over."""
    present = set(operations)
    styles = {name: style for name, style in _STYLES.items() if name in present}
    taken = {style.color for style in styles.values()}
    left = [color for color in PALETTE if color not in taken] or PALETTE
    looks = itertools.cycle(itertools.product((_SOLID, _DASHED, _DOTTED, _MIXED), left))
    for name, (dashes, color) in zip(sorted(present - set(styles)), looks, strict=False):
        styles[name] = Style(name.replace("_", " "), name, color, dashes)
    return styles


# Drawing


def _draw(
    ax: Axes,
    edges: Sequence[Edge],
    layout: Layout,
    kind: Kind,
    inputs: Sequence[str],
    styles: Mapping[str, Style],
) -> None:
    _draw_box(ax, layout.panel, _PANEL, _PANEL, 0)
    for i, (edge, route) in enumerate(zip(edges, layout.routes, strict=True)):
        _draw_route(ax, route, styles[edge[2]], 1 + 0.01 * i)
    for edge, place in zip(edges, layout.labels, strict=True):
        color = styles[edge[2]].color
        _draw_box(ax, place, color, _PANEL, 5)
        ink = INK if _luminance(color) > 0.55 else "white"
        _write(ax, place, _label(edge, styles), color=ink, parse_math=False)
    for place, name in zip(layout.inputs, inputs, strict=True):
        _draw_box(ax, place, _END_FILL, INK, 4)
        if _is_math(name):
            _write(ax, place, f"${name}$", fontsize=_FONT + 2)
        else:
            _write(ax, place, name, parse_math=False)
    for i, place in enumerate(layout.nodes):
        _draw_box(ax, place, "white", INK, 4)
        _write(ax, place, str(i))
    _draw_output(ax, layout, "$c_{k}$" if "c_{k-1}" in inputs else "output", kind.joined)
    _draw_title(ax, layout, kind.title, Counter(styles[edge[2]].short for edge in edges))
    left, right, bottom, top = layout.limits
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.axis("off")


def _draw_box(ax: Axes, place: _Box, fill: str, line: str, zorder: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = place.x - place.width / 2, place.y - place.height / 2
    radius = min(0.12, 0.22 * place.height)
    shape = f"round,pad=0,rounding_size={radius}"
    look: dict[str, Any] = {"fc": fill, "ec": line, "lw": 1.1, "zorder": zorder}
    ax.add_patch(FancyBboxPatch(corner, place.width, place.height, shape, **look))


def _write(ax: Axes, place: _Box, text: str, **look: Any) -> None:
    usual: dict[str, Any] = {
        "fontsize": _FONT,
        "ha": "center",
        "va": "center_baseline",
        "color": INK,
        "zorder": 6,
    }
    ax.text(place.x, place.y, text, **(usual | look))


def _draw_route(ax: Axes, route: _Route, style: Style, zorder: float) -> None:
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path as Outline

    points = [route.pieces[0][0], *(point for piece in route.pieces for point in piece[1:])]
    outline = Outline(points, [Outline.MOVETO] + [Outline.CURVE4] * (len(points) - 1))
    core, look = _line_look(style)
    # The halo parts the line from those it crosses.
    ax.add_patch(PathPatch(outline, fc="none", ec=_PANEL, lw=6, capstyle="butt", zorder=zorder))
    look |= {"fc": "none", "ec": core, "capstyle": "butt", "zorder": zorder + 0.005}
    ax.add_patch(PathPatch(outline, **look))
    before, end = np.array(route.pieces[-1][-2:])
    along = (end - before) / np.hypot(*(end - before))
    half = 0.55 * _ARROW * np.array([-along[1], along[0]])
    corners = [end + _ARROW * along, end + half, end - half]
    edge = FAINT if _luminance(style.color) > _PALE else style.color
    ax.add_patch(Polygon(corners, closed=True, fc=style.color, ec=edge, lw=0.6, zorder=3))


def _line_look(style: Style) -> tuple[str, dict[str, Any]]:
    """Return the colour of a line's core, and the rest of its look."""
    from matplotlib.patheffects import withStroke

    look: dict[str, Any] = {"lw": 2.2, "ls": (0, style.dashes) if style.dashes else "-"}
    if style.hollow:
        return "white", look | {
            "lw": 1.3,
            "path_effects": [withStroke(linewidth=3.6, foreground=style.color)],
        }
    if _luminance(style.color) > _PALE:
        look["path_effects"] = [withStroke(linewidth=3.2, foreground=FAINT)]
    return style.color, look


def _luminance(color: str) -> float:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue


def _draw_output(ax: Axes, layout: Layout, name: str, joined: str) -> None:
    start, end = layout.panel.x + layout.panel.width / 2, layout.output.x - layout.output.width / 2
    arrow = {"arrowstyle": "-|>,head_width=0.28,head_length=0.55", "color": INK, "lw": 2.2}
    arrow |= {"shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (end, 0.0), (start, 0.0), arrowprops=arrow, zorder=3)
    if len(layout.nodes) > 1:
        ax.text((start + end) / 2, 0.12, joined, fontsize=8, color=FAINT, ha="center")
    _draw_box(ax, layout.output, _END_FILL, INK, 4)
    _write(ax, layout.output, name, fontsize=_FONT + (2 if name.startswith("$") else 0))


def _draw_title(ax: Axes, layout: Layout, title: str, counts: Counter[str]) -> None:
    panel = layout.panel
    y = panel.y + panel.height / 2 + 0.1
    left, right = panel.x - panel.width / 2, panel.x + panel.width / 2
    ax.text(left, y, title, fontsize=12, weight="bold", color=INK, parse_math=False)
    text = ", ".join(f"{count} {short}" for short, count in counts.most_common())
    if text_width(title, 12, "bold") + text_width(text, 9) + 0.2 < right - left:
        ax.text(right, y, text, fontsize=9, color=FAINT, ha="right", parse_math=False)


def _panels(
    sizes: Sequence[Point], title: str, styles: Mapping[str, Style]
) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes of these sizes, beside each other where they fit, and a legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    edge, gap, widest = 0.12, 0.3, 9.0
    widths, heights = [size[0] for size in sizes], [size[1] for size in sizes]
    abreast = sum(widths) + gap * (len(sizes) - 1) <= widest
    width = (sum(widths) + gap * (len(sizes) - 1) if abreast else max(widths)) + 2 * edge
    columns = min(len(styles), max(1, int(width / 2.5)))
    legend = 0.25 + 0.22 * -(-len(styles) // columns)
    head = 0.45 if title else 0.1
    body = max(heights) if abreast else sum(heights) + gap * (len(sizes) - 1)
    height = legend + body + head
    figure = Figure(figsize=(width, height), facecolor="white")
    axes, x, top = [], edge, legend + body
    for wide, high in sizes:
        place = (x / width, (top - high) / height, wide / width, high / height)
        axes.append(figure.add_axes(place))
        x, top = (x + wide + gap, top) if abreast else (x, top - high - gap)
    if title:
        look: dict[str, Any] = {"fontsize": 13, "ha": "center", "va": "top", "color": INK}
        figure.text(0.5, 1 - 0.12 / height, title, parse_math=False, **look)
    looks = [_line_look(style) for style in styles.values()]
    lines = [Line2D([], [], color=core, **look) for core, look in looks]
    names = [style.name for style in styles.values()]
    place_legend: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.0)}
    figure.legend(
        lines, names, ncols=columns, fontsize=9, frameon=False, handlelength=3, **place_legend
    )
    return figure, axes
