"""Draws docs/eigenvalue.svg: lambda_max in two searches of the paper's authors, and where DARTS-ES
stops.   python docs/eigenvalue.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from rdarts_fast.curvature import EigenvalueTrace
from rdarts_fast.plots.look import INK, PALETTE, save

HERE = Path(__file__).parent
TRACES = HERE.parent / "tests" / "data" / "published_traces.json"
EPOCHS = (*range(0, 50, 2), 49)
# Run, and what the logs say of its normal cell (8 edges) at the end.
RUNS = {
    "0.0_0.0003-2516843": "L2 0.0003, as in DARTS: 7 of 8 edges end as skip connections",
    "0.0_0.0081-2516846": "L2 0.0081: 2 of 8",
}


def main() -> None:
    """Draw the picture."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    ax = figure.add_subplot()
    runs = {(r["run"], r["seed"]): r["lambda_max"] for r in json.loads(TRACES.read_text())["runs"]}
    for color, (run, label) in zip(PALETTE[1::-1], RUNS.items(), strict=True):
        values, trace = runs[run, 1], EigenvalueTrace()
        for epoch, value in zip(EPOCHS, values, strict=True):
            trace.update(epoch, value)
        averages = trace.local_average
        ax.plot(EPOCHS, values, "o", color=color, markersize=3.5, alpha=0.45)
        ax.plot(EPOCHS[: len(averages)], averages, color=color, linewidth=2, label=label)
        if trace.stop_epoch is None:
            continue
        ax.vlines(trace.stop_epoch, 0, 1.2, color=INK, linestyle=(0, (4, 2)), linewidth=1)
        said = f"DARTS-ES keeps the\ngenotype of epoch {trace.stop_epoch}"
        ax.text(trace.stop_epoch + 0.6, 1.18, said, va="top", color=INK, fontsize=9)
    ax.set(xlabel="epoch of the search", ylabel="lambda_max", ylim=(0, 1.6))
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, HERE / "eigenvalue.svg")


if __name__ == "__main__":
    main()
