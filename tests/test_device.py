"""Which GPUs and drivers run what was compiled (csrc/include/device.h), on fake ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rdarts_fast import native
from rdarts_fast.draws import uniform_twin
from tests.host_cuda import add_device, counts, on_host, runs_on, set_driver

SEED, COUNTER = 1, (0, 0, 0, 0)


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    with on_host():
        yield


@pytest.mark.parametrize(
    ("arch", "runs", "refuses"),
    [
        ("sm_80", [80, 86, 89], [75, 90, 120]),
        ("sm_86", [86, 89], [80, 90]),
        ("sm_100", [100, 103], [90, 110]),
        ("sm_90a", [90], [91, 100]),
        ("sm_100f", [100, 103], [90, 110]),
        ("compute_90", [90, 91, 100, 121], [89]),
        ("compute_90a", [90], [89, 91, 100]),
        ("compute_120f", [120, 121], [110, 130]),
    ],
)
def test_which_gpus_run_which_code(arch: str, runs: list[int], refuses: list[int]) -> None:
    assert [runs_on(arch, capability) for capability in runs] == [True] * len(runs)
    assert [runs_on(arch, capability) for capability in refuses] == [False] * len(refuses)


def fill_on(device: int) -> None:
    """Launch a kernel on a device."""
    out, place = torch.empty(4), native.extension.Place("base", device=device)
    native.extension.philox_uniform(out.data_ptr(), 4, SEED, COUNTER, place)
    assert torch.equal(out, uniform_twin(SEED, COUNTER, 4, torch.device("cpu")))


OLD_GPU = (
    "^this GPU is sm_75, the module was compiled for sm_80,sm_90,compute_90: set "
    r"RDARTS_CUDA_ARCHS=75 and run `pip install \.`$"
)
OLD_DRIVER = (
    r"^the driver supports CUDA {}, the module needs {}: update the driver, or run "
    r"`pip install \.` with an older toolkit$"
)


# The runtime is 13.2: PTX, which 10.0 has here, needs all of it, machine code its major version.
@pytest.mark.parametrize(
    ("capability", "driver", "message"),
    [
        (75, 13020, OLD_GPU),
        (75, 13000, OLD_GPU),
        (80, 12020, OLD_DRIVER.format("12.2", "13.0")),
        (100, 12090, OLD_DRIVER.format("12.9", "13.0")),
        (100, 13010, OLD_DRIVER.format("13.1", "13.2")),
        (86, 13000, None),
        (90, 14000, None),
        (100, 13020, None),
        (100, 14000, None),
    ],
)
def test_gpu_and_driver_are_compared_with_what_was_compiled(
    capability: int, driver: int, message: str | None
) -> None:
    device = add_device(capability)
    set_driver(driver)
    if message is None:
        fill_on(device)
        return
    for _ in range(2):  # again and again, as a program may go on after an error
        with pytest.raises(RuntimeError, match=message):
            fill_on(device)
    assert counts() == {}


def test_a_device_that_fits_is_not_compared_again() -> None:
    device = add_device(80)
    set_driver(12020)
    with pytest.raises(RuntimeError, match="update the driver"):
        fill_on(device)
    set_driver(13020)
    fill_on(device)
    set_driver(12020)
    fill_on(device)
    with pytest.raises(RuntimeError, match="update the driver"):
        fill_on(add_device(80))


def test_an_empty_launch_asks_nothing_of_the_device() -> None:
    place = native.extension.Place("base", device=add_device(75))
    native.extension.philox_uniform(0, 0, SEED, COUNTER, place)  # that of fill_on would be refused
    assert counts() == {}
