"""CUDA kernels on the CPU: the machine catches what it is made to catch, and Philox passes."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rdarts_fast import native
from rdarts_fast.draws import Draws, normal_twin, philox_twin, uniform_twin
from tests.host_cuda import (
    THREAD_ORDERS,
    Counts,
    build,
    counts,
    on_host,
    reset,
    run_fault,
    set_thread_order,
)

CPU = torch.device("cpu")
FAULTS = Path(__file__).resolve().parent / "host_cuda" / "faults"
NAN = float("nan")

# Of each fault: the elements of input and output, and what the right kernel makes of the input.
RIGHT: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "out_of_bounds_read": (100, 100, lambda x: torch.cat([x[1:] - x[:-1], x[:1] * 0])),
    "out_of_bounds_write": (100, 100, lambda x: x),
    "out_of_bounds_shared": (64, 64, lambda x: x.flip(0)),
    "out_of_bounds_vector": (30, 30, lambda x: x),
    "misaligned_vector": (36, 32, lambda x: x[:32]),
    "unwritten_output": (102, 102, lambda x: x),
    "unwritten_shared": (64, 32, lambda x: x[:32] + x[32:]),
    "read_after_write": (64, 64, lambda x: torch.cat([x[:1], x[:-1]])),
    "write_after_read": (64, 64, lambda x: x.roll(-2)),
    "vector_race": (64, 64, lambda x: x.roll(5)),
    "small_launch": (64, 64, lambda x: x.flip(0)),
    "atomic_race": (64, 1, lambda x: (x > 0).sum().float().view(1)),
    "between_lanes": (32, 32, lambda x: x.flip(0)),
    "between_blocks": (6, 6, lambda x: x + x.view(3, 2).flip(1).view(6)),
    "early_return": (64, 48, lambda x: x[:48].flip(0)),
    "two_barriers": (64, 64, lambda x: x.flip(0)),
    "part_of_a_warp": (16, 16, lambda x: x + x.view(8, 2).flip(1).view(16)),
    "half_a_block": (16, 16, lambda x: (x > 0).sum().float().expand(16)),
    "absent_lane": (16, 16, lambda x: x.roll(-1)),
    "last_block": (8, 10, lambda x: torch.cat([x.double().sum().float().view(1), x, x[:1] * 0])),
    "first_come": (
        32,
        32,
        lambda x: torch.cat([x[x > 0], torch.full((int((x <= 0).sum()),), NAN)]),
    ),
}
NOT_YET = r"of shared memory of 64, which no thread of the block has written yet"
# What is said of the planted fault in each of THREAD_ORDERS; one text stands for all.
SAID = {
    "out_of_bounds_read": [
        r"^out_of_bounds_read, block \(1,0,0\): thread \(35,0,0\), out_of_bounds_read.cu:\d+: "
        r"read of index 100 of a Span of 100 is out of bounds$"
    ],
    "out_of_bounds_write": [
        rf"^out_of_bounds_write, block \(1,0,0\): thread \({thread},0,0\), out_of_bounds_write.cu"
        rf":\d+: write of index {64 + int(thread)} of a Span of 100 is out of bounds$"
        for thread in ("36", "63")
    ],
    "out_of_bounds_shared": [
        r"thread \(0,0,0\), out_of_bounds_shared.cu:\d+: "
        r"read of index 64 of shared memory of 64 is out of bounds"
    ],
    "out_of_bounds_vector": [r"read of 4 elements from index 28 of a Span of 30 is out of bounds"],
    "misaligned_vector": [
        rf"read of a vector at index {index} of a Span of 36: the address is no multiple of 16"
        for index in (1, 29)
    ],
    "unwritten_shared": [rf"read of index {index} {NOT_YET}" for index in (32, 63)],
    "read_after_write": [
        r"thread \(1,0,0\), read_after_write.cu:\d+: read-after-write race: read of index 0 of "
        r"shared memory of 64 after the write by thread \(0,0,0\) at read_after_write.cu:\d+, with "
        r"no barrier between",
        rf"thread \(63,0,0\), read_after_write.cu:\d+: read of index 62 {NOT_YET}",
    ],
    "write_after_read": [
        r"thread \(1,0,0\), write_after_read.cu:\d+: write-after-read race: write of index 1 of "
        r"shared memory of 64 after the read by thread \(0,0,0\) at write_after_read.cu:\d+",
        r"thread \(62,0,0\), write_after_read.cu:\d+: read-after-write race: read of index 63 of "
        r"shared memory of 64 after the write by thread \(63,0,0\) at write_after_read.cu:\d+",
    ],
    "vector_race": [
        rf"read of index 59 {NOT_YET}",
        r"read of index 55 of shared memory of 64, which no thread of the block has written yet",
    ],
    "small_launch": [
        r"small_launch.cu:\d+: dynamic_shared: 256 bytes from byte 0 on, but the launch gave 252"
    ],
    "atomic_race": [
        r"thread \(63,0,0\), atomic_race.cu:\d+: read-after-atomic race: read of index 0",
        r"atomic_race.cu:\d+: atomic-after-read race: .* after the read by thread \(63,0,0\)",
    ],
    "between_lanes": ["read-after-write race: read of index 31", "read-after-write race: .* 0 of"],
    "between_blocks": [
        rf"block \({block},0,0\): .*write-after-read race: write of index {block} of a Span of 6 "
        r"after the read by a thread of another block at between_blocks.cu:\d+"
        for block in (1, 4)
    ],
    "last_block": [
        r"read-after-write race: read of index [15] of a Span of 10 after the write by a thread of "
        r"another block at last_block.cu:\d+"
    ],
    "early_return": [
        r"^early_return, block \(0,0,0\): divergent barrier: thread \(0,0,0\) waits in "
        r"__syncthreads at early_return.cu:\d+; thread \(48,0,0\) has returned$"
    ],
    "two_barriers": [
        r"divergent barrier: thread \(0,0,0\) waits in __syncthreads at two_barriers.cu:13; "
        r"thread \(32,0,0\) waits in __syncthreads at two_barriers.cu:15"
    ],
    "part_of_a_warp": [
        r"^part_of_a_warp, block \(0,0,0\): __shfl_xor_sync at part_of_a_warp.cu:\d+ is executed by"
        r" only part of its mask 0xffffffff: thread \(0,0,0\) waits there; thread \(16,0,0\) has "
        r"returned$"
    ],
    "half_a_block": [
        r"__ballot_sync at half_a_block.cu:\d+ is executed by only part of its mask 0xffffffff: "
        r"thread \(0,0,0\) waits there; a lane that the block does not have"
    ],
    "absent_lane": [r"__shfl_sync: reads lane 16, which the mask 0x0000ffff does not name"],
}
# What a wrong order of threads alone shows: no error, but other numbers.
ORDER_DEPENDENT = ["float_atomics", "first_come"]


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    with on_host():
        yield


@pytest.fixture(params=THREAD_ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    set_thread_order(request.param, seed=3)
    return str(request.param)


def numbers(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1))


def outcome(name: str, inputs: Tensor, size: int, *, planted: bool = False) -> Tensor:
    out = torch.empty(size)
    run_fault(name, out, inputs, planted=planted)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_passes(name: str, order: str) -> None:
    inputs, outputs, model = RIGHT[name]
    x = numbers(inputs)
    torch.testing.assert_close(outcome(name, x, outputs), model(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SAID)
def test_a_planted_fault_is_named(name: str, order: str) -> None:
    inputs, outputs, _ = RIGHT[name]
    with pytest.raises(RuntimeError) as raised:
        outcome(name, numbers(inputs), outputs, planted=True)
    texts = SAID[name]
    if len(texts) == 1:
        text = texts[0]
    elif order == "shuffled":  # any thread may be the first to be caught
        text = rf"^{name}, block \(\d,0,0\): thread \(\d+,0,0\), {name}.cu:\d+: "
    else:
        text = texts[THREAD_ORDERS.index(order)]
    assert re.search(text, str(raised.value)), raised.value


def test_a_fault_leaves_the_machine_fit_for_the_next_launch(order: str) -> None:
    for name in SAID:
        with pytest.raises(RuntimeError):
            outcome(name, numbers(RIGHT[name][0]), RIGHT[name][1], planted=True)
        test_a_right_kernel_passes(name, order)


def test_what_is_left_unwritten_stays_nan(order: str) -> None:
    x = numbers(102)
    found = outcome("unwritten_output", x, 102, planted=True)
    assert found.isnan().nonzero().flatten().tolist() == [100, 101]
    assert not outcome("unwritten_output", x, 102).isnan().any()


@pytest.mark.parametrize("name", ORDER_DEPENDENT)
@pytest.mark.parametrize("planted", [True, False])
def test_what_hangs_on_the_order_differs_between_the_orders(name: str, planted: bool) -> None:
    found = []
    for order in THREAD_ORDERS:
        set_thread_order(order, seed=3)
        out = torch.zeros(32)
        run_fault(name, out, numbers(256 if name == "float_atomics" else 32), planted=planted)
        found.append(out)
    assert same_bits(found[0], found[1]) is not planted
    assert same_bits(found[0], found[2]) is not planted


def test_a_shuffled_order_hangs_on_its_seed_alone() -> None:
    found = []
    for seed in (1, 2, 1):
        set_thread_order("shuffled", seed)
        found.append(outcome("first_come", numbers(32), 32, planted=True))
        right = outcome("first_come", numbers(32), 32)
        torch.testing.assert_close(found[-1].sort()[0], right.sort()[0], equal_nan=True)
    assert same_bits(found[0], found[2]) and not same_bits(found[0], found[1])


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match='ascending, descending or shuffled, found "backwards"'):
        set_thread_order("backwards")


def test_every_fault_is_tested() -> None:
    names = {path.stem for path in FAULTS.glob("*.cu")}
    assert names == {*SAID, *ORDER_DEPENDENT, "unwritten_output"}
    assert names == {*RIGHT, "float_atomics"}


@pytest.mark.parametrize("factor", [1, -1, 4])  # each vote comes out both ways
def test_primitives_give_what_cuda_says(factor: float, order: str) -> None:
    x = factor * numbers(64)
    warps, positive = x.view(2, 32), (x > 0).view(2, 32)
    lane = torch.arange(32)
    up = torch.where(lane % 16 >= 3, lane - 3, lane)
    down = torch.where(lane + 2 < 32, lane + 2, lane)
    # A lane may read from an earlier group of its width, not from a later one.
    xor = torch.where((lane ^ 4) < (lane & ~3) + 4, lane ^ 4, lane)
    votes = positive.long() << lane
    ballot = (votes >> 16).sum(1).float() + (votes & 0xFFFF).sum(1).float()
    columns = [
        warps[:, 5:6].expand(2, 32),
        warps[:, (lane & ~7) + 1],
        warps[:, up],
        warps[:, down],
        warps[:, xor],
        ballot.view(2, 1).expand(2, 32),
        (positive[:, 7:8].float() + 2 * positive[:, 9:10].float()).expand(2, 32),
        positive.sum().float().expand(2, 32),
        ((x > 2.5).any().float() + 2 * (x < 2.5).all().float()).expand(2, 32),
        warps.bfloat16().float(),
    ]
    expected = torch.stack(columns, dim=2).flatten()
    assert torch.equal(outcome("primitives", x, 640), expected)


def to_10_bits(x: Tensor) -> Tensor:
    """Round to the nearest number of 10 bits of mantissa, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign(), exponent - 11)


