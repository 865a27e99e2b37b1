"""The supernet and the discrete network: sizes, parameters, drop path, one against the other."""

import pytest
import torch
from torch import Tensor, nn

from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype, discretize
from rdarts_fast.networks import Network, Supernet, softmax_weights
from rdarts_fast.networks.discrete import DiscreteCell
from rdarts_fast.networks.supernet import SearchCell, is_reduction
from rdarts_fast.spaces import SPACES, edges_into, space_from_dict, spaces_of

DRAWS = Draws(5)
GENOTYPE = Genotype(
    {
        "normal": (
            (("sep_conv_3x3", 0), ("skip_connect", 1)),
            (("dil_conv_5x5", 2), ("max_pool_3x3", 0)),
        ),
        "reduce": (
            (("skip_connect", 0), ("max_pool_3x3", 1)),
            (("skip_connect", 2), ("sep_conv_5x5", 1)),
        ),
    }
)


@pytest.mark.parametrize(
    ("space", "count"),
    [("s1", 405_146), ("s2", 665_466), ("s3", 665_466), ("s4", 624_506), ("darts", 1_930_618)],
)
def test_parameter_counts_of_the_published_supernets(space: str, count: int) -> None:
    assert sum(p.numel() for p in Supernet(space).parameters()) == count


def test_only_the_stem_has_affine_batch_norm() -> None:
    affine = [n for n, m in Supernet("darts", layers=3).named_modules()
              if isinstance(m, nn.BatchNorm2d) and m.affine]  # fmt: skip
    assert affine == ["stem.1"]


def test_reductions_are_at_a_third_and_two_thirds() -> None:
    assert [i for i in range(8) if is_reduction(i, 8)] == [2, 5]
    assert [i for i in range(20) if is_reduction(i, 20)] == [6, 13]


@pytest.mark.parametrize("space", spaces_of("classification"))
@pytest.mark.parametrize(
    ("channels", "size"), [(1, (8, 8)), (3, (28, 28)), (3, (50, 50)), (1, (9, 14))]
)
def test_sizes_and_image_channels(space: str, channels: int, size: tuple[int, int]) -> None:
    net = Supernet(space, channels=3, layers=3, classes=4, image_channels=channels)
    alphas = net.initial_alphas(0)
    logits = net(torch.randn(2, channels, *size), softmax_weights(alphas), DRAWS)
    assert logits.shape == (2, 4)
    network = Network(
        discretize(net.space, alphas), 3, 3, 4, auxiliary=True, image_channels=channels
    )
    logits, auxiliary = network(torch.randn(2, channels, *size), DRAWS)
    assert logits.shape == (2, 4)
    assert (auxiliary is None) == (min(size) < 13)  # halved twice, below 4


@pytest.mark.slow
def test_224() -> None:
    net = Supernet("s2", channels=4, layers=8)
    logits = net(torch.randn(2, 3, 224, 224), softmax_weights(net.initial_alphas(0)), DRAWS)
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("nodes", [1, 2, 6])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_any_number_of_nodes_and_layers(nodes: int, layers: int) -> None:
    cell = ["skip_connect", "conv_7x1_1x7", "sep_conv_7x7"]
    space = space_from_dict({"nodes": nodes, "cells": {"normal": cell, "reduce": cell}}, "test")
    net = Supernet(space, channels=2, layers=layers)
    alphas = net.initial_alphas(0)
    assert net(torch.randn(2, 3, 8, 8), softmax_weights(alphas), DRAWS).shape == (2, 10)
    network = Network(discretize(space, alphas), 2, layers)
    assert network(torch.randn(2, 3, 8, 8), DRAWS).shape == (2, 10)


