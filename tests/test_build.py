"""The build as a user meets it: its decisions, and behind `-m slow` whole installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parent.parent
CLEARED = (
    *("RDARTS_CUDA", "RDARTS_CUDA_ARCHS", "RDARTS_CPU", "RDARTS_CPU_UNITS", "PYTHONPATH"),
    *("CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH"),
)
NOT_SOURCES = (".*", "build", "dist", "runs", "data", "*.egg-info", "*.so", "__pycache__")

Done = subprocess.CompletedProcess[str]


def run(*command: str | Path, cwd: Path, **variables: str) -> Done:
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


def checked(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command that must succeed prints."""
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, **variables: str) -> Done:
    """Build the native module into `folder`; CMake wraps its messages, which is undone here."""
    command = ("setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder)
    done = run(sys.executable, *command, cwd=CLONE, **variables)
    done.stderr = " ".join(done.stderr.split())
    return done


def path_without_nvcc(folder: Path) -> str:
    """PATH, where a folder that holds nvcc is replaced by one that holds all the rest of it."""
    places = []
    for number, place in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not (Path(place) / "nvcc").exists():
            places.append(place)
            continue
        mirror = folder / f"bin{number}"
        mirror.mkdir()
        for program in Path(place).iterdir():
            if program.name != "nvcc":
                (mirror / program.name).symlink_to(program)
        places.append(str(mirror))
    return os.pathsep.join(places)


def fake_nvcc(folder: Path, script: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_a_cuda_build_without_nvcc_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, RDARTS_CUDA="1", PATH=path_without_nvcc(tmp_path))
    assert done.returncode != 0
    assert "no nvcc was found" in done.stderr
    assert "RDARTS_CUDA=0" in done.stderr


def test_a_named_nvcc_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, CUDACXX=str(tmp_path / "nvcc"))
    assert done.returncode != 0
    assert str(tmp_path / "nvcc") in done.stderr and "RDARTS_CUDA=0" in done.stderr


def test_a_host_compiler_that_nvcc_refuses_is_an_error(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "echo '#error -- unsupported GNU version!' >&2; exit 1")
    done = build(tmp_path, CUDACXX=nvcc)
    assert done.returncode != 0
    for words in ("unsupported GNU version", "does not work with the host compiler"):
        assert words in done.stderr
    assert "RDARTS_CUDA=0" in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("RDARTS_CUDA", "yes"), ("RDARTS_CUDA_ARCHS", "80,sm_90"), ("RDARTS_CPU_UNITS", "avx2")],
)
def test_a_malformed_variable_is_an_error(tmp_path: Path, name: str, value: str) -> None:
    done = build(tmp_path, **{"CUDACXX": fake_nvcc(tmp_path, "exit 0"), name: value})
    assert done.returncode != 0
    assert f"{name} must" in done.stderr and value.split(",")[-1] in done.stderr


def test_every_folder_of_the_package_is_installed() -> None:
    for path in (CLONE / "rdarts_fast").rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path