def test_factors_are_rounded_as_ptx_says(order: str) -> None:
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 2 - 2.0**-11])
    below = torch.nextafter(ties, torch.zeros(4))
    x = torch.cat([numbers(64), 1e-30 * numbers(64), ties, below, torch.zeros(1)])
    assert torch.equal(outcome("tf32s", x, len(x)).double(), to_10_bits(x))
    assert outcome("tf32s", ties, 4).tolist() == [1 + 2.0**-10, 1 + 2.0**-9, -1 - 2.0**-10, 2]
    ends = torch.tensor([NAN, float("inf"), -float("inf"), torch.finfo(torch.float32).max])
    expected = torch.tensor([NAN, float("inf"), -float("inf"), float("inf")])
    assert torch.equal(outcome("tf32s", ends, 4).nan_to_num(), expected.nan_to_num())


def test_tensor_cores_multiply_matrices(order: str) -> None:
    x = numbers(320)
    a, b, c = x[:128].view(16, 8), x[128:192].view(8, 8), x[192:].view(16, 8)
    found = outcome("tensor_core", x, 128).view(16, 8).double()
    expected = to_10_bits(a) @ to_10_bits(b) + c
    assert (found - expected).abs().max() < 2.0**-20 * expected.abs().max()  # sums of float32
    assert (found - (a.double() @ b.double() + c)).abs().max() > 2.0**-14 * expected.abs().max()


