"""The default search on digits, the same with one module per candidate, and the retraining of what
it found: accuracy and wall time.

python -m bench.main_job > bench/results/main_job.json
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

from bench.record import line
from rdarts_fast.retrain import run_retraining
from rdarts_fast.search import run_search


def main() -> None:
    """Run them and print a line."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        started = time.perf_counter()
        run = run_search(space="s4", out=Path(folder) / "search")
        fused = time.perf_counter()
        run_search(space="s4", out=Path(folder) / "reference", backend="reference")
        searched = time.perf_counter()
        (retrained,) = run_retraining(source=str(run.folder), out=Path(folder) / "retrained")
        ended = time.perf_counter()
    assert run.result is not None
    assert retrained.result is not None
    text = line(
        "main_job",
        space="s4",
        data="digits",
        search_seconds=round(fused - started, 1),
        reference_search_seconds=round(searched - fused, 1),
        ratio=round((searched - fused) / (fused - started), 2),
        valid_accuracy=run.result["valid_accuracy"],
        genotype=run.metrics[-1]["genotype"],
        retrain_seconds=round(ended - searched, 1),
        test_error=retrained.result["test_error"],
        run_threads=run.environment["threads"],
    )
    print(text)


if __name__ == "__main__":
    main()
