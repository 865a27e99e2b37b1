from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from rdarts_fast import draws, native
from rdarts_fast.draws import Draws, normal_twin, philox_twin, uniform_twin
from tests.conftest import device_of

CPU = torch.device("cpu")
UNITS = [
    pytest.param(
        unit,
        marks=pytest.mark.skipif(
            unit not in native.extension.runnable_units(),
            reason=f"this machine does not run {unit}",
        ),
    )
    for unit in native.build_info()["cpu_units"]
]
KINDS = {
    "philox_bits": (torch.int64, philox_twin),
    "philox_uniform": (torch.float32, uniform_twin),
    "philox_normal": (torch.float32, normal_twin),
}
# A CPU group of 64 blocks holds 256 numbers and a thread takes 16 groups at once.
SIZES = [0, 1, 2, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097, 3 * 4096 + 258, 100_003]
SEED = 0xDEADBEEFCAFEBABE
COUNTER = (5, 77, 9, 7 << 16 | 3)

# Philox4x32-10 of Random123's kat_vectors: counter, key, output.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Blocks of seed 0, counter (block, 0, 0, 0) with a pair at an end of one of the formulas.
EDGE_BLOCKS = {
    "u = 1, second pair": 2330056,
    "u = 1, first pair": 38471471,
    "smallest u": 14883995,
    "angle on the axis, half a turn": 454764,
    "angle on the axis, a quarter turn": 7980426,
    "angle on the axis, three quarters": 5288436,
    "eighth of a turn": 23610117,
    "three eighths": 26556792,
    "five eighths": 558593,
    "seven eighths": 22699091,
}


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RDARTS_CPU", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def native_numbers(
    fill: str, seed: int, counter: Sequence[int], count: int, device: torch.device = CPU
) -> Tensor:
    """The extension's numbers, with a guard on both sides of the memory it fills."""
    dtype = KINDS[fill][0]
    memory = torch.full((count + 16,), 3, dtype=dtype, device=device)
    native.filled(fill, memory[8 : 8 + count], seed, counter)
    assert (memory[:8] == 3).all() and (memory[8 + count :] == 3).all()
    return memory[8 : 8 + count].clone()


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype == torch.float32:
        found, expected = found.view(torch.int32), expected.view(torch.int32)
    assert torch.equal(found, expected)


def key(words: Sequence[int]) -> int:
    return words[0] | words[1] << 32


@pytest.mark.parametrize(("counter", "words", "expected"), PUBLISHED)
def test_twin_gives_the_published_vectors(
    counter: Sequence[int], words: Sequence[int], expected: Sequence[int]
) -> None:
    assert tuple(philox_twin(key(words), counter, 4, CPU).tolist()) == expected


@pytest.mark.parametrize(("counter", "words", "expected"), PUBLISHED)
def test_native_gives_the_published_vectors(
    unit: str, counter: Sequence[int], words: Sequence[int], expected: Sequence[int]
) -> None:
    found = native_numbers("philox_bits", key(words), counter, 4)
    assert tuple(found.tolist()) == expected


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("fill", KINDS)
def test_native_and_twin_give_the_same_bits(unit: str, fill: str, count: int) -> None:
    expected = KINDS[fill][1](SEED, COUNTER, count, CPU)
    assert_same_bits(native_numbers(fill, SEED, COUNTER, count), expected)


@pytest.mark.parametrize("block", EDGE_BLOCKS.values(), ids=EDGE_BLOCKS.keys())
def test_native_and_twin_give_the_same_bits_at_the_edges(unit: str, block: int) -> None:
    expected = normal_twin(0, (block, 0, 0, 0), 4, CPU)
    found = native_numbers("philox_normal", 0, (block, 0, 0, 0), 4)
    assert_same_bits(found, expected)
    assert found.isfinite().all()


