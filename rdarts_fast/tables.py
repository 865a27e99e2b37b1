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

from rdarts_fast.metrics import METRICS, Metric
from rdarts_fast.run_dir import write_file

CLASSIFICATION = METRICS["classification"]


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

    def to_markdown(self, most: int | None = None) -> str:
        """Return the rows to read, the selected in bold, the first `most` of them."""
        columns = titles(self.metric)
        names = [name for name in columns if any(row.get(name) is not None for row in self.rows)]
        lines = [f"{self.title}\n", "| " + " | ".join(columns[name] for name in names) + " |"]
        lines.append("|" + "---|" * len(names))
        for row in self.rows[:most]:
            cells = [self._cell(name, row.get(name)) for name in names]
            if row.get("selected"):
                cells = [f"**{cell}**" if cell else "" for cell in cells]
            lines.append("| " + " | ".join(cells) + " |")
        if most is not None and len(self.rows) > most:
            lines.append(f"\n({len(self.rows) - most} more rows in table.md)")
        if self.mean is not None:
            spread = "" if self.deviation is None else f" ± {self.metric.text(self.deviation)}"
            mean = self.metric.text(self.mean)
            lines.append(f"\ntest {self.metric.cost} of the selected: {mean}{spread}")
        failed = [f"{row['name']}: {row['error']}" for row in self.rows if row.get("error")]
        lines += [f"\nfailed: {line}" for line in failed]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write table.json, table.csv and table.md."""
        write_file(folder / "table.json", self.to_json() + "\n")
        write_file(folder / "table.csv", self.to_csv())
        write_file(folder / "table.md", self.to_markdown() + "\n")

    def _cell(self, name: str, value: Any) -> str:
        if value is None:
            return ""
        if name == "regret" or name.endswith((f"_{self.metric.cost}", f"_{self.metric.name}")):
            return self.metric.text(value)
        return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
