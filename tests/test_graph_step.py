"""Steps on memory that stays where it is, and recorded ones, against those taken one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rdarts_fast import graph_step
from rdarts_fast.config import SearchConfig
from rdarts_fast.graph_step import RecordedSteps, StaticSteps
from rdarts_fast.search import run_search
from rdarts_fast.search_state import SearchState
from tests.small import settings
from tests.tape import Tapes
from tests.test_search import assert_same_bits

# 18 images in batches of 5: the last has 3. Drop path and cutout begin with the second epoch.
SEARCHES: dict[str, dict[str, Any]] = {
    "s4 second": {"space": "s4", "cutout_schedule": "linear", "drop_path_prob": 0.4},
    "s4 first": {"space": "s4", "order": "first", "drop_path_prob": 0.4, "cutout_prob": 0.5},
    "s4 shared noise": {"space": "s4", "noise_per_pass": "shared", "layers": 1},
    "s2 exact": {"space": "s2", "implicit": "exact", "layers": 1, "drop_path_prob": 0.2},
    "s3": {"space": "s3", "layers": 1, "flip": True, "drop_path_prob": 0.3},
    "s4 reference": {"space": "s4", "backend": "reference", "layers": 1, "drop_path_prob": 0.3},
}


def given(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    base = {"epochs": 6, "batch_size": 5, "cutout_length": 2, "out": folder / name}
    return settings(folder, **base, **changes)


@pytest.fixture
def capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam as on a GPU, where its bias corrections are made on the device."""
    start = SearchState.start

    def started(settings: SearchConfig, supernet: Any) -> SearchState:
        state = start(settings, supernet)
        state.alpha_optimizer.param_groups[0]["capturable"] = True
        return state

    monkeypatch.setattr(SearchState, "start", staticmethod(started))
    for module in (torch.optim.adam, torch.optim.optimizer):
        monkeypatch.setattr(
            module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"]
        )


def take_static(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph_step, "taker", lambda step, how, state, run: StaticSteps(step, state, run))


def take_recorded(patch: pytest.MonkeyPatch) -> Tapes:
    tapes = Tapes()

    def taker(step: Any, how: str, state: Any, run: Any) -> RecordedSteps:
        return RecordedSteps(step, state, run, tapes)

    patch.setattr(graph_step, "taker", taker)
    return tapes


@pytest.mark.parametrize("name", SEARCHES)
def test_static_steps_have_the_bits_of_plain_ones(name: str, tmp_path, monkeypatch) -> None:
    plain = run_search(**given(tmp_path, "plain", **SEARCHES[name]))
    take_static(monkeypatch)
    static = run_search(**given(tmp_path, "static", **SEARCHES[name]))
    assert len(plain.metrics) == 6
    assert_same_bits(plain.folder, static.folder)


@pytest.mark.parametrize("name", SEARCHES)
def test_recorded_steps_have_the_bits_of_plain_ones(
    name: str, tmp_path, monkeypatch, capturable
) -> None:
    """A recorded step reads nothing from the host, so each replay does the present step; and it
    could be a CUDA graph: no value comes to the host, no tensor from it.
    """
    plain = run_search(**given(tmp_path, "plain", **SEARCHES[name]))
    tapes = take_recorded(monkeypatch)
    recorded = run_search(**given(tmp_path, "recorded", **SEARCHES[name]))
    assert_same_bits(plain.folder, recorded.folder)
    # Two sizes; with drop path, two more from the second epoch on.
    shapes = 4 if SEARCHES[name].get("drop_path_prob") else 2
    # Those of the first epoch: the full batch is recorded at its second step, the last one's never.
    recordings = shapes - 1 if shapes == 4 else shapes
    assert tapes.counts["prepared"] == shapes
    assert tapes.counts["recorded"] == recordings
    assert tapes.counts["replayed"] == 6 * 4 - shapes - recordings
