"""Stereo data: layouts in their real formats, batches, and augmentation that keeps disparities."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rdarts_fast.data import stereo
from rdarts_fast.data.stereo import load_stereo, shifted, shrunk
from rdarts_fast.data.stereo_augmentation import (
    MEAN,
    StereoAugmentation,
    augmented_batch,
    relit,
    spatial_maps,
)
from rdarts_fast.data.stereo_files import StereoFiles, StereoSample, sintel
from rdarts_fast.draws import SITE_STREAM_VALIDATION, Draws
from rdarts_fast.errors import UserError
from tests.test_pfm import pfm

GENERATOR = np.random.default_rng(0)
SIZE = (6, 9)  # height, width
STILL = StereoAugmentation(scale=0.0)


def image(file: Path, size: tuple[int, int] = SIZE) -> np.ndarray:
    pixels = GENERATOR.integers(0, 256, (*size, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return pixels


def pfm_file(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = f"Pf\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode()
    file.write_bytes(pfm(header, "<", values.tolist()))


def values(high: float = 50.0) -> np.ndarray:
    return GENERATOR.uniform(0, high, SIZE).astype(np.float32)


def planes(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def flying_things(root: Path, frames: str, negative: bool = False):
    made = {}
    for part, scene, name in [
        ("TRAIN", "A/0000", "0006"),
        ("TRAIN", "A/0000", "0007"),
        ("TRAIN", "C/0012", "0006"),
        ("TEST", "B/0001", "0006"),
    ]:
        at = f"{part}/{scene}"
        left = image(root / frames / at / "left" / f"{name}.png")
        right = image(root / frames / at / "right" / f"{name}.png")
        disparity = values()
        file = root / "disparity" / at / "left" / f"{name}.pfm"
        pfm_file(file, -disparity if negative else disparity)
        made[at, name] = (left, right, disparity)
    return made


@pytest.mark.parametrize("name", ["flyingthings", "flyingthings_final"])
@pytest.mark.parametrize("negative", [False, True])
def test_flying_things(tmp_path: Path, name: str, negative: bool) -> None:
    frames = "frames_finalpass" if name.endswith("final") else "frames_cleanpass"
    made = flying_things(tmp_path, frames, negative)
    (tmp_path / frames / "TRAIN/A/0000/left/Thumbs.db").write_bytes(b"")
    found = load_stereo(f"{name}:{tmp_path}")
    assert (len(found.train), len(found.test)) == (3, 1)
    assert [half.tolist() for half in found.halves] == [[0], [1, 2]]
    for part, index, key in [
        ("train", 1, ("TRAIN/A/0000", "0007")),
        ("train", 2, ("TRAIN/C/0012", "0006")),
        ("test", 0, ("TEST/B/0001", "0006")),
    ]:
        left, right, disparity = made[key]
        sample = found.read(part, index)
        assert torch.equal(sample.left, planes(left)) and torch.equal(sample.right, planes(right))
        assert torch.equal(sample.disparity, torch.from_numpy(disparity))
    (tmp_path / "all_unused_files.txt").write_text("TRAIN/A/0000/left/0006.png\n")
    assert len(load_stereo(f"{name}:{tmp_path}").train) == 2


def packed(disparity: np.ndarray) -> np.ndarray:
    """As sintel_io.py of the data set packs it."""
    red = np.floor(disparity / 4)
    green = np.floor((disparity / 4 - red) * 256)
    blue = np.floor(((disparity / 4 - red) * 256 - green) * 256)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def sintel_files(root: Path, scenes=("alley_1", "ambush_2")) -> dict:
    made = {}
    for scene in scenes:
        for name in ("frame_0001.png", "frame_0002.png"):
            base, disparity = root / "training", values(900.0)
            pair = [image(base / f"clean_{side}" / scene / name) for side in ("left", "right")]
            masks = GENERATOR.integers(0, 2, (2, *SIZE)).astype(np.uint8) * 255
            for folder, pixels in [
                ("disparities", packed(disparity)),
                ("occlusions", masks[0]),
                ("outofframe", masks[1]),
            ]:
                file = base / folder / scene / name
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
            made[scene, name] = (*pair, disparity, masks)
    return made


def test_sintel(tmp_path: Path) -> None:
    made = sintel_files(tmp_path)
    found = load_stereo(f"sintel:{tmp_path}")
    assert (len(found.train), len(found.test)) == (2, 2)  # whole scenes
    left, right, disparity, masks = made["ambush_2", "frame_0002.png"]
    sample = found.read("test", 1)
    assert torch.equal(sample.left, planes(left)) and torch.equal(sample.right, planes(right))
    error = sample.disparity - torch.from_numpy(disparity)
    assert error.abs().max() <= 2**-14 * 1.01 + 900 * 2**-23  # steps of the packing, and float32's
    visible = sintel(tmp_path, "sintel", "clean", visible_only=True)[1][1].read()
    unknown = torch.from_numpy((masks > 0).any(axis=0))
    assert 0 < unknown.sum() < unknown.numel()
    assert torch.equal(visible.disparity, torch.where(unknown, torch.inf, sample.disparity))
    with pytest.raises(UserError, match=r"no such folder: .*final_left; expected training/final"):
        load_stereo(f"sintel_final:{tmp_path}")


def test_middlebury(tmp_path: Path) -> None:
    for i, scene in enumerate(("Adirondack", "Backpack", "Bicycle1")):
        for name in ("im0.png", "im1.png"):
            image(tmp_path / scene / name)
        disparity = values()
        disparity[0, :4] = np.inf
        pfm_file(tmp_path / scene / ("disp0GT.pfm" if i == 1 else "disp0.pfm"), disparity)
    found = load_stereo(f"middlebury:{tmp_path}")
    assert (len(found.train), len(found.test)) == (2, 1)
    sample = found.read("test", 0)
    assert torch.equal(sample.disparity, torch.from_numpy(disparity))
    assert sample.disparity[0, :4].isinf().all() and sample.disparity[1:].isfinite().all()


@pytest.mark.parametrize("split", [True, False])
def test_folder_of_ones_own_in_every_format(tmp_path: Path, split: bool) -> None:
    made = []
    for i in range(6):
        part = tmp_path / ("test" if i == 4 else "train") if split else tmp_path
        left = image(part / "left" / f"{i}.png")
        right = image(part / "right" / (f"{i}.bmp" if i == 2 else f"{i}.png"))
        disparity = np.round(values() * 256) / 256
        disparity[2, 3] = np.inf
        (part / "disparity").mkdir(exist_ok=True)
        file = part / "disparity" / f"{i}"
        if i % 3 == 0:
            pfm_file(file.with_suffix(".pfm"), disparity)
        elif i % 3 == 1:
            levels = np.where(np.isfinite(disparity), disparity, 0) * 256
            Image.fromarray(levels.astype(np.uint16)).save(file.with_suffix(".png"))
        else:
            kept = np.where(np.isfinite(disparity), disparity, -1)
            np.save(file.with_suffix(".npy"), kept.astype(np.float32 if i == 2 else np.float64))
        made.append((left, right, disparity))
    found = load_stereo(f"folder:{tmp_path}")
    assert (len(found.train), len(found.test)) == (5, 1)
    for part, index, i in [*(("train", k, k) for k in range(4)), ("train", 4, 5), ("test", 0, 4)]:
        sample = found.read(part, index)
        assert torch.equal(sample.left, planes(made[i][0]))
        assert torch.equal(sample.right, planes(made[i][1]))
        torch.testing.assert_close(sample.disparity, torch.from_numpy(made[i][2]).float())


def own(root: Path) -> StereoFiles:
    for i in range(2):
        for side in ("left", "right"):
            image(root / side / f"{i}.png")
        pfm_file(root / "disparity" / f"{i}.pfm", values())
    return load_stereo(f"folder:{root}").train[0]


def damage(root: Path, what: str) -> None:
    disparity = root / "disparity" / "0.pfm"
    if what == "other size":
        image(root / "right" / "0.png", (6, 8))
    elif what == "other disparity size":
        pfm_file(disparity, values()[:, :8])
    elif what == "colour":
        disparity.write_bytes(pfm(b"PF\n9 6\n-1\n", "<", np.zeros((6, 9, 3))))
    elif what == "cut image":
        file = root / "left" / "0.png"
        file.write_bytes(file.read_bytes()[:60])
    elif what == "8 bits":
        disparity.unlink()
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(disparity.with_suffix(".png"))
    elif what == "pickle":
        disparity.unlink()
        np.save(disparity.with_suffix(".npy"), np.array([[{}]]), allow_pickle=True)
    elif what == "colours in npy":
        disparity.unlink()
        np.save(disparity.with_suffix(".npy"), np.zeros((*SIZE, 3)))
    elif what == "two":
        np.save(disparity.with_suffix(".npy"), np.zeros(SIZE))
    elif what == "no right":
        (root / "right" / "0.png").unlink()
    elif what == "no disparity":
        disparity.unlink()
    elif what == "empty":
        shutil.rmtree(root / "left")
        (root / "left").mkdir()
    elif what == "gone":
        shutil.rmtree(root)


@pytest.mark.parametrize(
    "what, message",
    [
        ("other size", r"right/0.png: expected 6x9 \(height x width\) as .*left/0.png, got 6x8"),
        ("other disparity size", r"0.pfm: expected 6x9 \(height x width\) as .*, got 6x8"),
        ("colour", r"0.pfm: expected one channel \(Pf\), found three \(PF\)"),
        ("cut image", "left/0.png: not a readable image"),
        ("8 bits", r"0.png: expected a grey PNG of 16 bits .* found uint8"),
        ("pickle", "0.npy: not a readable .npy file"),
        ("colours in npy", r"0.npy: expected an array \[H, W\]"),
        ("two", "one of them is needed"),
        ("no right", "no .*right/0.png, which belongs to .*left/0.png"),
        ("no disparity", "no .*disparity/0.pfm, which belongs to"),
        ("empty", "no images in"),
        ("gone", "no such folder: .*; expected left/, right/ and disparity/"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, what: str, message: str) -> None:
    root = tmp_path / "own"
    own(root)
    damage(root, what)
    with pytest.raises(UserError, match=message):
        load_stereo(f"folder:{root}").read("train", 0)


@pytest.mark.parametrize(
    "name, message",
    [
        ("kitti", 'unknown data set "kitti": one of motorcycle'),
        ("sintel:", 'unknown data set "sintel:"'),
        ("motorcycles", 'Did you mean "motorcycle"'),
    ],
)
def test_an_unknown_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_stereo(name)


def test_one_pair_cannot_be_split(tmp_path: Path) -> None:
    own(tmp_path)
    for file in tmp_path.glob("*/1.*"):
        file.unlink()
    with pytest.raises(UserError, match="one pair alone"):
        load_stereo(f"folder:{tmp_path}")


# ---- The embedded pair.


def test_motorcycle_is_cut_into_parts_that_share_no_pixel() -> None:
    from skimage.data import stereo_motorcycle

    left, right, disparity = stereo_motorcycle()
    found = load_stereo("motorcycle")
    assert len(found.train) == 64 and len(found.test) == 1
    sample = found.read("test", 0)
    assert torch.equal(sample.left, planes(left[:, 370:]))
    assert torch.equal(sample.right, planes(right[:, 370:]))
    assert torch.equal(sample.disparity, torch.from_numpy(disparity[:, 370:]))
    bands = [found.read("train", i) for i in range(4)]
    joined = torch.cat([band.left for band in bands], dim=1)
    assert torch.equal(joined, planes(left[:, :370]))
    joined = torch.cat([band.disparity for band in bands])
    assert torch.equal(joined, torch.from_numpy(disparity[:, :370]))
    weights, alphas = (set(half.tolist()) for half in found.halves)
    assert {row % 4 for row in weights} == {0, 2} and {row % 4 for row in alphas} == {1, 3}
    assert len(weights) == len(alphas) == 32
    assert load_stereo("motorcycle").fingerprint() == found.fingerprint()
    known = np.sort(disparity[:, 370:][np.isfinite(disparity[:, 370:])])
    assert found.median_disparity("test") == known[(len(known) - 1) // 2]


def test_its_disparity_is_right_for_its_images() -> None:
    """The right view, moved by the disparity, is the left one: closer than moved by 2 more."""
    found = load_stereo("motorcycle").read("test", 0)
    errors = []
    for off in (0.0, 2.0, -2.0):
        moved, inside = moved_right(found.right.double() / 255, found.disparity.double() + off)
        difference = (moved - found.left.double() / 255).abs().mean(dim=0)[inside]
        errors.append(difference.median().item())
    assert errors[0] < 0.6 * min(errors[1:])


def test_its_training_crops_are_shifted() -> None:
    """The lowest band is near, so that its disparities stay known under every shift."""
    found, shifts = load_stereo("motorcycle"), []
    whole = found.read("train", 3)
    for i in range(16):
        band = found.read("train", 4 * i + 3)
        by = (i + 1) // 2 * 12 // 8 * (1 if i % 2 else -1)
        kept, partner = (slice(max(s, 0), 370 + min(s, 0)) for s in (by, -by))
        assert torch.equal(band.left, whole.left[..., kept])
        assert torch.equal(band.right, whole.right[..., partner])
        assert torch.equal(band.disparity, whole.disparity[:, kept] - by)
        shifts.append(by)
    assert sorted(shifts) == [-10, -9, -7, -6, -4, -3, -1, 0, 1, 3, 4, 6, 7, 9, 10, 12]


@pytest.mark.parametrize("by", [0, 3, -3])
def test_a_shifted_pair_has_the_disparity_of_its_images(by: int) -> None:
    left = torch.arange(60, dtype=torch.uint8).view(3, 2, 10)
    right = torch.roll(left, -4, dims=-1)  # left[x] is right[x - 4]
    disparity = torch.full((2, 10), 4.0)
    disparity[0, 5], disparity[1, 5] = 2.0, torch.inf
    found = shifted(StereoSample(left, right, disparity), by)
    width, at = 10 - abs(by), 5 - max(by, 0)
    assert found.disparity.shape == (2, width)
    assert found.disparity[:, at].tolist() == [2.0 - by if by <= 2 else math.inf, math.inf]
    others = [x for x in range(width) if x != at]
    assert (found.disparity[:, others] == 4.0 - by).all()
    for x in range(4 - by, min(width, width + 4 - by)):
        assert torch.equal(found.left[..., x], found.right[..., x - 4 + by])


def test_without_scikit_image_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(UserError, match=r"pip install 'rdarts-fast\[disparity\]'"):
        load_stereo("motorcycle")


# ---- Batches and augmentation.


def moved_right(right: Tensor, disparity: Tensor) -> tuple[Tensor, Tensor]:
    """Return right[y, x - d], [3, H, W], and where that lies inside and d is known."""
    height, width = disparity.shape
    known = disparity.isfinite()
    x = torch.arange(width) - torch.where(known, disparity, 0.0)
    y = torch.arange(height, dtype=x.dtype).view(-1, 1).expand_as(x)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    moved = F.grid_sample(right.unsqueeze(0), grid.unsqueeze(0).to(right), align_corners=False)
    return moved.squeeze(0), known & (x >= 0) & (x <= width - 1)


def synthetic(height: int = 120, width: int = 200) -> StereoSample:
    """A smooth texture whose disparity grows with the row: d = 4 + y / 10."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    disparity = 4 + y / 10

    def texture(x: Tensor) -> Tensor:
        waves = [torch.sin(x / 4 + y / 7), torch.cos(x / 6 - y / 3), torch.sin(x / 9 + y / 2)]
        return ((torch.stack(waves) * 0.3 + 0.5) * 255).round().to(torch.uint8)

    disparity[:, 20:30] = torch.inf
    return StereoSample(
        texture(x), texture(x + torch.where(x > 0, 4 + y / 10, 4 + y / 10)), disparity
    )


