"""The table of all architectures of S5, and what a search on it regrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import Network
from rdarts_fast.oracle import Oracle, architectures, count_architectures, plain
from rdarts_fast.search import run_search
from rdarts_fast.spaces import SPACES, Space
from tests.small import settings

S5 = SPACES["s5"]
SEP, SKIP, POOL = "sep_conv_3x3", "skip_connect", "max_pool_3x3"


def genotype(normal: tuple[str, str], reduce: tuple[str, str]) -> Genotype:
    """The architecture with these operations on inputs 0 and 1."""
    cells = {"normal": normal, "reduce": reduce}
    return Genotype({kind: (((a, 0), (b, 1)),) for kind, (a, b) in cells.items()})


def table(data: str = "digits") -> Oracle:
    """Errors worked out by hand: a pool costs 1 %, a skip 2 % in a normal and 4 % in a reduction
    cell, on top of 5 %.
    """
    cost = {SEP: (0.0, 0.0), POOL: (0.01, 0.01), SKIP: (0.02, 0.04)}
    errors = []
    for g in architectures(S5):
        total = 0.05
        for k, kind in enumerate(("normal", "reduce")):
            total += sum(cost[name][k] for name, _ in g.cells[kind][0])
        errors.append((g, total))
    return Oracle.of(S5, data, errors)


def test_s5_has_81_architectures_that_differ_and_can_be_trained() -> None:
    found = list(architectures(S5))
    assert len(found) == len(set(found)) == count_architectures(S5) == 81
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for g in found:
        network = Network(g, channels=2, layers=3, classes=3, image_channels=1)
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_architectures_choose_two_inputs_and_never_none() -> None:
    names = ("none", "skip_connect", "noise")
    space = Space("small", 2, {"normal": (names,) * 5, "reduce": (("noise",),) * 5})
    found = list(architectures(space))
    # normal: 2 x 2 for the first node; 3 pairs of inputs x 2 x 2 for the second. reduce: 3 pairs.
    assert len(found) == count_architectures(space) == 4 * 12 * 3 == len(set(found))
    assert all("none" not in g.to_text() for g in found)


def test_regret_is_what_was_worked_out_by_hand() -> None:
    oracle = table()
    assert oracle.best == 0.05
    assert oracle.regret(genotype((SEP, SEP), (SEP, SEP))) == 0.0
    assert oracle.regret(genotype((SKIP, SEP), (POOL, SKIP))) == pytest.approx(0.07)
    assert oracle.regret(genotype((SKIP, SKIP), (SKIP, SKIP))) == pytest.approx(0.12)
    turned = Genotype({"normal": (((SEP, 1), (SKIP, 0)),), "reduce": (((SKIP, 1), (POOL, 0)),)})
    assert oracle.regret(turned) == pytest.approx(0.07)  # the stronger input first: no other one
    assert plain(turned) == genotype((SKIP, SEP), (POOL, SKIP))
    with pytest.raises(UserError, match="has no Genotype"):
        oracle.regret(genotype(("noise", SEP), (SEP, SEP)))


def test_a_search_with_an_oracle_reports_its_regret(tmp_path, capsys) -> None:
    given = settings(tmp_path)
    oracle = table(given["data"])
    (tmp_path / "oracle.json").write_text(oracle.to_json())
    run = run_search(**given, oracle=tmp_path / "oracle.json")
    printed = capsys.readouterr().out
    assert len(run.metrics) == 3
    for record in run.metrics:
        expected = oracle.regret(Genotype.from_dict(record["genotype"]))
        assert record["regret"] == pytest.approx(expected)
        assert f"regret {record['regret']:.2%}" in printed
    again = run_search(**{**given, "out": tmp_path / "plain"})
    assert "regret" not in again.metrics[-1]
    assert again.metrics[-1]["alphas"] == run.metrics[-1]["alphas"]
    resumed = run_search(resume=run.folder)
    assert resumed.config["oracle"] == str(tmp_path / "oracle.json")


def test_a_written_table_is_read_back(tmp_path) -> None:
    (tmp_path / "o.json").write_text(table().to_json())
    read = Oracle.read(tmp_path / "o.json")
    assert read.errors == table().errors and read.data == "digits"
    rows = json.loads((tmp_path / "o.json").read_text())["architectures"]
    errors = [row["test_error"] for row in rows]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("format"), "not a table of robust"),
        (lambda t: t["architectures"].pop(), "1 of 81 architectures are missing"),
        (lambda t: t["architectures"].append(t["architectures"][0]), "stands there twice"),
        (lambda t: t["architectures"][3].update(test_error=3.0), r"not in \[0, 1\]"),
        (lambda t: t["architectures"][3].update(test_error="x"), "damaged: ValueError"),
        (lambda t: t["architectures"][3].pop("genotype"), "damaged: KeyError"),
        (lambda t: t.pop("data"), "damaged: KeyError"),
        (lambda t: t["space"].pop("cells"), "space of oracle"),
    ],
)
def test_a_bad_table_is_refused(change, message, tmp_path) -> None:
    path = tmp_path / "o.json"
    whole = json.loads(table().to_json())
    change(whole)
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=message):
        Oracle.read(path)


def test_a_table_of_something_else_is_refused_before_the_search(tmp_path: Path) -> None:
    given = settings(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        run_search(**given, oracle=tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        run_search(**given, oracle=tmp_path / "text.json")
    (tmp_path / "o.json").write_text(table().to_json())
    with pytest.raises(UserError, match="a table of digits, the search is on npz"):
        run_search(**given, oracle=tmp_path / "o.json")
    with pytest.raises(UserError, match="of space s5, not of s4"):
        run_search(**{**given, "space": "s4"}, oracle=tmp_path / "o.json")
    assert not given["out"].exists()
