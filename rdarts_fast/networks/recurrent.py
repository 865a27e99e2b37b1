"""The recurrent cell of DARTS: the supernet of language modelling, and a genotype's network (DARTS,
section 2.1 and appendix A.1.2; paper, appendix E).

With x the word, h the hidden state and m its dropout mask, a step is

    [c0, h0] = [x, h m] W0         s_0 = h + sigmoid(c0) (tanh(h0) - h)
    [c, u]   = (s_j m) W_i         f(s_j) = s_j + sigmoid(c) (f(u) - s_j)
    s_i      = sum over j < i and operations f of p[j, f] f(s_j)

and the new hidden state is the mean of the nodes s_1, s_2, ... A genotype's node keeps one j and
one f. The supernet normalises s_0 and each node over the batch, with one batch norm for all,
without learned scale; the genotype's network does not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdarts_fast.draws import SITE_NETWORK, Draws
from rdarts_fast.errors import unknown
from rdarts_fast.genotype import Genotype
from rdarts_fast.kernels.recurrent_node import CURVES
from rdarts_fast.networks.recurrent_cell import recurrent_cell
from rdarts_fast.networks.search_network import SearchNetwork, Weights
from rdarts_fast.networks.trained_network import TrainedNetwork
from rdarts_fast.spaces import Candidates, Space, load_space

INIT_RANGE = 0.04  # of embeddings and the cell's weights, uniform on both sides of 0
_EMBEDDING, _INPUT, _WORD, _HIDDEN, _OUTPUT = range(5)  # sites of the masks, from SITE_NETWORK on

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


class Dropouts(NamedTuple):
    """Chances of dropping, in [0, 1)."""

    output: float = 0.75  # of the cell's output, before the decoder
    words: float = 0.75  # of the cell's input, the same in every step of a window
    hidden: float = 0.25  # of its states, likewise
    input: float = 0.2  # of the embedded words, likewise
    embedding: float = 0.0  # of a word of the vocabulary, wherever it stands in a window


OF_A_SEARCH, OF_A_RETRAINING = Dropouts(), Dropouts(embedding=0.1)


class LanguageOutput(NamedTuple):
    """What a language model returns for T words of B columns."""

    logits: Tensor  # [T * B, V]
    raw: Tensor  # [T, B, H], the cell's outputs
    dropped: Tensor  # [T, B, H], as the decoder sees them
    hidden: Tensor  # [B, H], the state after the last word


def mask(draws: Draws, site: int, shape: Sequence[int], chance: float, like: Tensor) -> Tensor:
    """Return a dropout mask: 0 with probability `chance`, 1 / (1 - chance) elsewhere."""
    keep = draws.uniform(SITE_NETWORK + site, shape, like.device) >= chance
    return keep.to(like.dtype) / (1.0 - chance)


class LanguageModel(nn.Module):
    """Embedding, a recurrent cell, and a decoder tied to the embedding.

    Call `run(words, hidden, draws, cell)`; the cell itself is a subclass's.
    """

    embedding: nn.Embedding
    decoder: nn.Linear
    dropouts: Dropouts
    w0: nn.Parameter  # [2 H, 2 H]
    ws: nn.ParameterList  # [H, 2 H] a node

    def build(self, vocabulary: int, hidden: int, nodes: int, dropouts: Dropouts) -> None:
        """Make the parameters."""
        self.hidden_size, self.dropouts = hidden, dropouts
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.decoder.weight = self.embedding.weight
        shapes = [(2 * hidden, 2 * hidden), *((hidden, 2 * hidden) for _ in range(nodes))]
        parameters = [nn.Parameter(torch.empty(shape)) for shape in shapes]
        self.w0, self.ws = parameters[0], nn.ParameterList(parameters[1:])
        with torch.no_grad():
            for parameter in (self.embedding.weight, *parameters):
                parameter.uniform_(-INIT_RANGE, INIT_RANGE)
            self.decoder.bias.zero_()

    def run(
        self,
        words: Tensor,
        hidden: Tensor | None,
        draws: Draws,
        cell: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> LanguageOutput:
        """Return the outputs for words [T, B] from a hidden state [B, H], zeros where there is
        none.

        cell: from embedded words [T, B, H], the hidden state and its states' mask to the hidden
        states after each word [T, B, H].
        """
        columns = words.shape[1]
        weight, size, chance = self.embedding.weight, self.hidden_size, self.dropouts
        if hidden is None:
            hidden = weight.new_zeros(columns, size)
        table = weight
        if self.training and chance.embedding > 0.0:
            table = weight * mask(draws, _EMBEDDING, (len(weight), 1), chance.embedding, weight)
        x = F.embedding(words, table)  # [T, B, H]
        for site, each in ((_INPUT, chance.input), (_WORD, chance.words)):
            if self.training and each > 0.0:
                x = x * mask(draws, site, (columns, size), each, weight)
        masked = self.training and chance.hidden > 0.0
        m = mask(draws, _HIDDEN, (columns, size), chance.hidden, weight) if masked else None
        outputs = cell(x, hidden, m)
        dropped = outputs
        if self.training and chance.output > 0.0:
            dropped = outputs * mask(draws, _OUTPUT, (columns, size), chance.output, weight)
        logits = self.decoder(dropped.flatten(0, 1))
        return LanguageOutput(logits, outputs, dropped, outputs[-1])

    def unrolled(
        self,
        x: Tensor,
        hidden: Tensor,
        m: Tensor | None,
        step: Callable[[Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Return the hidden states [T, B, H] of a cell, a word at a time.

        step: from s_0 [B, H] and the mask to the new hidden state.
        """
        raw = []
        for word in x:
            seen = hidden if m is None else hidden * m
            c, h = (torch.cat([word, seen], dim=1) @ self.w0).chunk(2, dim=1)
            hidden = step(hidden + torch.sigmoid(c) * (torch.tanh(h) - hidden), m)
            raw.append(hidden)
        return torch.stack(raw)


