"""Genotypes: read off alphas, written and read back, and what is refused."""

import json

import pytest
import torch

from rdarts_fast.errors import UserError
from rdarts_fast.genotype import (
    Genotype,
    discretize,
    kept_edges,
    one_hot_weights,
    read_genotype,
)
from rdarts_fast.spaces import SPACES, Space

# Final genotypes of published searches, in the official text form.
PUBLISHED = (
    "Genotype(normal=[('skip_connect', 1), ('dil_conv_3x3', 0), ('skip_connect', 2), "
    "('skip_connect', 0), ('skip_connect', 0), ('skip_connect', 2), ('skip_connect', 2), "
    "('skip_connect', 1)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('max_pool_3x3', 1), ('skip_connect', 2), "
    "('max_pool_3x3', 0), ('max_pool_3x3', 0), ('max_pool_3x3', 1)], "
    "reduce_concat=range(2, 6))"
)


def zeros(space: Space) -> dict[str, torch.Tensor]:
    return {kind: torch.zeros(space.edges(kind), space.operations(kind)) for kind in space.cells}


def test_two_strongest_inputs_strongest_first() -> None:
    alphas = zeros(SPACES["s2"])
    alphas["normal"][7, 1] = 3.0  # into node 2 from node 0: sep_conv, strongest
    alphas["normal"][5, 0] = 2.0  # into node 2 from c_{k-2}: skip
    alphas["normal"][6, 0] = 1.0
    genotype = discretize(SPACES["s2"], alphas)
    assert genotype.cells["normal"][2] == (("sep_conv_3x3", 2), ("skip_connect", 0))


def test_strength_is_the_softmax_weight_not_the_alpha() -> None:
    alphas = zeros(SPACES["s3"])
    # Edge 2: largest alpha 5, but shared with none; edge 3 has a smaller alpha and a larger weight.
    alphas["normal"][2] = torch.tensor([5.0, 5.0, 0.0])
    alphas["normal"][3] = torch.tensor([-9.0, 2.0, -9.0])
    alphas["normal"][4] = torch.tensor([0.0, 0.0, 0.5])
    genotype = discretize(SPACES["s3"], alphas)
    assert genotype.cells["normal"][1] == (("skip_connect", 1), ("skip_connect", 0))


def test_none_is_never_chosen_wherever_it_stands_in_the_list() -> None:
    # A mixed space: `none` first on one edge, last on the other; the official code looks at edge
    # 0's list for both.
    edges = (("none", "skip_connect"), ("skip_connect", "none"))
    space = Space("mixed", 1, {"normal": edges, "reduce": edges})
    alphas = zeros(space)
    alphas["normal"][0, 0] = alphas["normal"][1, 1] = 9.0
    assert discretize(space, alphas).cells["normal"] == (
        (("skip_connect", 0), ("skip_connect", 1)),
    )


def test_ties_go_to_the_lower_index() -> None:
    genotype = discretize(SPACES["s2"], zeros(SPACES["s2"]))
    assert genotype.cells["reduce"] == ((("skip_connect", 0), ("skip_connect", 1)),) * 4