def test_the_package_works_from_another_folder(tmp_path: Path) -> None:
    script = (
        "import pathlib, rdarts_fast\n"
        "from rdarts_fast.draws import Draws\n"
        "print(Draws(1).normal(0, (3,)).shape, pathlib.Path(rdarts_fast.__file__).parent)"
    )
    assert "torch.Size([3])" in checked(sys.executable, "-c", script, cwd=tmp_path)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "clone"
    shutil.copytree(CLONE, folder, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    (folder / "README.md").touch()
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a fresh virtual environment, which holds nothing but pip."""
    checked(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    return tmp_path / "venv" / "bin" / "python"


def pip_install(python: Path, clone: Path, *options: str, **variables: str) -> str:
    command = ("-m", "pip", "install", "--no-deps", "--disable-pip-version-check", *options, ".")
    done = run(python, *command, cwd=clone, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr  # pip -v shows the build on the latter


def built(python: Path, cwd: Path) -> dict[str, object]:
    """The extension's build_info; it needs no torch."""
    script = "import json, _rdarts_fast; print(json.dumps(_rdarts_fast.build_info()))"
    info: dict[str, object] = json.loads(checked(python, "-c", script, cwd=cwd))
    return info


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_installed_uninstalled_installed_again(clone: Path, python: Path, tmp_path: Path) -> None:
    before = files(clone)
    for _ in range(2):
        pip_install(python, clone)
        assert built(python, tmp_path)["version"] == "0.1.0"
        assert "torch:" in checked(python, "-m", "rdarts_fast.info", cwd=tmp_path)
        checked(python, "-m", "pip", "uninstall", "--yes", "rdarts-fast", cwd=tmp_path)
        for module in ("_rdarts_fast", "rdarts_fast"):
            assert run(python, "-c", f"import {module}", cwd=tmp_path).returncode != 0
    pip_install(python, clone)
    pip_install(python, clone)  # over itself
    assert built(python, tmp_path)["version"] == "0.1.0"
    assert files(clone) == before


@pytest.mark.slow
def test_only_the_package_is_installed(clone: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, clone, RDARTS_CUDA="0")
    script = "from importlib.metadata import files; print(*files('rdarts-fast'), sep='\\n')"
    names = checked(python, "-c", script, cwd=tmp_path).split()
    tops = {name.split("/")[0].split(".")[0].split("-")[0] for name in names}
    assert tops == {"rdarts_fast", "_rdarts_fast"}
    sources = {str(path.relative_to(clone)) for path in (clone / "rdarts_fast").rglob("*.py")}
    assert sources <= set(names) and "rdarts_fast/py.typed" in names


@pytest.mark.slow
def test_a_file_removed_from_the_clone_is_not_installed(
    clone: Path, python: Path, tmp_path: Path
) -> None:
    extra = clone / "rdarts_fast" / "extra.py"
    extra.touch()
    pip_install(python, clone, RDARTS_CUDA="0")
    checked(python, "-c", "import rdarts_fast.extra", cwd=tmp_path)
    extra.unlink()
    pip_install(python, clone, RDARTS_CUDA="0")
    assert run(python, "-c", "import rdarts_fast.extra", cwd=tmp_path).returncode != 0


@pytest.mark.slow
def test_a_cpu_build_on_demand_and_for_lack_of_nvcc(
    clone: Path, python: Path, tmp_path: Path
) -> None:
    text = pip_install(python, clone, "-v", RDARTS_CUDA="0")
    assert "CPU build, as RDARTS_CUDA=0 says" in text
    assert built(python, tmp_path)["cuda_archs"] == []
    text = pip_install(python, clone, "-v", PATH=path_without_nvcc(tmp_path))
    assert "CPU build, since no nvcc was found" in text
    assert built(python, tmp_path)["cuda_runtime"] is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_cuda_build_for_the_wished_generations(clone: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, clone)
    assert built(python, tmp_path)["cuda_archs"] == ["sm_80", "sm_90", "compute_90"]
    pip_install(python, clone, RDARTS_CUDA="1", RDARTS_CUDA_ARCHS="90")
    assert built(python, tmp_path)["cuda_archs"] == ["sm_90", "compute_90"]


@pytest.mark.slow
def test_an_editable_install_notices_newer_sources(
    clone: Path, python: Path, tmp_path: Path
) -> None:
    work = tmp_path / "clone"
    shutil.copytree(clone, work)
    pip_install(python, work, "-e", RDARTS_CUDA="0")
    assert built(python, tmp_path)["version"] == "0.1.0"
    found = checked(python, "-c", "import rdarts_fast; print(rdarts_fast.__file__)", cwd=tmp_path)
    assert Path(found.strip()).parent == work / "rdarts_fast"
    # This Python has torch; in the folder it takes the module that the install left there.
    script = "from rdarts_fast import native; print(native.extension.__file__)"
    assert checked(sys.executable, "-c", script, cwd=work).startswith(str(work))
    with (work / "csrc" / "bindings.cpp").open("a") as source:
        source.write("\n")
    stale = run(sys.executable, "-c", script, cwd=work)
    assert stale.returncode != 0 and "pip install -e ." in stale.stderr
    pip_install(python, work, "-e", RDARTS_CUDA="0")
    checked(sys.executable, "-c", script, cwd=work)
