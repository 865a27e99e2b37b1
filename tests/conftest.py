"""Fixtures that several files use."""

import os
import signal
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; before torch loads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from rdarts_fast import native
from tests.host_cuda import THREAD_ORDERS, on_host, set_thread_order

# A shell lets what it starts in the background ignore Ctrl-C; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = ["cpu-base", "cpu-best", *(f"cuda-on-host {order}" for order in THREAD_ORDERS)]
if torch.cuda.is_available() and native.runs_on(torch.device("cuda")):
    BACKENDS.append("cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test's kernels on each backend; the tensors' device is device_of(backend)."""
    if request.param.startswith("cuda-on-host"):
        with on_host():
            set_thread_order(request.param.split()[1], seed=1)
            yield request.param
        return
    if request.param == "cpu-base":
        monkeypatch.setenv("RDARTS_CPU", "base")
    yield request.param


def device_of(backend: str) -> str:
    """Return where tensors lie for a backend."""
    return "cuda" if backend == "cuda" else "cpu"
