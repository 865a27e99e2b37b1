from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdarts_fast.data import ImageSet, load
from rdarts_fast.errors import UserError

Arrays = dict[str, np.ndarray[Any, Any]]


def some_arrays(shape: tuple[int, ...] = (9, 10, 3), classes: int = 3) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (20, *shape), np.uint8),
        "y_train": np.arange(20) % classes,
        "x_test": rng.integers(0, 256, (6, *shape), np.uint8),
        "y_test": np.arange(6) % classes,
    }


def load_npz(file: Path, **settings: Any) -> ImageSet:
    return load(f"npz:{file}", root=file.parent / "unused", **settings)


def error_of(file: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_npz(file, **settings)
    message = str(caught.value)
    assert "\n" not in message
    prefix = f"npz:{file}: "
    assert message.startswith(prefix)
    return message.removeprefix(prefix)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(9, 10), (9, 10, 1), (9, 10, 3)])
@pytest.mark.parametrize("label_type", ["uint8", ">i4", "uint64"])
def test_reads_arrays(
    shape: tuple[int, ...], compressed: bool, label_type: str, tmp_path: Path
) -> None:
    arrays = some_arrays(shape)
    arrays["x_train"] = np.asfortranarray(arrays["x_train"])
    arrays["y_train"] = arrays["y_train"].astype(label_type)
    file = tmp_path / "my.npz"
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    data = load_npz(file)
    channels = 3 if shape == (9, 10, 3) else 1
    assert (data.classes, data.channels, data.size) == (3, channels, (9, 10))
    assert data.name == f"npz:{file}"
    assert data.class_names == ("0", "1", "2")
    for part in ("train", "test"):
        images = torch.from_numpy(arrays[f"x_{part}"].reshape(-1, 9, 10, channels))
        assert torch.equal(getattr(data, f"{part}_images"), images.permute(0, 3, 1, 2))
        labels = getattr(data, f"{part}_labels")
        assert labels.dtype == torch.int64
        assert labels.tolist() == arrays[f"y_{part}"].tolist()
    assert (data.augmentation.pad, data.augmentation.cutout_length) == (1, 4)
    assert data.augmentation.flip


def test_halves_are_stratified_and_seeded(tmp_path: Path) -> None:
    np.savez(tmp_path / "my.npz", **some_arrays())
    halves = [load_npz(tmp_path / "my.npz", seed=seed).halves for seed in (0, 1)]
    assert not torch.equal(halves[0][0], halves[1][0])
    labels = torch.arange(20) % 3
    counts = [torch.bincount(labels[half]) for half in halves[0]]
    assert (counts[0] - counts[1]).abs().max() <= 1


def test_a_constant_data_set_loads(tmp_path: Path) -> None:
    arrays = some_arrays()
    arrays["x_train"][:] = 0
    np.savez(tmp_path / "my.npz", **arrays)
    assert load_npz(tmp_path / "my.npz").augmentation.std == (0.5, 0.5, 0.5)


def replaced(name: str, value: Any) -> Arrays:
    return {**some_arrays(), name: np.asarray(value)}


