"""The command line of the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from rdarts_fast.errors import UserError, exit_on_user_error
from rdarts_fast.report.page import DETAILS, write_report


@exit_on_user_error
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rdarts_fast.report",
        description="Write one page about runs: a table, each search's cells and curves, the "
        "paper's figures over all of them, and tables to paste. Nothing is fetched.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", help="runs' folders, or folders that hold some at any depth"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="where to [report]")
    parser.add_argument(
        "--details",
        default=str(DETAILS),
        help=f"how many searches have a part of their own, or all [{DETAILS}]",
    )
    given = parser.parse_args()
    report = write_report(given.runs, given.out, details=_details(given.details))
    for line in report.described():
        print(line)


def _details(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isascii() or not text.isdecimal():
        raise UserError(f"--details: expected a whole number from 0 on, or all, got {text}")
    return int(text)


if __name__ == "__main__":
    main()