def test_s5_keeps_both_edges_and_has_81_genotypes() -> None:
    space, found = SPACES["s5"], set()
    for i in range(81):
        alphas = zeros(space)
        for edge in range(4):
            kind = ("normal", "reduce")[edge // 2]
            alphas[kind][edge % 2, i // 3**edge % 3] = 1.0
        genotype = discretize(space, alphas)
        assert {source for _, source in genotype.cells["normal"][0]} == {0, 1}
        found.add(
            json.dumps({k: sorted(v[0], key=lambda e: e[1]) for k, v in genotype.cells.items()})
        )
    assert len(found) == 81


def test_wrong_shape_is_an_error() -> None:
    alphas = zeros(SPACES["s2"])
    alphas["reduce"] = torch.zeros(14, 3)
    with pytest.raises(
        ValueError, match=r"alphas\['reduce'\]: expected shape \(14, 2\), got \(14, 3\)"
    ):
        discretize(SPACES["s2"], alphas)


def test_published_text_round_trip() -> None:
    genotype = Genotype.from_text(PUBLISHED)
    assert genotype.cells["normal"][0] == (("skip_connect", 1), ("dil_conv_3x3", 0))
    assert genotype.cells["reduce"][3] == (("max_pool_3x3", 0), ("max_pool_3x3", 1))
    assert genotype.to_text() == PUBLISHED
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert hash(Genotype.from_json(genotype.to_json())) == hash(genotype)


def test_text_is_never_evaluated(tmp_path) -> None:
    trap = tmp_path / "trap"
    text = f"Genotype(normal=[__import__('pathlib').Path({str(trap)!r}).touch()], reduce=[])"
    with pytest.raises(UserError, match="normal: not a plain value"):
        Genotype.from_text(text)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Genotype(normal=[", "genotype text: "),
        ("[1, 2]", "expected Genotype("),
        (PUBLISHED.replace("range(2, 6)", "5", 1), "normal_concat: expected [2, 3, 4, 5], got 5"),
        ("Genotype(normal=[('skip_connect', 0)])", "expected two (operation, input) pairs a node"),
        (
            PUBLISHED.replace("range(2, 6)", "range(3, 6)", 1),
            "normal_concat: expected [2, 3, 4, 5]",
        ),
        (
            PUBLISHED.replace("'dil_conv_3x3', 0", "'dil_conv_3x3', 2"),
            "normal[0]: input 2 is not before",
        ),
        (
            PUBLISHED.replace("'dil_conv_3x3', 0", "'dil_conv_3x3', 1"),
            "an input stands there twice",
        ),
        (PUBLISHED.replace("dil_conv_3x3", "none"), 'normal[0]: unknown operation "none"'),
        (PUBLISHED.replace("dil_conv_3x3", "dil_conf_3x3"), 'Did you mean "dil_conv_3x3"'),
        (PUBLISHED.replace("'dil_conv_3x3', 0", "'dil_conv_3x3'"), "expected [operation, input]"),
    ],
)
def test_bad_text_names_the_entry(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Genotype.from_text(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", 'with "format": 1, got list'),
        ('{"format": 2}', 'with "format": 1, got 2'),
        ('{"format": 1, "cells": []}', "cells: expected an object, got list"),
        ('{"format": 1, "cells": {"normal": 3}}', "normal: expected a list of nodes, got int"),
        ('{"format": 1, "cells": {"normal": [[]], "reduce": [[]]}}', "normal[0]: expected a list"),
        (
            '{"format": 1, "cells": {"normal": [[["noise", 0]]]}}',
            "expected cells ['normal', 'reduce']",
        ),
        (
            '{"format": 1, "cells": {"normal": [[["noise", 0]]], '
            '"reduce": [[["noise", 0]], [["noise", 1]]]}}',
            "same number of nodes",
        ),
        (
            '{"format": 1, "cells": {"normal": [[["noise", true]]], "reduce": []}}',
            "expected [operation, input]",
        ),
    ],
)
def test_bad_json_names_the_entry(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Genotype.from_json(text)
    assert message in str(error.value)


def test_files_of_both_forms(tmp_path) -> None:
    genotype = Genotype.from_text(PUBLISHED)
    (tmp_path / "text").write_text(PUBLISHED + "\n")
    (tmp_path / "json").write_text(genotype.to_json())
    assert read_genotype(tmp_path / "text") == read_genotype(tmp_path / "json") == genotype
    with pytest.raises(UserError, match="nowhere: No such file"):
        read_genotype(tmp_path / "nowhere")
    (tmp_path / "image").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match="image: "):
        read_genotype(tmp_path / "image")


def test_kept_edges_carry_their_softmax_weight() -> None:
    space = SPACES["s2"]
    alphas = zeros(space)
    alphas["normal"][4, 1] = 2.0  # into node 1 from node 0
    genotype = discretize(space, alphas)
    kept = kept_edges(space, genotype, alphas)["normal"]
    assert len(kept) == 8
    weight = torch.softmax(torch.tensor([0.0, 2.0], dtype=torch.float64), 0)[1].item()
    assert (2, 3, "sep_conv_3x3", pytest.approx(weight, abs=1e-12)) in kept


def test_description_names_every_edge() -> None:
    text = Genotype.from_text(PUBLISHED).describe()
    assert "normal  node 0 = skip_connect(c_{k-1}) + dil_conv_3x3(c_{k-2})" in text
    assert "node 1 = skip_connect(node 0) + skip_connect(c_{k-2})" in text
    assert len(text.splitlines()) == 8


def test_one_hot_weights_choose_what_the_genotype_keeps() -> None:
    space = SPACES["s5"]  # sep_conv_3x3, skip_connect, max_pool_3x3
    genotype = Genotype(
        {
            "normal": ((("max_pool_3x3", 1), ("sep_conv_3x3", 0)),),
            "reduce": ((("skip_connect", 0), ("skip_connect", 1)),),
        }
    )
    weights = one_hot_weights(space, genotype.cells)
    assert weights["normal"].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert weights["reduce"].tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    alphas = {kind: 5.0 * weight for kind, weight in weights.items()}
    found = one_hot_weights(space, discretize(space, alphas).cells)
    assert all(found[kind].equal(weights[kind]) for kind in weights)


@pytest.mark.parametrize("name", ["s2", "s4"])
def test_one_hot_weights_of_another_space_are_refused(name) -> None:
    alphas = {kind: torch.zeros(14, 2) for kind in ("normal", "reduce")}
    genotype = discretize(SPACES[name], alphas)
    other = {"s2": "s4", "s4": "s2"}[name]
    with pytest.raises(UserError, match=f"is not in space {other}"):
        one_hot_weights(SPACES[other], genotype.cells)
    with pytest.raises(UserError, match=r"normal\[1\].*is not in space s5"):
        one_hot_weights(
            SPACES["s5"], discretize(SPACES["darts"], {k: one_sep() for k in alphas}).cells
        )


def one_sep() -> torch.Tensor:
    alphas = torch.zeros(14, 8)
    alphas[:, 4] = 1.0  # sep_conv_3x3, which s5 has
    return alphas


def test_a_node_may_have_one_input_but_not_in_the_text_form_and_not_none() -> None:
    one = Genotype({kind: ((("noise", 1),),) for kind in ("normal", "reduce")})
    assert Genotype.from_json(one.to_json()) == one
    assert one.edges("normal") == [(1, 2, "noise")]
    with pytest.raises(UserError, match=r"two inputs a node, normal\[0\] has 1: use the JSON"):
        one.to_text()
    with pytest.raises(UserError, match=r"normal\[0\]: a node needs an input"):
        Genotype({"normal": ((),), "reduce": ((("noise", 1),),)})


def test_an_upsampling_cells_first_node_keeps_all_four_inputs() -> None:
    space = SPACES["disparity_small"]
    genotype = discretize(space, zeros(space))
    assert [len(node) for node in genotype.cells["upsample"]] == [4, 2, 2]
    assert [len(node) for node in genotype.cells["reduce"]] == [2, 2, 2]
    assert genotype.edges("upsample")[-1][1] == 6  # node 2, after four inputs
    assert Genotype.from_json(genotype.to_json()) == genotype
    weights = one_hot_weights(space, genotype.cells)
    assert {kind: int(w.sum()) for kind, w in weights.items()} == {
        "normal": 6,
        "reduce": 6,
        "upsample": 8,
    }
    with pytest.raises(UserError, match="use the JSON"):
        genotype.to_text()


def test_a_recurrent_cells_node_keeps_one_input() -> None:
    space = SPACES["rnn"]
    alphas = zeros(space)
    alphas["recurrent"][0] = torch.tensor([9.0, 2.0, 1.0, 0.0, 0.0])  # none, never chosen
    alphas["recurrent"][2, 3] = 5.0  # into node 1 from node 0: sigmoid
    genotype = discretize(space, alphas)
    assert genotype.cells["recurrent"][:2] == ((("tanh", 0),), (("sigmoid", 1),))
    text = genotype.to_text()
    assert text.startswith("Genotype(recurrent=[('tanh', 0), ('sigmoid', 1), ")
    assert text.endswith("concat=range(1, 9))")
    assert Genotype.from_text(text) == genotype
    assert "node 1 = sigmoid(node 0)" in genotype.describe()


def test_an_input_after_its_node_is_refused_whatever_the_cell() -> None:
    with pytest.raises(UserError, match=r"recurrent\[0\]: input 1 is not before the node \(0 to 0"):
        Genotype({"recurrent": [[("tanh", 1)]]})
