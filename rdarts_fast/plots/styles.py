"""What edges and cells look like and are called: styles of operations, titles of cell types."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rdarts_fast.plots.look import PALETTE

Edge = tuple[int, int, str, float | None]  # from, to, operation, weight
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


STYLES: Mapping[str, Style] = {
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


KINDS: Mapping[str, Kind] = {
    "normal": Kind("normal cell"),
    "reduce": Kind("reduction cell"),
    "upsample": Kind("upsampling cell"),
    "recurrent": Kind("recurrent cell", joined="mean"),
}


TWO = ("c_{k-2}", "c_{k-1}")  # the inputs of a cell of which nothing is said
FONT = 10.0  # points


def kind_of(cell_type: str) -> Kind:
    """Return what to call cells of a type; one that is not known by its name."""
    return KINDS.get(cell_type, Kind(f"{cell_type} cell"))


def inputs_of(inputs: Inputs | None, cell_type: str) -> Sequence[str]:
    """Return the names of a cell type's inputs; those of a normal cell where none are given."""
    return (inputs or {}).get(cell_type, TWO)


def is_math(name: str) -> bool:
    return "_" in name or len(name) == 1


def label_of(edge: Edge, styles: Mapping[str, Style]) -> str:
    short = styles[edge[2]].short
    return short if edge[3] is None else f"{short}  {edge[3]:.2f}"


def text_width(text: str, size: float = FONT, weight: str = "normal") -> float:
    """Return how wide a text is; size: of its font in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def styles_of(operations: Iterable[str]) -> dict[str, Style]:
    """The style of each operation, in the table's order; unknown ones get the colours left over."""
    present = set(operations)
    styles = {name: style for name, style in STYLES.items() if name in present}
    taken = {style.color for style in styles.values()}
    left = [color for color in PALETTE if color not in taken] or PALETTE
    looks = itertools.cycle(itertools.product((_SOLID, _DASHED, _DOTTED, _MIXED), left))
    for name, (dashes, color) in zip(sorted(present - set(styles)), looks, strict=False):
        styles[name] = Style(name.replace("_", " "), name, color, dashes)
    return styles
