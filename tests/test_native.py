from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rdarts_fast import native
from rdarts_fast.csrc_hash import csrc_hash
from rdarts_fast.errors import UserError

CLONE = Path(__file__).resolve().parent.parent


def place() -> object:
    return native.extension.Place("base")


def test_build_info_says_what_was_compiled() -> None:
    built = native.build_info()
    assert set(built) == {
        "version",
        "csrc_hash",
        "compiler",
        "build_type",
        "cpu_units",
        "cuda_archs",
        "cuda_runtime",
    }
    assert built["cpu_units"][0] == "base"
    assert bool(built["cuda_archs"]) == (built["cuda_runtime"] is not None)
    assert set(native.extension.runnable_units()) <= set(built["cpu_units"])


def test_the_hash_of_the_sources_is_compiled_in() -> None:
    assert native.build_info()["csrc_hash"] == csrc_hash(CLONE / "csrc")


def test_the_hash_sees_contents_names_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(CLONE / "csrc", tmp_path / "csrc")
    sources = tmp_path / "csrc"
    before = csrc_hash(sources)
    (sources / "notes.txt").write_text("not a source")
    assert csrc_hash(sources) == before
    (sources / "cpu" / "more.cpp").write_text("")
    with_more = csrc_hash(sources)
    (sources / "cpu" / "more.cpp").rename(sources / "cpu" / "name.cpp")  # sorted as before
    assert len({before, with_more, csrc_hash(sources)}) == 3
    (sources / "cpu" / "name.cpp").rename(sources / "cpu" / "more.cpp")
    assert csrc_hash(sources) == with_more
    (sources / "cpu" / "more.cpp").write_text(" ")
    assert csrc_hash(sources) != with_more


def test_sources_newer_than_the_module_are_noticed(tmp_path: Path) -> None:
    shutil.copytree(CLONE / "csrc", tmp_path / "csrc")
    assert native.load_extension(tmp_path) is native.extension
    with (tmp_path / "csrc" / "bindings.cpp").open("a") as source:
        source.write("\n")
    with pytest.raises(ImportError, match=r"built from other sources.*pip install \.") as caught:
        native.load_extension(tmp_path)
    assert str(tmp_path / "csrc") in str(caught.value)


def test_a_stale_module_in_the_clone_gets_its_own_cure(tmp_path: Path) -> None:
    built = tmp_path / "_rdarts_fast.so"
    assert "delete that file" in native._cure(built, tmp_path)
    assert "delete" not in native._cure(built, tmp_path / "clone")


def test_without_sources_beside_the_package_the_module_is_taken(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()  # some other package's folder
    assert native.load_extension(tmp_path) is native.extension


def test_a_missing_module_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_rdarts_fast", None)
    with pytest.raises(ImportError, match=r"_rdarts_fast is not installed: run `pip install \.`"):
        native.load_extension()


def test_the_best_unit_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDARTS_CPU", raising=False)
    assert native.cpu_unit() == native.extension.runnable_units()[-1]


def test_rdarts_cpu_picks_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit in native.extension.runnable_units():
        monkeypatch.setenv("RDARTS_CPU", unit)
        assert native.cpu_unit() == unit


def test_an_unknown_unit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDARTS_CPU", "sse9")
    with pytest.raises(UserError, match='RDARTS_CPU="sse9": no such unit; set one of base'):
        native.cpu_unit()


def test_a_unit_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDARTS_CPU", "avx512")
    monkeypatch.setattr(native.extension, "runnable_units", lambda: ["base"])
    if "avx512" not in native.build_info()["cpu_units"]:
        pytest.skip("no avx512 unit on this kind of machine")
    with pytest.raises(UserError, match="does not have its instructions; set one of base or unset"):
        native.cpu_unit()


def test_bad_arguments_are_refused() -> None:
    fill, counter = native.extension.philox_normal, (0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"count: expected 0 \.\. 17179869184, found -1"):
        fill(64, -1, 0, counter, place())
    with pytest.raises(ValueError, match=r"count: expected 0 \.\. 4, found 5"):
        fill(64, 5, 0, (0xFFFFFFFF, 0, 0, 0), place())
    with pytest.raises(ValueError, match="out: expected an aligned address, found 0"):
        fill(0, 4, 0, counter, place())
    with pytest.raises(ValueError, match="out: expected an aligned address, found 66"):
        fill(66, 4, 0, counter, place())
    with pytest.raises(TypeError):
        fill(64, 4, 2**64, counter, place())


def test_bad_places_are_refused() -> None:
    with pytest.raises(ValueError, match="threads: expected 1 or more, found 0"):
        native.extension.Place("base", threads=0)
    with pytest.raises(ValueError, match=r'unit: .* found "best"'):
        native.extension.Place("best")
    if not native.build_info()["cuda_archs"]:
        with pytest.raises(ValueError, match="CPU build"):
            native.extension.Place("base", device=0)


def openmp_libraries(imports: str) -> list[str]:
    """The OpenMP libraries that a fresh process maps after these imports and some work."""
    script = f"""
import json
{imports}
names = {{line.split()[-1] for line in open("/proc/self/maps") if "/" in line}}
print(json.dumps(sorted(name for name in names if "libgomp" in name or "libomp" in name)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=CLONE, capture_output=True, text=True, check=True
    )
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_extension_shares_torchs_openmp_library() -> None:
    # Through native alone: whoever imports it first must get torch's.
    filled = "native.filled('philox_normal', native.torch.empty(100_000), 0, (0, 0, 0, 0))"
    found = openmp_libraries(f"from rdarts_fast import native; {filled}")
    assert len(found) == 1 and found == openmp_libraries("import torch; torch.rand(9)")


def test_the_interpreter_runs_on_while_a_launcher_works() -> None:
    out, span = torch.empty(1 << 24), []

    def work() -> None:
        span.append(time.perf_counter())
        native.extension.philox_normal(out.data_ptr(), out.numel(), 0, (0, 0, 0, 0), place())
        span.append(time.perf_counter())

    worker, ticks = threading.Thread(target=work), []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
    start, end = span
    quarter = (end - start) / 4
    assert any(start + quarter < tick < end - quarter for tick in ticks)
