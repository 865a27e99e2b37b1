"""What the networks of genotypes, trained from scratch, have in common."""

from __future__ import annotations

from torch import nn


class TrainedNetwork(nn.Module):
    """A genotype's network. `drop_path_prob` is the probability of dropping an operation per
    sample, in train mode only; the training sets it each epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drop_path_prob = 0.0

    @property
    def uses_all(self) -> bool:
        """Whether the result depends on all parameters."""
        return True