SPATIAL = StereoAugmentation(noise=0, brightness=0, contrast=0, gamma=0, colour=0)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_spatial_augmentation_keeps_disparities_right(scale: float) -> None:
    """The right crop moved by the new disparity is the left crop; not so by another."""
    sample, n = synthetic(), 12
    augmentation = StereoAugmentation(
        scale, translate=0.05, zoom=0.15, shear=0.05, noise=0, brightness=0, contrast=0, gamma=0,
        colour=0,
    )  # fmt: skip
    views, disparities = augmented_batch([sample] * n, (64, 96), augmentation, Draws(3))
    maps = spatial_maps([sample] * n, (64, 96), augmentation, Draws(3))
    zooms = [one.zoom for one in maps]
    assert max(zooms) > 1.05 and min(zooms) < 0.95 and max(abs(m.shear) for m in maps) > 0.01
    for view, disparity, spatial in zip(views, disparities, maps, strict=True):
        known = disparity.isfinite()
        _, x = spatial.sources((64, 96), disparity.device)
        in_frame = torch.where(x > disparity / spatial.zoom, disparity, torch.inf)
        error = matching_error(view, in_frame)
        assert error < 0.012, (error, spatial)
        if abs(spatial.zoom - 1) > 0.05:  # the disparity before the zoom would be wrong
            assert matching_error(view, in_frame / spatial.zoom) > 2 * error
        y = (spatial.centre[0] + (torch.arange(64) + 0.5 - 32) / spatial.zoom - 0.5).round()
        expected = spatial.zoom * (4 + y.view(-1, 1) / 10).expand(64, 96)
        torch.testing.assert_close(disparity[known], expected.float()[known])
        assert known.float().mean() > 0.5


