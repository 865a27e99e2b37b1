"""Tables of results: to read, to paste, to compute with."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdarts_fast.errors import UserError
from rdarts_fast.metrics import METRICS, Metric
from rdarts_fast.run_dir import read_object, write_file

CLASSIFICATION = METRICS["classification"]
TABLE = "table.json"
TEXTS = ("name", "regularisation")  # columns that are no numbers


def titles(metric: Metric) -> dict[str, str]:
    """Return the columns' titles, by their names in a row."""
    return {
        "name": "run",
        "regularisation": "regularisation",
        f"supernet_{metric.name}": f"supernet's validation {metric.name}",
        "lambda_max": "lambda_max",
        f"valid_{metric.cost}": f"validation {metric.cost}, short training",
        f"test_{metric.cost}": f"test {metric.cost}",
        "regret": "regret",
    }


@dataclass(frozen=True)
class Table:
    """Rows of results, and the mean and the sample deviation of the selected runs' test costs
    (errors as shares in [0, 1]); None where there is none.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    mean: float | None
    deviation: float | None
    metric: Metric = CLASSIFICATION

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, Any]], title: str, metric: Metric = CLASSIFICATION
    ) -> Table:
        """Return the table of a protocol's rows."""
        key = f"test_{metric.cost}"
        costs = [row[key] for row in rows if row["selected"] and row[key] is not None]
        mean = statistics.mean(costs) if costs else None
        deviation = statistics.stdev(costs) if len(costs) > 1 else None
        return cls(title, rows, mean, deviation, metric)

    @classmethod
    def read(cls, folder: Path, metric: Metric = CLASSIFICATION) -> Table:
        """Read what `write` wrote. Raises UserError where it is not whole."""
        path = folder / TABLE
        values = read_object(path)
        rows = values.get("rows")
        if not isinstance(values.get("title"), str) or not isinstance(rows, list):
            raise UserError(f"{path}: damaged, expected a title and rows")
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not _whole(row, metric):
                raise UserError(f"{path}: damaged, row {i} is none of such a table")
        mean, deviation = values.get("mean"), values.get("deviation")
        if not (_is_number(mean) and _is_number(deviation)):
            raise UserError(f"{path}: damaged, expected numbers as mean and deviation")
        return cls(values["title"], rows, mean, deviation, metric)

    def to_json(self) -> str:
        """Return everything."""
        return json.dumps(
            {
                "title": self.title,
                "rows": list(self.rows),
                "mean": self.mean,
                "deviation": self.deviation,
            },
            indent=2,
        )

    def to_csv(self) -> str:
        """Return the rows, numbers with all their digits."""
        text = io.StringIO()
        names = list(self.rows[0]) if self.rows else ["name"]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def columns(self) -> dict[str, str]:
        """Return the titles of the columns that are not empty, by their names in a row."""
        found = titles(self.metric)
        return {
            name: title
            for name, title in found.items()
            if any(row.get(name) is not None for row in self.rows)
        }

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        """Return a row's texts, one for each of the columns."""
        return [self._cell(name, row.get(name)) for name in self.columns()]

    def notes(self, most: int | None = None) -> list[str]:
        """Return what stands below the first `most` rows: how many are left, mean and deviation of
        the selected, and what failed.
        """
        lines = []
        if most is not None and len(self.rows) > most:
            lines.append(f"({len(self.rows) - most} more rows in table.md)")
        if self.mean is not None:
            spread = "" if self.deviation is None else f" ± {self.metric.text(self.deviation)}"
            mean = self.metric.text(self.mean)
            lines.append(f"test {self.metric.cost} of the selected: {mean}{spread}")
        failed = [row for row in self.rows if row.get("error")]
        return lines + [f"failed: {row['name']}: {row['error']}" for row in failed]

    def to_markdown(self, most: int | None = None) -> str:
        """Return the rows to read, the selected in bold, the first `most` of them."""
        columns = self.columns()
        lines = [f"{self.title}\n", "| " + " | ".join(columns.values()) + " |"]
        lines.append("|" + "---|" * len(columns))
        for row in self.rows[:most]:
            cells = [cell.replace("|", "\\|") for cell in self.cells(row)]
            if row.get("selected"):
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes(most))])

    def write(self, folder: Path) -> None:
        """Write table.json, table.csv and table.md."""
        write_file(folder / TABLE, self.to_json() + "\n")
        write_file(folder / "table.csv", self.to_csv())
        write_file(folder / "table.md", self.to_markdown() + "\n")

    def _cell(self, name: str, value: Any) -> str:
        if value is None:
            return ""
        if name == "regret" or name.endswith((f"_{self.metric.cost}", f"_{self.metric.name}")):
            return self.metric.text(value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)


def _whole(row: Mapping[str, Any], metric: Metric) -> bool:
    """Whether the columns of a row that was read hold what they should."""
    numbers = [name for name in titles(metric) if name not in TEXTS]
    texts = [row.get(name) for name in (*TEXTS, "error")]
    return (
        isinstance(row.get("name"), str)
        and all(text is None or isinstance(text, str) for text in texts)
        and all(_is_number(row.get(name)) for name in numbers)
    )


def _is_number(value: object) -> bool:
    """Whether a value is None or a number that can be written."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300
