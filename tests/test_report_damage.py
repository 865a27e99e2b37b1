"""What the report makes of damaged, unfinished and foreign folders."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import pytest

from rdarts_fast import write_report
from rdarts_fast.errors import UserError
from rdarts_fast.report.search import Search
from rdarts_fast.run_dir import RunDir
from tests.planted_runs import plant_retraining, plant_search, read_metrics, write, write_metrics
from tests.report_page import Page, pictures_of, rows_in, written

LAMBDAS = {0: 0.125, 1: 0.25, 2: 0.5, 3: 1.0}


def damage(folder: Path, how: str) -> str:
    """Damage a planted search; return what the report says of it."""
    text = (folder / "metrics.jsonl").read_text()
    if how == "no metrics":
        (folder / "metrics.jsonl").unlink()
        return "cannot read metrics.jsonl: No such file or directory (ENOENT)"
    if how == "half a line":
        (folder / "metrics.jsonl").write_text(text + text[:40])
        return "metrics.jsonl: half a line at the end"
    if how == "a line of rubbish":
        first, rest = text.split("\n", 1)
        (folder / "metrics.jsonl").write_text(f"{first}\n{{rubbish\n{rest}")
        return "metrics.jsonl line 2: damaged, not JSON"
    if how == "genotype":
        (folder / "genotype.json").write_text('{"format": 1, "cells": 3}')
        return "genotype.json: genotype: cells: expected an object, got int"
    if how == "result":
        (folder / "result.json").write_text("[1]")
        return "result.json: damaged, expected an object, got list"
    if how == "space":
        (folder / "space.json").write_text("{")
        return "its search space could not be read"
    if how == "environment":
        (folder / "environment.json").unlink()
        return "cannot read environment.json"
    if how == "fewer settings":
        config = json.loads((folder / "config.json").read_text())
        del config["stop_rule"]
        write(folder / "config.json", config | {"extra": 1})
        return (
            "not a search of this version of rdarts_fast (config.json differs in extra, stop_rule)"
        )
    records = read_metrics(folder)
    if how == "missing fields":
        write_metrics(folder, [{"epoch": r["epoch"]} for r in records])
        return "4 of 4 epochs have no alphas that fit its space"
    if how == "numbers that are none":
        write_metrics(
            folder, [r | {"valid_accuracy": math.nan, "lambda_max": "x"} for r in records]
        )
        return "metrics.jsonl: no finite numbers, left out: lambda_max, valid_accuracy"
    if how == "no epochs":
        write_metrics(folder, [{"valid_accuracy": 0.5}, *records])
        return "metrics.jsonl: 1 lines without an epoch were left out"
    if how == "epochs twice":
        write_metrics(folder, [*records, *records])
        return "lambda_max without local average and stop: epoch: expected one after 3, got 0"
    raise AssertionError(how)


DAMAGES = (
    *("no metrics", "half a line", "a line of rubbish", "genotype", "result", "space"),
    *("environment", "fewer settings", "missing fields", "numbers that are none"),
    *("no epochs", "epochs twice"),
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Page, dict[str, str], Path]:
    """The report of a run for each damage, what it should say of it, and where it is."""
    root = tmp_path_factory.mktemp("damaged")
    said = {}
    for how in DAMAGES:
        settings = {"lambdas": LAMBDAS, "curvature": "lambda", "curvature_every": 1}
        run = plant_search(root / "runs" / how, space="s5", **settings)
        plant_retraining(root / "runs" / f"{how} retrained", run, 0.25)
        said[how] = damage(run, how)
    report = write_report(root / "runs", root / "out")
    assert (report.runs, report.unread) == (2 * len(DAMAGES), [])
    return written(root / "out"), said, root / "out"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_run_is_told_of_as_far_as_it_goes(damaged, how: str) -> None:
    page, said, out = damaged
    assert said[how] in page.parts[how]
    assert page.column("test error, %")[how] == "25.00"
    assert f"{how.replace(' ', '-')}-cells" in pictures_of(out)
    assert ("as epoch 3 of metrics.jsonl has them" in page.parts[how]) == (how == "genotype")
    whole = [other for other in DAMAGES if other != how and said[how] in page.parts[other]]
    assert not whole


def test_a_run_that_is_written_to_is_still_going(tmp_path) -> None:
    done = plant_search(tmp_path / "done", ended=False)
    config = json.loads((done / "config.json").read_text())
    with RunDir.create(tmp_path / "runs/going", config, {}) as run:
        run.append_metrics({"epoch": 0, "valid_accuracy": 0.5, "branch": 0})
        assert rows_in(tmp_path / "runs")["going"].found.state == "still going"
        write_report(tmp_path / "runs", tmp_path / "out")
        page = written(tmp_path / "out")
        assert page.column("state")["going"] == "still going"
        assert page.column("epochs")["going"] == "1 / 4"
        assert "Of these 1 is still going." in page.text
        assert "it has no genotype yet" in page.text
    row = rows_in(tmp_path / "runs")["going"]
    assert (row.found.state, row.notes) == ("not finished", [])
    for lock, note in (
        ("process 999999999 on HERE\n", "the process that wrote to it was killed"),
        ("process 1 on there\n", "process 1 on there writes to it, or was killed"),
    ):
        (tmp_path / "runs/going/lock").write_text(lock.replace("HERE", socket.gethostname()))
        row = rows_in(tmp_path / "runs")["going"]
        assert (row.found.state, row.notes) == ("not finished", [note])


def test_folders_that_are_no_runs_are_named_with_the_reason(tmp_path) -> None:
    run = plant_search(tmp_path / "run", 1, space="s5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/metrics.jsonl").touch()
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/config.json", {"a": 1})
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish/config.json").write_text("{")
    names = ("empty", "file", "half", "other", "rubbish", "absent")
    report = write_report([run, *(tmp_path / name for name in names)], tmp_path / "out")
    assert report.runs == 1
    reasons = {Path(unread.path).name: unread.reason for unread in report.unread}
    assert reasons == {
        "empty": "holds no run folder (none has a config.json)",
        "file": "is not a folder",
        "half": "is not a run folder: it has no config.json",
        "other": "its config.json is of no search and no retraining",
        "rubbish": reasons["rubbish"],
        "absent": "there is no such folder",
    }
    assert "damaged, not JSON" in reasons["rubbish"]
    page = written(tmp_path / "out")
    assert "6 folders could not be read:" in page.text
    assert all(reason in page.text for reason in reasons.values())


def test_nothing_readable_is_an_error_and_no_report(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"nothing to report on: .*empty: holds no run folder"):
        write_report(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no folders were named"):
        write_report([], tmp_path / "out")


def test_other_files_are_not_overwritten(tmp_path) -> None:
    run = plant_search(tmp_path / "run", 2)
    for name, text in (("notes.txt", "mine"), ("report.html", "<p>mine")):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text(text)
        with pytest.raises(UserError, match="is not empty and holds no earlier report"):
            write_report(run, out)
        assert [path.name for path in out.iterdir()] == [name]
    with pytest.raises(UserError, match="it is a file"):
        write_report(run, tmp_path / "notes/notes.txt")
    with pytest.raises(UserError, match="cannot write in"):
        write_report(run, tmp_path / "notes/notes.txt/out")


def test_an_earlier_report_is_replaced_with_its_pictures(tmp_path) -> None:
    out = tmp_path / "out"
    write_report(plant_search(tmp_path / "one", 2), out)
    assert "one-cells" in pictures_of(out)
    write_report(plant_search(tmp_path / "two", 2), out)
    assert "two-cells" in pictures_of(out) and "one-cells" not in pictures_of(out)


def test_alphas_of_another_space_are_left_out(tmp_path) -> None:
    run = plant_search(tmp_path / "run", 2)
    records = read_metrics(run)
    records[0]["alphas"]["normal"] = records[0]["alphas"]["normal"][:-1]
    write_metrics(run, records)
    search = Search.of(rows_in(run)["run"])
    assert sorted(search.alphas) == [1]
    assert search.notes == ["1 of 2 epochs have no alphas that fit its space"]
