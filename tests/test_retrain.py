"""Retraining a genotype: test error, checkpoints, earlier genotypes of a run, resumption."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rdarts_fast import retrain
from rdarts_fast.errors import UserError
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import auxiliary_fits
from rdarts_fast.retrain import run_retraining
from rdarts_fast.run_dir import Run
from rdarts_fast.search import run_search
from rdarts_fast.tasks.classification import Classification
from rdarts_fast.training import cosine, linear
from tests.small import arguments, settings

REPOSITORY = Path(__file__).parents[1]
GENOTYPE = Genotype(
    {
        "normal": ((("sep_conv_3x3", 0), ("skip_connect", 1)),),
        "reduce": ((("skip_connect", 0), ("max_pool_3x3", 1)),),
    }
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Run:
    return run_search(**settings(tmp_path_factory.mktemp("searched")))


def small(folder: Path, source: Path, **changes: Any) -> dict[str, Any]:
    given = settings(folder, out=folder / "retrained", source=source, epochs=4, batch_size=12)
    for name in ("space", "alpha_learning_rate"):
        del given[name]
    return given | changes | {"source": str(source)}


def test_a_run_is_retrained_on_its_own_data(searched, tmp_path) -> None:
    given = small(tmp_path, searched.folder, epochs=25)
    del given["data"]
    (run,) = run_retraining(**given)
    assert run.config["data"] == searched.config["data"]
    assert run.genotype == searched.genotype
    assert [r["epoch"] for r in run.metrics] == list(range(25))
    assert run.result["test_error"] == run.metrics[-1]["test_error"]
    assert run.result["best_test_error"] == min(r["test_error"] for r in run.metrics)
    assert run.result["test_error"] < 0.35  # three easy classes: guessing is 0.67
    best, last = run.load_checkpoint("best"), run.load_checkpoint("last")
    assert best["best_cost"] == run.result["best_test_error"]
    assert run.metrics[best["epoch"] - 1]["test_error"] == best["best_cost"]
    assert last["epoch"] == 25
    drops = [r["drop_path_prob"] for r in run.metrics]
    assert drops == pytest.approx([0.2 * epoch / 25 for epoch in range(25)])
    rates = [r["learning_rate"] for r in run.metrics]
    assert rates == pytest.approx([cosine(epoch, 25, 0.025, 0.0) for epoch in range(25)])


def test_genotype_files_of_both_forms_give_the_same_network(tmp_path) -> None:
    errors = []
    for name, text in (("a.json", GENOTYPE.to_json()), ("b.txt", GENOTYPE.to_text())):
        (tmp_path / name).write_text(text)
        given = small(tmp_path, tmp_path / name, out=tmp_path / name[0], epochs=2)
        (run,) = run_retraining(**given)
        assert run.genotype == GENOTYPE
        errors.append([r["test_loss"] for r in run.metrics])
    assert errors[0] == errors[1]


def test_earlier_genotypes_each_get_a_folder_and_a_second_call_only_fills_in(
    searched, tmp_path, monkeypatch, capsys
) -> None:
    lines = (searched.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    given = small(tmp_path, searched.folder, genotypes_at="0,2", epochs=2)
    runs = run_retraining(**given)
    out = tmp_path / "retrained"
    assert [run.folder for run in runs] == [out / "epoch-000", out / "epoch-002"]
    for run, epoch in zip(runs, (0, 2), strict=True):
        assert run.genotype == Genotype.from_dict(records[epoch]["genotype"])
    assert "epoch of the search  test error" in capsys.readouterr().out
    trained: list[int] = []
    step = retrain.train_step
    monkeypatch.setattr(retrain, "train_step", lambda *a: (trained.append(1), step(*a)))
    more = run_retraining(**given | {"genotypes_at": "0,1,2"})
    assert [run.result for run in (more[0], more[2])] == [run.result for run in runs]
    assert len(trained) == 2 * 3  # epoch 1's genotype alone: 2 epochs of 36 images in batches of 12
    with pytest.raises(UserError, match="--epochs: the run was started with 2, got 3"):
        run_retraining(**given | {"epochs": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,x", "--genotypes-at: expected epochs such as 0,5,10, got 0,x"),
        ("1,1", "--genotypes-at: expected different epochs"),
        ("-1", "--genotypes-at: expected different epochs from 0 on"),
        ("7", "has epochs 0 to 2, not 7"),
        ("0,7", "has epochs 0 to 2, not 7"),
    ],
)
def test_bad_epochs(text: str, message: str, searched, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        run_retraining(**small(tmp_path, searched.folder, genotypes_at=text))
    assert message in str(error.value)
    assert not (tmp_path / "retrained").exists()


def test_interrupted_and_resumed_gives_the_same_bits(tmp_path) -> None:
    (tmp_path / "g.json").write_text(GENOTYPE.to_json())
    (whole,) = run_retraining(**small(tmp_path, tmp_path / "g.json"))
    given = small(tmp_path, tmp_path / "g.json", out=tmp_path / "cut")
    given["checkpoint_minutes"] = 0.0
    command = [sys.executable, "-c", CUT, *arguments(given)]
    i = command.index("--source")
    command[i : i + 2] = [command[i + 1]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    stopped = Run.read(tmp_path / "cut").load_checkpoint()
    assert (stopped["epoch"], stopped["step"]) == (2, 1)
    os.remove(tmp_path / "g.json")  # a resumed run has its genotype
    (resumed,) = run_retraining(resume=tmp_path / "cut")
    one, other = (run.load_checkpoint()["network"] for run in (whole, resumed))
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert [r["test_loss"] for r in whole.metrics] == [r["test_loss"] for r in resumed.metrics]


CUT = """
import os, signal
from rdarts_fast import retrain
step = retrain.train_step
def killed(settings, task, model, state, *rest):
    if (state.epoch, state.step) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    step(settings, task, model, state, *rest)
