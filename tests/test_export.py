"""Exported files: what they compute, for any batch; what they say; what has none."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rdarts_fast import export
from rdarts_fast.errors import UserError
from rdarts_fast.export import export_network, export_run
from rdarts_fast.genotype import Genotype
from rdarts_fast.networks import Network
from rdarts_fast.retrain import run_retraining
from rdarts_fast.run_dir import Run
from tests.small import settings
from tests.tolerances import assert_equal

SUFFIXES = (".pt2", ".onnx")
REPOSITORY = Path(__file__).parents[1]


def genotype(*names: str) -> Genotype:
    """One node a two names, the names in turn on the edges of both cells."""
    pairs = zip(names[::2], names[1::2], strict=True)
    nodes = tuple(((one, 0), (other, i + 1)) for i, (one, other) in enumerate(pairs))
    return Genotype({"normal": nodes, "reduce": nodes})


# Every kind of operation, the skip connection and the maximum at both strides.
MANY = Genotype(
    genotype("sep_conv_3x3", "skip_connect", "dil_conv_5x5", "max_pool_3x3").cells
    | {
        "reduce": genotype("skip_connect", "max_pool_3x3", "avg_pool_3x3", "conv_7x1_1x7").cells[
            "reduce"
        ]
    }
)
SMALL = genotype("max_pool_3x3", "avg_pool_3x3")


def network(cells: Genotype, layers: int, auxiliary: bool = False) -> Network:
    """A network of 5 classes on RGB images whose batch norms are not at their start."""
    torch.manual_seed(0)
    made = Network(cells, 2, layers, 5, auxiliary)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return made


def load(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The file as a function, by what others would use and nothing of this package."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def notes(path: Path) -> dict[str, str]:
    """The metadata of a file."""
    if path.suffix == ".pt2":
        found = dict.fromkeys(("input", "mean", "std", "class_names", "genotype"), "")
        torch.export.load(path, extra_files=found)
        return {name: bytes(text, "utf-8").decode() for name, text in found.items()}
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A retraining of two epochs."""
    folder = tmp_path_factory.mktemp("retrained")
    (folder / "g.json").write_text(genotype("sep_conv_3x3", "max_pool_3x3").to_json())
    given = settings(folder, source=str(folder / "g.json"), epochs=2, learning_rate=0.1)
    for name in ("space", "alpha_learning_rate"):
        del given[name]
    (run,) = run_retraining(**given)
    return run


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_computes_what_the_network_does_at_any_batch(suffix: str, tmp_path: Path) -> None:
    made = network(MANY, 3, auxiliary=True).to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    path = tmp_path / f"model{suffix}"
    difference = export_network(made, path, (13, 17))  # odd sizes: both reductions pad
    assert 0.0 <= difference < 1e-4 and list(tmp_path.iterdir()) == [path]
    assert made.training and made.auxiliary is not None and next(made.parameters()).requires_grad
    assert [name for name, was in before.items() if not made.state_dict()[name].equal(was)] == []
    made.eval()
    written = load(path)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 13, 17)
        with torch.no_grad():
            expected = made(images)
            assert_equal(written(images), expected, torch.float32)
    data = path.read_bytes()
    assert str(REPOSITORY).encode() not in data and b"auxiliary" not in data


def test_a_compiled_network_is_exported_as_it_is_in_eval_mode(tmp_path: Path) -> None:
    made, same = network(SMALL, 1), network(SMALL, 1).eval()
    made.compile()
    export_network(made, tmp_path / "model.pt2", (8, 8))
    images = torch.randn(2, 3, 8, 8)
    assert_equal(load(tmp_path / "model.pt2")(images), same(images), torch.float32)


