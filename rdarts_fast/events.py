"""Where the epochs' records go beside metrics.jsonl: nowhere, or TensorBoard (an extra)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdarts_fast.errors import UserError


class Events:
    """Takes records and drops them."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take an epoch's record."""

    def rewind(self, epoch: int) -> None:
        """Drop the records from `epoch` on: a rollback has undone them."""

    def close(self) -> None:
        """Write what is buffered."""


class TensorBoardEvents(Events):
    """Writes every number of an epoch's record as a scalar into the run's folder."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self._folder = folder
        self._open(first_epoch)

    def _open(self, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=first_epoch)

    def rewind(self, epoch: int) -> None:
        self._writer.close()
        self._open(epoch)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raise UserError where the extra is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("--tensorboard needs the extra: pip install '.[tensorboard]'") from error