retrain.train_step = killed
retrain.main()
"""


def test_auxiliary_head_is_off_below_4x4_and_has_a_say_above(tmp_path, monkeypatch) -> None:
    assert [auxiliary_fits(size) for size in ((32, 32), (28, 28), (13, 99), (12, 99), (8, 8))] == [
        True, True, True, False, False,
    ]  # fmt: skip
    (tmp_path / "g.json").write_text(GENOTYPE.to_json())
    losses = []
    for weight in (0.4, 0.0):
        given = small(tmp_path, tmp_path / "g.json", image_size=16, epochs=1, epoch_steps=2)
        given |= {"data": f"folder:{folder(tmp_path)}", "auxiliary_weight": weight}
        (run,) = run_retraining(**given | {"out": tmp_path / f"weight-{weight}"})
        network = run.load_checkpoint()["network"]
        assert any(name.startswith("auxiliary.") for name in network)
        losses.append(run.metrics[0]["test_loss"])
    assert losses[0] != losses[1]
    (run,) = run_retraining(**small(tmp_path, tmp_path / "g.json", epochs=1))  # 8x8 images
    assert run.config["auxiliary"] is True
    assert not any(n.startswith("auxiliary.") for n in run.load_checkpoint()["network"])


def folder(place: Path) -> Path:
    from PIL import Image

    root = place / "images"
    for split in ("train", "test"):
        for i, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for k in range(4):
                image = Image.new("L", (16, 16), 60 + 120 * i + 5 * k)
                image.putpixel((k, k), 255)
                image.save(root / split / name / f"{k}.png")
    return root


def test_schedules() -> None:
    assert cosine(0, 50, 0.025, 0.001) == 0.025
    assert cosine(25, 50, 0.025, 0.001) == pytest.approx(0.013)
    assert cosine(50, 50, 0.025, 0.001) == pytest.approx(0.001)
    assert [linear(epoch, 49, 0.6) for epoch in (0, 49)] == [0.0, 0.6]
    assert linear(0, 0, 0.6) == 0.0


def test_without_a_source_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="give a run's folder or a genotype file"):
        run_retraining()


def test_a_search_without_an_epoch_has_no_genotype(tmp_path, monkeypatch) -> None:
    from rdarts_fast import search

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "weight_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_search(**settings(tmp_path))
    with pytest.raises(UserError, match="no genotype yet: the search has not finished an epoch"):
        run_retraining(**small(tmp_path, tmp_path / "run"))


def test_command_line_reports_the_test_error(tmp_path) -> None:
    (tmp_path / "g.json").write_text(GENOTYPE.to_json())
    given = small(tmp_path, tmp_path / "g.json", epochs=1)
    command = [sys.executable, "-m", "rdarts_fast.retrain", given.pop("source"), *arguments(given)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = Run.read(tmp_path / "retrained").result["test_error"]
    assert f"test error after the last epoch: {error:.2%}" in done.stdout
    assert done.stderr == ""


def test_holdout_sees_neither_the_other_half_nor_the_test_images(
    searched, tmp_path, monkeypatch, capsys
) -> None:
    seen: dict[str, set[int]] = {"training_batch": set(), "holdout_batch": set()}
    for name, rows_seen in seen.items():
        original = getattr(Classification, name)

        def noting(self, rows, *rest, original=original, rows_seen=rows_seen, **more):
            rows_seen.update(rows.tolist())
            return original(self, rows, *rest, **more)

        monkeypatch.setattr(Classification, name, noting)
    monkeypatch.setattr(Classification, "test_batch", None)
    (run,) = run_retraining(**small(tmp_path, searched.folder, epochs=2, holdout=True))
    assert run.result is not None
    count = len(seen["training_batch"] | seen["holdout_batch"])
    assert seen["training_batch"].isdisjoint(seen["holdout_batch"])
    assert (len(seen["training_batch"]), count) == (18, 36)
    assert run.result["valid_error"] == run.metrics[-1]["valid_error"]
    assert "test_error" not in run.result and "test_error" not in run.metrics[-1]
    printed = capsys.readouterr().out
    assert "18 training images, 18 held out; the test images are not used" in printed
    assert "validation error after the last epoch" in printed
