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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rdarts_fast.plots.styles import Edge, Style, is_math, label_of, text_width

Point = tuple[float, float]

_NODE, _END = (0.46, 0.36), (0.64, 0.36)  # width, height of a node, of an input or the output
_FIRST_LANE, _LANE = 0.56, 0.32
_FIRST_GAP, _GAP, _WEIGHT_GAP = 1.80, 1.45, 0.40  # from an input; between nodes; more with weights
_FAN, _MARGIN, _OUTPUT = 0.42, 0.48, 0.86  # an input's edges spread; panel border; panel to output
_APART = 0.48  # middles of inputs one above the other, at the least
_CORNER, _SLOT, ARROW = 0.24, 0.15, 0.11
_LABEL_HEIGHT, _LABEL_PAD, _CLEAR = 0.21, 0.06, 0.12
_TITLE = 0.34


@dataclass(frozen=True)
class Box:
    """A rectangle by its middle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Route:
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

    inputs: list[Box]
    nodes: list[Box]
    output: Box
    panel: Box
    routes: list[Route]
    labels: list[Box]

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
    boxes = [Box(at, y, width, _END[1]) for y in _input_heights(edges, lanes, inputs)]
    boxes += [Box(x, 0.0, *_NODE) for x in xs]
    slots = _assign_slots(edges, lanes, inputs)
    widths = [text_width(label_of(edge, styles)) + 2 * _LABEL_PAD for edge in edges]
    routes = [
        _route(boxes[edge[0]], boxes[edge[1]], lane, *slot, fan=inputs > 1 and edge[0] < inputs)
        for edge, lane, slot in zip(edges, lanes, slots, strict=True)
    ]
    left, right = _END[0] / 2 + 0.75 * _FAN, xs[-1] + _MARGIN
    top, bottom = (_lane_y(max([1, *(side * lane for lane in lanes)])) + 0.27 for side in (1, -1))
    return Layout(
        inputs=boxes[:inputs],
        nodes=boxes[inputs:],
        output=Box(right + _OUTPUT, 0.0, *_END),
        panel=Box((left + right) / 2, (top - bottom) / 2, right - left, top + bottom),
        routes=routes,
        labels=_place_labels(routes, widths),
    )


def input_width(inputs: Sequence[str]) -> float:
    """Return how wide the boxes of inputs of these names are."""
    words = [text_width(name) + 2 * _LABEL_PAD for name in inputs if not is_math(name)]
    return max([_END[0], *words])


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


def _route(source: Box, target: Box, lane: int, leave: float, meet: float, fan: bool) -> Route:
    if lane == 0:
        start, end = source.x + source.width / 2, target.x - target.width / 2 - ARROW
        return Route((_line((start, 0.0), (end, 0.0)),), (start, end), 0.0)
    side, y = (1 if lane > 0 else -1), _lane_y(lane)
    edge_y = side * target.height / 2
    corner = min(_CORNER, 0.9 * (abs(y) - abs(edge_y) - ARROW))
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
    pieces.append(_line((x, y - side * corner), (x, edge_y + side * ARROW)))
    return Route(tuple(pieces), (start, end), y)


def _line(a: Point, b: Point) -> tuple[Point, Point, Point, Point]:
    return a, _between(a, b, 1 / 3), _between(a, b, 2 / 3), b


def _turn(a: Point, corner: Point, b: Point) -> tuple[Point, Point, Point, Point]:
    return a, _between(a, corner, 0.5523), _between(b, corner, 0.5523), b  # a quarter circle


def _between(a: Point, b: Point, part: float) -> Point:
    return a[0] + part * (b[0] - a[0]), a[1] + part * (b[1] - a[1])


def _place_labels(routes: Sequence[Route], widths: Sequence[float]) -> list[Box]:
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
        labels.append(Box(float(xs[best]), route.y, width, _LABEL_HEIGHT))
    return labels
