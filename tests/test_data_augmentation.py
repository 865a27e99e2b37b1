from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import functional as transforms

from rdarts_fast.data import Augmentation, augment, normalize
from rdarts_fast.data.image_set import mean_and_std, scaled_augmentation
from rdarts_fast.draws import (
    SITE_CROP,
    SITE_CUTOUT,
    SITE_FLIP,
    SITE_STREAM_VALIDATION,
    Draws,
)
from rdarts_fast.errors import UserError

CIFAR = Augmentation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616), 4, True, 16)
GREY = Augmentation((0.286,), (0.353,), 4, True, 14)
# float32 against the order of operations of torchvision
TOLERANCE = 1e-5

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random_images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def with_(augmentation: Augmentation, **changes: object) -> Augmentation:
    return Augmentation(**{**augmentation.__dict__, **changes})


def augment_one(image: Tensor, b: int, a: Augmentation, draws: Draws, probability: float) -> Tensor:
    """The same for image b with torchvision's crop and flip and the published cutout."""
    _, height, width = image.shape
    crop = draws.uniform(SITE_CROP, (b + 1, 2))[b].tolist()
    top, left = (math.floor(u * (2 * a.pad + 1)) for u in crop)
    image = transforms.crop(transforms.pad(image, [a.pad]), top, left, height, width)
    if a.flip and draws.uniform(SITE_FLIP, (b + 1,))[b] < 0.5:
        image = transforms.hflip(image)
    normal = transforms.normalize(image.float() / 255, a.mean, a.std)
    down, across, whether = draws.uniform(SITE_CUTOUT, (b + 1, 3))[b].tolist()
    if whether < probability:
        y, x, half = math.floor(down * height), math.floor(across * width), a.cutout_length // 2
        y1, y2 = np.clip([y - half, y - half + a.cutout_length], 0, height)
        x1, x2 = np.clip([x - half, x - half + a.cutout_length], 0, width)
        normal[:, y1:y2, x1:x2] = 0
    return normal


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("shape", "augmentation"),
    [
        ((64, 3, 32, 32), CIFAR),
        ((9, 1, 28, 28), GREY),
        ((7, 1, 8, 8), Augmentation((0.3,), (0.4,), 1, False, 4)),
        ((5, 3, 33, 50), with_(CIFAR, cutout_length=7)),
        ((5, 3, 50, 33), with_(CIFAR, flip=False, pad=6)),
        ((5, 3, 16, 16), with_(CIFAR, pad=0, cutout_length=1)),
        ((2, 3, 16, 16), with_(CIFAR, pad=0, flip=False, cutout_length=0)),
        ((2, 3, 224, 224), CIFAR),
        ((0, 3, 32, 32), CIFAR),
    ],
)
def test_equals_torchvision_image_by_image(
    shape: tuple[int, ...], augmentation: Augmentation, layout: str, device: str
) -> None:
    images = random_images(*shape)
    expected = torch.empty(shape)
    draws = Draws(3, step=11)
    for b in range(shape[0]):
        expected[b] = augment_one(images[b], b, augmentation, draws, 0.6)
    images = images.to(device)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    if layout == "sliced":
        images = torch.stack((images, 255 - images), dim=-1)[..., 0]
    before = images.clone()
    result = augment(images, augmentation, draws, cutout_probability=0.6)
    assert result.dtype == torch.float32
    assert result.device == images.device
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(images, before)


def test_normalizes_as_torchvision() -> None:
    images = random_images(4, 3, 9, 11)
    expected = transforms.normalize(images.float() / 255, CIFAR.mean, CIFAR.std)
    torch.testing.assert_close(normalize(images, CIFAR), expected, rtol=0, atol=TOLERANCE)


def test_the_same_draws_give_the_same_bits() -> None:
    images = random_images(16, 3, 32, 32)
    first = augment(images, CIFAR, Draws(1, step=2), cutout_probability=1.0)
    assert torch.equal(first, augment(images, CIFAR, Draws(1, step=2), cutout_probability=1.0))


