"""The benchmark of the recurrent supernet: a line a case, and a wrong result is caught."""

from __future__ import annotations

import json
import sys

import pytest

from bench import recurrent
from rdarts_fast.networks import recurrent as network

SMALL = recurrent.Setup("rnn", batch=6, bptt=3, hidden=8, vocabulary=20)
SIZES = ["--batch", "6", "--bptt", "3", "--hidden", "8", "--vocabulary", "20", "--seconds", "0"]


def test_a_line_of_json_a_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--json", "--spaces", "rnn", *SIZES])
    recurrent.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["space"], row["case"]) for row in rows] == [
        ("rnn", "word without products"),
        ("rnn", "window"),
    ]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], rel=1e-3)
        assert "batch 6, bptt 3, 8 units, 20 words" in row["sizes"]
    assert rows[1]["peak_mb"] > 0 < rows[1]["baseline_peak_mb"]


@pytest.mark.parametrize("space", ["rnn", "rnn_small"])
def test_the_check_catches_a_wrong_node(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = recurrent.Setup(space, batch=6, bptt=3, hidden=8, vocabulary=20)
    recurrent.check(setup)
    right = recurrent.mixed_node
    monkeypatch.setattr(recurrent, "mixed_node", lambda s, *rest: right(s.flip(0), *rest))
    with pytest.raises(AssertionError, match=f"{space}, word without products: result 0"):
        recurrent.check(setup)


def test_the_check_catches_a_wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    right = network.recurrent_cell

    def half_the_gradient(x, hidden, mask, w0, ws, mix, norm, **more):  # type: ignore[no-untyped-def]
        return right(x, hidden, mask, w0, ws, mix / 2 + mix.detach() / 2, norm, **more)

    monkeypatch.setattr(network, "recurrent_cell", half_the_gradient)
    with pytest.raises(AssertionError, match="rnn, window: result 1 differs"):
        recurrent.check(SMALL)
