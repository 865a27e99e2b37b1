"""The report: what it says of planted runs, what it makes of damaged ones, and that it is one page
that stands alone.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import scipy.stats

from rdarts_fast import config_sources, write_report
from rdarts_fast.analysis import analyse
from rdarts_fast.config import RetrainConfig, SearchConfig
from rdarts_fast.report import beside, groups, many
from rdarts_fast.report.__main__ import main
from rdarts_fast.report.commands import command_of
from rdarts_fast.report.markup import inlined, raw, tag
from rdarts_fast.report.numbers import Average, pearson, ranks, spearman
from rdarts_fast.retrain import run_retraining
from rdarts_fast.search import run_search
from tests.planted_runs import (
    accuracy_at,
    plant_retraining,
    plant_search,
    read_metrics,
    write,
    write_metrics,
)
from tests.report_page import Page, pictures_of, rows_in, written
from tests.small import settings
from tests.test_plots import texts_of

NAMES = "<b>&x_$y"

LAMBDAS = {0: 0.125, 1: 0.25, 2: 0.5, 3: 1.0}
ERRORS = {(3e-4, 0): 0.25, (3e-4, 1): 0.15, (27e-4, 0): 0.1, (27e-4, 1): 0.05}


@pytest.fixture(scope="module")
def robust(tmp_path_factory) -> Path:
    """Four searches of two weight decays and two seeds with both kinds of retraining."""
    root = tmp_path_factory.mktemp("planted") / "robust"
    for (decay, seed), error in ERRORS.items():
        name = f"l2-{decay:g}-seed{seed}"
        scale = 1.0 + seed + 100 * decay
        search = plant_search(
            root / "searches" / name,
            seed=seed,
            weight_decay=decay,
            curvature="lambda",
            curvature_every=1,
            lambdas={epoch: scale * value for epoch, value in LAMBDAS.items()},
            records={3: {"valid_accuracy": 0.75 + decay + seed / 100}},
        )
        short, final = root / "short" / name, root / "final" / name
        plant_retraining(short, search, error + 0.1, holdout=True)
        plant_retraining(final, search, error, epochs=3)
    return root


@pytest.fixture(scope="module")
def robust_report(robust, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "out"
    write_report(robust, out)
    return out


# Numbers


def test_the_table_has_the_numbers_of_the_folders(robust, robust_report) -> None:
    page = written(robust_report)
    assert len(page.tables[0]) == 1 + 12
    for decay, seed in ERRORS:
        name = f"l2-{decay:g}-seed{seed}"
        search, final, short = (f"{part}/{name}" for part in ("searches", "final", "short"))
        results = {
            part: json.loads((robust / part / "result.json").read_text())
            for part in (search, final, short)
        }
        values = [(1.0 + seed + 100 * decay) * value for value in LAMBDAS.values()]
        expected = {
            "supernet's validation accuracy, %": {search: 100 * results[search]["valid_accuracy"]},
            "test error, %": dict.fromkeys((search, final), 100 * results[final]["test_error"]),
            "validation error, short training, %": dict.fromkeys(
                (search, short), 100 * results[short]["valid_error"]
            ),
            "lambda_max, last": {search: values[-1]},
            "lambda_max, mean": {search: sum(values) / 4},
            "seconds": {search: 6.0, final: 3.25},
            "weight decay": {search: decay, final: 3e-4},
            "seed": {search: seed},
        }
        for title, cells in expected.items():
            found = page.column(title)
            for run, value in cells.items():
                assert float(found[run]) == pytest.approx(value, abs=0.5 * ulp(found[run])), title
        assert page.column("epochs")[final] == "3 / 3"
        assert page.column("kind")[short] == "short retraining"
        assert {page.column("state")[run] for run in results} == {"ended"}
    assert "12 runs read: 4 searches, 8 retrainings. All have ended." in page.text


def ulp(text: str) -> float:
    """The unit of the last digit written."""
    return 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-9)


def test_means_and_deviations_over_seeds(robust, robust_report) -> None:
    lines = csv_lines(robust_report)
    page = written(robust_report)
    markdown = (robust_report / "table.md").read_text().splitlines()
    latex = (robust_report / "table.tex").read_text()
    assert [float(line["weight_decay"]) for line in lines] == [3e-4, 27e-4]
    for line, decay, shown in zip(lines, (3e-4, 27e-4), markdown[2:], strict=True):
        errors = [error for (d, _), error in ERRORS.items() if d == decay]
        accuracies = [0.75 + decay + seed / 100 for seed in (0, 1)]
        lasts = [1.0 + seed + 100 * decay for seed in (0, 1)]
        for name, values in (
            ("test_error", errors),
            ("valid_error", [error + 0.1 for error in errors]),
            ("supernet_valid_accuracy", accuracies),
            ("lambda_last", lasts),
            ("lambda_mean", [value * 1.875 / 4 for value in lasts]),
        ):
            assert float(line[f"{name}_mean"]) == pytest.approx(fmean(values), rel=1e-12)
            assert float(line[f"{name}_deviation"]) == pytest.approx(stdev(values), rel=1e-12)
            assert line[f"{name}_count"] == "2"
        text = f"{100 * fmean(errors):.2f} ± {100 * stdev(errors):.2f}"
        assert shown.endswith(f"| {text} |") and text in page.text
        assert text.replace("±", "$\\pm$") in latex
        assert (line["space"], line["data"], line["method"], line["searches"]) == (
            *("s2", "digits", "DARTS"),
            "2",
        )
    assert len(page.tables) == 2  # of runs, of means


def csv_lines(out: Path) -> list[dict[str, str]]:
    """The lines of table.csv."""
    return list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))


def test_one_run_has_no_deviation() -> None:
    assert Average.of([0.5, None]) == Average(0.5, None, 1)
    assert Average.of([None]) is None
    assert Average(0.5, None, 1).text(2, 100.0) == "50.00"


def test_correlations_are_scipys() -> None:
    random = np.random.default_rng(0)
    for size in (3, 4, 10, 57):
        x = random.normal(size=size)
        y = x * random.normal() + random.normal(size=size)
        ties = random.integers(0, 3, size=size).astype(float)
        for a, b in ((x, y), (x, 1e-9 + 1e-12 * y), (x, ties), (1e8 * y, ties)):
            if len(set(b)) > 1:
                assert pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b)[0], rel=1e-9)
                assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0], rel=1e-9)
        assert ranks(ties) == list(scipy.stats.rankdata(ties))
    assert pearson([1, 2, 3], [0.1, 0.1, 0.1]) is None
    assert pearson([1, 2], [1, 3]) is None and spearman([1, 2], [1, 3]) is None


def test_correlations_in_words(robust, robust_report) -> None:
    x = [(1.0 + seed + 100 * decay) * 1.875 / 4 for decay, seed in ERRORS]
    y = list(ERRORS.values())
    words = f"Pearson {scipy.stats.pearsonr(x, y)[0]:.2f}, "
    words += f"Spearman {scipy.stats.spearmanr(x, y)[0]:.2f} over 4 searches"
    assert written(robust_report).text.count(words) == 2  # in the summary and below the picture
    assert "not enough for a correlation (2 searches)" in many.correlations({"a": [(1, 2), (2, 3)]})
    flat = many.correlations({"a": [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]})
    assert "no correlation" in flat


def test_what_a_rollback_has_undone_counts_nowhere(tmp_path) -> None:
    undone = {"lambda_max": 9.0, "abandoned": True, "stop_epoch": 0}
    run = plant_search(
        tmp_path / "ada",
        lambdas=LAMBDAS,
        curvature="lambda",
        curvature_every=1,
        adaptive="l2",
        result={"rollbacks": 1},
    )
    records = read_metrics(run)
    again = [{**record, "branch": 1} for record in records[1:]]
    write_metrics(run, [records[0], *[record | undone for record in records[1:]], *again])
    row = rows_in(run)["ada"]
    assert (row.lambda_last, row.lambda_mean) == (1.0, fmean(LAMBDAS.values()))
    assert (row.rollbacks, row.stop_epoch, row.epochs_done) == (1, 0, 4)
    assert row.method == "DARTS-ADA (l2)"
    write_report(run, tmp_path / "out")
    page = written(tmp_path / "out")
    assert page.column("rollbacks")["ada"] == "1" and page.column("stop epoch")["ada"] == "0"
    assert "Fainter: epochs that a rollback has undone." in page.text


# Which retraining belongs to which search


def test_retrainings_find_their_search_after_a_move_and_in_a_copy(robust, tmp_path) -> None:
    shutil.copytree(robust, tmp_path / "copy")
    rows = rows_in(robust, tmp_path / "copy")
    assert len(rows) == 24
    for row in rows.values():
        if not row.searched:
            assert row.source is not None and row.source.name.split("/")[0] in ("robust", "copy")
    for row in rows_in(tmp_path / "copy").values():
        assert row.searched or row.source is not None
    moved = tmp_path / "moved"
    plant_retraining(moved / "final/a", plant_search(moved / "searches/a"), 0.3)
    moved.rename(tmp_path / "elsewhere")
    assert rows_in(tmp_path / "elsewhere")["searches/a"].test_cost == 0.3


def test_a_search_of_the_same_name_is_not_taken_for_another(tmp_path) -> None:
    plant_retraining(tmp_path / "r", plant_search(tmp_path / "one/a", seed=1), 0.3)
    plant_search(tmp_path / "two/a", seed=2)
    rows = rows_in(tmp_path / "r", tmp_path / "two")
    assert rows["r"].source is None and rows["two/a"].test_cost is None
    assert rows["r"].notes == ["its search is not among these runs"]


def test_the_longest_retrainings_of_the_found_genotype_count(tmp_path) -> None:
    search = plant_search(tmp_path / "s")
    plant_retraining(tmp_path / "quick", search, 0.9, epochs=1)
    plant_retraining(tmp_path / "a", search, 0.2, epochs=3)
    plant_retraining(tmp_path / "b", search, 0.4, epochs=3, seed=1)
    plant_retraining(tmp_path / "going", search, 0.7, epochs=9, ended=False)
    plant_retraining(tmp_path / "g/epoch-001", search, 0.8, epochs=3, genotypes_at="1")
    plant_retraining(tmp_path / "g/epoch-003", search, 0.6, epochs=3, genotypes_at="3")
    rows = rows_in(tmp_path)
    assert rows["s"].test_cost == pytest.approx((0.2 + 0.4 + 0.6) / 3)  # epoch 3 is the last
    assert [row.test_cost for row in rows["s"].at(1)] == [0.8]


def test_stopped_early_is_a_method_where_all_its_genotypes_were_retrained(tmp_path) -> None:
    settings = {"curvature": "lambda", "early_stop": "simulate"}
    for seed, stop in enumerate((1, 2, None)):
        early = {} if stop is None else {"early_stop": {"epoch": stop}}
        lambdas = dict.fromkeys(range(4), 0.1)
        name = f"s{seed}"
        search = plant_search(tmp_path / name, seed=seed, lambdas=lambdas, result=early, **settings)
        plant_retraining(tmp_path / f"{name}-last", search, 0.5 + seed / 10)
        if stop is not None:
            plant_retraining(
                tmp_path / f"{name}-early", search, 0.1 + seed / 10, genotypes_at=str(stop)
            )
    found = {g.method: g.costs for g in groups.groups_of(list(rows_in(tmp_path).values()))}
    assert found["DARTS"] == pytest.approx([0.5, 0.6, 0.7])
    assert found["DARTS-ES"] == pytest.approx([0.1, 0.2, 0.7])
    shutil.rmtree(tmp_path / "s1-early")
    assert "DARTS-ES" not in {g.method for g in groups.groups_of(list(rows_in(tmp_path).values()))}


# Pictures


def test_each_figure_only_where_the_runs_have_its_data(robust_report, tmp_path) -> None:
    found = pictures_of(robust_report)
    assert {"by-weight_decay", "lambda-and-error"} <= found
    panels = texts_of(robust_report / "pictures/by-weight_decay.svg")
    assert {"retrained networks", "curvature", "supernets"} <= set(panels)
    assert "networks retrained for a short time" not in panels
    assert not found & {"by-drop_path_prob", "by-epoch", "regret", "lambda-and-drop"}
    assert sum(name.endswith("-epochs") for name in found) == 3
    for part in ("cells", "course", "lambda", "alphas"):
        assert sum(name.endswith(f"-{part}") for name in found) == 4
    for seed, drop_path in enumerate((0.0, 0.2)):
        search = plant_search(
            tmp_path / f"runs/s{seed}",
            space="s5",
            drop_path_prob=drop_path,
            lambdas=LAMBDAS,
            records={epoch: {"regret": 0.1 / (1 + epoch)} for epoch in range(4)},
            spectrum=True,
        )
        for epoch in (0, 2):
            plant_retraining(
                tmp_path / f"runs/s{seed}-genotypes/epoch-00{epoch}",
                search,
                0.1 + epoch / 100,
                genotypes_at=str(epoch),
            )
        (search / "analysis").mkdir()
        cost = {"epoch": 3, "supernet": 0.75, "discretised": 0.5, "drop": 0.25}
        write(search / "analysis/analysis.json", {"discretisation": cost})
    write_report(tmp_path / "runs", tmp_path / "out")
    found = pictures_of(tmp_path / "out")
    wanted = {"by-drop_path_prob", "by-epoch", "regret", "lambda-and-drop", "s0-spectrum"}
    assert wanted <= found and "by-weight_decay" not in found
    page = written(tmp_path / "out")
    assert "from 75.00 % to 50.00 %, a drop of 25.00 points" in page.text
    assert "The best genotypes are of epoch 0" in page.text
    assert "It ends at 2.50 points on average over 2 searches." in page.text
    assert "landscape.npz: missing or damaged" in page.text


def test_short_retrainings_stand_in_where_only_the_chosen_have_a_test_error(tmp_path) -> None:
    for decay in (3e-4, 27e-4):
        name = f"l2-{decay:g}"
        search = plant_search(tmp_path / "r/searches" / name, 1, space="s5", weight_decay=decay)
        plant_retraining(tmp_path / "r/short" / name, search, 0.5, holdout=True)
    plant_retraining(tmp_path / "r/final/l2-0.0003", tmp_path / "r/searches/l2-0.0003", 0.25)
    write_report(tmp_path / "r", tmp_path / "out", details=0)
    found = texts_of(tmp_path / "out/pictures/by-weight_decay.svg")
    assert "networks retrained for a short time" in found and "supernets" in found
    assert "retrained networks" not in found and "curvature" not in found


def test_a_random_search_has_cells_and_a_loss_but_no_alphas(tmp_path) -> None:
    run = plant_search(tmp_path / "random", 2, result={"valid_error": 0.25, "valid_accuracy": None})
    config = json.loads((run / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("alpha")}
    write(run / "config.json", kept | {"samples": 100})
    records = [{"epoch": r["epoch"], "train_loss": r["train_loss"]} for r in read_metrics(run)]
    write_metrics(run, records)
    write_report(run, tmp_path / "out")
    page = written(tmp_path / "out")
    assert page.column("kind")["random"] == "random search"
    assert page.column("supernet's validation accuracy, %")["random"] == "75.00"
    assert page.column("method", 1) == {"s2": "RandomNAS-ws"}
    assert pictures_of(tmp_path / "out") == {"random-cells", "random-course"}
    assert "missing" not in page.text and "analysis" not in page.text


def test_a_trajectory_says_where_the_rule_stops(tmp_path) -> None:
    rule = {"curvature": "lambda", "curvature_every": 1, "stop_window": 1, "stop_delta": 1}
    rule |= {"stop_start_epoch": 0}
    plant_search(tmp_path / "grows", 5, lambdas={0: 0.1, 1: 0.1, 2: 0.2, 3: 0.2, 4: 0.2}, **rule)
    plant_search(tmp_path / "flat", 5, lambdas=dict.fromkeys(range(5), 0.1), **rule)
    write_report([tmp_path / "grows", tmp_path / "flat"], tmp_path / "out")
    text = written(tmp_path / "out").text
    assert "It goes from 0.100 at epoch 0 to 0.200 at epoch 4." in text
    assert (
        "grows after epoch 1, which foretells a degenerate cell: the rule would stop at 1" in text
    )
    assert "never grows by more than the rule allows: no stop" in text


def test_more_searches_than_asked_for_are_named(tmp_path) -> None:
    runs = [plant_search(tmp_path / name, 1, space="s5") for name in ("a", "b", "c")]
    report = write_report(runs, tmp_path / "out", details=1)
    text = written(tmp_path / "out").text
    assert text.count("The found cells") == 1
    assert "2 of the 3 searches have no part of their own here" in text
    assert report.pictures == len(pictures_of(tmp_path / "out")) == 3  # cells, course, alphas
    assert write_report(runs, tmp_path / "out", details=None).pictures == 9
    assert written(tmp_path / "out").text.count("The found cells") == 3
    assert write_report(runs, tmp_path / "out", details=0).pictures == 0


def test_pictures_in_a_page_have_their_own_ids_and_no_styles(tmp_path) -> None:
    path = tmp_path / "p.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'width="9" height="9" viewBox="0 0 9 9"><metadata>m</metadata><defs>'
        '<style>*{color:red}</style><clipPath id="a"/>'
        '<path id="b" d="M 0.123456 1&#10;L 2 3"/></defs>'
        '<g id="unused" clip-path="url(#a)"><use xlink:href="#b"/>'
        '<text style="font-size: 9px; font-family: Some, Thing; fill: red">id="a" '
        "&lt;b&gt;</text></g></svg>"
    )
    found = inlined(path, "p7-", 'a "title" <b>')
    assert found == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="a &quot;title&quot; &lt;b&gt;"><defs>'
        '<clipPath id="p7-a" /><path id="p7-b" d="M 0.12 1L 2 3" /></defs>'
        '<g clip-path="url(#p7-a)"><use href="#p7-b" />'
        '<text style="font-size: 9px; fill: red">id="a" &lt;b&gt;</text></g></svg>'
    )
    Page(found)


# Names


def test_names_are_text_everywhere(tmp_path) -> None:
    name = f"{NAMES}{{%}}~^#|\\="
    search = plant_search(
        tmp_path / "runs" / NAMES, lambdas=LAMBDAS, data=f"npz:/x/{NAMES}.npz", curvature="lambda"
    )
    space = json.loads((search / "space.json").read_text())
    write(search / "space.json", {**space, "name": name})
    plant_retraining(tmp_path / "runs/r", search, 0.25)
    plant_search(tmp_path / "runs/other", lambdas=LAMBDAS, weight_decay=0.1)
    write_report(tmp_path / "runs", tmp_path / "out")
    page = written(tmp_path / "out")
    assert page.column("space")[NAMES] == name and page.column("data")[NAMES] == f"npz:{NAMES}.npz"
    assert (tmp_path / "out/report.html").read_text().count("<b>") == len(
        re.findall(r"<b>[^<]*</b>", (tmp_path / "out/report.html").read_text())
    )
    latex = (tmp_path / "out/table.tex").read_text()
    written_name = (
        "\\textless{}b\\textgreater{}\\&x\\_\\$y\\{\\%\\}\\textasciitilde{}\\textasciicircum{}\\#"
        "\\textbar{}\\textbackslash{}="
    )
    assert written_name in latex
    markdown = (tmp_path / "out/table.md").read_text().splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown} == {12}
    lines = csv_lines(tmp_path / "out")
    assert name in {line["space"] for line in lines}


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_name_is_a_formula_in_a_spreadsheet(start: str, tmp_path) -> None:
    search = plant_search(tmp_path / "s", 1)
    space = json.loads((search / "space.json").read_text())
    write(search / "space.json", {**space, "name": f'{start}1+"a",\n2'})
    table = groups.to_csv(groups.groups_of(list(rows_in(search).values())))
    (line,) = csv.DictReader(io.StringIO(table))
    assert line["space"] == f'\'{start}1+"a",�2' and float(line["weight_decay"]) == 3e-4


def test_text_that_no_page_may_hold_is_replaced() -> None:
    assert raw("a\x00\ud800\x1b\n<") == "a���\n&lt;"
    assert tag("p", "x", title='"<').text == '<p title="&quot;&lt;">x</p>'


# Beside the paper


PAPER = {"preset": "paper", "data": "cifar10", "space": "s1", "epochs": 50}


def test_only_what_was_made_like_the_paper_stands_beside_it(tmp_path) -> None:
    for seed, error in enumerate((0.04, 0.05)):
        search = plant_search(
            tmp_path / f"runs/s{seed}", seed=seed, lambdas={49: 0.5 + seed}, **PAPER
        )
        plant_retraining(
            tmp_path / f"runs/r{seed}",
            search,
            error,
            epochs=600,
            layers=20,
            channels=36,
            data="cifar10",
            ended=True,
        )
    plant_search(tmp_path / "runs/short", **PAPER | {"epochs": 25})
    rows = list(rows_in(tmp_path / "runs").values())
    text = beside.section(rows).text
    page = Page(text)
    case = ["s1", "cifar10", "darts", "0"]
    here = f"4.50 ± {100 * stdev([0.04, 0.05]):.2f} (2)"
    accuracy = f"{100 * accuracy_at(49):.2f} ± 0.00 (2)"
    assert page.tables[0][1:] == [
        [*case, "test error, %", here, "4.66 ± 0.71 (3)", "W T1"],
        [*case, "supernet's validation accuracy, %", accuracy, "87.07 ± 0.13 (3)", "W T2"],
        [*case, "lambda_max, last", "1.000 ± 0.707 (2)", "0.852 ± 0.163 (3)", "W T2"],
    ]
    assert "1 search: search: epochs 25 (published 50)" in page.text


def test_runs_unlike_the_papers_have_one_line_that_says_why(robust) -> None:
    page = Page(beside.section(list(rows_in(robust).values())).text)
    assert page.tables == []
    assert page.text.count("no published numbers for s2 on digits") == 1
    assert "4 searches: no published numbers for s2 on digits" in page.text


# Commands


def test_the_commands_make_the_same_settings(tmp_path) -> None:
    search = plant_search(
        tmp_path / "a b",
        weight_decay=9e-4,
        curvature="lambda",
        curvature_decay=False,
        flip=True,
        epoch_steps=3,
        seed=7,
    )
    run = plant_retraining(tmp_path / "r", search, 0.25, auxiliary=False, holdout=True, seed=2)
    for folder, kind in ((search, SearchConfig), (run, RetrainConfig)):
        command = command_of(rows_in(folder)[folder.name])
        assert command is not None
        words = shlex.split(command)
        assert words[:3] == [
            "python",
            "-m",
            f"rdarts_fast.{'search' if kind is SearchConfig else 'retrain'}",
        ]
        assert "--epochs" in words if kind is RetrainConfig else "--momentum" not in words
        parsed = config_sources.parse(kind, "", "x", words[3:])
        wanted = config_sources.stored(kind, folder, "x")
        for field in dataclasses.fields(kind):
            if field.name not in ("out", "resume", "data_root", "threads"):
                assert getattr(parsed, field.name) == getattr(wanted, field.name), field.name


# As a program, on real runs


def test_the_report_of_real_runs(tmp_path, monkeypatch, capsys) -> None:
    changes = {"curvature": "spectrum", "curvature_every": 1, "epochs": 3}
    search = run_search(**settings(tmp_path, out=tmp_path / "runs/search", **changes))
    data = {"data": search.config["data"], "channels": 2, "layers": 3, "device": "cpu"}
    run_retraining(source=str(search.folder), epochs=2, out=tmp_path / "runs/r", **data)
    analyse(search.folder, points=3, device="cpu")
    monkeypatch.setattr(sys, "argv", ["report", f"{tmp_path}/runs", "--out", f"{tmp_path}/out"])
    capsys.readouterr()
    main()
    assert capsys.readouterr().out.startswith("2 runs read\nwritten: ")
    page = written(tmp_path / "out")
    shown = page.column("supernet's validation accuracy, %")["search"]
    assert float(shown) == pytest.approx(100 * search.result["valid_accuracy"], abs=0.006)
    assert {"search-landscape", "search-spectrum", "search-alphas"} <= pictures_of(tmp_path / "out")
    assert "a drop of" in page.text and "None" not in page.text and "nan" not in page.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "error: nothing to report on: absent: there is no such folder"),
        ([".", "--details", "few"], "error: --details: expected a whole number from 0 on, or all"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(
    tmp_path, monkeypatch, capsys, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert told.err.startswith(words) and told.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_fifty_runs_of_fifty_epochs_take_seconds_and_megabytes(tmp_path, capsys) -> None:
    for i in range(50):
        lambdas = {epoch: 0.1 + 0.002 * i * epoch for epoch in range(0, 50, 2)}
        decay = {"weight_decay": 3e-4 * 3 ** (i % 5), "curvature": "spectrum"}
        folder = tmp_path / f"runs/s{i:02d}"
        plant_search(folder, 50, lambdas=lambdas, spectrum=True, seed=i // 5, **decay)
    started = time.monotonic()
    write_report(tmp_path / "runs", tmp_path / "out")
    seconds = time.monotonic() - started
    size = (tmp_path / "out/report.html").stat().st_size / 1e6
    with capsys.disabled():
        print(f"\n50 runs of 50 epochs: {seconds:.1f} s, {size:.1f} MB")
    written(tmp_path / "out")
    assert size < 20