def test_shared_memory_is_poisoned_in_every_block(order: str) -> None:
    for _ in range(2):
        assert outcome("poison", torch.ones(4), 4).isnan().all()


@pytest.mark.parametrize("size", [1, 200_000])  # more than are remembered without growth
@pytest.mark.parametrize("order", THREAD_ORDERS[:2])
def test_a_block_must_not_overwrite_what_another_reads(order: str, size: int) -> None:
    set_thread_order(order)
    text = rf"race: .* index 0 of a Span of {size} .* another block"
    with pytest.raises(RuntimeError, match=text):
        run_fault("overwritten", torch.zeros(size), torch.ones(1), planted=True)


def test_halves_of_a_warp_go_separate_ways(order: str) -> None:
    found = outcome("halves", numbers(32), 32).view(2, 16)
    torch.testing.assert_close(found, numbers(32).view(2, 16).sum(1, keepdim=True).expand(2, 16))


def test_block_sums_have_the_same_bits_in_every_order() -> None:
    x, found = numbers(64 * 256 - 100), []
    for order in THREAD_ORDERS:
        set_thread_order(order)
        found.append(outcome("block_sums", x, 64))
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])
    expected = torch.nn.functional.pad(x, (0, 100)).view(64, 256).double().sum(1).float()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


def test_atomics(order: str) -> None:
    x = (numbers(64) * 100).trunc()
    assert outcome("atomics", x, 2).tolist() == [x.sum(), x.max()]