@pytest.mark.parametrize(("suffix", "checkpoint"), [(".pt2", "last"), (".onnx", "best")])
def test_a_retraining_is_exported_with_how_its_images_are_normalised(
    retrained: Run, suffix: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"model{suffix}"
    export_run(retrained.folder, path, checkpoint)
    out = capsys.readouterr().out
    epoch = retrained.load_checkpoint(checkpoint)["epoch"]
    assert f"checkpoint {checkpoint} of {retrained.folder}, after {epoch} of 2 epochs" in out
    assert "images float32 [batch, 1, 8, 8] -> logits [batch, 3]" in out
    said = notes(path)
    assert said["genotype"] == retrained.genotype.to_json()
    assert json.loads(said["class_names"]) == ["0", "1", "2"]
    mean, std = json.loads(said["mean"]), json.loads(said["std"])
    assert f"mean {mean[0]:.8g}, std {std[0]:.8g}" in out
    with np.load(retrained.folder.parent / "images.npz") as arrays:
        grey, labels = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    images = ((grey / 255 - mean[0]) / std[0]).unsqueeze(1).to(torch.float32)  # [N, 1, 8, 8]
    wrong = float((load(path)(images).argmax(dim=1) != labels).double().mean())
    assert wrong == pytest.approx(retrained.metrics[epoch - 1]["test_error"])


def test_the_checkpoints_are_told_apart(
    retrained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(retrained.folder, folder)
    stored = retrained.load_checkpoint("best")
    stored["network"]["classifier.bias"] = torch.full((3,), 7.0)
    torch.save(stored, folder / "checkpoints" / "best.pt")
    exported = []
    monkeypatch.setattr(export, "export_network", lambda made, *_: exported.append(made) or 0.0)
    for name in ("last", "best"):
        export_run(folder, tmp_path / "model.pt2", name)
    last = retrained.load_checkpoint("last")["network"]
    for made, expected in zip(exported, (last, stored["network"]), strict=True):
        assert made.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[k]) for k, tensor in made.state_dict().items())


@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_noise_has_no_fixed_network(kind: str, tmp_path: Path) -> None:
    plain, noisy = (genotype("sep_conv_3x3", name) for name in ("skip_connect", "noise"))
    cells = Genotype(plain.cells | {kind: noisy.cells[kind]})
    with pytest.raises(UserError, match="operation noise, whose output is random"):
        export_network(network(cells, 1), tmp_path / "model.pt2", (8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_search_is_not_a_retraining(retrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(retrained.folder, folder)
    changed = {k: v for k, v in retrained.config.items() if k != "source"}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=f"{folder} is not a retraining's folder"):
        export_run(folder, tmp_path / "model.pt2")
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(tmp_path, tmp_path / "model.pt2")


def test_other_images_would_be_normalised_otherwise(retrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(retrained.folder, folder)
    with np.load(retrained.folder.parent / "images.npz") as arrays:
        changed = dict(arrays)
    changed["x_train"] = changed["x_train"] // 2
    np.savez(tmp_path / "images.npz", **changed)
    moved = retrained.config | {"data": f"npz:{tmp_path / 'images.npz'}"}
    (folder / "config.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match="no longer those that"):
        export_run(folder, tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pth", r"model\.pth: expected a name that ends in \.pt2 or \.onnx"),
        ("model", r"model: expected a name that ends in \.pt2 or \.onnx"),
        ("nowhere/model.pt2", r"nowhere is not a folder"),
        ("taken.pt2", r"cannot write .*taken\.pt2: Is a directory"),
    ],
)
def test_a_bad_name(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "taken.pt2").mkdir()
    with pytest.raises(UserError, match=message):
        export_network(network(SMALL, 1), tmp_path / name, (8, 8))
    assert list(tmp_path.iterdir()) == [tmp_path / "taken.pt2"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    made = network(SMALL, 1)
    with pytest.raises(UserError, match=rf"pip install '\.\[export\]' .*{package}"):
        export_network(made, tmp_path / "model.onnx", (8, 8))
    export_network(made, tmp_path / "model.pt2", (8, 8))  # needs none of them


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_a_wrong_file_is_not_left(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = export._pt2_bytes, lambda path: lambda x: load(path)(x) * (1.0 + wrong)
    monkeypatch.setitem(export._FORMATS, ".pt2", changed)
    path = tmp_path / "model.pt2"
    path.write_bytes(b"an earlier file")
    with pytest.raises(RuntimeError, match=r"the exported file's logits differ .* no file was"):
        export_network(network(SMALL, 1), path, (8, 8))
    assert path.read_bytes() == b"an earlier file"
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_line(
    retrained: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["export", str(retrained.folder), "--out", str(tmp_path / "model.pt2")]
    monkeypatch.setattr(sys, "argv", words)
    export.main()
    done = capsys.readouterr()
    assert done.out.startswith(f"{tmp_path / 'model.pt2'}: checkpoint last of ")
    assert done.err == "" and done.out.count("\n") == 3
    monkeypatch.setattr(sys, "argv", [*words[:-1], str(tmp_path / "model.pth")])
    with pytest.raises(SystemExit) as stop:
        export.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out ")


def test_data_root_moves_where_the_images_are_looked_for(retrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(retrained.folder, folder)
    moved = retrained.config | {"data": "svhn"}
    (folder / "config.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match=f'data set "svhn" is .* in {tmp_path / "elsewhere"}'):
        export_run(folder, tmp_path / "model.pt2", data_root=tmp_path / "elsewhere")
