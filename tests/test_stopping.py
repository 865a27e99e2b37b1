"""When DARTS-ES stops: the published measurements, and traces worked by hand."""

import json
from pathlib import Path

import pytest

from rdarts_fast.curvature import EigenvalueTrace

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_traces.json").read_text())
EPOCHS = [*range(0, 50, 2), 49]
# What the official rule did on them: the epoch it fired at and the one it went back to; None: never
# (paper's repository, search logs). Space, run, seeds.
DECISIONS = {
    ("s1", "0.0_0.0003-2516843"): {1: (22, 10), 2: (22, 10)},
    ("s1", "0.0_0.0009-2516844"): {1: (22, 10), 2: (32, 20)},
    ("s1", "0.0_0.0027-2516845"): {1: (42, 30), 2: (40, 28)},
    ("s1", "0.0_0.0081-2516846"): {1: None, 2: None},
    ("s1", "0.0_0.0243-2516847"): {1: None, 2: None},
    ("s1", "0.0_0.0729-2516848"): {1: (42, 30), 2: (26, 14)},
    ("s1", "0.0_0.2187-2516849"): {1: (22, 10), 2: (26, 14)},
    ("s1", "0.2_0.0003-2516850"): {1: (36, 24), 2: None},
    ("s1", "0.4_0.0003-2516851"): {1: None, 2: None},
    ("s1", "0.6_0.0003-2516868"): {1: (22, 10), 2: (24, 12)},
    ("s1", "0.8_0.0003-2516869"): {1: (46, 34), 2: (36, 24)},
    ("s3", "0.0_0.0003-2516870"): {1: (34, 22), 2: (30, 18)},
    ("s3", "0.0_0.0009-2516871"): {1: (48, 36), 2: (32, 20)},
    ("s3", "0.0_0.0027-2516872"): {1: (46, 34)},
    ("s3", "0.0_0.0027-2614099"): {1: (46, 34), 3: (22, 10)},
    ("s3", "0.0_0.0081-2614100"): {1: None, 3: None},
    ("s3", "0.0_0.0243-2614101"): {1: None, 3: None},
    ("s3", "0.0_0.0729-2614102"): {1: None, 3: None},
    ("s3", "0.0_0.2187-2614103"): {1: None, 3: None},
    ("s3", "0.2_0.0003-2614104"): {1: None, 3: (42, 30)},
    ("s3", "0.4_0.0003-2614117"): {1: None, 3: None},
    ("s3", "0.6_0.0003-2614118"): {1: (34, 22), 3: None},
    ("s3", "0.8_0.0003-2614123"): {1: (34, 22), 3: (38, 26)},
}


def decision(
    trace: EigenvalueTrace, epochs: list[int], values: list[float]
) -> tuple[int, int] | None:
    """Return the epoch at which the trace fires and the one it goes back to."""
    fired = None
    for epoch, value in zip(epochs, values, strict=True):
        trace.update(epoch, value)
        if trace.stop_epoch is not None and fired is None:
            fired = epoch, trace.stop_epoch
    if fired is not None:
        assert trace.stop_epoch == fired[1]  # fixed once it has fired
    return fired


def test_the_published_decisions() -> None:
    found: dict[tuple[str, str], dict[int, tuple[int, int] | None]] = {}
    for run in PUBLISHED["runs"]:
        seeds = found.setdefault((run["space"], run["run"]), {})
        seeds[run["seed"]] = decision(EigenvalueTrace(), EPOCHS, run["lambda_max"])
    assert found == DECISIONS


def test_the_worked_example() -> None:
    run = PUBLISHED["runs"][0]
    assert (run["space"], run["run"], run["seed"]) == ("s1", "0.0_0.0003-2516843", 1)
    trace = EigenvalueTrace()
    expected = [
        *(0.1658, 0.1609, 0.1530, 0.1670, 0.1836, 0.2214, 0.2370, 0.2900, 0.2819, 0.3217, 0.3514),
        *(0.3522, 0.3570, 0.4158, 0.4298, 0.3781, 0.4239, 0.4452, 0.4735, 0.4654, 0.5568, 0.7292),
        *(0.7313, 0.7068, 0.7687, 0.7892),
    ]
    for n, (epoch, value) in enumerate(zip(EPOCHS, run["lambda_max"], strict=True)):
        trace.update(epoch, value)
        known = 26 if epoch == 49 else max(0, n - 1)  # one from the third measurement on
        assert len(trace.local_average) == known
        assert trace.local_average == pytest.approx(expected[:known], abs=6e-5)
        assert trace.stop_epoch == (None if epoch < 22 else 10)
    averages = trace.local_average
    assert averages[9] / averages[5] == pytest.approx(1.453, abs=5e-4)  # epochs 18 and 10
    later = {24: 1.482, 26: 1.215, 28: 1.266, 30: 1.293, 32: 1.223, 34: 1.074, 40: 1.102}
    later |= {44: 1.314, 46: 1.638, 48: 1.544}
    for epoch, ratio in later.items():
        n = epoch // 2 - 2
        assert averages[n] / averages[n - 4] == pytest.approx(ratio, abs=6e-4)


