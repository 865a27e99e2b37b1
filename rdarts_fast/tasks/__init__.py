"""Tasks: what a network is for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rdarts_fast.config import RunConfig
from rdarts_fast.tasks.classification import Classification
from rdarts_fast.tasks.disparity import Disparity
from rdarts_fast.tasks.language import Language
from rdarts_fast.tasks.task import Batch, Carry, Task

TASKS: Mapping[str, type[Task]] = {
    "classification": Classification,
    "language": Language,
    "disparity": Disparity,
}


def load(config: RunConfig, device: torch.device) -> Task:
    """Load the task that `config` names. Raises UserError (data missing, malformed, small)."""
    return TASKS[config.task].load(config, device)


__all__ = ["TASKS", "Batch", "Carry", "Task", "load"]