CASES: list[tuple[Arrays, str]] = [
    (
        replaced("x_train", np.zeros((20, 9, 10, 3), np.float32)),
        "x_train: expected uint8 (0 .. 255), found float32",
    ),
    (
        replaced("x_test", np.zeros((6, 9, 10, 3), np.int64)),
        "x_test: expected uint8 (0 .. 255), found int64",
    ),
    (
        replaced("x_train", np.zeros((20, 90), np.uint8)),
        "x_train: expected N,H,W or N,H,W,C, found shape [20, 90]",
    ),
    (
        replaced("x_train", np.zeros((), np.uint8)),
        "x_train: expected N,H,W or N,H,W,C, found shape []",
    ),
    (
        replaced("x_train", np.zeros((20, 3, 9, 10), np.uint8)),
        "x_train: expected 1 or 3 channels in the last place (N,H,W,C), found shape [20, 3, 9, 10]",
    ),
    (
        replaced("x_test", np.zeros((0, 9, 10, 3), np.uint8)),
        "x_test: expected at least one image, found shape [0, 9, 10, 3]",
    ),
    (
        replaced("x_test", np.zeros((6, 9, 10), np.uint8)),
        "x_test: expected images as in x_train, [20, 9, 10, 3], found [6, 9, 10]",
    ),
    (
        replaced("x_test", np.zeros((6, 9, 11, 3), np.uint8)),
        "x_test: expected images as in x_train, [20, 9, 10, 3], found [6, 9, 11, 3]",
    ),
    (
        replaced("y_train", np.arange(19) % 3),
        "y_train: expected 20 labels, as many as x_train has images, found 19",
    ),
    (
        replaced("y_test", []),
        "y_test: expected integers, found float64",
    ),
    (
        replaced("y_test", np.zeros(0, np.int64)),
        "y_test: expected 6 labels, as many as x_test has images, found 0",
    ),
    (replaced("y_train", np.zeros(20)), "y_train: expected integers, found float64"),
    (
        replaced("y_train", (np.arange(20) % 2).astype(bool)),
        "y_train: expected integers, found bool",
    ),
    (
        replaced("y_train", np.zeros((20, 1), np.int64)),
        "y_train: expected one label an image, found shape [20, 1]",
    ),
    (
        replaced("y_train", np.arange(20) % 3 - 1),
        "y_train: expected labels from 0, found -1",
    ),
    (
        replaced("y_test", [0, 1, 2, 0, -7, 0]),
        "y_test: expected labels from 0, found -7",
    ),
    (
        replaced("y_test", [0, 1, 2, 0, 3, 0]),
        "y_test: expected labels from 0 to 2, as in y_train, found 3",
    ),
    (
        replaced("y_train", np.arange(20) % 3 + 1),
        "y_train: expected every label from 0 to 3, found no 0: number the classes without gaps",
    ),
    (
        replaced("y_train", np.array([0, 1] * 9 + [2, 2**63 - 1])),
        "y_train: expected every label from 0 to 9223372036854775807, found no 3: "
        "number the classes without gaps",
    ),
]


@pytest.mark.parametrize(("arrays", "message"), CASES, ids=[case[1][:60] for case in CASES])
def test_names_the_array_what_was_expected_and_found(
    arrays: Arrays, message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "my.npz", **arrays)
    assert error_of(tmp_path / "my.npz") == message


@pytest.mark.parametrize("name", ["x_train", "y_train", "x_test", "y_test"])
def test_names_a_missing_array(name: str, tmp_path: Path) -> None:
    arrays = some_arrays()
    del arrays[name]
    np.savez(tmp_path / "my.npz", **arrays)
    message = error_of(tmp_path / "my.npz")
    assert message.startswith(f"no array {name}: expected x_train, y_train, x_test, y_test, found ")
    assert message.endswith(", ".join(arrays))


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["x_train", "y_test"])
def test_pickles_are_never_read(name: str, tmp_path: Path) -> None:
    arrays = replaced(name, np.array([Trap(tmp_path / "mark")] * 20, dtype=object))
    np.savez(tmp_path / "my.npz", allow_pickle=True, **arrays)
    assert error_of(tmp_path / "my.npz").startswith(f"{name} cannot be read (Object arrays cannot")
    np.save(tmp_path / "pickled.npy", arrays[name], allow_pickle=True)
    assert "not a readable .npz file" in error_of(tmp_path / "pickled.npy")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 but no zip", b"x_train = ...", b"\x80\x04N."]
)
def test_a_file_that_is_no_npz(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.npz").write_bytes(content)
    assert error_of(tmp_path / "my.npz").startswith("not a readable .npz file (")


def test_one_bare_array(tmp_path: Path) -> None:
    np.save(tmp_path / "my.npy", some_arrays()["x_train"])
    assert error_of(tmp_path / "my.npy").startswith("one array, not an .npz file: save x_train, ")


def test_a_damaged_member(tmp_path: Path) -> None:
    file = tmp_path / "my.npz"
    np.savez(file, **some_arrays())
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("y_train.npy").header_offset + 200
    content[start] ^= 255
    file.write_bytes(content)
    assert error_of(file).startswith("y_train cannot be read (Bad CRC-32")


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.npz") == f"no such file: {tmp_path / 'no.npz'}"
    assert error_of(tmp_path).startswith("not a readable .npz file ([Errno 21] Is a directory")


def test_small_images_need_an_image_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "my.npz", **some_arrays((7, 12)))
    message = error_of(tmp_path / "my.npz")
    assert message.startswith("images of 7x12 are too small: at least 8x8 is needed")
    assert load_npz(tmp_path / "my.npz", image_size=8).size == (8, 8)


def test_one_class_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "my.npz", **some_arrays(classes=1))
    assert error_of(tmp_path / "my.npz") == "only one class, 0: at least two are needed"
