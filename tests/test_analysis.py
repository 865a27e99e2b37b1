"""The analyses of a search: what they read from its folder, and what they compute anew."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rdarts_fast import analysis
from rdarts_fast.analysis import Searched, analyse, discretisation_drop, landscape, trajectory
from rdarts_fast.curvature import softmax_null_space
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from rdarts_fast.evaluation import validate
from rdarts_fast.genotype import discretize, one_hot_weights
from rdarts_fast.networks import softmax_weights
from rdarts_fast.retrain import run_retraining
from rdarts_fast.run_dir import Run, RunDir
from rdarts_fast.search import run_search
from rdarts_fast.spaces import SPACES
from rdarts_fast.tasks.classification import Classification
from tests.small import settings, write_images

# The published worked example: lambda_max at epochs 0, 2, .., 22, and its local averages.
VALUES = [0.1788, 0.1482, 0.1703, 0.1464, 0.1211, 0.2488, 0.2311, 0.3595, 0.2246, 0.3859]
VALUES += [0.2085, 0.4298]
EXAMPLE = dict(zip(range(0, 24, 2), VALUES, strict=True))
AVERAGES = [0.1658, 0.1609, 0.1530, 0.1670, 0.1836, 0.2214, 0.2370, 0.2900, 0.2819, 0.3217]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("searched")
    return run_search(
        **settings(folder, space="s2", channels=4, curvature="spectrum", drop_path_prob=0.3)
    )


def with_settings(run: Run, folder: Path, **changes: object) -> Run:
    """A copy of the run whose config.json says otherwise."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**run.config, **changes}))
    return replace(run, folder=folder)


def planted(values: dict[int, float], branch: int = 0) -> list[dict[str, object]]:
    """Records of all epochs to the last of `values`."""
    epochs = range(min(values), max(values) + 1)
    measured = {e: {"lambda_max": values[e]} if e in values else {} for e in epochs}
    return [{"epoch": e, "branch": branch, **measured[e]} for e in epochs]


def test_the_trajectory_has_the_published_averages_and_stop(searched, tmp_path) -> None:
    run = with_settings(searched, tmp_path / "a", epochs=50, curvature_every=2)
    (branch,) = trajectory(replace(run, metrics=planted(EXAMPLE)))
    assert branch.epochs == list(range(0, 24, 2)) and branch.values == VALUES
    assert branch.average_epochs == list(range(0, 20, 2))
    assert branch.averages == pytest.approx(AVERAGES, abs=1e-4)  # both were rounded
    assert branch.stop_epoch == 10


def test_a_rollback_begins_a_branch_that_has_forgotten_what_came_after(searched, tmp_path) -> None:
    run = with_settings(searched, tmp_path / "a", epochs=50, curvature_every=2)
    first = planted(EXAMPLE)
    second = planted({11: 9.0} | dict.fromkeys(range(12, 24, 2), 0.1), branch=1)[1:]
    one, other = trajectory(replace(run, metrics=first + second))
    assert (one.branch, one.stop_epoch, other.branch, other.stop_epoch) == (0, 10, 1, None)
    assert other.epochs == list(range(12, 24, 2))
    window = [0.1211, 0.2488, 0.1, 0.1, 0.1]  # epochs 8 and 10 of the first branch, then its own
    assert other.averages[other.average_epochs.index(12)] == pytest.approx(sum(window) / 5)


def test_the_spectrum_is_ordered_by_size(searched) -> None:
    found = analysis.spectrum(searched)
    assert sorted(found) == [0, 2]
    for record in searched.metrics:
        if record["epoch"] in found:
            values = found[record["epoch"]]
            assert sorted(values) == record["eigenvalues"]
            assert all(abs(a) >= abs(b) for a, b in itertools.pairwise(values))


def test_the_supernets_accuracy_is_the_one_of_its_last_epoch(searched) -> None:
    loaded = Searched.load(searched.folder, "cpu")
    drop = discretisation_drop(loaded)
    assert (drop.epoch, drop.supernet) == (2, searched.metrics[-1]["valid_accuracy"])
    alphas, space = loaded.state.alphas, SPACES["s2"]
    one_hot = one_hot_weights(space, discretize(space, alphas).cells)
    kept = {kind: weights.sum(dim=1).bool() for kind, weights in one_hot.items()}
    assert all(int(edges.sum()) == 8 for edges in kept.values())
    for alpha in alphas.values():  # no weight but the genotype's
        alpha.data.mul_(0.0)
    assert drop.discretised == loaded.score(one_hot)
    before = {name: b.clone() for name, b in loaded.state.supernet.named_buffers()}
    assert drop.batch_statistics == loaded.score(one_hot, batch_statistics=True)
    for name, buffer in loaded.state.supernet.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_batch_statistics_do_not_ask_what_the_supernet_had(searched) -> None:
    loaded = Searched.load(searched.folder, "cpu")
    task, state = loaded.task, loaded.state
    weights = softmax_weights(state.alphas)

    def losses() -> list[float]:
        return [
            validate(task, state.supernet, weights, Draws(0), 0, batch_statistics=own).loss
            for own in (True, False)
        ]

    before = losses()
    for name, buffer in state.supernet.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(3.0)
    after = losses()
    assert after[0] == before[0] and after[1] != before[1]