@pytest.mark.parametrize("other", [Draws(1, step=3), Draws(2, step=2), Draws(1, branch=1, step=2)])
def test_draws_depend_on_seed_branch_and_step(other: Draws) -> None:
    image = random_images(1, 3, 32, 32).expand(16, -1, -1, -1)
    result = augment(image, CIFAR, Draws(1, step=2))
    assert (result != augment(image, CIFAR, other)).flatten(1).any(1).sum() > 8


@pytest.mark.parametrize(
    "augmentation",
    [
        with_(CIFAR, flip=False, cutout_length=0),
        with_(CIFAR, pad=0, cutout_length=0),
        with_(CIFAR, pad=0, flip=False),
    ],
    ids=["crop", "flip", "cutout"],
)
def test_the_streams_of_both_batches_differ(augmentation: Augmentation) -> None:
    images = random_images(64, 3, 32, 32)
    streams = [
        augment(images, augmentation, Draws(1), stream=stream, cutout_probability=1.0)
        for stream in (0, SITE_STREAM_VALIDATION)
    ]
    assert (streams[0] != streams[1]).flatten(1).any(1).sum() > 16


def test_draws_depend_on_the_position_and_on_nothing_else_in_the_batch() -> None:
    images = random_images(16, 3, 32, 32)
    whole = augment(images, CIFAR, Draws(1), cutout_probability=1.0)
    assert torch.equal(whole[:5], augment(images[:5], CIFAR, Draws(1), cutout_probability=1.0))
    same = augment(images[:1].expand(16, -1, -1, -1), CIFAR, Draws(1), cutout_probability=1.0)
    assert torch.equal(same[0], whole[0])
    assert len({tuple(image.flatten().tolist()) for image in same}) == 16


def test_every_crop_and_both_flips_occur_equally_often() -> None:
    # One bright pixel in the centre says where the window was; another beside it, whether mirrored.
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 4], image[0, 0, 4, 5] = 255, 128
    augmentation = Augmentation((0.5,), (0.5,), 1, True, 0)
    result = augment(image.expand(18000, -1, -1, -1), augmentation, Draws(5)).flatten(1)
    brightest = result.argmax(1)
    right = result.gather(1, brightest[:, None] + 1)[:, 0] > -0.5
    counts = torch.bincount(brightest * 2 + right, minlength=162)
    assert (counts > 0).sum() == 18  # 3 x 3 windows, mirrored or not
    assert counts.sum() == 18000
    # 1000 expected in each: 5 standard deviations
    assert (counts[counts > 0] - 1000).abs().max() < 5 * 1000**0.5


def test_cutout_centres_are_uniform_and_squares_are_clipped() -> None:
    augmentation = Augmentation((0.3,), (0.5,), 0, False, 3)
    image = torch.full((6400, 1, 8, 8), 200, dtype=torch.uint8)
    result = augment(image, augmentation, Draws(5), cutout_probability=1.0)
    zeros = (result == 0).sum((1, 2, 3))
    assert set(zeros.tolist()) == {4, 6, 9}
    # A corner is the centre in 1 of 64 images, an edge pixel in 24, an inner one in 36.
    for count, share in ((4, 4 / 64), (6, 24 / 64), (9, 36 / 64)):
        expected = 6400 * share
        assert abs((zeros == count).sum() - expected) < 5 * expected**0.5