# Worked by hand. window 3, delta 1: averages are of measurements n-1, n, n+1.
BY_HAND = {
    # averages 1, 1, 4/3, 2, 7/3 at epochs 0 to 4; the first ratio above 1.3 is 4/3 over 1, known at
    # epoch 3; one measurement before the one it is about.
    "rises": ([1, 1, 1, 2, 3, 2], 0, (3, 1)),
    # The same, but epoch 1 is too early to go back to: 2 over 4/3 at epoch 4.
    "too early": ([1, 1, 1, 2, 3, 2], 2, (4, 2)),
    # 3/2, 5/3, 4/3, 5/3, 5/3: ratios 10/9, 4/5, 5/4, 1, and epoch 5 is the last.
    "wavers": ([1, 2, 2, 0, 3, 2], 0, None),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_traces_worked_by_hand(case: str) -> None:
    values, start, expected = BY_HAND[case]
    trace = EigenvalueTrace(3, every=1, epochs=6, factor=1.3, delta=1, start_epoch=start)
    assert decision(trace, list(range(6)), [float(v) for v in values]) == expected


def test_a_ratio_of_exactly_the_factor_goes_on() -> None:
    def trace() -> EigenvalueTrace:
        return EigenvalueTrace(1, every=1, epochs=9, factor=1.5, delta=1, start_epoch=0)

    assert decision(trace(), [0, 1, 2], [1.0, 1.5, 2.25]) is None
    assert decision(trace(), [0, 1, 2], [1.0, 1.5, 2.2500001]) == (2, 1)


def test_zeros_and_negative_values() -> None:
    def trace() -> EigenvalueTrace:
        return EigenvalueTrace(1, every=1, epochs=9, factor=1.5, delta=1, start_epoch=0)

    assert decision(trace(), [0, 1], [0.0, 0.0]) is None
    assert decision(trace(), [0, 1], [0.0, 0.1]) == (1, 0)
    assert decision(trace(), [0, 1], [-0.1, 0.1]) is None


def test_the_papers_rule() -> None:
    # Averages rise from 1 (up to epoch 7) over 1.2 and 1.4 to 2: that of epoch 9 is the first with
    # 1 / 1.4 < 0.75; it is known at epoch 11 and five epochs after epoch 4.
    values = [1.0] * 10 + [2.0] * 10
    assert decision(EigenvalueTrace(every=1, rule="paper"), list(range(20)), values) == (11, 4)
    # At the end the windows are cut: those of epochs 9 and 10 have means 1.3 and 1.4.
    short = EigenvalueTrace(every=1, epochs=11, rule="paper")
    assert decision(short, list(range(11)), [1.0] * 10 + [2.2]) == (10, 5)
    with pytest.raises(ValueError, match='rule "paper" needs 1, got 2'):
        EigenvalueTrace(rule="paper")


def test_what_is_off_the_grid_does_not_count() -> None:
    run = PUBLISHED["runs"][0]
    trace = EigenvalueTrace()
    for epoch in range(49):
        trace.update(epoch, run["lambda_max"][epoch // 2] if epoch % 2 == 0 else 1e6)
    assert trace.stop_epoch == 10 and len(trace.measured) == 25


def test_rolling_back() -> None:
    run = PUBLISHED["runs"][0]
    trace, until = EigenvalueTrace(), EigenvalueTrace()
    for epoch, value in zip(EPOCHS[:12], run["lambda_max"][:12], strict=True):
        trace.update(epoch, value)
        if epoch <= 10:
            until.update(epoch, value)
    assert trace.stop_epoch == 10
    again = trace.rolled_back(10)
    assert again.stop_epoch is None
    assert again.measured == until.measured and again.local_average == until.local_average
    # On a branch whose eigenvalue stays where it was, the rule does not fire again.
    assert decision(again, list(range(12, 49, 2)), [0.2] * 19) is None
    assert EigenvalueTrace().lag == 12


def test_bad_numbers() -> None:
    trace = EigenvalueTrace()
    trace.update(4, 1.0)
    with pytest.raises(ValueError, match="epoch: expected one after 4, got 4"):
        trace.update(4, 1.0)
    with pytest.raises(ValueError, match="finite number at epoch 6, got nan"):
        trace.update(6, float("nan"))
    with pytest.raises(ValueError, match="window: expected an odd number, got 4"):
        EigenvalueTrace(window=4)
    with pytest.raises(ValueError, match="delta: expected at least 1, got 0"):
        EigenvalueTrace(delta=0)
