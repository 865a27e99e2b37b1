"""The cases of bench.search_step and bench.kernels for pytest-benchmark, small: about 3 minutes.

    pytest bench/                                            # a table a case
    pytest bench/ -k "s4 and second" --benchmark-autosave    # then --benchmark-compare
    pytest bench/ --benchmark-histogram                      # needs pytest-benchmark[histogram]

Here each contender runs by itself, so its ratio to another has the machine's moods in it: the
numbers to quote are those of `python -m bench.search_step` and `python -m bench.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import contenders, kernels
from bench.contenders import CASES, OURS
from bench.kernels import FORMATS, KERNELS, SHAPES
from rdarts_fast.spaces import spaces_of

THREADS = 1  # as steady as it gets
CONTENDERS = (OURS, "eager", "channels_last")  # "compile" takes minutes
SIZES = {"batch": 16, "channels": 8, "layers": 3, "size": 16}
KERNEL_BATCH = 16

pytestmark = pytest.mark.benchmark(min_rounds=3, max_time=0.3, warmup=False)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=spaces_of("classification"))
def setup(request: pytest.FixtureRequest) -> contenders.Setup:
    """A space, checked once."""
    setup = contenders.Setup(request.param, **SIZES)
    contenders.check(setup)
    return setup


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONTENDERS)
def test_search_step(
    benchmark: BenchmarkFixture, setup: contenders.Setup, case: str, name: str
) -> None:
    benchmark.group = f"{setup.space}, {case}"
    call = contenders.prepare(name, setup, case)
    call()
    benchmark(call)


@pytest.mark.parametrize("whose", ["ours", "torch"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(
    benchmark: BenchmarkFixture, kernel: str, shape: str, memory_format: str, whose: str
) -> None:
    setup = kernels.Setup(kernel, shape, memory_format, KERNEL_BATCH)
    kernels.check(setup, kernels.Inputs.draw(setup))
    benchmark.group = f"{kernel}, {shape} {memory_format}"
    call = kernels.prepare(setup, whose)
    call()
    benchmark(call)
