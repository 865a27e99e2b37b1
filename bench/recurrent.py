"""The recurrent supernet at Penn Treebank's search size, ours against the published form: times.

    python -m bench.recurrent                                # a table
    python -m bench.recurrent --json > bench/results/recurrent.json
    python -m bench.recurrent --batch 16 --hidden 64 --vocabulary 2000 --no-memory

Cases: "word without products", everything of a word outside the matrix products, forward and
backward, with the products and their gradients given; "window", a pass over a window of text from
the embedding to the cross entropy, and its backward to weights and alphas. First it checks that
both compute the same, values and gradients, then it times them in turn. The threads are torch's
(OMP_NUM_THREADS=1 for one).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rows import HEADER, Row, show
from bench.timing import in_turn, peak_mb
from rdarts_fast.draws import Draws
from rdarts_fast.errors import exit_on_user_error
from rdarts_fast.kernels.recurrent_node import BATCH_NORM, without_curves, workspace
from rdarts_fast.networks import recurrent_cell
from rdarts_fast.networks.recurrent import (
    ACTIVATIONS,
    RecurrentSupernet,
    curve_weights,
    mixed_node,
)
from rdarts_fast.networks.search_network import softmax_weights

BENCH = "recurrent"
TOLERANCE = 1e-3  # relative to the largest number, in float32
DRAWS = Draws(3)


@dataclass(frozen=True)
class Setup:
    """What is measured; the defaults are the published sizes."""

    space: str
    batch: int = 256
    bptt: int = 35
    hidden: int = 300
    vocabulary: int = 10_000
    device: str = "cpu"

    def text(self) -> str:
        """Return the sizes."""
        sizes = f"batch {self.batch}, bptt {self.bptt}, {self.hidden} units"
        return f"{sizes}, {self.vocabulary} words, {self.device}"


def supernet(setup: Setup, backend: str) -> RecurrentSupernet:
    """Return the supernet at its start, the same for both backends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RecurrentSupernet(setup.space, setup.vocabulary, setup.hidden, backend=backend)
    return network.to(setup.device)


class Window:
    """A window's pass and backward."""

    def __init__(self, setup: Setup, backend: str) -> None:
        self.network = supernet(setup, backend)
        self.alphas = self.network.initial_alphas(1)["recurrent"]
        generator = torch.Generator().manual_seed(2)
        shape = (setup.bptt + 1, setup.batch)
        words = torch.randint(setup.vocabulary, shape, generator=generator).to(setup.device)
        self.words, self.following = words[:-1], words[1:]

    def __call__(self) -> list[Tensor]:
        """Return loss and gradients of the alphas and all weights."""
        weights = softmax_weights({"recurrent": self.alphas})
        found = self.network(self.words, weights, DRAWS)
        loss = F.cross_entropy(found.logits, self.following.flatten())
        gradients = torch.autograd.grad(loss, [self.alphas, *self.network.parameters()])
        return [loss.detach(), *gradients]


class Given:
    """A word's hidden state, the products of all its nodes, and the gradients that come in."""

    def __init__(self, setup: Setup) -> None:
        self.network = supernet(setup, "fused")
        nodes, size, batch = self.network.space.nodes, setup.hidden, setup.batch
        generator = torch.Generator().manual_seed(4)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(setup.device)

        self.hidden, self.g = normal(batch, size), normal(batch, size)
        self.gates0 = normal(batch, 2 * size)
        self.gates = [normal(i + 1, batch, 2 * size) for i in range(nodes)]  # of each node
        self.dseen = normal(nodes, batch, size)  # the gradient of what the products meet
        self.mask = (torch.rand(batch, size, generator=generator) > 0.25).to(setup.device) / 0.75
        weights = softmax_weights(self.network.initial_alphas(1))["recurrent"]
        mix, self.names = curve_weights(weights, self.network.space.cells["recurrent"])
        self.mix = mix.detach()
        self.curved = not self.names.isdisjoint({"tanh", "sigmoid"})