def test_a_cell_is_the_weighted_sum_over_edges_and_candidates() -> None:
    torch.manual_seed(0)
    cell = SearchCell(SPACES["s3"], "normal", (5, 6), 4, False, 2000).double()
    s0 = torch.randn(3, 5, 6, 6, dtype=torch.float64)
    s1 = torch.randn(3, 6, 6, 6, dtype=torch.float64)
    weights = torch.rand(14, 3, dtype=torch.float64)
    states = [cell.preprocess0(s0), cell.preprocess1(s1)]
    for node in range(4):
        total = torch.zeros(3, 4, 6, 6, dtype=torch.float64)
        for source, e in enumerate(edges_into(node)):
            skip, sep = states[source], cell.edges[e].operations[2](states[source])
            total = total + weights[e, 1] * skip + weights[e, 2] * sep  # none adds nothing
        states.append(total)
    (got,) = cell([s0], [s1], weights, DRAWS, 0.0)
    torch.testing.assert_close(got, torch.cat(states[2:], 1), rtol=1e-12, atol=1e-12)


def test_a_reduction_cell_halves_only_its_inputs_edges() -> None:
    cell = SearchCell(SPACES["s2"], "reduce", (4, 4), 4, False, 2000)
    strides = [edge.operations[1][1].stride[0] for edge in cell.edges]
    assert strides == [2, 2, 2, 2, 1, 2, 2, 1, 1, 2, 2, 1, 1, 1]


def test_drop_path_drops_whole_edges_per_sample_in_train_mode_only() -> None:
    torch.manual_seed(0)
    space = space_from_dict(
        {"nodes": 1, "cells": {k: ["skip_connect"] for k in ("normal", "reduce")}}, "t"
    )
    cell = SearchCell(space, "normal", (2, 2), 2, False, 2000).double()
    s0, s1 = torch.randn(2, 64, 2, 5, 5, dtype=torch.float64)
    weights = torch.ones(2, 1, dtype=torch.float64)
    edges = [cell.preprocess0(s0), cell.preprocess1(s1)]
    factors = (DRAWS.uniform(2000, (2, 64)) < 0.6).double() / 0.6
    assert 0 < (factors == 0).sum() < 128
    expected = sum(f.view(-1, 1, 1, 1) * e for f, e in zip(factors, edges, strict=True))
    (got,) = cell([s0], [s1], weights, DRAWS, 0.4)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    cell.eval()
    whole = cell.preprocess0(s0) + cell.preprocess1(s1)
    (got,) = cell([s0], [s1], weights, DRAWS, 0.4)
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)


def test_drop_path_of_a_network_spares_identities() -> None:
    torch.manual_seed(0)
    cell = DiscreteCell(GENOTYPE, "normal", (4, 4), 4, False, 2000)
    s = torch.randn(64, 4, 6, 6)
    factors = cell.factors(s, DRAWS, 0.999)  # every other operation is dropped from nearly all
    out = cell(s, s, DRAWS, factors)
    with torch.no_grad():
        identity = cell.preprocess1(s)
    same = [(out[n, :4] - identity[n]).abs().max() < 1e-5 for n in range(64)]
    assert sum(same) > 55


def test_draws_are_part_of_the_function() -> None:
    net = Supernet("s4", channels=2, layers=3)
    net.drop_path_prob = 0.3
    weights = softmax_weights(net.initial_alphas(0))
    x = torch.randn(4, 3, 8, 8)

    def logits(draws: Draws | None) -> Tensor:
        return net(x, weights, draws)

    assert torch.equal(logits(DRAWS), logits(DRAWS))
    assert not torch.equal(logits(DRAWS), logits(DRAWS.at(step=1)))
    assert not torch.equal(logits(None), logits(None))
    torch.manual_seed(3)
    first = logits(None)
    torch.manual_seed(3)
    assert torch.equal(first, logits(None))


def test_no_two_sites_of_a_network_are_the_same() -> None:
    net = Supernet("s4", channels=2, layers=8)
    sites = [m.site for m in net.modules() if hasattr(m, "site")]
    assert len(sites) == 8 * (14 + 1)
    assert len(set(sites)) == len(sites)


