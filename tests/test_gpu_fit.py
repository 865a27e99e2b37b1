"""Which GPUs and drivers the native module fits, in plain numbers: no GPU has a part in it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from rdarts_fast import gpu_fit, info, native, training
from rdarts_fast.config import RetrainConfig, SearchConfig
from rdarts_fast.draws import Draws
from rdarts_fast.errors import UserError
from tests.host_cuda import runs_on

BUILD = {"cuda_archs": ["sm_80", "sm_90", "compute_90"], "cuda_runtime": "13.2"}
CPU_BUILD = {"cuda_archs": [], "cuda_runtime": None}
OLD_GPU = (
    "the GPU is sm_75, the native module was compiled for sm_80, sm_90, compute_90: run "
    "`RDARTS_CUDA_ARCHS=75 pip install .`"
)
OLD_DRIVER = (
    "the driver supports CUDA {}, the native module needs {}: update the driver, or run `pip "
    "install .` with an older toolkit"
)


# PTX, which 10.0 has here, needs all of the runtime's version, machine code its major part.
@pytest.mark.parametrize(
    ("capability", "driver", "expected"),
    [
        (75, 13020, OLD_GPU),
        (75, 12020, OLD_GPU),
        (80, 12020, OLD_DRIVER.format("12.2", "13.0")),
        (90, 12090, OLD_DRIVER.format("12.9", "13.0")),
        (100, 13010, OLD_DRIVER.format("13.1", "13.2")),
        (86, 13000, None),
        (90, 14000, None),
        (100, 13020, None),
        (90, None, None),
    ],
)
def test_gpu_driver_and_build_are_compared(
    capability: int, driver: int | None, expected: str | None
) -> None:
    assert gpu_fit.misfit(capability, driver, BUILD) == expected


def test_a_cpu_build_fits_no_gpu() -> None:
    found = gpu_fit.misfit(90, 13020, CPU_BUILD)
    assert found == (
        "the native module is a CPU build: put nvcc on PATH and run `RDARTS_CUDA=1 pip install .`"
    )


@pytest.mark.parametrize(
    "arch",
    ["sm_80", "sm_86", "sm_90", "sm_90a", "sm_100f", "compute_90", "compute_90a", "compute_120f"],
)
def test_the_rule_is_that_of_the_launchers(arch: str) -> None:
    capabilities = (75, 80, 86, 89, 90, 91, 100, 103, 110, 120, 121, 130)
    ours = [gpu_fit.runs_on(arch, capability) for capability in capabilities]
    assert ours == [runs_on(arch, capability) for capability in capabilities]
    assert len(set(ours)) == 2


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "expected"),
    [
        (None, "13.0", "no NVIDIA driver was found"),
        (13020, None, "this torch is a CPU build"),
        (12020, "13.0", "the driver supports CUDA 12.2, this torch needs 13.0: update the driver"),
        (12020, "12.8", "the driver shows it none"),
        (13020, "13.0", "the driver shows it none"),
    ],
)
def test_why_torch_sees_no_gpu(driver: int | None, torch_cuda: str | None, expected: str) -> None:
    assert gpu_fit.unusable(driver, torch_cuda).startswith(expected)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, which is older than what the module was compiled for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(gpu_fit, "driver_version", lambda: 13020)
    monkeypatch.setattr(native, "build_info", lambda: {**native.extension.build_info(), **BUILD})
    native._misfit.cache_clear()
    yield
    native._misfit.cache_clear()


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_run_that_would_need_kernels_ends_before_it_begins(device: str) -> None:
    with (
        pytest.raises(UserError) as caught,
        training.prepared(SearchConfig(device=device)),
    ):
        pass
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "Tesla T4" in text and OLD_GPU in text
    assert "--backend reference" in text and "--device cpu" in text


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(
    "config", [SearchConfig(backend="reference"), RetrainConfig(source="runs/a")]
)
def test_what_needs_no_kernels_runs_on_any_gpu(config: SearchConfig | RetrainConfig) -> None:
    with training.prepared(config) as device:
        assert device.type == "cuda"
        assert not native.runs_on(device)  # so that its draws are those of plain torch


@pytest.mark.usefixtures("old_gpu")
def test_the_report_says_that_no_kernels_run() -> None:
    assert OLD_GPU in info.report()


def test_the_cpu_is_never_taken_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver, expected in ((None, ""), (4000, "note: torch sees no GPU, this runs on the CPU: ")):
        monkeypatch.setattr(gpu_fit, "driver_version", lambda driver=driver: driver)
        assert training.select_device("auto").type == "cpu"
        error = capsys.readouterr().err
        assert error.startswith(expected) and bool(error) == bool(expected)


def test_the_cpu_has_kernels() -> None:
    assert native.runs_on(torch.device("cpu"))
    training.check_kernels(torch.device("cpu"))
    assert Draws(0).uniform(0, (3,)).shape == (3,)


def test_a_build_for_gpus_knows_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_info", lambda: {**native.extension.build_info(), **BUILD})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_fit, "driver_version", lambda: None)
    assert native.misfit(torch.device("cuda")) == "no NVIDIA driver was found"
    assert not native.runs_on(torch.device("cuda:1"))