def matching_error(view: Tensor, disparity: Tensor) -> float:
    moved, inside = moved_right(view[1].double(), disparity.double())
    return (moved - view[0]).abs().mean(dim=0)[inside].mean().item()


def test_unknown_and_outside_pixels_stay_unknown() -> None:
    sample = synthetic(40, 60)
    augmentation = StereoAugmentation(0.0)
    views, disparities = augmented_batch([sample], (64, 96), augmentation, Draws(0))
    known = disparities[0].isfinite()
    expected = torch.zeros(64, 96, dtype=torch.bool)
    expected[12:52, 18:78] = sample.disparity.isfinite()
    assert torch.equal(known, expected)
    torch.testing.assert_close(views[0, 0, :, 0], views[0, 0, :, 12])  # the border goes on


def test_at_scale_0_a_crop_is_the_middle_as_it_is() -> None:
    sample = synthetic()
    views, disparities = augmented_batch([sample] * 3, (64, 96), STILL, Draws(0))
    assert torch.equal(views[0], views[2])
    rows, columns = slice(28, 92), slice(52, 148)
    expected = torch.stack([sample.left, sample.right])[:, :, rows, columns].float() / 255 - MEAN
    torch.testing.assert_close(views[1], expected, rtol=0, atol=1e-6)
    assert torch.equal(disparities[1], sample.disparity[rows, columns].float())


