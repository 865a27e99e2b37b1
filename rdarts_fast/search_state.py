"""Everything that changes during a search, and that a checkpoint holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rdarts_fast import training
from rdarts_fast.config import SearchConfig
from rdarts_fast.curvature import EigenvalueTrace
from rdarts_fast.metrics import Sums
from rdarts_fast.networks import SearchNetwork
from rdarts_fast.regularisation import Regularisation


@dataclass
class SearchState:
    """Everything that changes during a search, and that a checkpoint holds."""

    supernet: SearchNetwork
    alphas: dict[str, Tensor]  # cell type -> [E, O]
    weight_optimizer: torch.optim.SGD
    alpha_optimizer: torch.optim.Adam
    trace: EigenvalueTrace
    regularisation: Regularisation
    epoch: int = 0
    step: int = 0  # within the epoch
    branch: int = 0
    records: int = 0  # lines of metrics.jsonl
    sums: Sums = field(default_factory=Sums)
    seconds: float = 0.0  # spent in the present epoch
    carry: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # stream -> RNN's state

    @classmethod
    def start(cls, settings: SearchConfig, supernet: SearchNetwork) -> SearchState:
        """Return the state before the first step."""
        alphas = supernet.initial_alphas(settings.seed)
        weight_optimizer = training.sgd(supernet.parameters(), settings, training.SGD)
        alpha_optimizer = torch.optim.Adam(
            alphas.values(),
            lr=settings.alpha_learning_rate,
            betas=(settings.alpha_beta1, settings.alpha_beta2),
            weight_decay=settings.alpha_weight_decay,
            foreach=True,
            capturable=next(iter(alphas.values())).is_cuda,
        )
        regularisation = Regularisation.of(settings)
        trace = new_trace(settings)
        return cls(supernet, alphas, weight_optimizer, alpha_optimizer, trace, regularisation)

    def regularise(self, regularisation: Regularisation) -> None:
        """Regularise like this from now on, everywhere: the weights' optimiser, and through this
        state the virtual step, drop path and cutout.
        """
        self.regularisation = regularisation
        for group in self.weight_optimizer.param_groups:
            group["weight_decay"] = regularisation.weight_decay

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it."""
        return {
            "kind": "search",
            "epoch": self.epoch,
            "step": self.step,
            "branch": self.branch,
            "records": self.records,
            "sums": dict(self.sums.values),
            "seconds": self.seconds,
            "trace": [[epoch, value] for epoch, value in self.trace.measured],
            "regularisation": asdict(self.regularisation),
            "carry": self.carry,
            "supernet": self.supernet.state_dict(),
            "alphas": {kind: alpha.detach() for kind, alpha in self.alphas.items()},
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
        }

    def from_checkpoint(self, stored: dict[str, Any]) -> None:
        """Take over a checkpoint. Raises what an entry that is missing or does not fit raises."""
        self.supernet.load_state_dict(stored["supernet"])
        with torch.no_grad():
            for kind, alpha in self.alphas.items():
                if stored["alphas"][kind].shape != alpha.shape:
                    raise ValueError(f"alphas {kind}: expected shape {tuple(alpha.shape)}")
                alpha.copy_(stored["alphas"][kind])
        self.weight_optimizer.load_state_dict(stored["weight_optimizer"])
        # Whether it is capturable is up to the device here, not to that of the checkpoint.
        own = self.alpha_optimizer.param_groups[0]["capturable"]
        groups = [{**g, "capturable": own} for g in stored["alpha_optimizer"]["param_groups"]]
        adam = {**stored["alpha_optimizer"], "param_groups": groups}
        self.alpha_optimizer.load_state_dict(adam)
        self.epoch, self.step, self.branch = stored["epoch"], stored["step"], stored["branch"]
        self.records, self.seconds = stored["records"], stored["seconds"]
        self.sums, self.carry = Sums(dict(stored["sums"])), stored["carry"]
        # A run that began before there were these has neither.
        self.trace = self.trace.replayed([(e, value) for e, value in stored.get("trace", [])])
        if "regularisation" in stored:
            self.regularise(Regularisation(**stored["regularisation"]))


def new_trace(settings: SearchConfig) -> EigenvalueTrace:
    """Return the trace of a search that begins."""
    return EigenvalueTrace(
        settings.stop_window,
        settings.curvature_every,
        settings.epochs,
        settings.stop_factor,
        settings.stop_delta,
        settings.stop_start_epoch,
        settings.stop_rule,
    )