def test_vectors(order: str) -> None:
    x = numbers(64)
    assert torch.equal(outcome("vectors", x, 64), x.view(16, 4).flip(0).flatten())


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = torch.arange(-(2**31), 2**31, 65521 * 3, dtype=torch.int64)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001])
    x = torch.cat([bits, ties, -ties - 1, torch.tensor([0x7F800000])]).int().view(torch.float32)
    found = outcome("bfloat16s", x, x.numel())
    torch.testing.assert_close(found, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["large", "all_unasked"])
def test_large_dynamic_shared_memory_is_asked_for(name: str) -> None:
    assert torch.equal(outcome(name, numbers(64), 64), numbers(64).flip(0))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("too_many_threads", "too_many_threads: invalid configuration argument"),
        ("no_such_device", "device 1000: invalid device ordinal"),
        ("too_many_items", "blocks: expected at most .*, got 2147483648 x 1 x 1: split the batch"),
    ],
)
def test_a_launch_that_no_gpu_takes_is_refused(name: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        outcome(name, numbers(32), 32)
    outcome("halves", numbers(32), 32)


@pytest.mark.parametrize("sizes", [(2**31, 1, 1), (1, 2**16, 1), (1, 1, 2**16), (2**33, 0, 0)])
def test_more_blocks_than_a_grid_has_are_refused(sizes: tuple[int, int, int]) -> None:
    got = " x ".join(map(str, sizes))
    with pytest.raises(RuntimeError, match=f"at most 2147483647 x 65535 x 65535, got {got}"):
        outcome("too_many_blocks", torch.tensor(sizes, dtype=torch.float32), 3)
    most = torch.tensor([2**31 - 1, 2**16 - 1, 2**16 - 1], dtype=torch.float32)
    assert torch.equal(outcome("most_blocks", most, 3), most)


def test_launches_and_bytes_are_counted() -> None:
    assert counts() == {}
    outcome("block_sums", numbers(1000), 4)
    outcome("block_sums", numbers(1000), 4)
    outcome("vectors", numbers(64), 64)
    assert counts() == {"block_sums": Counts(2, 8000, 32), "vectors": Counts(1, 256, 256)}
    reset()
    assert counts() == {}


PHILOX = {
    "philox_bits": (torch.int64, philox_twin),
    "philox_uniform": (torch.float32, uniform_twin),
    "philox_normal": (torch.float32, normal_twin),
}
SEED, COUNTER = 0xDEADBEEFCAFEBABE, (5, 77, 9, 7 << 16 | 3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("fill", PHILOX)
def test_philox_and_twin_give_the_same_bits(fill: str, count: int, order: str) -> None:
    dtype, twin = PHILOX[fill]
    memory = torch.full((count + 16,), 3, dtype=dtype)
    native.filled(fill, memory[8 : 8 + count], SEED, COUNTER)
    expected = torch.full_like(memory, 3)
    expected[8 : 8 + count] = twin(SEED, COUNTER, count, CPU)
    assert torch.equal(memory, expected)
    launched = {} if count == 0 else {"philox": Counts(1, 0, count * dtype.itemsize)}
    assert counts() == launched


def test_public_functions_run_cuda_kernels_on_host() -> None:
    found = Draws(7).normal(3, (5, 7))
    assert counts()["philox"].launches == 1
    assert torch.equal(found.flatten(), normal_twin(7, (0, 3, 0, 0), 35, CPU))


def test_on_host_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = object(), object()
    monkeypatch.setattr(native, "extension", before[0])
    monkeypatch.setattr(native, "place", before[1])
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ZeroDivisionError), on_host() as module:
        assert native.extension is module and native.place is not before[1]
        assert torch.empty(3).isnan().all()
        raise ZeroDivisionError
    assert (native.extension, native.place) == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("csrc", "cmake", "tests/host_cuda", "tests/all_kernels"):
        shutil.copytree(build.CLONE / name, tmp_path / name)
    for name in ("CMakeLists.txt", "rdarts_fast/csrc_hash.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(build.CLONE / name, tmp_path / name)
    return tmp_path


def test_a_compile_error_is_shown(clone: Path) -> None:
    broken = clone / "csrc/cuda/philox.cu"
    for path in clone.glob("csrc/**/*.c*"):
        if path != broken:
            path.write_text("")  # what the others hold takes long
    with broken.open("a") as file:
        file.write("nonsense;\n")
    with pytest.raises(RuntimeError, match=r"do not compile as C\+\+(.|\n)*philox.cu(.|\n)*nonsen"):
        build.built_library(clone, clone / "build")


def test_the_library_is_built_anew_where_a_source_has_changed(clone: Path) -> None:
    seen = {build.fingerprint(clone)}
    assert seen == {build.fingerprint(build.CLONE)}
    for name in (
        *("csrc/cuda/philox.cu", "csrc/include/philox.h", "csrc/bindings.cpp", "CMakeLists.txt"),
        *("tests/host_cuda/machine.cpp", "tests/host_cuda/include/on_host/warp.h"),
        *("tests/host_cuda/CMakeLists.txt", "tests/host_cuda/faults/early_return.cu"),
    ):
        with (clone / name).open("a") as file:
            file.write("\n")
        seen.add(build.fingerprint(clone))
    assert len(seen) == 9


@pytest.mark.parametrize("path", sorted((build.CLONE / "csrc/cuda").glob("*.cu")), ids=str)
def test_kernels_keep_to_what_both_compilers_take(path: Path) -> None:
    text = path.read_text()
    assert "<<<" not in text and "asm(" not in text and not re.search(r"^\s*#\s*if", text, re.M)
    # Memory that is not in a Shared would be neither poisoned nor checked.
    assert not re.search(r"__shared__\s+(?!(rdarts::)?Shared<)", text)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_span_costs_nothing_on_the_device(tmp_path: Path) -> None:
    source, cubin = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    command = ["nvcc", "-std=c++17", "-arch=sm_80", f"-I{build.CLONE / 'csrc/include'}"]
    code = []
    for view, data in (("rdarts::Span", ""), ("Raw", ".data")):
        source.write_text(
            '#include "span.h"\ntemplate <typename T> struct Raw { T* data; int64_t size; };\n'
            f'extern "C" __global__ void kernel({view}<const float> in, {view}<float> out) {{\n'
            "  const int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
            f"  out{data}[i] = 2.0f * in{data}[i] + in{data}[i + 1];\n}}\n"
        )
        subprocess.run([*command, "-cubin", "-o", str(cubin), str(source)], check=True)
        code.append(cubin.read_bytes())
    assert code[0] == code[1]
