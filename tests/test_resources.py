"""What the compiler gave each CUDA kernel: registers only, no spills, no stack, no local memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from rdarts_fast import native

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHS = [arch for arch in native.build_info()["cuda_archs"] if arch.startswith("sm_")]


class Resources(NamedTuple):
    """Bytes a thread has beside its registers, where spills lie on its stack; and a block's static
    shared memory.
    """

    arch: str
    kernel: str  # its mangled name
    stack: int
    shared: int
    local: int


def cuobjdump() -> str:
    """Return the path of the program that lists resources; skips the test where there is none.

    The toolkit brings it, and so does triton, which comes with a CUDA build of torch.
    """
    triton = importlib.util.find_spec("triton")
    brought = [Path(str(triton.origin)).parent / "backends/nvidia/bin"] if triton else []
    for place in (None, *brought):
        found = shutil.which("cuobjdump", path=place)
        if found:
            return found
    pytest.skip("no cuobjdump, neither on PATH nor from triton")


def resources(binary: Path) -> list[Resources]:
    """Return what every kernel in a compiled file takes, once for each GPU generation."""
    command = [cuobjdump(), "--dump-resource-usage", str(binary)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, arch = [], ""
    pattern = (
        r"^arch = (\w+)|^ *Function (\S+):\n.*\bSTACK:(\d+)\b.*\bSHARED:(\d+)\b.*\bLOCAL:(\d+)\b"
    )
    for line in re.finditer(pattern, report, re.M):
        if line[1]:
            arch = line[1]
        else:
            found.append(Resources(arch, line[2], *map(int, line.groups()[2:])))
    assert len(found) == len(re.findall(r"\bFunction ", report)), report
    return found


def kernels_of(path: Path) -> list[str]:
    """Return the names of the kernels that a .cu file defines."""
    code = re.sub(r"__launch_bounds__\([^()]*\)", "", path.read_text())
    names = re.findall(r"__global__\s+void\s+(\w+)\(", code)
    assert len(names) == code.count("__global__"), path
    return names


# Kernels whose products may go to tensor cores; the mangled name says in a bool whether they do.
FORWARD = ("sep_stage_kernel", "mixing_kernel")
BACKWARD = ("gradient_of_d_kernel", "gradients_below_kernel", "mixing_backward_kernel")


@pytest.mark.skipif(not ARCHS, reason="the installed native module is a CPU build")
def test_no_kernel_needs_more_than_its_registers() -> None:
    found = resources(Path(str(native.extension.__file__)))
    assert {kernel.arch for kernel in found} == set(ARCHS)
    names = [name for path in sorted(CSRC.glob("cuda/*.cu")) for name in kernels_of(path)]
    assert names
    for arch in ARCHS:
        compiled = [kernel.kernel for kernel in found if kernel.arch == arch]
        for name in names:
            assert any(f"{len(name)}{name}" in kernel for kernel in compiled), (arch, name)
    assert [kernel for kernel in found if kernel.stack or kernel.local] == []
    dynamic = [k for k in found if any(f"{len(n)}{n}" in k.kernel for n in (*FORWARD, *BACKWARD))]
    assert 0 < max(kernel.shared for kernel in dynamic) <= 8 << 10  # launch.h: kMostStatic


def code_of_kernels(binary: Path, arch: str, folder: Path) -> dict[str, np.ndarray]:
    """Return the first words of every kernel's instructions, of a GPU generation. `folder` gets the
    ELF files that hold them.
    """
    command = [cuobjdump(), "--extract-elf", f".{arch}.", str(binary.resolve())]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    found = {}
    for path in folder.iterdir():
        elf = path.read_bytes()
        (headers_at,) = struct.unpack_from("<Q", elf, 40)
        size, count, names = struct.unpack_from("<3H", elf, 58)
        headers = [struct.unpack_from("<II4Q", elf, headers_at + size * i) for i in range(count)]
        for name_at, _, _, _, start, length in headers:
            at = headers[names][4] + name_at
            name = elf[at : elf.index(b"\0", at)].decode()
            if name.startswith(".text."):
                words = np.frombuffer(elf, "<u8", length // 8, start)  # two an instruction
                found[name.removeprefix(".text.")] = words[::2]
    return found


def tensor_core_instructions(binary: Path, arch: str, folder: Path) -> dict[str, int]:
    """Return how many instructions of tensor cores each kernel of a GPU generation has.

    To take them all apart as text takes long: one of them says which opcode is theirs.
    """
    code = code_of_kernels(binary, arch, folder)
    one = next(name for name in code if f"{FORWARD[0]}I13__nv_bfloat16" in name)
    command = [cuobjdump(), "--dump-sass", "--gpu-architecture", arch, "--function", one]
    report = subprocess.run([*command, binary], check=True, capture_output=True, text=True).stdout
    lines = re.findall(
        r"^ +/\*[0-9a-f]+\*/ +(.*);.*/\* 0x[0-9a-f]+([0-9a-f]{3}) \*/$", report, re.M
    )
    assert len(lines) == len(code[one]) > 0
    (opcode,) = {int(low, 16) for text, low in lines if "HMMA." in text}
    found = {name: int((words & 0xFFF == opcode).sum()) for name, words in code.items()}
    assert found[one] == sum("HMMA." in text for text, _ in lines)
    return found


@pytest.mark.skipif(not ARCHS, reason="the installed native module is a CPU build")
@pytest.mark.parametrize("arch", ARCHS)
def test_products_are_on_tensor_cores_where_they_may_be_rounded(arch: str, tmp_path: Path) -> None:
    found = tensor_core_instructions(Path(str(native.extension.__file__)), arch, tmp_path)
    for kernel in (*FORWARD, *BACKWARD):  # of type, size of a depthwise part, whether it rounds
        pattern = rf"\d{kernel}I(f|d|13__nv_bfloat16)(?:Li\dE)?Lb(\d)E"
        named = [(re.search(pattern, name), count) for name, count in found.items()]
        of = {(match[1], match[2], count > 0) for match, count in named if match}
        expected = {("f", "0", False), ("d", "0", False), ("13__nv_bfloat16", "1", True)}
        if kernel in BACKWARD:
            expected.add(("f", "1", True))
        assert of == expected, kernel
    others = {name for name, count in found.items() if count and "Lb1E" not in name}
    assert others == set()


PLANTED = """
__global__ void clean(float* out, const float* in) { out[threadIdx.x] = in[threadIdx.x]; }

// More values at once than the 32 registers that it may have.
__global__ void __launch_bounds__(1024, 2) spilling(float* out, const float* in) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = in[1024 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) out[1024 * i + threadIdx.x] = values[i] * values[63 - i];
}

// Registers have no index that is known only when it runs.
__global__ void indexed(float* out, const int* in) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[in[i]] = i;
  out[threadIdx.x] = values[in[threadIdx.x]];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_spills_and_local_arrays_are_seen(tmp_path: Path) -> None:
    source, library = tmp_path / "planted.cu", tmp_path / "planted.so"
    source.write_text(PLANTED)
    assert kernels_of(source) == ["clean", "spilling", "indexed"]
    archs = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    options = ["-shared", "-Xcompiler=-fPIC", "-cudart=none", *archs]
    subprocess.run(["nvcc", *options, "-o", str(library), str(source)], check=True)
    found = resources(library)
    assert len(found) == 6 and {kernel.arch for kernel in found} == {"sm_80", "sm_90"}
    for kernel in found:
        assert bool(kernel.stack or kernel.local) != ("clean" in kernel.kernel), kernel
