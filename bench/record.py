"""The line of JSON that every measurement prints: what was measured, on what, from which commit."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from rdarts_fast.native import build_info, cpu_unit

REPOSITORY = Path(__file__).parents[1]


def line(bench: str, device: torch.device | None = None, **measured: Any) -> str:
    """Return one line: `bench`, what was `measured`, and where (without `device`: on a GPU if there
    is one).
    """
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    where = {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "cpu_unit": cpu_unit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rdarts_fast": build_info()["version"],
        "commit": commit(),
    }
    return json.dumps({"bench": bench, **measured, **where})


def processor() -> str:
    """Return the processor's name."""
    for row in Path("/proc/cpuinfo").read_text().splitlines():
        if row.startswith("model name"):
            return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of the clone, with a + where files differ from it."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