def test_the_scale_multiplies_the_variances() -> None:
    sample, size = synthetic(), (64, 96)
    one = spatial_maps([sample] * 64, size, SPATIAL, Draws(1))
    four = spatial_maps([sample] * 64, size, StereoAugmentation(scale=4.0), Draws(1))
    for a, b in zip(one, four, strict=True):
        assert math.log(b.zoom) == pytest.approx(2 * math.log(a.zoom))
        assert b.shear == pytest.approx(2 * a.shear)
    spread = torch.tensor([math.log(m.zoom) for m in one]).std()
    assert 0.7 * 0.15 < spread < 1.3 * 0.15
    views = torch.full((64, 2, 3, 4, 4), 0.5)
    only = {name: 0.0 for name in ("noise", "contrast", "gamma", "colour")}
    for scale in (0.25, 1.0):
        lit = relit(views, StereoAugmentation(scale, brightness=0.02, **only), Draws(2))
        moved = (lit - 0.5).mean(dim=(1, 2, 3, 4))
        assert 0.7 < moved.std() / (0.02 * math.sqrt(scale)) < 1.3
        torch.testing.assert_close(lit, lit[:, :1, :1, :1, :1].expand_as(lit))
    noisy = relit(views, StereoAugmentation(1.0, 0, 0, 0, 0.02, 0, 0, 0, 0), Draws(2))
    assert not torch.allclose(noisy[:, 0], noisy[:, 1])  # each view its own
    assert 0.01 < (noisy - 0.5).square().mean().sqrt() < 0.04


