"""The disparity maps of a report: drawn wherever they lie, and a note where they are damaged."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rdarts_fast import write_report
from rdarts_fast.report.maps import maps_of
from tests.planted_runs import plant_maps, plant_retraining, plant_search
from tests.report_page import pictures_of, written


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> Path:
    """A search and its two retrainings, all with maps, and a retraining alone."""
    root = tmp_path_factory.mktemp("mapped")
    search = plant_search(root / "runs/s", task="disparity")
    elsewhere = plant_search(root / "elsewhere", task="disparity", seed=1)
    for name, source in (("r0", search), ("r1", search), ("alone", elsewhere)):
        plant_maps(plant_retraining(root / f"runs/{name}", source, 3.0))
    plant_maps(search)
    write_report(root / "runs", root / "out")
    return root / "out"


def test_maps_are_drawn_wherever_they_lie(mapped) -> None:
    page = written(mapped)
    assert {name for name in pictures_of(mapped) if name.endswith("-maps")} == {
        *("s-maps", "r0-maps", "r1-maps", "alone-maps"),
    }
    for name in ("search s", "retraining r0", "retraining r1"):
        assert f"The {name}: input, true and predicted disparity on one scale" in page.parts["s"]
    assert "The retraining alone: input" in page.text
    assert "Retrainings without their search" in page.text
    words = "3.00 px on average over the 90 % of the pixels that are known (grey: unknown), "
    assert page.text.count(words + "more than 3 px at 50.0 % of these.") == 4
    tag = "{http://www.w3.org/2000/svg}image"
    assert len(list(ET.parse(mapped / "pictures/r0-maps.svg").iter(tag))) >= 4


def test_maps_are_drawn_whatever_the_task_is(tmp_path) -> None:
    plant_maps(plant_search(tmp_path / "s"))
    write_report(tmp_path / "s", tmp_path / "out")
    assert "s-maps" in pictures_of(tmp_path / "out")


def test_more_maps_than_a_page_should_have_are_named(tmp_path) -> None:
    search = plant_search(tmp_path / "runs/s", task="disparity")
    for i in range(5):
        plant_maps(plant_retraining(tmp_path / f"runs/r{i}", search, 3.0))
    write_report(tmp_path / "runs", tmp_path / "out")
    assert sum(name.endswith("-maps") for name in pictures_of(tmp_path / "out")) == 4
    assert "maps.npz of 1 more retrainings are not drawn" in written(tmp_path / "out").parts["s"]


def damage(folder: Path, how: str) -> None:
    """Damage planted maps."""
    path = folder / "maps.npz"
    maps = dict(np.load(path))
    if how == "empty":
        path.write_bytes(b"")
    elif how == "no archive":
        path.write_text("x" * 1000)
    elif how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "an array is missing":
        np.savez(path, left=maps["left"], truth=maps["truth"])
    elif how == "shapes differ":
        np.savez(path, **maps | {"truth": maps["truth"][1:]})
    elif how == "grey":
        np.savez(path, **maps | {"left": maps["left"][..., 0]})
    elif how == "objects":
        np.savez(path, **maps | {"truth": np.array([None, {}], dtype=object)})
    elif how == "text":
        np.savez(path, **maps | {"truth": maps["truth"].astype(str)})
    elif how == "nothing is known":
        none = np.full_like(maps["truth"], np.nan)
        np.savez(path, **maps | {"truth": none, "prediction": none})
    elif how == "no pixels":
        np.savez(path, **{name: array[:0] for name, array in maps.items()})
    elif how == "no disparity":
        np.savez(path, **maps | {"prediction": maps["truth"] * 0 + np.float32(1e30)})
    else:
        raise AssertionError(how)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize(
    "how",
    [
        *("empty", "no archive", "half", "a folder", "an array is missing", "shapes differ"),
        *("grey", "objects", "text", "nothing is known", "no pixels", "no disparity"),
    ],
)
def test_damaged_maps_are_a_note(how: str, tmp_path) -> None:
    search = plant_search(tmp_path / "runs/s", 1, task="disparity")
    run = plant_retraining(tmp_path / "runs/r", search, 3.0)
    other = plant_search(tmp_path / "elsewhere", 1, task="disparity", seed=1)
    alone = plant_retraining(tmp_path / "runs/alone", other, 3.0)
    for folder in (search, run, alone):
        plant_maps(folder)
        damage(folder, how)
    write_report(tmp_path / "runs", tmp_path / "out")
    page = written(tmp_path / "out")
    assert not any(name.endswith("-maps") for name in pictures_of(tmp_path / "out"))
    said = "damaged, or nothing in it is known"
    assert f"maps.npz: {said}" in page.parts["s"] and f"r/maps.npz: {said}" in page.parts["s"]
    assert page.text.count(said) == 3 and "alone : its search is not" in page.text


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_byte_that_differs_is_a_traceback(tmp_path, save: Callable[..., None]) -> None:
    path = tmp_path / "maps.npz"
    save(path, **plant_maps(tmp_path))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    ends = [*range(0, 200), *range(len(whole) - 400, len(whole))]  # headers, the directory
    for place in [*ends, *random.integers(0, len(whole), size=200)]:
        changed = bytearray(whole)
        changed[place] ^= int(random.integers(1, 256))
        path.write_bytes(bytes(changed))
        refused += maps_of(path) is None
    assert refused > 300
    path.write_bytes(whole)
    assert maps_of(path) is not None
