from __future__ import annotations

import pickle
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from scipy.io import savemat

from rdarts_fast.data import DATA_SETS, load
from rdarts_fast.data.image_set import resize, stratified_halves
from rdarts_fast.errors import UserError

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def labelled(count: int, *shape: int, classes: int = 10) -> Arrays:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, classes, count)


def write_cifar10(root: Path) -> tuple[Arrays, Arrays]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, test = labelled(35, 3, 32, 32), labelled(6, 3, 32, 32)
    parts = {f"data_batch_{k}": slice(7 * k - 7, 7 * k) for k in range(1, 6)}
    for name, rows in parts.items():
        entry = {"data": train[0][rows].reshape(7, -1), "labels": train[1][rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    entry = {"data": test[0].reshape(6, -1), "labels": test[1].tolist()}
    (folder / "test_batch").write_bytes(pickle.dumps(entry))
    names = [f"name {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return train, test


def write_cifar100(root: Path) -> tuple[Arrays, Arrays]:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    train, test = labelled(12, 3, 32, 32, classes=100), labelled(5, 3, 32, 32, classes=100)
    for name, (images, labels) in (("train", train), ("test", test)):
        entry = {"data": images.reshape(len(images), -1), "fine_labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = [f"name {k}" for k in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    return train, test


def write_svhn(root: Path) -> tuple[Arrays, Arrays]:
    root.mkdir(parents=True)
    train, test = labelled(13, 3, 32, 32), labelled(4, 3, 32, 32)
    for name, (images, labels) in (("train", train), ("test", test)):
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        arrays = {"X": images.transpose(2, 3, 1, 0), "y": stored}
        savemat(root / f"{name}_32x32.mat", arrays)
    return train, test


def write_fashion_mnist(root: Path) -> tuple[Arrays, Arrays]:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    train, test = labelled(11, 1, 28, 28), labelled(4, 1, 28, 28)
    for name, (images, labels) in (("train", train), ("t10k", test)):
        header = struct.pack(">4I", 0x0803, len(images), 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2I", 0x0801, len(images))
        content = header + labels.astype(np.uint8).tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(content)
    return train, test


WRITERS: dict[str, Callable[[Path], tuple[Arrays, Arrays]]] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "fashion_mnist": write_fashion_mnist,
}


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda path, md5: True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def error_of(name: str, root: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(name, root=root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# digits


def test_digits_are_all_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load("digits", root=tmp_path / "unused")
    assert (digits.classes, digits.channels, digits.size) == (10, 1, (8, 8))
    assert digits.class_names == tuple("0123456789")
    assert (len(digits.train_images), len(digits.test_images)) == (1438, 359)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64

    images = torch.cat((digits.train_images, digits.test_images)).flatten(1).double() / 255 * 16
    assert set(images.round().unique().tolist()) == set(range(17))
    assert (images - images.round()).abs().max() < 0.04
    labels = torch.cat((digits.train_labels, digits.test_labels))
    ours = sorted(zip(images.round().int().tolist(), labels.tolist(), strict=True))
    original = load_digits()
    theirs = zip(original.data.astype(int).tolist(), original.target.tolist(), strict=True)
    assert ours == sorted(theirs)
    assert not (tmp_path / "unused").exists()


def test_digits_test_images_are_stratified_and_independent_of_the_seed(tmp_path: Path) -> None:
    first, second = (load("digits", root=tmp_path, seed=seed) for seed in (0, 12345))
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.train_images, second.train_images)
    share = torch.bincount(first.test_labels) / torch.bincount(
        torch.cat((first.train_labels, first.test_labels))
    )
    assert (share - 0.2).abs().max() < 0.01


def test_digits_augmentation_is_scaled_and_does_not_flip(tmp_path: Path) -> None:
    digits = load("digits", root=tmp_path)
    augmentation = digits.augmentation
    assert (augmentation.pad, augmentation.cutout_length, augmentation.flip) == (1, 4, False)
    values = digits.train_images.double() / 255
    assert augmentation.mean == pytest.approx([values.mean().item()], abs=1e-9)
    assert augmentation.std == pytest.approx([values.std(unbiased=False).item()], abs=1e-9)


def test_digits_halves_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (load("digits", root=tmp_path, seed=seed).halves for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "labels", [[0, 1], [0] * 7 + [1] * 4, [3, 1, 2, 0, 1] * 33, [5] * 101 + [0] * 50 + [2]]
)
def test_halves_are_stratified_and_cover_everything_once(labels: list[int]) -> None:
    tensor = torch.tensor(labels)
    weights, alphas = stratified_halves(tensor, 7)
    assert (len(weights), len(alphas)) == (len(labels) // 2, len(labels) - len(labels) // 2)
    assert sorted(weights.tolist() + alphas.tolist()) == list(range(len(labels)))
    for half in (weights, alphas):
        assert half.tolist() == sorted(half.tolist())
    difference = torch.bincount(tensor[weights], minlength=6) - torch.bincount(
        tensor[alphas], minlength=6
    )
    assert difference.abs().max() <= 1


def test_halves_are_random() -> None:
    labels = torch.arange(10).repeat(100)
    taken = torch.zeros(1000)
    for seed in range(200):
        taken[stratified_halves(labels, seed)[0]] += 1
    # Each image is in the first half half of the time: 5 standard deviations
    assert (taken - 100).abs().max() < 5 * (200 * 0.25) ** 0.5


# the downloaded sets


@pytest.mark.usefixtures("any_checksum", "no_network")
@pytest.mark.parametrize("name", WRITERS)
def test_reads_the_published_files(name: str, tmp_path: Path) -> None:
    train, test = WRITERS[name](tmp_path / "root")
    data = load(name, root=tmp_path / "root")
    for images, labels, (expected_images, expected_labels) in (
        (data.train_images, data.train_labels, train),
        (data.test_images, data.test_labels, test),
    ):
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert torch.equal(images, torch.from_numpy(expected_images))
        assert torch.equal(labels, torch.from_numpy(expected_labels))
    assert data.classes == (100 if name == "cifar100" else 10)
    expected_names = {"svhn": "3", "fashion_mnist": "Dress"}
    assert data.class_names[3] == expected_names.get(name, "name 3")


@pytest.mark.usefixtures("any_checksum", "no_network")
@pytest.mark.parametrize("name", WRITERS)
def test_published_halves_are_by_index(name: str, tmp_path: Path) -> None:
    train, _ = WRITERS[name](tmp_path / "root")
    weights, alphas = load(name, root=tmp_path / "root", seed=3).halves
    half = len(train[0]) // 2
    assert weights.tolist() == list(range(half))
    assert alphas.tolist() == list(range(half, len(train[0])))


@pytest.mark.usefixtures("any_checksum", "no_network")
@pytest.mark.parametrize(
    ("name", "mean", "std", "length"),
    [
        (
            "cifar10",
            (0.49139968, 0.48215827, 0.44653124),
            (0.24703233, 0.24348505, 0.26158768),
            16,
        ),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 16),
        ("svhn", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), 16),
        ("fashion_mnist", (0.2860,), (0.3530,), 14),
    ],
)
def test_published_augmentation(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], length: int, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / "root")
    augmentation = load(name, root=tmp_path / "root").augmentation
    assert (augmentation.mean, augmentation.std) == (mean, std)
    assert (augmentation.pad, augmentation.flip, augmentation.cutout_length) == (4, True, length)


LOOKED_FOR = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "fashion_mnist": "FashionMNIST/raw",
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", WRITERS)
def test_no_data_and_no_network(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    message = error_of(name, root)
    assert f'data set "{name}" is missing: looked for {LOOKED_FOR[name]} in {root}' in message
    assert "Name or service not known" in message
    assert (
        "; put the files there, name another folder with --data-root, or run once with network"
        in message
    )
    assert not root.exists()


@pytest.mark.parametrize("name", WRITERS)
def test_no_data_and_no_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("used"))
    message = error_of(name, tmp_path, download=False)
    assert f"looked for {LOOKED_FOR[name]} in {tmp_path} (Dataset not found" in message
    assert "download=True" not in message


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_wrong_checksums_are_damage(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "root")
    message = error_of(name, tmp_path / "root")
    assert f'data set "{name}" is damaged or incomplete' in message
    assert "delete what is there and run once with network access" in message
    assert (tmp_path / "root").exists()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("length", [0, 3, 15, 16, 100])
@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_truncated_files_are_damage(file: str, length: int, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "root")
    path = tmp_path / "root/FashionMNIST/raw" / file
    path.write_bytes(path.read_bytes()[: min(length, path.stat().st_size - 1)])
    message = error_of("fashion_mnist", tmp_path / "root")
    assert "damaged or incomplete: looked for FashionMNIST/raw in" in message


@pytest.mark.usefixtures("no_network")
def test_another_number_of_labels_is_damage(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / "FashionMNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(struct.pack(">2I", 0x0801, 10) + bytes(10))
    message = error_of("fashion_mnist", tmp_path)
    assert "damaged or incomplete" in message
    assert "(11 images and 10 labels)" in message


@pytest.mark.usefixtures("any_checksum")
def test_downloads_once_and_limits_the_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(self: Any) -> None:
        if not self._check_integrity():
            calls.append(socket.getdefaulttimeout())
            write_cifar10(Path(self.root))

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    for _ in range(2):
        assert len(load("cifar10", root=tmp_path / "a/b").train_images) == 35
    assert calls == [30.0]
    assert socket.getdefaulttimeout() is None


def test_a_root_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = error_of("cifar10", tmp_path / "file/root")
    assert f"in {tmp_path / 'file/root'} (" in message
    assert "Not a directory" in message


@pytest.mark.usefixtures("no_network")
def test_a_root_that_no_file_system_takes(tmp_path: Path) -> None:
    assert "File name too long" in error_of("cifar10", tmp_path / ("a" * 300))


# every set


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("cifar11", "cifar10"),
        ("digit", "digits"),
        ("folder", "folder:PATH"),
        ("folder:", "folder:PATH"),
        ("npz:", "npz:FILE"),
        ("", None),
        ("file:images", None),
    ],
)
def test_unknown_names_get_the_nearest(name: str, suggestion: str | None, tmp_path: Path) -> None:
    message = error_of(name, tmp_path)
    assert message.startswith(f'unknown data set "{name}": one of digits, cifar10, ')
    assert all(known in message for known in DATA_SETS)
    if suggestion:
        assert f'Did you mean "{suggestion}"' in message


def test_image_size_resizes_and_rescales_the_augmentation(tmp_path: Path) -> None:
    digits = load("digits", root=tmp_path, image_size=32)
    assert digits.size == (32, 32)
    assert digits.test_images.shape[2:] == (32, 32)
    assert digits.train_images.dtype == torch.uint8
    assert (digits.augmentation.pad, digits.augmentation.cutout_length) == (4, 16)


def test_resize_keeps_the_centre() -> None:
    images = torch.zeros(3000, 1, 20, 40, dtype=torch.uint8)
    images[:, :, :, 10:30] = torch.arange(3000).view(-1, 1, 1, 1) % 256
    resized = resize(images, 10)
    assert resized.shape == (3000, 1, 10, 10)
    expected = (torch.arange(3000) % 256).view(-1, 1, 1, 1).expand(-1, -1, 10, 8)
    assert torch.equal(resized[:, :, :, 1:-1].long(), expected)


@pytest.mark.parametrize("image_size", [7, 0, -3])
def test_an_image_size_below_8_is_refused(image_size: int, tmp_path: Path) -> None:
    message = error_of("digits", tmp_path, image_size=image_size)
    assert message == f"--image-size {image_size}: choose at least 8"


def test_to_moves_every_tensor(tmp_path: Path) -> None:
    digits = load("digits", root=tmp_path)
    moved = digits.to("meta")
    for tensor in (
        moved.train_images,
        moved.train_labels,
        moved.test_images,
        moved.test_labels,
        *moved.halves,
    ):
        assert tensor.device.type == "meta"
    assert moved.augmentation == digits.augmentation
    assert digits.train_images.device.type == "cpu"


def test_importing_loads_no_data_library() -> None:
    script = (
        "import sys, rdarts_fast.data\n"
        "print([m for m in ('torchvision', 'sklearn', 'scipy') if m in sys.modules])"
    )
    folder = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
