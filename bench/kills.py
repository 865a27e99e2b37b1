"""A hundred searches killed at seeded moments and resumed, each compared with one never killed.

python -m bench.kills [COUNT] > bench/results/kills.json
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from bench.record import line
from tests.test_search import kill


def main() -> None:
    """Kill, resume, compare (any difference raises), and print a line."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        killed = kill(Path(folder), seed=2, count=count)
    print(line("kills", searches=count, killed=killed, same_bits_as_never_killed=count))


if __name__ == "__main__":
    main()