def light(name: str, value: float = 0.3) -> tuple[Tensor, Tensor]:
    views = torch.rand(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    zeros = {key: 0.0 for key in ("noise", "brightness", "contrast", "gamma", "colour")}
    return views, relit(views, StereoAugmentation(1.0, 0, 0, 0, **{**zeros, name: value}), Draws(4))


def test_each_change_of_light_is_what_its_name_says() -> None:
    views, lit = light("gamma")
    power = lit.log() / views.log()
    torch.testing.assert_close(power, power[:, :1, :1, :1, :1].expand_as(power))
    assert power.flatten(1)[:, 0].std() > 0.05
    views, lit = light("colour", 0.05)
    factor = lit / views
    torch.testing.assert_close(factor, factor[:, :1, :, :1, :1].expand_as(factor))
    assert factor[:, 0, :, 0, 0].std() > 0.01
    views, lit = light("contrast", 0.1)
    mean = views.mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(lit.mean(dim=(1, 2, 3, 4), keepdim=True), mean)
    ratio = (lit - mean).std(dim=(1, 2, 3, 4)) / views.std(dim=(1, 2, 3, 4))
    assert ratio.std() > 0.02


def test_draws_depend_on_the_place_in_the_batch_alone() -> None:
    samples = [synthetic(), synthetic(100, 150), synthetic()]
    full = StereoAugmentation(1.0)
    whole = augmented_batch(samples, (32, 64), full, Draws(5, step=3))
    again = augmented_batch(samples, (32, 64), full, Draws(5, step=3))
    part = augmented_batch(samples[1:], (32, 64), full, Draws(5, step=3, part=(1, 3)))
    other = augmented_batch(samples, (32, 64), full, Draws(5, step=4))
    alphas = augmented_batch(
        samples, (32, 64), full, Draws(5, step=3), stream=SITE_STREAM_VALIDATION
    )
    for a, b, c, d, e in zip(whole, again, part, other, alphas, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a[1:], c, rtol=0, atol=1e-6)
        assert not torch.equal(a, d) and not torch.equal(a, e)
    assert not torch.equal(whole[0][0], whole[0][2])  # the same pair, another crop


def test_bad_values_of_the_augmentation_are_named() -> None:
    with pytest.raises(UserError, match="augmentation scale: expected 0 or more, got -1"):
        StereoAugmentation(scale=-1.0)
    with pytest.raises(UserError, match="augmentation zoom: expected 0 or more, got nan"):
        StereoAugmentation(zoom=math.nan)


def test_whole_batches_are_padded_with_unknown_pixels(tmp_path: Path) -> None:
    for i, size in enumerate([SIZE, (5, 12), SIZE]):
        for side in ("left", "right"):
            image(tmp_path / side / f"{i}.png", size)
        pfm_file(tmp_path / "disparity" / f"{i}.pfm", np.full(size, 3.0, np.float32))
    found = load_stereo(f"folder:{tmp_path}")
    views, disparities = found.whole_batch("train", torch.tensor([0, 1]))
    assert views.shape == (2, 2, 3, 6, 12) and disparities.shape == (2, 6, 12)
    first = found.read("train", 0)
    torch.testing.assert_close(views[0, 0, :, :, :9], first.left.float() / 255 - MEAN)
    assert torch.equal(views[0, :, :, :, 9:], views[0, :, :, :, 8:9].expand(-1, -1, -1, 3))
    assert (disparities[0, :, :9] == 3).all() and disparities[0, :, 9:].isinf().all()
    assert disparities[1, 5].isinf().all()
    single, _ = found.whole_batch("test", torch.tensor([0]))
    assert single.shape == (1, 2, 3, *SIZE)


def test_training_batches_come_from_the_rows(tmp_path: Path) -> None:
    found = load_stereo("motorcycle", shrink=2)
    rows = torch.tensor([5, 0])
    views, disparities = found.training_batch(rows, (32, 64), STILL, Draws(0))
    alone, _ = found.training_batch(rows[1:], (32, 64), STILL, Draws(0))
    assert views.shape == (2, 2, 3, 32, 64) and disparities.shape == (2, 32, 64)
    assert torch.equal(views[1], alone[0]) and not torch.equal(views[0], views[1])


def test_shrinking_averages_pixels_and_known_disparities() -> None:
    disparity = torch.tensor([[4.0, torch.inf, 1.0], [8.0, 6.0, 1.0], [1.0, 1.0, 1.0]])
    left = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    small = shrunk(StereoSample(left, left + 1, disparity), 2)
    assert small.disparity.tolist() == [[3.0]]  # (4 + 8 + 6) / 3 / 2
    assert small.left.flatten().tolist() == [2, 11, 20] and small.right[0, 0, 0] == 3
    unknown = torch.full((2, 2), torch.inf)
    assert shrunk(StereoSample(left[:, :2, :2], left[:, :2, :2], unknown), 2).disparity.isinf()
    with pytest.raises(UserError, match=r"shrink 4: takes all of an image of \[3, 3\]"):
        shrunk(StereoSample(left, left, disparity), 4)
    with pytest.raises(UserError, match="shrink: expected 1 or more, got 0"):
        load_stereo("motorcycle", shrink=0)


def test_pairs_stay_in_memory_while_there_is_room(tmp_path: Path, monkeypatch) -> None:
    own(tmp_path)
    image(tmp_path / "left" / "2.png")
    image(tmp_path / "right" / "2.png")
    pfm_file(tmp_path / "disparity" / "2.pfm", values())
    size = 6 * 9 * (3 + 3 + 4)
    monkeypatch.setattr(stereo, "KEPT_BYTES", size)
    found = load_stereo(f"folder:{tmp_path}")
    assert found.read("train", 0) is found.read("train", 0)
    assert found.read("train", 1) is not found.read("train", 1)