def modules_word(given: Given) -> list[Tensor]:
    """The published form: hidden state, gradients of hidden state, mix and products."""
    mix, hidden = given.mix.requires_grad_(), given.hidden.requires_grad_()
    gates = [given.gates0.requires_grad_(), *(x.requires_grad_() for x in given.gates)]
    c, h = gates[0].chunk(2, dim=1)
    s0 = hidden + torch.sigmoid(c) * (ACTIVATIONS["tanh"](h) - hidden)
    states = given.network.norm(s0)[None]
    outputs, incoming = [], []
    for i in range(given.network.space.nodes):
        seen = states * given.mask  # what the product would meet
        outputs.append(seen[i])
        incoming.append(given.dseen[i])
        rows = mix[i * (i + 1) // 2 :][: i + 1]
        value = mixed_node(states, gates[i + 1], rows, given.names)
        states = torch.cat([states, given.network.norm(value)[None]])
    new = states[1:].mean(dim=0)
    inputs = [hidden, mix, *gates]
    return [
        new.detach(),
        *torch.autograd.grad([new, *outputs], inputs, [given.g, *incoming]),
    ]


class OursWord:
    """The same by the launches of networks/recurrent_cell.py."""

    def __init__(self, given: Given) -> None:
        self.given = given
        size, nodes = given.hidden.shape[1], given.network.space.nodes
        norm = given.network.norm
        assert norm.running_mean is not None and norm.running_var is not None
        self.cell = recurrent_cell.Cell(
            given.curved, BATCH_NORM, norm.eps, 0.1, norm.running_mean, norm.running_var, True
        )
        self.room = recurrent_cell._Room(given.hidden[None], size, nodes, 1, masked=True)
        for j, gates in enumerate(self.room.gates):  # as the products by source lie
            parts = [given.gates[i][j] for i in range(j, nodes)]
            gates.copy_(torch.cat(parts, dim=1)[None])
        self.ws = tuple(given.network.ws)

    def __call__(self) -> list[Tensor]:
        """Return what modules_word returns, the products' gradients by source."""
        given, room = self.given, self.room
        with torch.no_grad():
            mixes, space = recurrent_cell._mixes(given.mix), workspace(given.hidden, room.nodes)
            forward = recurrent_cell._Forward(self.cell, room, mixes, given.mask, space)
            forward.first(given.hidden, given.gates0, 0)
            for i in range(room.nodes):
                forward.node(i, 0)
            new = room.states[1:, 0].mean(dim=0)
            gates0 = given.gates0[None]
            # No gradient of the weights is asked for, and the products' have come.
            inputs = given.hidden[None], given.hidden, given.mask, given.network.w0, given.mix
            needs = (True, True, False, False, True, False)
            backward = recurrent_cell._Backward(
                self.cell, room, (*inputs, self.ws), new[None], gates0, given.g[None], needs
            )
            backward._product = self._given(backward)  # type: ignore[method-assign]
            torch.add(given.g, 0.0, out=backward.dall)
            backward._nodes(0)
            dmix = backward.dmix[0, 1:].to(given.mix.dtype)
            dmix = dmix if given.curved else without_curves(dmix)
        return [new, backward.dhidden, dmix, backward.dgates0[0], *backward.dgates]

    def _given(self, backward: recurrent_cell._Backward) -> Callable[[int, int], None]:
        def product(j: int, slot: int) -> None:
            backward.dseen = self.given.dseen[j]

        return product


def by_source(found: Sequence[Tensor], nodes: int) -> list[Tensor]:
    """Return what modules_word returns with the products' gradients by source."""
    first, gates = list(found[:4]), found[4:]
    return first + [
        torch.cat([gates[i][j] for i in range(j, nodes)], dim=1)[None] for j in range(nodes)
    ]


def check(setup: Setup) -> None:
    """Raise AssertionError unless ours and the modules compute the same."""
    given = Given(setup)
    theirs = by_source(modules_word(given), given.network.space.nodes)
    _compare(setup, "word without products", OursWord(given)(), theirs)
    _compare(setup, "window", Window(setup, "fused")(), Window(setup, "reference")())


def _compare(setup: Setup, case: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for i, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise AssertionError(f"{setup.space}, {case}: result {i} differs by {error:.2g}")


def prepare_window(setup: Setup, backend: str) -> Callable[[], object]:
    """Return the pass over a window, for a process of its own."""
    return Window(setup, backend)


def compare(setup: Setup, seconds: float, least: int, memory: bool) -> list[Row]:
    """Return the rows of one space."""
    device = torch.device(setup.device)
    more = {"sizes": setup.text()}
    given = Given(setup)
    word = [OursWord(given), functools.partial(modules_word, given)]
    ours, theirs = in_turn(word, device, seconds=seconds, least=max(5, least))
    row = functools.partial(Row, BENCH, space=setup.space, baseline="modules", more=more)
    rows = [row("word without products", ours=ours, theirs=theirs)]
    window = [Window(setup, "fused"), Window(setup, "reference")]
    ours, theirs = in_turn(window, device, seconds=seconds, least=least)
    del window
    peaks: list[float | None] = [None, None]
    if memory:
        peaks = [
            peak_mb(functools.partial(prepare_window, setup, name), device)
            for name in ("fused", "reference")
        ]
    rows.append(
        row("window", ours=ours, theirs=theirs, peak_mb=peaks[0], baseline_peak_mb=peaks[1])
    )
    return rows


@exit_on_user_error
def main() -> None:
    """Print two rows for each space."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spaces", default="rnn,rnn_small")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bptt", type=int, default=35)
    parser.add_argument("--hidden", type=int, default=300)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="a case at least")
    parser.add_argument("--rounds", type=int, default=3, help="of the window at least")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", action="store_true", help="a line of JSON a row")
    parsed = parser.parse_args()
    device = torch.device(parsed.device)
    for i, space in enumerate(parsed.spaces.split(",")):
        sizes = parsed.batch, parsed.bptt, parsed.hidden, parsed.vocabulary
        setup = Setup(space, *sizes, parsed.device)
        if i == 0 and not parsed.json:
            print(f"{setup.text()}, {torch.get_num_threads()} threads")
            print(HEADER, flush=True)
        check(setup)
        for row in compare(setup, parsed.seconds, parsed.rounds, parsed.memory):
            show(row, device, parsed.json)


if __name__ == "__main__":
    main()
