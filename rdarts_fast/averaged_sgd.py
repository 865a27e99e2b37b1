"""SGD that goes over to averaging its weights once the validation loss does not fall any more
(NT-ASGD; Merity et al., "Regularizing and optimizing LSTM language models", 2018, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class AveragedSGD(torch.optim.SGD):
    """SGD; after `note` has said so, each weight's average over the steps from then on is kept
    beside it, and `averaged` tests with it.
    """

    def __init__(
        self, parameters: Iterable[Tensor], rate: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(
            parameters, lr=rate, momentum=momentum, weight_decay=weight_decay, foreach=True
        )
        for group in self.param_groups:  # in a group, as they belong into a checkpoint
            group.setdefault("losses", [])
            group.setdefault("averaged_steps", None)

    @property
    def averaging(self) -> bool:
        """Whether the weights are averaged by now."""
        return self.param_groups[0]["averaged_steps"] is not None

    def note(self, loss: float, patience: int) -> None:
        """Note an epoch's validation loss; begin to average where it is above the best one that is
        more than `patience` epochs old.
        """
        group = self.param_groups[0]
        before = group["losses"]
        if not self.averaging and len(before) > patience and loss > min(before[:-patience]):
            group["averaged_steps"] = 0
        group["losses"] = [*before, loss]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step, and the averages'."""
        found = super().step(closure)
        if self.averaging:
            group = self.param_groups[0]
            group["averaged_steps"] += 1
            for parameter in self._parameters():
                state = self.state[parameter]
                if "average" not in state:
                    state["average"] = parameter.detach().clone()
                state["average"].lerp_(parameter, 1.0 / group["averaged_steps"])
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the weights their averages, inside, where they have any."""
        have = [p for p in self._parameters() if "average" in self.state[p]]
        kept = [parameter.detach().clone() for parameter in have]
        with torch.no_grad():
            for parameter in have:
                parameter.copy_(self.state[parameter]["average"])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(have, kept, strict=True):
                    parameter.copy_(value)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