def test_initial_alphas() -> None:
    net = Supernet("darts", channels=2, layers=3).double()
    first, again, other = (net.initial_alphas(seed) for seed in (1, 1, 2))
    for kind in ("normal", "reduce"):
        assert first[kind].shape == (14, 8)
        assert first[kind].dtype == torch.float64
        assert first[kind].is_leaf
        assert first[kind].requires_grad
        assert torch.equal(first[kind], again[kind])
        assert not torch.equal(first[kind], other[kind])
        assert first[kind].std().item() == pytest.approx(1e-3, rel=0.2)
    assert not torch.equal(first["normal"], first["reduce"])


def test_a_one_hot_supernet_equals_its_network_with_the_same_weights() -> None:
    """In eval mode and with affine at its start, a network computes what the supernet computes
    one-hot.
    """
    torch.manual_seed(0)
    cell = [
        "skip_connect",
        "sep_conv_3x3",
        "dil_conv_5x5",
    ]  # no pools: a network has no batch norm after those
    space = space_from_dict({"nodes": 2, "cells": dict.fromkeys(("normal", "reduce"), cell)}, "t")
    net = Supernet(space, channels=4, layers=3).double()
    for _ in range(2):  # move the running statistics off their start
        net(
            torch.randn(8, 3, 8, 8, dtype=torch.float64),
            softmax_weights(net.initial_alphas(0)),
            DRAWS,
        )
    genotype = discretize(space, net.initial_alphas(4))
    network = Network(genotype, 4, 3).double()
    one_hot = {kind: torch.zeros(space.edges(kind), 3, dtype=torch.float64) for kind in space.cells}
    for i, cell_ in enumerate(net.cells):
        target = network.cells[i]
        target.preprocess0.load_state_dict(cell_.preprocess0.state_dict(), strict=False)
        target.preprocess1.load_state_dict(cell_.preprocess1.state_dict(), strict=False)
        for k, (source, node, name) in enumerate(genotype.edges(cell_.kind)):
            edge = edges_into(node - 2)[source]
            o = cell.index(name)
            one_hot[cell_.kind][edge, o] = 1.0
            state = cell_.edges[edge].operations[o].state_dict()
            target.operations[k].load_state_dict(state, strict=False)
    network.stem.load_state_dict(net.stem.state_dict())
    network.classifier.load_state_dict(net.classifier.state_dict())
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = net.eval()(x, one_hot, DRAWS)
    torch.testing.assert_close(network.eval()(x, DRAWS), expected, rtol=1e-10, atol=1e-10)


def test_auxiliary_head_is_published_at_8x8_and_in_train_mode_only() -> None:
    network = Network(GENOTYPE, 4, 3, auxiliary=True)
    logits, auxiliary = network(torch.randn(2, 3, 32, 32), DRAWS)
    assert logits.shape == auxiliary.shape == (2, 10)
    assert network.auxiliary_at == 2
    assert network.eval()(torch.randn(2, 3, 32, 32), DRAWS).shape == (2, 10)
    head = network.auxiliary
    x = torch.randn(2, 32, 8, 8)
    pooled = nn.AvgPool2d(5, stride=3, padding=0, count_include_pad=False)(x.relu())
    expected = head.classifier(head.eval().features(pooled).flatten(1))
    torch.testing.assert_close(head(x), expected)
    with_head = sum(p.numel() for p in network.auxiliary.parameters())
    assert with_head == 32 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10


def test_errors() -> None:
    with pytest.raises(UserError, match='unknown backend "fusd"'):
        Supernet("s2", backend="fusd")
    net = Supernet("s2", channels=2, layers=3)
    weights = softmax_weights(net.initial_alphas(0))
    weights["reduce"] = torch.ones(14, 3)
    with pytest.raises(
        ValueError, match=r"weights\['reduce'\]: expected shape \(14, 2\), got \(14, 3\)"
    ):
        net(torch.randn(2, 3, 8, 8), weights)
    with pytest.raises(
        ValueError, match=r"weights\['reduce'\]: expected shape \(14, 2\), got None"
    ):
        net(torch.randn(2, 3, 8, 8), {"normal": weights["normal"]})
    with pytest.raises(ValueError, match="at least 1"):
        Supernet("s2", channels=0)
