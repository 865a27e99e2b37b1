"""How strongly a search regularises, and how DARTS-ADA raises it (paper, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from rdarts_fast.config import SearchConfig
from rdarts_fast.errors import UserError

SLACK = 1.0 + 1e-6  # 3e-4 x 10 x 10 is not 0.03 in floating point


@dataclass(frozen=True)
class Regularisation:
    """The L2 factor on the weights and the drop-path probability of the last epoch."""

    weight_decay: float
    drop_path_prob: float

    @classmethod
    def of(cls, settings: SearchConfig) -> Regularisation:
        """Return what a search starts with. Raises UserError where none is stronger."""
        found = cls(settings.weight_decay, settings.drop_path_prob)
        if settings.adaptive != "off" and found.raised(settings) is None:
            raise UserError(
                f"--adaptive {settings.adaptive} cannot regularise more than it begins with: lower "
                "--weight-decay or --drop-path-prob (above 0 for l2), or raise --adaptive-max or "
                "--adaptive-drop-path-max"
            )
        return found

    def raised(self, settings: SearchConfig) -> Regularisation | None:
        """Return the next stronger one; None where `--adaptive` is off or its caps are reached.

        The L2 factor is multiplied, the drop-path probability grows by a step; with "both" each as
        far as its own cap allows.
        """
        decay = self.weight_decay * settings.adaptive_factor
        drop = self.drop_path_prob + settings.adaptive_step
        raises_decay = (
            settings.adaptive in ("l2", "both")
            and self.weight_decay < decay <= settings.adaptive_max * SLACK
        )
        raises_drop = (
            settings.adaptive in ("drop-path", "both")
            and self.drop_path_prob < drop <= settings.adaptive_drop_path_max * SLACK
        )
        if not raises_decay and not raises_drop:
            return None
        return Regularisation(
            decay if raises_decay else self.weight_decay,
            drop if raises_drop else self.drop_path_prob,
        )

    def raises_left(self, settings: SearchConfig) -> int:
        """Return how often it can still be raised."""
        count, stronger = 0, self.raised(settings)
        while stronger is not None:
            count, stronger = count + 1, stronger.raised(settings)
        return count
