"""What a report says of a protocol's folder: which genotype was chosen, and the mean over its
repetitions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rdarts_fast import write_report
from rdarts_fast.metrics import METRICS
from rdarts_fast.report.protocols import protocols_in
from rdarts_fast.tables import Table
from tests.planted_runs import plant_search, write
from tests.report_page import Page, written

NAME = "l2-<b>0.01"


def plant(
    root: Path, task: str = "classification", title: str = "R-DARTS(L2) on s2, digits"
) -> Path:
    """Write a protocol's folder: the table of four searches in two repetitions, and one run."""
    metric = METRICS[task]
    rows: list[dict[str, Any]] = []
    for seed, (valid, test) in enumerate(((0.5, 0.25), (0.625, 0.375))):
        for chosen in (True, False):
            name = f"{NAME}{int(chosen)}-seed{seed}"
            cost = valid if chosen else valid + 0.25
            rows.append(
                {
                    "name": name,
                    "seed": seed,
                    "regularisation": "L2 0.01",
                    f"supernet_{metric.name}": 0.75,
                    "lambda_max": None,
                    f"valid_{metric.cost}": cost,
                    "selected": chosen,
                    f"test_{metric.cost}": test if chosen else None,
                    "error": None,
                }
            )
    plant_search(root / "searches" / NAME, 1, task=task)
    Table.of(rows, title, metric).write(root)
    write(root / "robust.json", {"task": task})
    return root


def report_of(root: Path, *more: Path) -> Page:
    out = root.parent / f"{root.name}-report"
    write_report([root, *more], out, details=0)
    return written(out)


def test_the_chosen_and_their_mean_are_shown(tmp_path) -> None:
    page = report_of(plant(tmp_path / "robust"))
    chosen = page.column("selected")
    assert chosen == {f"{NAME}{k}-seed{s}": "yes" if k else "" for s in (0, 1) for k in (0, 1)}
    assert page.column("test error")[f"{NAME}1-seed1"] == "37.50%"
    assert page.column("validation error, short training")[f"{NAME}0-seed0"] == "75.00%"
    assert "lambda_max" not in page.tables[0][0]  # nobody measured it
    assert "R-DARTS(L2) on s2, digits" in page.text
    assert "test error of the selected: 31.25% ± 8.84%" in page.text  # 0.3125, 0.125 / sqrt(2)


@pytest.mark.parametrize(
    ("task", "cost", "mean"), [("language", "perplexity", "0.31"), ("disparity", "epe", "0.31 px")]
)
def test_a_table_has_its_tasks_numbers(tmp_path, task: str, cost: str, mean: str) -> None:
    page = report_of(plant(tmp_path / "robust", task))
    assert f"test {cost} of the selected: {mean}" in page.text


def test_a_folder_above_has_the_tables_of_all(tmp_path) -> None:
    plant(tmp_path / "all" / "one", title="first")
    plant(tmp_path / "all" / "two", title="second & last")
    page = report_of(tmp_path / "all", tmp_path / "all" / "one")
    assert page.text.index("first") < page.text.index("second & last")
    assert page.text.count("first") == 1  # named twice, and below itself


def test_a_long_table_is_cut_and_a_failure_told(tmp_path) -> None:
    root = plant(tmp_path / "robust")
    rows: list[Mapping[str, Any]] = [
        {"name": f"g{i}", "test_error": 0.01 * i, "regret": 0.0, "error": None} for i in range(81)
    ]
    Table("every architecture", [*rows, {"name": "g81", "error": "<no> space"}], None, None).write(
        root
    )
    page = report_of(root)
    assert "g19" in page.text and "g20" not in page.text and "62 more rows in" in page.text
    assert "failed: g81: <no> space" in page.text


DAMAGES = ("[]", "{", '{"title": 3, "rows": []}', '{"title": "t", "rows": [3]}', "\xff")


@pytest.mark.parametrize("text", [*DAMAGES, "list", "numbers"])
def test_a_damaged_table_is_a_note(tmp_path, text: str) -> None:
    root = plant(tmp_path / "robust")
    values = json.loads((root / "table.json").read_text())
    if text == "list":
        text = json.dumps(values | {"rows": 3})
    if text == "numbers":
        values["rows"][0]["test_error"] = "much"
        text = json.dumps(values | {"mean": [1]})
    (root / "table.json").write_text(text, encoding="latin-1")
    found, unread = protocols_in([root])
    assert found == [] and [each.path for each in unread] == [str(root)]
    assert re.match(r"table\.json: (damaged|.*not UTF-8)", unread[0].reason)
    if text == "{":
        page = report_of(root)
        assert unread[0].reason in page.text and "1 run read" in page.text
        assert "of the selected" not in page.text


def test_a_protocol_that_goes_on_has_no_table_yet(tmp_path) -> None:
    root = plant(tmp_path / "robust")
    (root / "table.json").unlink()
    page = report_of(root)
    assert "robust has no table yet" in page.text and "1 run read" in page.text


def test_without_a_protocol_nothing_is_said_of_one(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "table.json").write_text("somebody else's")
    plant_search(tmp_path / "run" / "one", 2)
    page = report_of(tmp_path / "run")
    assert "selected" not in page.text and "table.json" not in page.text
