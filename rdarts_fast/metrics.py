"""What a network is scored by, task by task, and how a score is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

MOST_EXPONENT = 690.0  # exp of more is not finite, which no file of a run may hold
LARGEST = math.exp(MOST_EXPONENT)  # a cost beyond all others


@dataclass(frozen=True)
class Metric:
    """A score, and the cost that is compared: less of it is better.

    name: of the score in metrics.jsonl, after `train_` and `valid_`. cost: of the cost in
    metrics.jsonl and result.json, after `valid_` and `test_`. unit: "%" shows a share of 1. short:
    what to call it in a text, where that is not its name. data: what its sets are made of.
    """

    name: str
    cost: str
    unit: str = ""
    exponential: bool = False  # of the mean over items
    short: str = ""
    data: str = "images"

    def score(self, mean: float) -> float:
        """Return the score of a set, from the mean of its items' scores; LARGEST for more."""
        return math.exp(min(mean, MOST_EXPONENT)) if self.exponential else mean

    @property
    def score_name(self) -> str:
        """What to call a score in a text."""
        return self.short or self.name

    @property
    def cost_name(self) -> str:
        """What to call a cost in a text."""
        return self.short or self.cost

    @property
    def more_is_better(self) -> bool:
        """Whether a greater score is a better one."""
        return self.name != self.cost

    def cost_of(self, score: float) -> float:
        """Return the cost of a score, and the score of a cost."""
        return 1.0 - score if self.more_is_better else score

    def text(self, value: float, digits: int = 2) -> str:
        """Return a score or a cost with its unit."""
        if self.unit == "%":
            return f"{value:.{digits}%}"
        text = f"{value:.{digits}f}" if abs(value) < 1e7 else f"{value:.3g}"
        return text + self.unit

    def said(self, score: float) -> str:
        """Return a score as an epoch's line has it."""
        return f"{self.name} {self.text(score, 1 if self.unit == '%' else 2)}"


METRICS: Mapping[str, Metric] = {
    "classification": Metric("accuracy", "error", "%"),
    "language": Metric("perplexity", "perplexity", exponential=True, data="text"),
    "disparity": Metric("epe", "epe", " px", short="EPE"),  # end-point error
}


def metric_of(task: object) -> Metric:
    """Return the metric of a run's task; of classification where its config names none."""
    return METRICS[task_of(task)]


def task_of(task: object) -> str:
    """Return the task that a run's config names; classification where it names none that is."""
    return str(task) if str(task) in METRICS else "classification"


@dataclass(frozen=True)
class Outcome:
    """What one pass of a network over a batch gives.

    objective: what a step of the weights descends, differentiable. loss: the mean over the batch's
    items. score: the metric's sum over them. items: how many (images, words, known pixels). more:
    sums of further measures, by name. carry: the state that the next batch's pass goes on with.
    """

    objective: Tensor
    loss: Tensor
    score: Tensor
    items: int
    more: Mapping[str, Tensor] = field(default_factory=dict)
    carry: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Sums:
    """Running sums of one pass over a set: loss, score and items, and further measures."""

    values: dict[str, float] = field(
        default_factory=lambda: {"loss": 0.0, "score": 0.0, "items": 0.0}
    )

    def add(self, outcome: Outcome) -> None:
        """Add a batch."""
        items = outcome.items
        found = {"loss": float(outcome.loss) * items, "score": float(outcome.score)}
        found |= {name: float(value) for name, value in outcome.more.items()}
        for name, value in {**found, "items": items}.items():
            self.values[name] = self.values.get(name, 0.0) + value

    @property
    def loss(self) -> float:
        """Mean loss an item."""
        return self.values["loss"] / self.values["items"]

    def score(self, metric: Metric) -> float:
        """The score of all."""
        return metric.score(self.values["score"] / self.values["items"])

    def cost(self, metric: Metric) -> float:
        """What is compared: less is better."""
        return metric.cost_of(self.score(metric))

    def more(self) -> dict[str, float]:
        """Means of the further measures, by name."""
        known = ("loss", "score", "items")
        items = self.values["items"]
        return {name: value / items for name, value in self.values.items() if name not in known}
