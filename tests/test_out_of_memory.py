"""Out of memory: what would fit is said, and by how much."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rdarts_fast import bilevel, memory, random_search, search
from rdarts_fast.errors import UserError
from rdarts_fast.memory import Way, explained, is_out_of_memory
from rdarts_fast.random_search import run_random_search
from rdarts_fast.retrain import run_retraining
from rdarts_fast.search import run_search
from tests.small import arguments, settings

CPU = torch.device("cpu")
TORCH_S = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
ERRORS = [
    TORCH_S,
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("std::bad_alloc"),
    RuntimeError("node_sum: out of memory"),  # of a launch
]


def raising(error: BaseException):
    def fail(*given: object, **named: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS)
def test_a_search_without_memory_says_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(bilevel, "second_order", raising(error))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3e5)
    with pytest.raises(UserError, match="out of memory on cpu with --batch-size 6") as found:
        run_search(**settings(tmp_path, space="s2", batch_size=6, channels=8))
    text = str(found.value)
    sizes = re.search(r"about (\S+) MB for a pass, and 0.3 MB are free", text)
    again = re.search(r"--checkpoint-cells(?: --batch-size (\d))? \((\S+) MB\)", text)
    assert sizes and again, text
    whole, less = float(sizes[1]), float(again[2]) * 6 / float(again[1] or 6)
    assert less < whole / 2
    assert "bf16" not in text  # not on a CPU
    for fits in re.findall(r"\(([\d.]+) MB\)", text):
        assert float(fits) <= 0.3


def test_the_largest_batch_that_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ways = [Way("", 1e7), Way("--checkpoint-cells", 2e6), Way("--precision bf16", 5e6)]
    given = settings(tmp_path, batch_size=16)
    made = search.config_sources.from_settings(search.SearchConfig, given)
    expected = {
        1.1e8: "--batch-size 8 (104.0 MB), or --checkpoint-cells (41.6 MB), or --precision bf16 "
        "(104.0 MB)",
        5e7: "--batch-size 2 (26.0 MB), or --checkpoint-cells (41.6 MB), or --precision bf16 "
        "--batch-size 4 (26.0 MB)",
        2e7: "--checkpoint-cells --batch-size 4 (10.4 MB), or --precision bf16 --batch-size 2 "
        "(13.0 MB)",
    }
    for free, end in expected.items():
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        text = memory.explanation(made, CPU, lambda: ways)
        assert text.endswith(f"start anew with what would fit: {end}"), text
        assert "about 208.0 MB for a pass" in text
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1.0)
    assert "not even a batch of 2" in memory.explanation(made, CPU, lambda: ways)


def test_other_programs_say_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_search(**settings(tmp_path, epochs=1))
    made = {k: v for k, v in settings(tmp_path).items() if k != "alpha_learning_rate"}
    monkeypatch.setattr(random_search.training, "descend", raising(TORCH_S))
    with pytest.raises(UserError, match=r"about .* for a pass, and .* are free"):
        run_random_search(**made | {"out": tmp_path / "random", "space": "s2"})
    with pytest.raises(UserError, match=r"out of memory on cpu .*less, such as --batch-size 3"):
        run_retraining(
            source=str(run.folder), out=tmp_path / "trained", batch_size=6, channels=2, layers=3
        )


def test_a_measurement_that_finds_no_room_tells_no_sizes(tmp_path: Path) -> None:
    made = search.config_sources.from_settings(search.SearchConfig, settings(tmp_path))
    text = memory.explanation(made, CPU, raising(TORCH_S))
    assert text.endswith("start anew with less, such as --batch-size 3")


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    made = search.config_sources.from_settings(search.SearchConfig, settings(tmp_path))
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), explained(made, CPU):
            raise error


def test_a_process_that_may_not_have_the_memory(tmp_path: Path) -> None:
    """What torch and the kernels really raise."""
    made = settings(tmp_path, space="s2", channels=64, batch_size=36, layers=3, image_size=96)
    made |= {"threads": 1, "epochs": 1}
    limited = (
        "import resource, sys, torch\n"
        "from rdarts_fast import search\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "limit = used + (700 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "search.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments(made)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: out of memory on cpu with --batch-size 36" in done.stderr