def test_alphas_that_have_decided_lose_nothing(tmp_path) -> None:
    run = run_search(**settings(tmp_path, epochs=2))  # s5: both inputs of the one node are kept
    loaded = Searched.load(run.folder, "cpu")
    for alpha in loaded.state.alphas.values():
        alpha.data.copy_(200.0 * torch.eye(3)[[0, 2]])
    drop = discretisation_drop(loaded)
    assert drop.drop == 0.0
    assert drop.supernet == loaded.score({k: torch.eye(3)[[0, 2]] for k in loaded.state.alphas})


def test_the_landscape_curves_as_the_eigenvalues_say(searched) -> None:
    loaded = Searched.load(searched.folder, "cpu")
    supernet = loaded.state.supernet.double()
    alphas = {kind: a.detach().double().requires_grad_() for kind, a in loaded.state.alphas.items()}
    loaded = replace(loaded, state=replace(loaded.state, supernet=supernet, alphas=alphas))
    step = 1e-5  # ReLUs bend the loss: a plain difference over more would see it
    double = DoubleTask(loaded.task.images, loaded.settings)
    shape = landscape(replace(loaded, task=double), points=3, radius=step)
    assert shape.epoch == 2 and shape.steps.tolist() == [-step, 0.0, step]
    second = [
        float(plane[2, 1] - 2 * plane[1, 1] + plane[0, 1]) / step**2
        if axis == 0
        else float(plane[1, 2] - 2 * plane[1, 1] + plane[1, 0]) / step**2
        for plane in (shape.leading, shape.random)
        for axis in (0, 1)
    ]
    assert second == pytest.approx(list(shape.curvatures), rel=1e-3, abs=1e-5)
    assert shape.leading[1, 1] == shape.random[1, 1]
    decay = loaded.settings.alpha_weight_decay
    top = searched.metrics[-1]["lambda_max"] - decay
    assert shape.curvatures[0] == pytest.approx(top, rel=1e-3)  # of float32
    assert shape.curvatures[0] > max(shape.curvatures[1:])
    read = np.load(Path(write(shape.to_npz(), searched.folder.parent / "l.npz")))
    assert read["leading"].tolist() == shape.leading.tolist()
    assert read["curvatures"].tolist() == list(shape.curvatures)


def write(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


class DoubleTask(Classification):
    """The same images in float64."""

    def training_batch(self, *given, **more):
        images, labels = super().training_batch(*given, **more)
        return images.double(), labels


def test_random_directions_are_orthonormal_and_seen_by_softmax() -> None:
    null = softmax_null_space([(14, 2), (14, 2)])
    found = analysis._random_directions(null, seed=1)
    assert torch.allclose(found.t() @ found, torch.eye(2).double(), atol=1e-12)
    assert float((null.t() @ found).abs().max()) < 1e-12
    assert not torch.equal(found, analysis._random_directions(null, seed=2))


def test_everything_is_written_and_told(searched, tmp_path, monkeypatch, capsys) -> None:
    words = ["analysis", str(searched.folder), "--points", "3", "--out", str(tmp_path / "a")]
    monkeypatch.setattr("sys.argv", words)
    analysis.main()
    printed = capsys.readouterr().out
    assert "lambda_max: " in printed and "discretising: " in printed
    names = {path.name for path in (tmp_path / "a").iterdir()}
    pictures = {"trajectory.svg", "spectrum.svg", "landscape.svg"}
    assert names == pictures | {"analysis.json", "landscape.npz"}
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())
    drop = found["discretisation"]
    assert drop["drop"] == pytest.approx(drop["supernet"] - drop["discretised"], abs=1e-12)
    assert f"{drop['discretised']:.2%}" in printed
    assert "stop" not in (tmp_path / "a" / "trajectory.svg").read_text()


def test_a_search_that_measured_nothing_has_the_rest(tmp_path, capsys) -> None:
    run = run_search(**settings(tmp_path, epochs=1))
    found = analyse(run.folder, points=3)
    names = {path.name for path in (run.folder / "analysis").iterdir()}
    assert names == {"landscape.svg", "analysis.json", "landscape.npz"}
    assert "lambda_max: not measured" in analysis.describe(found)


def test_what_cannot_be_analysed_is_said(searched, tmp_path) -> None:
    with pytest.raises(UserError, match="no such run"):
        analyse(tmp_path / "nowhere")
    with pytest.raises(UserError, match="odd number of points"):
        analyse(searched.folder, tmp_path / "a", points=4)
    (retrained,) = run_retraining(
        source=str(searched.folder), out=tmp_path / "r", epochs=1, channels=2, layers=3
    )
    with pytest.raises(UserError, match="not a search of this version"):
        analyse(retrained.folder)
    begun = settings(tmp_path, out=tmp_path / "begun")
    state = Searched.load(searched.folder, "cpu").state
    state.epoch = 0
    texts = {"space.json": json.dumps(SPACES["s2"].to_dict())}
    config = {**searched.config, "out": str(begun["out"])}
    same = {"data": searched.environment["data"]}
    RunDir.create(begun["out"], config, same, state.to_checkpoint(), texts).close()
    with pytest.raises(UserError, match="has not finished an epoch"):
        analyse(begun["out"])
    state.epoch, state.step = 1, 2
    RunDir.create(tmp_path / "m", config, same, state.to_checkpoint(), texts).close()
    with pytest.raises(UserError, match=r"middle of epoch 1: .* --resume"):
        analyse(tmp_path / "m")
    write_images(tmp_path / "other.npz", per_class=13)
    other = {**config, "data": f"npz:{tmp_path / 'other.npz'}"}
    RunDir.create(tmp_path / "o", other, same, state.to_checkpoint(), texts).close()
    with pytest.raises(UserError, match="no longer the images"):
        analyse(tmp_path / "o")
