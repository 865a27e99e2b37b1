"""The spaces against the published tables, and the errors of a user's own."""

import json

import pytest

from rdarts_fast import spaces
from rdarts_fast.errors import UserError
from rdarts_fast.networks import operations
from rdarts_fast.spaces import SPACES, edge_count, edges_into, load_space

S1_NORMAL = [
    "skip_connect dil_conv_3x3", "skip_connect dil_conv_5x5",
    "skip_connect dil_conv_5x5", "skip_connect sep_conv_3x3", "skip_connect dil_conv_3x3",
    "max_pool_3x3 skip_connect", "skip_connect sep_conv_3x3", "skip_connect sep_conv_3x3",
    "skip_connect dil_conv_3x3",
    "skip_connect sep_conv_3x3", "max_pool_3x3 skip_connect", "skip_connect dil_conv_3x3",
    "dil_conv_3x3 dil_conv_5x5", "dil_conv_3x3 dil_conv_5x5",
]  # fmt: skip
S1_REDUCE = [
    "max_pool_3x3 avg_pool_3x3", "max_pool_3x3 dil_conv_3x3",
    "max_pool_3x3 avg_pool_3x3", "max_pool_3x3 avg_pool_3x3", "skip_connect dil_conv_5x5",
    "max_pool_3x3 avg_pool_3x3", "max_pool_3x3 sep_conv_3x3", "skip_connect dil_conv_3x3",
    "skip_connect dil_conv_5x5",
    "max_pool_3x3 avg_pool_3x3", "max_pool_3x3 avg_pool_3x3", "skip_connect dil_conv_5x5",
    "skip_connect dil_conv_5x5", "skip_connect dil_conv_5x5",
]  # fmt: skip


def test_s1_is_the_published_table() -> None:
    s1 = SPACES["s1"]
    assert [" ".join(edge) for edge in s1.cells["normal"]] == S1_NORMAL
    assert [" ".join(edge) for edge in s1.cells["reduce"]] == S1_REDUCE


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("s2", "skip_connect sep_conv_3x3"),
        ("s3", "none skip_connect sep_conv_3x3"),
        ("s4", "noise sep_conv_3x3"),
        (
            "darts",
            "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 "
            "dil_conv_3x3 dil_conv_5x5",
        ),
    ],
)
def test_uniform_spaces_in_published_order(name: str, candidates: str) -> None:
    space = SPACES[name]
    assert space.nodes == 4
    assert space.edges("normal") == space.edges("reduce") == 14
    for kind in ("normal", "reduce"):
        assert [" ".join(edge) for edge in space.cells[kind]] == [candidates] * 14


def test_s5_is_the_papers_space_of_81() -> None:
    s5 = SPACES["s5"]
    assert (s5.nodes, s5.edges("reduce")) == (1, 2)
    choices = 1
    for kind in ("normal", "reduce"):
        for edge in s5.cells[kind]:
            assert set(edge) == {"sep_conv_3x3", "skip_connect", "max_pool_3x3"}
            choices *= len(edge)
    assert choices == 81


def test_edges_are_numbered_by_target_then_source() -> None:
    assert [list(edges_into(node)) for node in range(4)] == [
        [0, 1],
        [2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12, 13],
    ]
    assert edge_count(8) == 44


def test_other_cells_have_other_inputs() -> None:
    small, rnn = SPACES["disparity_small"], SPACES["rnn"]
    assert [small.edges(kind) for kind in small.cells] == [9, 9, 15]
    assert sum(small.edges(kind) * small.operations(kind) for kind in small.cells) == 99
    assert [list(small.edges_into("upsample", node)) for node in range(2)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8],
    ]
    assert (rnn.edges("recurrent"), rnn.operations("recurrent")) == (36, 5)
    assert list(rnn.edges_into("recurrent", 7)) == list(range(28, 36))
    tasks = {name: space.task for name, space in SPACES.items() if space.task != "classification"}
    assert tasks == {
        "disparity_small": "disparity",
        "disparity": "disparity",
        "rnn": "language",
        "rnn_small": "language",
    }


def test_a_cell_type_has_operations_of_its_own(tmp_path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"nodes": 2, "cells": {"recurrent": ["tanh", "identity"]}}))
    assert load_space(path).cells["recurrent"] == (("tanh", "identity"),) * 3
    path.write_text(json.dumps({"nodes": 2, "cells": {"recurrent": ["tanh", "skip_connect"]}}))
    with pytest.raises(UserError, match='unknown operation "skip_connect"'):
        load_space(path)


def test_every_operation_has_a_module_and_every_module_a_name() -> None:
    assert set(spaces.OPERATIONS) == set(operations.OPERATIONS)


def test_own_space_round_trip(tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SPACES["s1"].to_dict()))
    assert load_space(path) == SPACES["s1"]
    one = {"nodes": 2, "cells": {k: ["skip_connect", "noise"] for k in ("normal", "reduce")}}
    path.write_text(json.dumps(one))
    space = load_space(str(path))
    assert space.name == "mine"
    assert space.cells["reduce"] == (("skip_connect", "noise"),) * 5


GOOD = ["skip_connect", "noise"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object, got list"),
        ({"nodes": 4, "cels": {}}, 'unknown entry "cels". Did you mean "cells"?'),
        ({"nodes": 0, "cells": {}}, "nodes: expected a whole number from 1 to 16, got 0"),
        ({"nodes": True, "cells": {}}, "nodes: expected a whole number"),
        ({"nodes": 1}, 'cells: expected "normal" and "reduce" (and'),
        ({"nodes": 1, "cells": {"normal": GOOD}}, "got ['normal']"),
        ({"nodes": 1, "cells": {"normal": GOOD, "reduce": [GOOD]}},
         "reduce: expected 2 edges for 1 nodes, got 1"),
        ({"nodes": 1, "cells": {"normal": GOOD, "reduce": "all"}},
         "reduce: expected 2 edges for 1 nodes, got str"),
        ({"nodes": 1, "cells": {"normal": [GOOD, ["skip_connect"]], "reduce": GOOD}},
         "normal[1]: 1 candidates, but normal[0] has 2"),
        ({"nodes": 1, "cells": {"normal": [GOOD, ["skip", "noise"]], "reduce": GOOD}},
         'normal[1]: unknown operation "skip"'),
        ({"nodes": 1, "cells": {"normal": [GOOD, []], "reduce": GOOD}},
         "normal[1]: expected a list"),
        ({"nodes": 1, "cells": {"normal": [GOOD, ["noise", "noise"]], "reduce": GOOD}},
         "normal[1]: an operation stands there twice"),
        ({"nodes": 1, "cells": {"normal": ["none"], "reduce": GOOD}}, 'normal[0]: "none" alone'),
        ({"nodes": 1, "name": 3, "cells": {"normal": GOOD, "reduce": GOOD}},
         "name and description"),
    ],
)  # fmt: skip
def test_malformed_space_names_the_entry(tmp_path, data, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        load_space(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_unknown_space_gets_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r'unknown space "s44": one of s1, s2.*Did you mean "s4"'):
        load_space("s44")


def test_missing_and_unreadable_files(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: No such file"):
        load_space(tmp_path / "nowhere.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match=r"text\.json: not JSON"):
        load_space(tmp_path / "text.json")
