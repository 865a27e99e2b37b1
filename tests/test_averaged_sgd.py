"""NT-ASGD: when it begins to average, what the average is, and what a checkpoint holds of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rdarts_fast.averaged_sgd import AveragedSGD

RATE = 0.1


def start() -> list[Tensor]:
    return [torch.tensor([1.0, -2.0]).requires_grad_(), torch.tensor([[3.0]]).requires_grad_()]


def optimizer(parameters: list[Tensor], momentum: float = 0.0) -> AveragedSGD:
    return AveragedSGD(parameters, RATE, momentum, weight_decay=0.01)


def descend(parameters: list[Tensor], how: torch.optim.Optimizer, steps: int) -> list[list[Tensor]]:
    """Take steps on a quartic and return the weights after each."""
    path = []
    for _ in range(steps):
        how.zero_grad()
        torch.stack([p.pow(4).sum() for p in parameters]).sum().mul(0.05).backward()
        how.step()
        path.append([p.detach().clone() for p in parameters])
    return path


def decisions(losses: list[float], patience: int) -> list[bool]:
    how = optimizer(start())
    found = []
    for loss in losses:
        how.note(loss, patience)
        found.append(how.averaging)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_it_begins_where_the_published_code_does(seed: int) -> None:
    losses = torch.rand(15, generator=torch.Generator().manual_seed(seed)).tolist()
    for patience in (1, 3, 5):
        noted: list[float] = []
        begun, expected = False, []
        for loss in losses:
            if not begun and len(noted) > patience and loss > min(noted[:-patience]):
                begun = True
            noted.append(loss)
            expected.append(begun)
        assert decisions(losses, patience) == expected


def test_it_begins_once_no_loss_of_the_last_epochs_is_below_an_older_one() -> None:
    falling = [5.0 - 0.1 * i for i in range(10)]
    assert not any(decisions(falling, 2))
    # 3 epochs of patience: at the 5th epoch 4.9 is above the 1st, which alone is old enough.
    assert decisions([4.0, 5.0, 5.0, 5.0, 4.9], 3) == [False] * 4 + [True]
    assert decisions([4.0, 5.0, 5.0, 5.0, 3.9], 3) == [False] * 5
    assert decisions([4.0, 5.0, 5.0, 5.0, 4.9, 1.0], 3)[-1]  # and never ends


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_before_it_is_sgd_and_after_too(momentum: float) -> None:
    ours, theirs = start(), start()
    how = optimizer(ours, momentum)
    plain = torch.optim.SGD(theirs, lr=RATE, momentum=momentum, weight_decay=0.01)
    for averaging in (False, True):
        for mine, right in zip(descend(ours, how, 4), descend(theirs, plain, 4), strict=True):
            assert all(map(torch.equal, mine, right))
        if not averaging:
            for loss in (1.0, 1.0, 2.0):
                how.note(loss, patience=1)
            assert how.averaging


def test_the_average_is_the_mean_of_the_weights_since() -> None:
    weights = start()
    how = optimizer(weights)
    descend(weights, how, 3)
    before = [p.detach().clone() for p in weights]
    with how.averaged():  # nothing is averaged yet
        assert all(map(torch.equal, weights, before))
    for loss in (1.0, 1.0, 2.0):
        how.note(loss, patience=1)
    path = descend(weights, how, 5)
    last = [p.detach().clone() for p in weights]
    with how.averaged():
        for i, parameter in enumerate(weights):
            mean = torch.stack([step[i] for step in path]).mean(dim=0)
            torch.testing.assert_close(parameter.detach(), mean)
    assert all(map(torch.equal, weights, last))


def test_the_weights_come_back_after_an_error() -> None:
    weights = start()
    how = optimizer(weights)
    for loss in (1.0, 1.0, 2.0):
        how.note(loss, patience=1)
    descend(weights, how, 3)
    last = [p.detach().clone() for p in weights]
    with pytest.raises(KeyError), how.averaged():
        assert not torch.equal(weights[0], last[0])
        raise KeyError
    assert all(map(torch.equal, weights, last))


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_checkpoint_goes_on_with_the_same_bits(after: int) -> None:
    """Before it averages, at the very epoch, and after some averaged steps."""
    losses = [1.0, 1.0, 2.0, 0.5, 0.5, 0.5]
    straight, resumed = start(), start()
    one, two = optimizer(straight, 0.9), optimizer(resumed, 0.9)
    for epoch, loss in enumerate(losses):
        descend(straight, one, 2)
        one.note(loss, patience=1)
        descend(resumed, two, 2)
        two.note(loss, patience=1)
        if epoch == after:
            state = two.state_dict()
            resumed = [p.detach().clone().requires_grad_() for p in resumed]
            two = optimizer(resumed, 0.9)
            two.load_state_dict(state)
    assert one.averaging and two.averaging
    assert all(map(torch.equal, straight, resumed))
    with one.averaged(), two.averaged():
        assert all(map(torch.equal, straight, resumed))