def test_cutout_is_off_by_default_and_follows_its_probability() -> None:
    image = torch.full((4000, 1, 8, 8), 200, dtype=torch.uint8)
    augmentation = Augmentation((0.3,), (0.5,), 0, False, 4)
    assert (augment(image, augmentation, Draws(5)) != 0).all()
    result = augment(image, augmentation, Draws(5), cutout_probability=0.25)
    share = (result == 0).flatten(1).any(1).float().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int, int, bool]:
    height, width = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    shape = (draw(st.integers(1, 6)), draw(st.sampled_from([1, 3])), height, width)
    images = random_images(*shape, seed=draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "two levels", "constant"]))
    if kind == "two levels":
        low, high = draw(st.integers(0, 255)), draw(st.integers(0, 255))
        images = torch.where(images < 128, low, high).to(torch.uint8)
    if kind == "constant":
        images.fill_(draw(st.integers(0, 255)))
    side = min(height, width)
    return (
        images,
        draw(st.integers(0, side - 1)),
        draw(st.integers(0, side - 1)),
        draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(batches(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_no_image_ever_becomes_all_zero(
    batch: tuple[Tensor, int, int, bool], seed: int, step: int
) -> None:
    images, pad, length, flip = batch
    augmentation = Augmentation(*mean_and_std(images), pad, flip, length)
    result = augment(images, augmentation, Draws(seed, step=step), cutout_probability=1.0)
    assert result.isfinite().all()
    assert (result != 0).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [(8, 32), (32, 8), (8, 8)])
@pytest.mark.parametrize("changes", [{"cutout_length": 8}, {"pad": 8}, {"cutout_length": 30}])
def test_refuses_what_can_take_a_whole_image_away(
    size: tuple[int, int], changes: dict[str, int]
) -> None:
    augmentation = with_(CIFAR, **{"pad": 1, "cutout_length": 4, **changes})
    with pytest.raises(UserError, match=r"can take away a whole image .* at most 7"):
        augment(random_images(2, 3, *size), augmentation, Draws(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": (0.2, 0.0, 0.2)}, "std must be finite and above 0"),
        ({"std": (0.2, math.nan, 0.2)}, "std must be finite and above 0"),
        ({"mean": (0.2, math.inf, 0.2)}, "mean must be finite"),
        ({"mean": (0.2,)}, "one value per channel"),
        ({"mean": (), "std": ()}, "one value per channel"),
        ({"pad": -1}, "at least 0, found -1"),
        ({"cutout_length": -2}, "at least 0, found 4 and -2"),
    ],
)
def test_refuses_a_senseless_augmentation(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_(CIFAR, **changes)


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_refuses_a_probability_outside_0_to_1(probability: float) -> None:
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        augment(random_images(2, 3, 32, 32), CIFAR, Draws(0), cutout_probability=probability)


def test_refuses_images_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="images have 1 channels, mean and std are for 3"):
        augment(random_images(2, 1, 32, 32), CIFAR, Draws(0))
    for images in (torch.rand(2, 3, 32, 32), random_images(3, 32, 32)):
        for function in (normalize, lambda images, a: augment(images, a, Draws(0))):
            with pytest.raises(ValueError, match=r"expected uint8 \[B, C, H, W\]"):
                function(images, CIFAR)


@pytest.mark.parametrize(
    ("size", "pad", "length"),
    [((32, 32), 4, 16), ((8, 8), 1, 4), ((28, 28), 4, 14), ((224, 100), 13, 50), ((9, 50), 1, 4)],
)
def test_crop_and_cutout_scale_with_the_shorter_side(
    size: tuple[int, int], pad: int, length: int
) -> None:
    assert scaled_augmentation([0.5], [0.5], True, size) == Augmentation(
        (0.5,), (0.5,), pad, True, length
    )


def test_mean_and_std_are_those_of_each_channel() -> None:
    images = random_images(5000, 3, 3, 5)
    images[:, 1] //= 3
    mean, std = mean_and_std(images)
    values = images.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3), unbiased=False).tolist(), abs=1e-12)


def test_a_constant_channel_is_not_divided_by_nothing() -> None:
    images = random_images(20, 3, 8, 8)
    images[:, 1] = 77
    images[:, 2] = 200
    images[0, 2, 0, 0] = 201
    mean, std = mean_and_std(images)
    assert mean[1:] == (0.5, 0.5)
    assert std[1:] == (0.5, 0.5)
    assert std[0] != 0.5


def test_no_grey_level_becomes_exactly_zero() -> None:
    images = torch.tensor([100, 154], dtype=torch.uint8).repeat(8).view(2, 1, 2, 4)  # mean 127
    mean, std = mean_and_std(images)
    assert mean[0] == pytest.approx(127 / 255, abs=1e-5)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (normalize(levels, Augmentation(mean, std, 0, False, 0)) != 0).all()
