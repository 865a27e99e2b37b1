from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rdarts_fast.data import ImageSet, load
from rdarts_fast.errors import UserError

Pixels = np.ndarray[Any, Any]


def pixels(seed: int, *shape: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path: Path, values: Pixels, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)


def write_set(root: Path, *shape: int, classes: tuple[str, ...] = ("cat", "ant")) -> None:
    """4 training and 2 test images of each class, each of random pixels."""
    for part, count in (("train", 4), ("test", 2)):
        for name in classes:
            for k in range(count):
                seed = hash_of(part, name, k)
                write(root / part / name / f"{k}.png", pixels(seed, *shape))


def hash_of(part: str, name: str, k: int) -> int:
    return sum(map(ord, part + name)) * 100 + k


def load_folder(root: Path, **settings: Any) -> ImageSet:
    return load(f"folder:{root}", root=root / "unused", **settings)


def error_of(root: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    prefix = f"folder:{root}: "
    assert message.startswith(prefix)
    return message.removeprefix(prefix)


@pytest.mark.parametrize("shape", [(9, 12, 3), (9, 12)])
def test_reads_class_folders_in_order(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_set(tmp_path, *shape)
    data = load_folder(tmp_path)
    assert data.class_names == ("ant", "cat")
    assert (data.channels, data.size) == (3 if len(shape) == 3 else 1, (9, 12))
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4
    assert data.test_labels.tolist() == [0] * 2 + [1] * 2
    for part, images in (("train", data.train_images), ("test", data.test_images)):
        files = [(name, k) for name in data.class_names for k in range(len(images) // 2)]
        for image, (name, k) in zip(images, files, strict=True):
            expected = torch.from_numpy(pixels(hash_of(part, name, k), *shape).reshape(9, 12, -1))
            assert torch.equal(image, expected.permute(2, 0, 1))
    augmentation = data.augmentation
    assert (augmentation.pad, augmentation.flip, augmentation.cutout_length) == (1, True, 4)
    values = data.train_images.double() / 255
    assert augmentation.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-9)


def test_halves_are_stratified_and_seeded(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    halves = [load_folder(tmp_path, seed=seed).halves for seed in range(8)]
    for weights, alphas in halves:
        assert (weights < 4).sum() == (alphas < 4).sum() == 2
    assert len({tuple(weights.tolist()) for weights, _ in halves}) > 1


def test_one_colour_image_makes_all_three_channels(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    write(tmp_path / "test/ant/1.png", pixels(1, 8, 8, 3))
    data = load_folder(tmp_path)
    assert data.channels == 3
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    assert torch.equal(data.test_images[1].permute(1, 2, 0), torch.from_numpy(pixels(1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("mode", "suffix", "level", "channels"),
    [
        ("1", ".png", 255, 1),
        ("LA", ".png", 200, 1),
        ("P", ".png", 204, 3),
        ("RGBA", ".png", 200, 3),
        ("CMYK", ".jpg", 200, 3),
        ("RGB", ".JPEG", 200, 3),
        ("L", ".bmp", 200, 1),
        ("RGB", ".webp", 200, 3),
        ("RGB", ".tif", 200, 3),
    ],
)
def test_reads_other_modes(
    mode: str, suffix: str, level: int, channels: int, tmp_path: Path
) -> None:
    for path in ("train/a/1", "train/b/1", "test/a/1"):
        write(tmp_path / (path + suffix), np.full((8, 8, 3), level, np.uint8), mode)
    data = load_folder(tmp_path)
    assert data.channels == channels
    lossy = 2 if suffix in (".jpg", ".JPEG", ".webp") else 0
    assert (data.train_images.int() - level).abs().max() <= lossy


def test_16_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        write(tmp_path / path, values)
    data = load_folder(tmp_path)
    assert data.channels == 1
    assert data.train_images[0, 0].flatten().tolist() == (values >> 8).flatten().tolist()


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/ant/._0.png").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/README.md").write_text("no folder")
    write(tmp_path / "train/ant/more/5.png", pixels(5, 8, 8))
    assert load_folder(tmp_path).train_labels.tolist() == [0] * 5 + [1] * 4


def test_a_training_class_may_lack_test_images(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    write(tmp_path / "train/bee/0.png", pixels(5, 8, 8))
    data = load_folder(tmp_path)
    assert data.class_names == ("ant", "bee", "cat")
    assert data.test_labels.tolist() == [0, 0, 2, 2]


def test_mixed_sizes_name_image_size(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    write(tmp_path / "train/cat/2.png", pixels(5, 8, 9))
    assert error_of(tmp_path) == (
        f"images differ in size (height x width): 8x8 in {tmp_path}/train/ant/0.png, "
        f"8x9 in {tmp_path}/train/cat/2.png; --image-size N resizes and crops all"
    )
    data = load_folder(tmp_path, image_size=8)
    assert data.size == (8, 8)
    assert torch.equal(
        data.train_images[0, 0], torch.from_numpy(pixels(hash_of("train", "ant", 0), 8, 8))
    )


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 20)])
def test_image_size_resizes_the_shorter_side_and_keeps_the_centre(
    height: int, width: int, tmp_path: Path
) -> None:
    values = np.zeros((height, width, 3), np.uint8)
    top, left = (height - 20) // 2, (width - 20) // 2
    values[top : top + 20, left : left + 20] = np.linspace(0, 200, 20).astype(np.uint8)[:, None]
    for path in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        write(tmp_path / path, values)
    image = load_folder(tmp_path, image_size=10).test_images[0].float()
    assert image.shape == (3, 10, 10)
    # Every two columns of the square in the middle become one; its edges see the border.
    expected = torch.linspace(0, 200, 20).view(10, 2).mean(1)
    assert (image[:, 1:-1, 1:-1] - expected[1:-1]).abs().max() < 4


def test_no_such_folder(tmp_path: Path) -> None:
    message = error_of(tmp_path / "no")
    assert message.startswith(f"no such folder: {tmp_path / 'no'}; expected train/<class>/")
    (tmp_path / "file").write_text("")
    assert error_of(tmp_path / "file").startswith("no such folder")


def test_a_path_that_no_file_system_takes(tmp_path: Path) -> None:
    assert error_of(tmp_path / ("a" * 300)).startswith("cannot be read: [Errno 36] File name too")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "images", 8, 8)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("folder:~/images", root=tmp_path).classes == 2
    with pytest.raises(UserError, match="no such folder"):
        load("folder:~nobody-at-all/images", root=tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_train_or_test(part: str, tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    (tmp_path / part).rename(tmp_path / "other")
    assert error_of(tmp_path).startswith(f"no folder {part}/ in it; expected train/<class>/")


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_images(part: str, tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    (tmp_path / part).rename(tmp_path / "other")
    (tmp_path / part).mkdir()
    write(tmp_path / part / "0.png", pixels(0, 8, 8))  # in no class folder
    assert error_of(tmp_path).startswith(f"no images in the class folders of {part}/; expected")
    (tmp_path / part / "ant").mkdir()
    assert error_of(tmp_path).startswith(f"no images in the class folders of {part}/; expected")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class(part: str, tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    (tmp_path / part / "bee").mkdir()
    assert error_of(tmp_path) == f"{part}/bee/ holds no images: add some or remove it"


def test_a_test_class_that_is_not_in_train(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    write(tmp_path / "test/bee/0.png", pixels(0, 8, 8))
    assert error_of(tmp_path) == "class bee of test/ is not in train/: remove it or add it"


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_an_unreadable_image_is_named(content: bytes | str, tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    file = tmp_path / "train/cat/1.png"
    file.write_bytes(content if isinstance(content, bytes) else file.read_bytes()[:70])
    assert error_of(tmp_path).startswith(f"{file} is not a readable image (")


def test_32_bit_images_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    write(tmp_path / "train/cat/1.tif", np.zeros((8, 8), np.float32))
    message = error_of(tmp_path)
    assert "cat/1.tif is not a readable image (32 bits a pixel: convert it to 8 bits)" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    write_set(tmp_path, 8, 8)
    (tmp_path / "train/cat").chmod(0)
    try:
        assert "Permission denied" in error_of(tmp_path)
    finally:
        (tmp_path / "train/cat").chmod(0o700)


def test_more_images_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, 100, 100)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 119}.__getitem__)
    message = error_of(tmp_path)
    assert message.startswith("12 images of 100x100 take 0.0 GB, this machine has 0.0 GB: choose")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 120}.__getitem__)
    load_folder(tmp_path)


def test_small_images_and_one_class_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "small", 7, 9)
    assert error_of(tmp_path / "small").startswith("images of 7x9 are too small: at least 8x8")
    write_set(tmp_path / "one", 8, 8, classes=("ant",))
    assert error_of(tmp_path / "one") == "only one class, ant: at least two are needed"