@pytest.mark.skipif(not native.runs_on(torch.device("cuda")), reason="CPU build")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("fill", KINDS)
def test_cuda_and_twin_give_the_same_bits(fill: str, count: int) -> None:
    found = native_numbers(fill, SEED, COUNTER, count, torch.device("cuda"))
    assert_same_bits(found.cpu(), KINDS[fill][1](SEED, COUNTER, count, CPU))
    on_device = KINDS[fill][1](SEED, COUNTER, count, torch.device("cuda"))
    assert_same_bits(on_device.cpu(), found.cpu())


@pytest.mark.parametrize("fill", KINDS)
def test_bits_do_not_depend_on_the_number_of_threads(
    fill: str, threads: Callable[[int], None]
) -> None:
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(native_numbers(fill, SEED, COUNTER, 100_003))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def test_normals_follow_the_formula() -> None:
    words = philox_twin(SEED, COUNTER, 200_000, CPU).view(-1, 2) >> 8
    radius = torch.sqrt(-2 * torch.log((words[:, 0] + 1).double() * 2.0**-24))
    angle = 2 * math.pi * words[:, 1].double() * 2.0**-24
    expected = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    found = normal_twin(SEED, COUNTER, 200_000, CPU).double().view(-1, 2)
    error = (found - expected).norm(dim=1)
    assert (error <= 4e-7 * radius).all()


def test_radius_is_exact_at_its_ends() -> None:
    words = torch.tensor([0xFFFFFFFF, 0xFFFFFF00, 0xFFFFFEFF, 0x80000000, 0x7FFFFFFF, 255, 0])
    radius = draws._radius(words)
    expected = torch.sqrt(-2 * torch.log(((words >> 8) + 1).double() * 2.0**-24))
    assert radius[:2].view(torch.int32).tolist() == [0, 0]
    torch.testing.assert_close(radius.double(), expected, rtol=1e-6, atol=0)


def test_uniforms_follow_the_formula() -> None:
    uniform = Draws(SEED).uniform(3, (100_000,))
    bits = Draws(SEED).bits(3, 100_000)
    assert torch.equal(uniform.double(), (bits >> 8).double() / 2**24)
    assert uniform.min() >= 0 and uniform.max() < 1


@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_uniforms_pass_kolmogorov_smirnov(seed: int) -> None:
    assert stats.kstest(Draws(seed).uniform(0, (1_000_000,)).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_normals_pass_kolmogorov_smirnov(seed: int) -> None:
    assert stats.kstest(Draws(seed).normal(0, (1_000_000,)).numpy(), "norm").pvalue > 1e-3


def test_normals_have_the_moments_of_a_normal() -> None:
    z = Draws(11).normal(0, (4_000_000,)).double()
    # The moments of a standard normal, and the variances of their estimates times the count.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / z.numel()), power


def test_neighbouring_draws_are_uncorrelated() -> None:
    here = Draws(5, branch=1, step=2, pass_index=3)
    others = [here.at(step=3), here.at(pass_index=4), here.at(branch=2), here.at(seed=6)]
    z = torch.stack([here.normal(8, (250_000,)), here.normal(9, (250_000,))])
    z = torch.cat([z, torch.stack([other.normal(8, (250_000,)) for other in others])])
    z = torch.cat([z, z[0].roll(1)[None], z[0].roll(2)[None]])
    correlations = torch.corrcoef(z) - torch.eye(len(z))
    assert correlations.abs().max() < 5 / math.sqrt(250_000)


def test_every_coordinate_changes_the_numbers() -> None:
    here = Draws(5, branch=1, step=2, pass_index=3)
    drawn = [
        (here, 8),
        (here, 9),
        (here.at(seed=6), 8),
        (here.at(seed=5 + (1 << 32)), 8),
        (here.at(branch=2), 8),
        (here.at(branch=3, pass_index=1), 8),
        (here.at(step=3), 8),
        (here.at(pass_index=2), 8),
    ]
    numbers = [draw.bits(site, 64) for draw, site in drawn]
    for a, b in itertools.combinations(numbers, 2):
        assert (a == b).sum() <= 1


def test_a_number_depends_on_its_index_alone() -> None:
    draw = Draws(5)
    flat = draw.normal(8, (3000,))
    assert torch.equal(draw.normal(8, (10, 1, 300)), flat.view(10, 1, 300))
    assert torch.equal(draw.normal(8, (1001,)), flat[:1001])
    assert draw.normal(8, ()) == flat[0]


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_a_shape_may_be_empty(shape: tuple[int, ...]) -> None:
    assert Draws(1).normal(0, shape).shape == shape
    assert Draws(1).uniform(0, shape).shape == shape
    assert Draws(1).permutation(0, 0).tolist() == []


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_permutation_holds_every_number_once(seed: int, site: int, count: int) -> None:
    assert sorted(Draws(seed).permutation(site, count).tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    found = [tuple(Draws(1, step=step).permutation(0, 3).tolist()) for step in range(6000)]
    counts = [found.count(p) for p in itertools.permutations(range(3))]
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "width"), [("seed", 64), ("branch", 16), ("step", 32), ("pass_index", 16)]
)
def test_coordinates_out_of_range_are_refused(name: str, width: int) -> None:
    assert Draws(0).at(**{name: 2**width - 1}).bits(0, 1).shape == (1,)
    for value in (-1, 2**width):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 2\*\*{width}\).*{value}"):
            Draws(0).at(**{name: value})


