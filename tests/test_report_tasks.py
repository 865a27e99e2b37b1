"""The report on runs of other tasks than classification, alone and beside each other."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from statistics import fmean, stdev

import pytest

from rdarts_fast import config_sources, write_report
from rdarts_fast.config import RetrainConfig, SearchConfig
from rdarts_fast.metrics import METRICS, metric_of, task_of
from rdarts_fast.report import beside, groups, many
from rdarts_fast.report.commands import command_of
from rdarts_fast.report.numbers import Average, Scale, fixed
from rdarts_fast.report.search import Search, edges_of
from rdarts_fast.spaces import CELLS, FAMILIES, SPACES
from tests.planted_runs import (
    SCORES,
    plant_retraining,
    plant_search,
    read_metrics,
    write,
    write_metrics,
)
from tests.report_page import Page, pictures_of, rows_in, written
from tests.test_plots import texts_of

LAMBDAS = {0: 0.125, 1: 0.25, 2: 0.5, 3: 1.0}
COSTS = {
    "classification": (0.25, 0.15, 0.1, 0.05),
    "language": (110.5, 98.25, 120.0, 90.0),
    "disparity": (3.5, 2.75, 2.0, 4.0),
}
# Of a column on the page; the columns of table.csv; a number as the page has it.
TITLES = {
    "classification": (
        *("test error, %", "supernet's validation accuracy, %"),
        "validation error, short training, %",
    ),
    "language": (
        *("test perplexity", "supernet's validation perplexity"),
        "validation perplexity, short training",
    ),
    "disparity": (
        *("test EPE, px", "supernet's validation EPE, px"),
        "validation EPE, short training, px",
    ),
}
COLUMNS = {
    "classification": ("supernet_valid_accuracy", "valid_error", "test_error"),
    "language": ("supernet_valid_perplexity", "valid_perplexity", "test_perplexity"),
    "disparity": ("supernet_valid_epe", "valid_epe", "test_epe"),
}
SAID = {"classification": "25.00 %", "language": "110.50", "disparity": "3.50 px"}


def plant(root: Path, task: str) -> None:
    """Write four searches of two weight decays, each with both kinds of retraining."""
    for i, cost in enumerate(COSTS[task]):
        search = plant_search(
            root / task / f"s{i}",
            task=task,
            seed=i % 2,
            weight_decay=(3e-4, 27e-4)[i // 2],
            curvature="lambda",
            curvature_every=1,
            lambdas={epoch: (1 + i) * value for epoch, value in LAMBDAS.items()},
        )
        plant_retraining(root / task / f"final-s{i}", search, cost, epochs=3)
        plant_retraining(root / task / f"short-s{i}", search, cost + 0.125, holdout=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for task in METRICS:
        plant(root, task)
    return root


@pytest.fixture(scope="module")
def reports(planted, tmp_path_factory) -> dict[str, Path]:
    """A report for each task, and "all" on all of them."""
    outs = {task: tmp_path_factory.mktemp(task) / "out" for task in (*METRICS, "all")}
    for task, out in outs.items():
        write_report(planted if task == "all" else planted / task, out)
    return outs


def test_every_task_is_planted() -> None:
    assert set(METRICS) == set(FAMILIES) == set(COSTS) == set(SCORES)


# One task


@pytest.mark.parametrize("task", METRICS)
def test_the_table_has_the_tasks_numbers_and_units(task: str, reports) -> None:
    page = written(reports[task])
    factor = 100.0 if task == "classification" else 1.0
    tested, supernet, shortly = (page.column(title) for title in TITLES[task])
    score = SCORES[task](3)
    for i, cost in enumerate(COSTS[task]):
        for run in (f"s{i}", f"final-s{i}"):
            assert tested[run] == f"{factor * cost:.2f}"
        for run in (f"s{i}", f"short-s{i}"):
            assert shortly[run] == f"{factor * (cost + 0.125):.2f}"
        assert supernet[f"s{i}"] == f"{factor * score:.2f}"
    best = min(COSTS[task])
    metric = METRICS[task]
    assert f"lowest test {metric.cost_name}: final-s{COSTS[task].index(best)}" in page.text
    assert f"test {metric.cost_name} of the retrained network {SAID[task]}." in page.parts["s0"]
    for other in set(METRICS) - {task}:
        assert not set(TITLES[other]) & {cell for table in page.tables for cell in table[0]}
        for word in {METRICS[other].name, METRICS[other].cost} - {"epe", "error"}:
            assert word not in page.text, word


@pytest.mark.parametrize("task", METRICS)
def test_the_course_and_the_figures_are_of_the_tasks_metric(task: str, reports) -> None:
    metric, out = METRICS[task], reports[task]
    page = written(out)
    found = pictures_of(out)
    assert {"by-weight_decay", "lambda-and-error", "s0-course", "s0-cells", "s0-alphas"} <= found
    title = {"disparity": "EPE, px"}.get(task, metric.name)
    assert title in texts_of(out / "pictures/s0-course.svg")
    panels = set(texts_of(out / "pictures/by-weight_decay.svg"))
    scale = Scale(metric)
    assert {scale.titled(scale.test), scale.titled(scale.valid), "lambda_max"} <= panels
    assert scale.titled(scale.test) in texts_of(out / "pictures/lambda-and-error.svg")
    best = "highest" if task == "classification" else "lowest"
    score = scale.said(SCORES[task](3))
    assert f"The validation {metric.score_name} ends at {score}, its {best}." in page.parts["s0"]
    x, y = [(1 + i) * 1.875 / 4 for i in range(4)], list(COSTS[task])
    space = SPACES["s2"].name if task == "classification" else rows_space(task)
    words = many.correlations({space: list(zip(x, y, strict=True))})
    told = words.split(": ", 1)[1]
    assert page.text.count(told) == 2 and f"against test {metric.cost_name}:" in page.text


def rows_space(task: str) -> str:
    """The space that is planted."""
    return next(name for name, space in SPACES.items() if space.task == task)


def test_a_wide_range_of_perplexities_is_on_a_logarithmic_axis(tmp_path) -> None:
    for name, scores in {"wide": (3000.0, 400.0, 150.0), "narrow": (130.0, 120.0, 110.0)}.items():
        records = {
            e: {"valid_perplexity": score, "train_perplexity": score}
            for e, score in enumerate(scores)
        }
        plant_search(tmp_path / "runs" / name, 3, task="language", records=records)
    write_report(tmp_path / "runs", tmp_path / "out")
    shown = {
        name: set(texts_of(tmp_path / f"out/pictures/{name}-course.svg"))
        for name in ("wide", "narrow")
    }
    assert {"200", "500", "1000", "2000"} <= shown["wide"]
    assert {"110.0", "130.0"} <= shown["narrow"] and "200" not in shown["narrow"]
    page = written(tmp_path / "out")
    assert "ends at 150.00, its lowest" in page.parts["wide"]


def test_what_was_best_before_the_end_is_said(tmp_path) -> None:
    for task, scores in {"classification": (0.5, 0.75, 0.7), "disparity": (4.0, 2.5, 3.0)}.items():
        name = f"valid_{METRICS[task].name}"
        records = {e: {name: score} for e, score in enumerate(scores)}
        plant_search(tmp_path / "runs" / task, 3, task=task, records=records)
    write_report(tmp_path / "runs", tmp_path / "out")
    parts = written(tmp_path / "out").parts
    assert "ends at 70.00 %, its highest was 75.00 %." in parts["classification"]
    assert "ends at 3.00 px, its lowest was 2.50 px." in parts["disparity"]


def test_cells_of_every_type_are_drawn(reports) -> None:
    for task, kinds in FAMILIES.items():
        part = written(reports[task]).parts["s0"]
        cells = texts_of(reports[task] / "pictures/s0-cells.svg")
        alphas = texts_of(reports[task] / "pictures/s0-alphas.svg")
        strip = texts_of(reports[task] / "pictures/s0-epochs.svg")
        titles = {
            "normal": "normal cell",
            "reduce": "reduction cell",
            "upsample": "upsampling cell",
            "recurrent": "recurrent cell",
        }
        for kind in kinds:
            assert cells.count(titles[kind]) == alphas.count(titles[kind]) == 1
            assert titles[kind].removesuffix(" cell") in strip
            words = [name for name in CELLS[kind].inputs if "_" not in name]
            assert set(words) <= set(cells)
            assert {f"{name} → 0" for name in words} <= set(alphas)
        nodes = SPACES[rows_space(task)].nodes
        kept = sum(CELLS[kind].kept_by(node) for kind in kinds for node in range(nodes))
        assert f"of the {kept} kept edges are" in part
    assert "identities" in written(reports["language"]).parts["s0"]
    assert "s₀ → 0" in texts_of(reports["language"] / "pictures/s0-alphas.svg")
    assert "The dot at the left is the input s₀" in written(reports["language"]).parts["s0"]
    inputs = "from the top cₖ₋₂, cₖ₋₁, prediction, encoder"
    assert inputs in written(reports["disparity"]).parts["s0"]


def test_a_strip_of_many_nodes_has_fewer_columns(tmp_path) -> None:
    for task, columns in (("language", 3), ("disparity", 6)):
        plant_search(tmp_path / "runs" / task, 12, task=task)
        write_report(tmp_path / "runs" / task, tmp_path / task)
        (strip,) = (tmp_path / task / "pictures").glob("*-epochs.svg")
        titles = [text for text in texts_of(strip) if text.startswith("epoch ")]
        assert len(titles) == columns and titles[0] == "epoch 0" and titles[-1] == "epoch 11"


def test_a_random_search_has_the_score_of_its_cost(tmp_path) -> None:
    for task, name, cost, shown in (
        ("language", "perplexity", 123.0, "123.00"),
        ("disparity", "epe", 3.25, "3.25"),
    ):
        run = plant_search(tmp_path / task, 2, task=task, result={f"valid_{name}": cost})
        config = json.loads((run / "config.json").read_text())
        kept = {name: value for name, value in config.items() if not name.startswith("alpha")}
        write(run / "config.json", kept | {"samples": 100})
        write_metrics(run, [{"epoch": r["epoch"], "train_loss": 1.0} for r in read_metrics(run)])
        write_report(run, tmp_path / f"{task}-out")
        page = written(tmp_path / f"{task}-out")
        assert page.column("kind")[task] == "random search"
        assert page.column(TITLES[task][1])[task] == shown


def test_only_a_short_training_has_the_cost_of_one(tmp_path) -> None:
    """A full training of a language model validates too, after each epoch."""
    search = plant_search(tmp_path / "runs/s", task="language")
    plant_retraining(tmp_path / "runs/short", search, 300.0, holdout=True)
    full = plant_retraining(tmp_path / "runs/full", search, 120.0, epochs=4)
    write_metrics(full, [record | {"valid_perplexity": 130.0} for record in read_metrics(full)])
    write_report(tmp_path / "runs", tmp_path / "out")
    page = written(tmp_path / "out")
    short = page.column("validation perplexity, short training")
    assert short == {"s": "300.00", "short": "300.00", "full": "–"}
    assert page.column("test perplexity")["full"] == "120.00"
    assert page.column("also")["full"] == "validation perplexity 130"


def test_further_measures_stand_beside(tmp_path) -> None:
    search = plant_search(
        tmp_path / "runs/s",
        task="disparity",
        records={3: {"valid_bad3": 0.125, "valid_<b>": 2.0, "valid_none": None}},
    )
    run = plant_retraining(tmp_path / "runs/r", search, 3.0)
    last = [r | {"test_bad3": 0.0, "valid_bad3": 0.5} for r in read_metrics(run)]
    write_metrics(run, last)
    write_report(tmp_path / "runs", tmp_path / "out")
    assert written(tmp_path / "out").column("also") == {"s": "bad3 0.125, <b> 2", "r": "bad3 0"}


def test_runs_without_a_task_are_classification(tmp_path) -> None:
    search = plant_search(tmp_path / "runs/s")
    run = plant_retraining(tmp_path / "runs/r", search, 0.25)
    for folder in (search, run):
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("task") == "classification"
        write(folder / "config.json", config)
    assert rows_in(tmp_path / "runs")["s"].test_cost == 0.25
    write_report(tmp_path / "runs", tmp_path / "out")
    assert written(tmp_path / "out").column("test error, %") == {"s": "25.00", "r": "25.00"}
    for strange in (None, 3, ["language"], "<b>"):
        assert task_of(strange) == "classification" and metric_of(strange).cost == "error"


# Several tasks in one folder


def test_no_column_has_numbers_of_two_metrics(reports, planted) -> None:
    page = written(reports["all"])
    runs, means = page.tables[:3], page.tables[3:]
    assert len(page.tables) == 6
    for task, table, mean in zip(METRICS, runs, means, strict=True):
        assert set(TITLES[task]) <= set(table[0])
        assert all(line[0].split("/")[0] == task for line in table[1:]) and len(table) == 1 + 12
        shown = mean[0][-1]
        assert shown == TITLES[task][0] and len(mean) == 3
        factor = 100.0 if task == "classification" else 1.0
        for line, costs in zip(mean[1:], (COSTS[task][:2], COSTS[task][2:]), strict=True):
            text = f"{factor * fmean(costs):.2f} ± {factor * stdev(costs):.2f}"
            assert line[-1] == text
    headings = [w for w in page.words if w in METRICS]
    assert headings == [*METRICS] * 3  # of runs, figures, means
    for task in METRICS:
        assert page.text.count(f"lowest test {METRICS[task].cost_name}:") == 1


def test_no_picture_has_numbers_of_two_metrics(reports) -> None:
    names = {scale.titled(scale.test): task for task in METRICS if (scale := Scale(METRICS[task]))}
    for stem in ("by-weight_decay", "lambda-and-error"):
        shown = []
        for picture in (reports["all"] / "pictures").glob(f"{stem}*.svg"):
            texts = texts_of(picture)
            tasks = {names[text] for text in texts if text in names}
            assert len(tasks) == 1, picture
            shown += tasks
        assert sorted(shown) == sorted(METRICS)


def test_the_tables_to_paste_are_apart(reports) -> None:
    markdown = (reports["all"] / "table.md").read_text().split("\n\n")
    latex = (reports["all"] / "table.tex").read_text()
    assert len(markdown) == latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 3
    for task, table in zip(METRICS, markdown, strict=True):
        alone = (reports[task] / "table.md").read_text()
        assert table.strip() == alone.strip()
        assert (reports[task] / "table.tex").read_text() in latex


def test_every_metric_has_columns_of_its_own_in_the_spreadsheet(reports) -> None:
    lines = list(csv.DictReader(io.StringIO((reports["all"] / "table.csv").read_text())))
    assert len(lines) == 6
    for task, pair in zip(METRICS, (lines[:2], lines[2:4], lines[4:]), strict=True):
        for line, costs in zip(pair, (COSTS[task][:2], COSTS[task][2:]), strict=True):
            supernet, valid, test = COLUMNS[task]
            assert float(line[f"{test}_mean"]) == pytest.approx(fmean(costs), rel=1e-12)
            assert float(line[f"{valid}_mean"]) == pytest.approx(fmean(costs) + 0.125, rel=1e-12)
            assert float(line[f"{supernet}_mean"]) == pytest.approx(SCORES[task](3), rel=1e-12)
            assert line[f"{test}_count"] == line["lambda_last_count"] == "2"
            for other in set(METRICS) - {task}:
                for name in COLUMNS[other]:
                    assert {line[f"{name}_{p}"] for p in ("mean", "deviation", "count")} == {""}


def test_a_retraining_is_not_taken_for_one_of_another_tasks_search(tmp_path) -> None:
    search = plant_search(tmp_path / "one/s", task="language")
    run = plant_retraining(tmp_path / "runs/r", search, 99.0)
    config = json.loads((run / "config.json").read_text())
    write(run / "config.json", config | {"source": str(tmp_path / "gone/s")})
    plant_search(tmp_path / "runs/s", task="disparity")
    rows = rows_in(tmp_path / "runs")
    assert rows["r"].source is None and rows["s"].test_cost is None
    (tmp_path / "one/s").rename(tmp_path / "runs/t")
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/t").rename(tmp_path / "runs/other/s")
    found = {str(row.found.folder): row for row in rows_in(tmp_path / "runs").values()}
    assert found[str(tmp_path / "runs/r")].source is found[str(tmp_path / "runs/other/s")]


def test_only_image_classifiers_stand_beside_the_paper(planted, tmp_path) -> None:
    rows = list(rows_in(planted).values())
    text = Page(beside.section(rows).text).text
    for task in METRICS:
        space = "s2" if task == "classification" else rows_space(task)
        assert f"4 searches: no published numbers for {space} on " in text
    paper = {"preset": "paper", "data": "cifar10", "space": "s1", "epochs": 50}
    search = plant_search(tmp_path / "s", lambdas={49: 0.5}, **paper)
    assert Page(beside.section(list(rows_in(search).values())).text).tables
    config = json.loads((search / "config.json").read_text())
    write(search / "config.json", config | {"task": "language"})
    page = Page(beside.section(list(rows_in(search).values())).text)
    assert page.tables == [] and "no published numbers for s1 on cifar10" in page.text


def test_groups_are_in_the_order_of_the_tasks(planted) -> None:
    found = groups.groups_of(list(reversed(rows_in(planted).values())))
    assert list(groups.tables_of(found)) == list(METRICS)


# Numbers


def test_scores_and_costs_are_each_others() -> None:
    for metric in METRICS.values():
        assert metric.cost_of(metric.cost_of(0.25)) == 0.25
        assert metric.more_is_better == (metric.cost_of(0.9) < metric.cost_of(0.1))


def test_numbers_have_their_units() -> None:
    share, words, pixels = (Scale(metric) for metric in METRICS.values())
    assert [s.said(0.125) for s in (share, words, pixels)] == ["12.50 %", "0.12", "0.12 px"]
    assert [s.difference(0.5) for s in (share, words, pixels)] == [
        "50.00 points",
        "0.50",
        "0.50 px",
    ]
    assert [s.text(None) for s in (share, words, pixels)] == ["–"] * 3
    assert fixed(1e9, 2) == "1e+09" and fixed(-123456.789, 2) == "-123456.79"
    assert Average(1e30, 2e29, 2).text(2) == "1e+30 ± 2e+29"


def test_a_perplexity_beyond_all_bounds_breaks_nothing(tmp_path) -> None:
    search = plant_search(
        tmp_path / "runs/s",
        task="language",
        records={0: {"valid_perplexity": float("inf")}, 1: {"valid_perplexity": 1e280}},
    )
    plant_retraining(tmp_path / "runs/r", search, 1e200)
    write_report(tmp_path / "runs", tmp_path / "out")
    page = written(tmp_path / "out")
    assert "no finite numbers, left out: valid_perplexity" in page.parts["s"]
    assert page.column("test perplexity")["r"] == "1e+200"


# What an analysis left


def test_the_cost_of_discretising_has_its_unit(tmp_path) -> None:
    cost = {"epoch": 3, "supernet": 2.5, "discretised": 4.0, "drop": 1.5}
    for i in range(2):
        search = plant_search(tmp_path / f"runs/s{i}", task="disparity", seed=i, lambdas=LAMBDAS)
        (search / "analysis").mkdir()
        write(search / "analysis/analysis.json", {"discretisation": cost | {"drop": 1.5 + i}})
    write_report(tmp_path / "runs", tmp_path / "out")
    part = written(tmp_path / "out").parts["s0"]
    assert "takes its validation EPE from 2.50 px to 4.00 px, a rise of 1.50 px" in part
    texts = texts_of(tmp_path / "out/pictures/lambda-and-drop.svg")
    assert "drop on discretising, px" in texts


def test_a_regret_has_its_unit(tmp_path) -> None:
    for task, unit in (("language", ""), ("disparity", " px")):
        records = {epoch: {"regret": 2.0 / (1 + epoch)} for epoch in range(4)}
        plant_search(tmp_path / task, task=task, records=records)
        write_report(tmp_path / task, tmp_path / f"{task}-out")
        page = written(tmp_path / f"{task}-out")
        assert f"It ends at 0.50{unit} on average over 1 search." in page.text
        label = f"regret,{unit}" if unit else "regret"
        assert label in texts_of(tmp_path / f"{task}-out/pictures/regret.svg")


def test_a_genotype_of_other_cells_has_no_weights(tmp_path) -> None:
    rows = rows_in(plant_search(tmp_path / "s", task="disparity"))
    search = Search.of(rows["s"])
    other = rows_in(plant_search(tmp_path / "t", task="language"))["t"].found.run.genotype
    assert other is not None
    edges = edges_of(search, other, search.alphas[3])
    assert {edge[3] for edge in edges["recurrent"]} == {None}
    assert search.notes == ["its genotype is not of its search space"]


# Commands


def test_commands_name_the_task_and_other_data_than_its_own(tmp_path) -> None:
    for data, named in (("pydoc", False), ("/texts/own", True)):
        folder = tmp_path / data.strip("/")
        search = plant_search(folder / "s", task="language", data=data, seed=3)
        run = plant_retraining(folder / "r", search, 90.0, seed=2)
        for name, kind in (("s", SearchConfig), ("r", RetrainConfig)):
            command = command_of(rows_in(folder)[name])
            assert command is not None
            words = shlex.split(command)
            assert words[words.index("--task") + 1] == "language"
            assert ("--data" in words) == named
            parsed = config_sources.parse(kind, "", "x", words[3:])
            wanted = config_sources.stored(kind, run if name == "r" else search, "x")
            assert (parsed.task, parsed.data, parsed.seed) == ("language", data, wanted.seed)