class NoNorm(nn.BatchNorm1d):
    """In place of a batch norm: what goes in comes out, in train mode too."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=0.0, affine=False)  # its statistics are 0 and 1
        self.eval()

    def train(self, mode: bool = True) -> NoNorm:
        """Stay in eval mode, where the statistics do not move."""
        return super().train(False)


class RecurrentSupernet(LanguageModel, SearchNetwork):
    """The search network of language modelling over `space`.

    vocabulary: words known, V. hidden: units of the cell, and numbers that a word is embedded in.
    backend: "reference" is the published form, an operation at a time; "fused" has the same
    parameters and buffers and computes a node at once, on kernels (recurrent_cell.py). normalised:
    with the batch norm of DARTS's search; without it, under one-hot weights, it is the network of a
    genotype. Raises UserError for an unknown backend.
    """

    def __init__(
        self,
        space: Space | str,
        vocabulary: int,
        hidden: int = 300,
        dropouts: Dropouts = OF_A_SEARCH,
        backend: str = "fused",
        *,
        normalised: bool = True,
    ) -> None:
        super().__init__(load_space(space) if isinstance(space, str) else space)
        if backend not in ("fused", "reference"):
            raise unknown("backend", backend, ("fused", "reference"))
        self.backend = backend
        self.build(vocabulary, hidden, self.space.nodes, dropouts)
        self.norm = nn.BatchNorm1d(hidden, affine=False) if normalised else NoNorm(hidden)

    def forward(
        self,
        words: Tensor,
        weights: Weights,
        draws: Draws | None = None,
        hidden: Tensor | None = None,
    ) -> LanguageOutput:
        """Return the outputs for words [T, B] under the operations' weights [E, O], from a hidden
        state [B, H]; without one, from zeros. Raises ValueError where a shape does not fit.
        """
        self.check_weights(weights)
        draws = Draws(seed=int(torch.randint(2**62, ()))) if draws is None else draws
        p = weights["recurrent"]
        return self.run(words, hidden, draws, lambda x, h, m: self._cell(x, h, m, p))

    def _cell(self, x: Tensor, hidden: Tensor, m: Tensor | None, weights: Tensor) -> Tensor:
        mix, names = curve_weights(weights, self.space.cells["recurrent"])
        if self.backend == "reference" or x.device.type == "meta":
            return self.unrolled(x, hidden, m, lambda s0, m: self._step(s0, m, mix, names))
        curved = not names.isdisjoint({"tanh", "sigmoid"})
        ws = list(self.ws)
        return recurrent_cell(x, hidden, m, self.w0, ws, mix, self.norm, curved=curved)

    def _step(self, s0: Tensor, m: Tensor | None, mix: Tensor, names: Collection[str]) -> Tensor:
        states = self.norm(s0)[None]  # [1, B, H]
        for node, w in enumerate(self.ws):
            edges = self.space.edges_into("recurrent", node)
            seen = states if m is None else states * m
            gates = seen @ w  # [J, B, 2 H]
            value = mixed_node(states, gates, mix[edges.start : edges.stop], names)
            states = torch.cat([states, self.norm(value)[None]])
        found: Tensor = states[1:].mean(dim=0)
        return found


def curve_weights(weights: Tensor, candidates: Candidates) -> tuple[Tensor, set[str]]:
    """Return the weight of each of CURVES on each edge, [E, 4], and the names that occur.

    weights: [E, O], of the operations that `candidates` names; `none` adds nothing.
    """
    missing = weights.shape[1]
    places = [[names.index(c) if c in names else missing for c in CURVES] for names in candidates]
    padded = torch.cat([weights, torch.zeros_like(weights[:, :1])], dim=1)
    mix = padded.gather(1, torch.tensor(places, device=weights.device))
    return mix, {name for names in candidates for name in names}


def mixed_node(states: Tensor, gates: Tensor, mix: Tensor, names: Collection[str]) -> Tensor:
    """Return a node of the supernet before its batch norm, [B, H], an operation at a time.

    states: [J, B, H], what it can read. gates: [J, B, 2 H], the states' products with the node's
    matrix. mix: [J, 4], weights of CURVES. names: those that occur.
    """
    c, u = gates.chunk(2, dim=-1)
    c = torch.sigmoid(c)
    terms = [
        torch.sum(mix[:, f, None, None] * (states + c * (ACTIVATIONS[name](u) - states)), dim=0)
        for f, name in enumerate(CURVES)
        if name in names
    ]
    total: Tensor = sum(terms[1:], terms[0])
    return total


class RecurrentNetwork(LanguageModel, TrainedNetwork):
    """The language model of a genotype."""

    def __init__(
        self,
        genotype: Genotype,
        vocabulary: int,
        hidden: int = 850,
        dropouts: Dropouts = OF_A_RETRAINING,
    ) -> None:
        super().__init__()
        self.nodes = [node[0] for node in genotype.cells["recurrent"]]
        self.build(vocabulary, hidden, len(self.nodes), dropouts)

    def forward(
        self, words: Tensor, draws: Draws | None = None, hidden: Tensor | None = None
    ) -> LanguageOutput:
        """Return the outputs for words [T, B] from a hidden state [B, H]; without one, from
        zeros.
        """
        draws = Draws(seed=int(torch.randint(2**62, ()))) if draws is None else draws
        return self.run(words, hidden, draws, lambda x, h, m: self.unrolled(x, h, m, self._step))

    def _step(self, s0: Tensor, m: Tensor | None) -> Tensor:
        states = [s0]
        for (name, source), w in zip(self.nodes, self.ws, strict=True):
            state = states[source]
            c, u = ((state if m is None else state * m) @ w).chunk(2, dim=1)
            states.append(state + torch.sigmoid(c) * (ACTIVATIONS[name](u) - state))
        return torch.stack(states[1:]).mean(dim=0)