@pytest.mark.parametrize("site", [-1, 2**32])
def test_sites_out_of_range_are_refused(site: int) -> None:
    for draw in (Draws(0).bits, Draws(0).permutation):
        with pytest.raises(ValueError, match="site must lie in"):
            draw(site, 1)
    with pytest.raises(ValueError, match="site must lie in"):
        Draws(0).normal(site, (1,))


@pytest.mark.parametrize("count", [-1, 2**34 + 1])
def test_counts_out_of_range_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="a draw holds 0 to"):
        Draws(0).bits(0, count)


def test_sites_do_not_collide() -> None:
    training = {draws.SITE_CROP, draws.SITE_FLIP, draws.SITE_CUTOUT}
    validation = {site + draws.SITE_STREAM_VALIDATION for site in training}
    others = {
        draws.SITE_ALPHAS,
        draws.SITE_ORDER,
        draws.SITE_VALIDATION_BATCH,
        draws.SITE_SPLIT,
        draws.SITE_SAMPLE,
        draws.SITE_ARCHITECTURE,
    }
    assert len(training | validation | others) == len(training) + len(validation) + len(others)
    assert max(training | validation | others) < draws.SITE_NETWORK


@pytest.mark.parametrize("step", [0, 6, 2**31 + 7, 2**32 - 1])
@pytest.mark.parametrize("kind", ["bits", "uniform", "normal"])
def test_a_clock_gives_the_bits_of_the_draws_it_stands_for(
    backend: str, kind: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch, device = 2**15 + 3, device_of(backend)
    clock = draws.new_clock(device)
    recorded = Draws(SEED, pass_index=4, clock=clock)
    size: int | tuple[int, ...] = 1029 if kind == "bits" else (3, 7, 49)

    def drawn(key: Draws) -> Tensor:
        found: Tensor = getattr(key, kind)(77, size, device)
        return found

    for now in (step, step // 2, step):  # the clock is read each time
        draws.set_clock(clock, now, branch)
        expected = Draws(SEED, branch, now, 4)
        assert_same_bits(drawn(recorded), drawn(expected))
        with monkeypatch.context() as patch:
            patch.setattr(native, "runs_on", lambda where: False)  # the twins
            assert_same_bits(drawn(recorded), drawn(expected))
    draws.set_clock(clock, step ^ 1, branch)
    assert not torch.equal(drawn(recorded), drawn(expected))


def test_a_clock_adds_to_the_step_and_the_branch_of_its_draws() -> None:
    clock = draws.new_clock("cpu")
    draws.set_clock(clock, 5, 2)
    moved = Draws(1, branch=3, step=4, pass_index=6, clock=clock)
    assert_same_bits(moved.normal(9, (64,)), Draws(1, 5, 9, 6).normal(9, (64,)))


def test_a_clock_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="clock: expected one on cpu, found meta"):
        Draws(1, clock=draws.new_clock("meta")).uniform(3, (4,))
