"""The node sum and the batch norms folded into it, against plain torch twins in float64."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rdarts_fast import native
from rdarts_fast.draws import Draws, new_clock, set_clock
from rdarts_fast.kernels import (
    Noise,
    channel_affine,
    channel_sums,
    node_sum,
    node_sum_dq,
    node_sum_dz,
    normalized_sum,
    pools,
)
from rdarts_fast.kernels.channel_sums import channel_affine_twin, channel_sums_twin
from rdarts_fast.kernels.node_sum import (
    launch_node_sum,
    launch_node_sums,
    launch_scaled,
    node_sum_dq_twin,
    node_sum_dz_twin,
    node_sum_twin,
)
from rdarts_fast.kernels.norm_table import NormTable, Terms
from rdarts_fast.kernels.normalized_sum import normalized_sum_twin
from tests.conftest import device_of
from tests.host_cuda import counts, on_host
from tests.tolerances import assert_equal

LAYOUTS = ["nchw", "nhwc", "sliced"]
SHAPES = [(3, 16, 8, 8), (2, 7, 5, 9), (2, 1, 4, 4), (1, 70, 3, 2), (0, 4, 4, 4), (3, 2, 1, 1)]
COEFFICIENTS = {torch.float64: torch.float64, torch.float32: torch.float32}


def dtypes_of(backend: str) -> list[torch.dtype]:
    """The CPU has no bfloat16 kernels; in CUDA it is a storage type."""
    types = [torch.float64, torch.float32]
    return types if backend.startswith("cpu") else [*types, torch.bfloat16]


class Case:
    """Inputs of one call, made in float64 and rounded to `dtype`."""

    def __init__(self, shape, k: int, layout: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.k, self.layout, self.dtype = shape, k, layout, dtype
        self.coefficients = torch.float64 if dtype == torch.float64 else torch.float32
        self.z = [self.images() for _ in range(k)]
        n, c = shape[:2]
        self.scale, self.shift = self.coefficient(k, c), self.coefficient(k, c)
        self.factors = (self.uniform(k, n) < 0.7).to(self.coefficients) / 0.7
        self.weights = self.coefficient(k)
        kept = (self.uniform(2, n) < 0.6).to(self.coefficients)
        self.noise = Noise(Draws(5, step=3), (9, 70_000), self.coefficient(2), kept)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def coefficient(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(
            self.coefficients
        )

    def images(self) -> Tensor:
        n, c, h, w = self.shape
        whole = torch.randn(n, c + 2, h + 1, w + 3, generator=self.generator, dtype=torch.float64)
        x = whole.to(self.dtype)[:, 1 : c + 1, 1:, 2 : w + 2]
        if self.layout == "sliced":
            return x
        nhwc = self.layout == "nhwc"
        return x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)

    def exact(self, value):
        """Return the same in float64, for a twin."""
        if isinstance(value, Tensor):
            return value.detach().double()
        if isinstance(value, Noise):
            return Noise(
                value.draws, value.sites, self.exact(value.weights), self.exact(value.factors)
            )
        return None if value is None else [self.exact(x) for x in value]


def cases(backend: str):
    for shape, layout, dtype in itertools.product(SHAPES, LAYOUTS, dtypes_of(backend)):
        for k in (1, 5):
            yield Case(shape, k, layout, dtype)


@pytest.mark.parametrize("channels", [7, 16, 32])
def test_sums_in_float32_are_of_short_blocks(backend: str, channels: int) -> None:
    """A block's numbers are added in the arrays' type, here equal ones, whose roundings add up."""
    z = torch.full((4, channels, 32, 32), 1 / 3)
    z = z.contiguous(memory_format=torch.channels_last).to(device_of(backend))
    pivot = torch.zeros(1, channels, device=z.device)
    for got, expected in zip(
        channel_sums([z], pivot), channel_sums_twin([z.double()], pivot.double()), strict=True
    ):
        assert ((got - expected) / expected).abs().max() < 5e-7


def test_a_node_sum_may_take_the_place_of_any_of_its_terms(backend: str) -> None:
    for layout, k, dropped in itertools.product(LAYOUTS, (2, 6), (False, True)):
        case = Case((3, 16, 5, 8), k, layout, torch.float64)
        on, factors = Moved(case, backend), case.factors if dropped else None
        expected = node_sum_twin(case.z, case.scale, case.shift, factors)
        out = on.z[-1]
        rest = (on.shift, on.factors if dropped else None, None, None)
        launch_node_sum(None, on.scale, *rest, on.z, out)
        assert_equal(out.cpu(), expected, torch.float64)


def test_sums_of_many_blocks_take_no_second_launch() -> None:
    z = torch.randn(16, 3, 32, 32)
    with on_host():
        channel_sums([z, z], torch.zeros(2, 3))
        pools(z)
        found = counts()
    assert found["channel_sums"].launches == found["pool"].launches == 1


def test_two_sums_of_the_same_tensors(backend: str) -> None:
    for layout, dtype in itertools.product(LAYOUTS, dtypes_of(backend)):
        case = Case((3, 16, 5, 8), 6, layout, dtype)
        on = Moved(case, backend)
        for factors in (None, on.factors):
            out = [torch.empty_like(on.z[0]) for _ in range(2)]
            got = launch_node_sums(on.scale, factors, on.z[:3], out)
            for rows, one in ((slice(0, 3), got[0]), (slice(3, 6), got[1])):
                kept = None if factors is None else case.exact(case.factors)[rows]
                expected = node_sum_twin(
                    case.exact(case.z[:3]), case.exact(case.scale)[rows], None, kept
                )
                assert_equal(one.cpu(), expected, dtype)


def test_scaled_and_shifted(backend: str) -> None:
    for case in cases(backend):
        on = Moved(case, backend)
        got = launch_scaled(on.z, on.scale, on.shift)
        exact = [case.exact(x) for x in (case.z, case.scale, case.shift)]
        for one, expected in zip(got, channel_affine_twin(*exact), strict=True):
            assert_equal(one.cpu(), expected, case.dtype)


def test_rows_of_norms_with_a_gradient_each_are_those_of_a_node_of_one(backend: str) -> None:
    for k, training, dtype in itertools.product((1, 2, 3), (True, False), dtypes_of(backend)):
        case, gradients = (Case((3, 16, 5, 8), k, "nhwc", dtype, seed) for seed in (0, 1))
        z, g = Moved(case, backend).z, Moved(gradients, backend).z
        table = NormTable(k + 1, 16, z[0], training)
        table.statistics.copy_(case.uniform(2, k + 1, 16))
        tables = [NormTable.for_backward(table.statistics, z[0], training) for _ in range(2)]
        tables[0].norms_backward(g, z, 1)
        for i in range(k):
            terms, mean = Terms((1 + i,), (0,), (True,)), table.statistics[0, 1 + i]
            tables[1].node_backward(g[i], z[i : i + 1], terms, None, mean, None)
        got, expected = (one.gradients[:, 1:].cpu() for one in tables)
        assert_equal(got, expected.double(), case.coefficients)


def test_node_sum_and_its_adjoints(backend: str) -> None:
    for case in cases(backend):
        on = Moved(case, backend)
        for shift, factors, noise in itertools.product(
            (None, on.shift), (None, on.factors), (None, on.noise)
        ):
            got = node_sum(on.z, on.scale, shift, factors, noise)
            arguments = [case.exact(x) for x in (case.z, case.scale)]
            rest = (
                case.exact(case.shift) if shift is not None else None,
                case.exact(case.factors) if factors is not None else None,
                case.exact(case.noise) if noise is not None else None,
            )
            assert got.dtype == case.dtype
            assert_equal(got.cpu(), node_sum_twin(*arguments, *rest), case.dtype)
            g = on.z[0]
            expected = node_sum_dq_twin(case.exact(case.z[0]), case.exact(case.z), *rest[1:])
            for a, b in zip(node_sum_dq(g, on.z, factors, noise), expected, strict=True):
                assert_equal(a.cpu(), b, case.coefficients, times=5)  # sums of many terms
            expected = node_sum_dz_twin(case.exact(case.z[0]), case.exact(case.scale), rest[1])
            for a, b in zip(node_sum_dz(g, on.scale, factors), expected, strict=True):
                assert_equal(a.cpu(), b, case.dtype)


class Moved:
    """A case on the backend's device."""

    def __init__(self, case: Case, backend: str) -> None:
        device = device_of(backend)
        self.z = [x.to(device) for x in case.z]
        self.scale, self.shift, self.factors, self.weights = (
            x.to(device) for x in (case.scale, case.shift, case.factors, case.weights)
        )
        n = case.noise
        self.noise = Noise(n.draws, n.sites, n.weights.to(device), n.factors.to(device))


@pytest.mark.parametrize("unit", native.extension.runnable_units())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 16, 64, 64), (4, 16, 63, 65), (4, 7, 96, 100)])
def test_gradients_that_no_cache_holds(monkeypatch, unit: str, shape, layout: str) -> None:
    """Written past the caches where their vectors are aligned; of an odd plane few are."""
    monkeypatch.setenv("RDARTS_CPU", unit)
    case = Case(shape, 3, layout, torch.float32)
    g = case.images()
    assert 3 * g.nbytes > 1 << 21  # what two cores hold
    for got, expected in zip(
        node_sum_dz(g, case.scale),
        node_sum_dz_twin(g.double(), case.scale.double()),
        strict=True,
    ):
        assert_equal(got, expected, case.dtype)
    for got, expected in zip(
        channel_affine(case.z, case.scale, case.shift),
        channel_affine_twin(case.exact(case.z), case.scale.double(), case.shift.double()),
        strict=True,
    ):
        assert_equal(got, expected, case.dtype)


def test_channel_sums_and_affine(backend: str) -> None:
    for case in cases(backend):
        on = Moved(case, backend)
        for a, b in zip(
            channel_sums(on.z, on.shift),
            channel_sums_twin(case.exact(case.z), case.exact(case.shift)),
            strict=True,
        ):
            assert_equal(a.cpu(), b, case.coefficients, times=5)
        got = channel_affine(on.z, on.scale, on.shift)
        expected = channel_affine_twin(*(case.exact(x) for x in (case.z, case.scale, case.shift)))
        for a, b in zip(got, expected, strict=True):
            assert_equal(a.cpu(), b, case.dtype)


@pytest.mark.parametrize("training", [True, False])
def test_normalized_sum_is_torchs_batch_norms_and_weighted_sum(
    backend: str, training: bool
) -> None:
    for case in cases(backend):
        if case.dtype == torch.bfloat16 or case.shape == (3, 2, 1, 1):
            continue  # held by the sums above; three values a channel multiply every rounding
        flags = [i != 1 for i in range(case.k)]
        if 0 in case.shape:
            flags = [False] * case.k
        on = Moved(case, backend)
        c = case.shape[1]
        start = torch.randn(c, generator=case.generator, dtype=torch.float64).to(case.coefficients)
        running = [(start.clone().to(on.weights), start.square().to(on.weights)) for _ in case.z]
        expected_running = [case.exact(pair) for pair in running]
        z = [x.requires_grad_() for x in on.z]
        weights, drawn = on.weights.requires_grad_(), on.noise.weights.requires_grad_()
        got = normalized_sum(z, weights, flags, running, on.factors, on.noise, training=training)
        exact = case.exact(case.noise)
        inputs = [case.exact(case.weights), exact.weights, *case.exact(case.z)]
        inputs = [x.requires_grad_() for x in inputs]
        noise = Noise(exact.draws, exact.sites, inputs[1], exact.factors)
        expected = normalized_sum_twin(
            inputs[2:], inputs[0], flags, expected_running, case.exact(case.factors), noise,
            training=training,
        )  # fmt: skip
        assert_equal(got.detach().cpu(), expected.detach(), case.dtype, times=5)
        g = torch.randn(case.shape, generator=case.generator, dtype=torch.float64)
        gradients = torch.autograd.grad(got, [weights, drawn, *z], g.to(got))
        exact_gradients = torch.autograd.grad(expected, inputs, g.to(case.dtype).double())
        for a, b in zip(gradients, exact_gradients, strict=True):
            assert_equal(a.cpu(), b, case.dtype, times=20)  # a batch norm multiplies by 1 / std
        for pair, exact_pair in zip(running, expected_running, strict=True):
            for a, b in zip(pair, exact_pair, strict=True):
                assert_equal(a.cpu(), b, case.coefficients, times=5)


def test_first_and_second_derivatives(backend: str) -> None:
    case = Case((2, 3, 2, 3), 3, "nhwc", torch.float64)
    on = Moved(case, backend)
    z = [x.requires_grad_() for x in on.z]
    scale, shift = on.scale.requires_grad_(), on.shift.requires_grad_()
    weights, drawn = on.weights.requires_grad_(), on.noise.weights.requires_grad_()

    def summed(scale, shift, drawn, *z):
        noise = Noise(on.noise.draws, on.noise.sites, drawn, on.noise.factors)
        return node_sum(z, scale, shift, on.factors, noise)

    def normalised(weights, drawn, *z):
        noise = Noise(on.noise.draws, on.noise.sites, drawn, on.noise.factors)
        return normalized_sum(z, weights, [True, False, True], None, on.factors, noise)

    pivot = on.shift.detach()
    functions = [
        (summed, (scale, shift, drawn, *z)),
        (normalised, (weights, drawn, *z)),
        (lambda *z: channel_sums(z, pivot), z),
        (lambda u, v, *z: tuple(channel_affine(z, u, v)), (scale, shift, *z)),
        (lambda g, scale: tuple(node_sum_dz(g, scale, on.factors)), (z[0], scale)),
        (lambda g, *z: node_sum_dq(g, z, on.factors, on.noise), (z[0], *z)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_statistics_of_hard_channels(backend: str, layout: str) -> None:
    """A constant channel, a mean a thousand times the deviation, and a dead network."""
    device = device_of(backend)
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 3.0
    x[:, 1] = x[:, 1] + 1e3
    format_ = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = x.contiguous(memory_format=format_).to(device).requires_grad_()
    weights = torch.ones(1, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    out = normalized_sum([x], weights, [True], [(mean, var)], momentum=1.0)
    exact = x.detach().cpu().double()
    expected = torch.nn.functional.batch_norm(exact, None, None, training=True)
    # 1 / sqrt(eps) times the rounding of the mean
    assert out.detach()[:, 0].abs().max() < 1e-4
    # The input itself is rounded at 1e3 x 6e-8: that much of a deviation is not to be had back.
    assert (out.detach().cpu() - expected)[:, 1].abs().max() < 5e-4
    assert (out.detach().cpu() - expected)[:, 2].abs().max() < 1e-5
    torch.testing.assert_close(mean.cpu().double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.cpu().double(), exact.var((0, 2, 3)), rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all()
    dead = torch.zeros_like(x).requires_grad_()
    out = normalized_sum([dead, dead], torch.ones(2, device=device), [True, True])
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), dead)[0].isfinite().all()


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_many_large_means_add_no_more_than_their_own_rounding(backend: str, spread: float) -> None:
    """Scales and shifts that nearly cancel, 64 times: no sum of shifts alone may be formed."""
    generator = torch.Generator().manual_seed(0)
    means = (1 + torch.rand(64, generator=generator)) * (1e3 if spread else 1.0)
    z = [m + spread * torch.randn(4, 3, 4, 4, generator=generator) for m in means]
    on = [x.to(device_of(backend)) for x in z]
    got = normalized_sum(on, torch.ones(64, device=on[0].device)).cpu()
    exact = normalized_sum_twin([x.double() for x in z], torch.ones(64, dtype=torch.float64))
    # Product and shift are rounded (on a unit without fma both are), each by up to 2e3 x 2**-24 =
    # 1.2e-4 of a deviation; those of 64 terms do not line up: 8 x 2 x 1.2e-4.
    assert (got - exact).abs().max() < 2e-3


def test_the_same_bits_again_and_on_two_threads() -> None:
    case = Case((5, 16, 8, 8), 4, "nhwc", torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            z = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in case.z]
            weights = case.weights.clone().requires_grad_()
            out = normalized_sum(z, weights, None, None, case.factors, case.noise)
            results.append([out, *torch.autograd.grad(out.square().sum(), [weights, *z])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_noise_is_what_the_draws_give(backend: str) -> None:
    device = device_of(backend)
    for shape, format_ in itertools.product(
        [(2, 3, 4, 4), (1, 5, 3, 7)], [torch.contiguous_format, torch.channels_last]
    ):
        z = torch.zeros(shape, device=device).contiguous(memory_format=format_)
        noise = Noise(Draws(8, branch=1, step=2, pass_index=3), (77,), torch.ones(1, device=device))
        got = node_sum([z], torch.zeros(1, shape[1], device=device), None, None, noise)
        drawn = Draws(8, branch=1, step=2, pass_index=3).normal(77, shape)
        assert torch.equal(got.cpu(), drawn)


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (1, 5, 3, 7)])
def test_noise_by_a_clock_has_the_bits_of_noise_by_the_step(
    backend: str, shape: tuple[int, ...], format_: torch.memory_format
) -> None:
    device = device_of(backend)
    z, g = (torch.randn(shape).to(device, memory_format=format_) for _ in range(2))
    scale, weights = torch.randn(1, shape[1]).to(device), torch.randn(2).to(device)
    clock = new_clock(device)

    def results(draws: Draws) -> list[torch.Tensor]:
        noise = Noise(draws, (77, 70_000), weights)
        return [node_sum([z], scale, noise=noise), *node_sum_dq(g, [z], noise=noise)]

    for step in (2**31 + 3, 4):
        set_clock(clock, step, 6)
        got = results(Draws(8, pass_index=3, clock=clock))
        expected = results(Draws(8, branch=6, step=step, pass_index=3))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    set_clock(clock, 5, 6)
    assert not torch.equal(results(Draws(8, pass_index=3, clock=clock))[3], expected[3])


def test_zero_strides_are_read_and_meta_tensors_give_shapes(backend: str) -> None:
    device = device_of(backend)
    z = torch.randn(1, 3, 1, 1, device=device).expand(2, 3, 4, 5)
    got = node_sum([z], torch.ones(1, 3, device=device))
    assert torch.equal(got, z.contiguous())
    meta = torch.empty(2, 3, 4, 5, device="meta")
    weights = torch.empty(1, device="meta")
    assert normalized_sum([meta], weights, [True]).shape == (2, 3, 4, 5)
    assert node_sum([meta], torch.empty(1, 3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 7, 5, 9)])
def test_any_argument_may_have_zero_strides(backend: str, shape: tuple[int, ...]) -> None:
    """Expanded along each axis and along all, as gradients of a sum are."""
    device, (n, c, *_) = device_of(backend), shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(device)

    for axes in ((0,), (1,), (2,), (3,), (2, 3), (0, 1, 2, 3)):
        sizes = [1 if axis in axes else size for axis, size in enumerate(shape)]
        for format_ in (torch.contiguous_format, torch.channels_last):
            parts = [random(*sizes), random(*shape)]
            images = [x.contiguous(memory_format=format_).expand(shape) for x in parts]
            g, whole = images[0], [x.contiguous().cpu() for x in images]
            row, factors = random(1, 1).expand(2, c), random(2, 1).expand(2, n)
            cpu = [x.contiguous().cpu() for x in (row, factors)]
            results = [node_sum(images, row, row, factors), *node_sum_dz(g, row, factors)]
            results += [*node_sum_dq(g, images, factors, None, row)[:2]]
            results += [*channel_sums(images, row), *channel_affine(images, row, row)]
            expected = [node_sum_twin(whole, cpu[0], *cpu), *node_sum_dz_twin(whole[0], *cpu)]
            expected += [*node_sum_dq_twin(whole[0], whole, cpu[1], None, cpu[0])[:2]]
            expected += [*channel_sums_twin(whole, cpu[0])]
            expected += [*channel_affine_twin(whole, cpu[0], cpu[0])]
            for a, b in zip(results, expected, strict=True):
                assert_equal(a.cpu(), b, torch.float64, times=5)


def test_offsets_over_32_bits(backend: str, tmp_path) -> None:
    """Elements more than 2**32 apart, in a file without blocks but where they lie."""
    if backend == "cuda":
        pytest.skip("nowhere to lie without 17 GB of memory")
    far, shape = 2**32 + 12, (2, 3, 4, 4)
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=far + 200)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[2.0, 3.0, 4.0]])
    for strides in ((far, 16, 4, 1), (60, far // 2, 4, 1), (60, 4, far // 3, 1), (48, 1, 12, 3)):
        z = file.as_strided(shape, strides)
        z.copy_(values)
        assert_equal(node_sum([z], scale), node_sum_twin([values], scale), torch.float32)
        for a, b in zip(node_sum_dq(z, [z]), node_sum_dq_twin(values, [values]), strict=True):
            assert_equal(a, b, torch.float32, times=5)
        for out in channel_affine([z], scale, scale):
            assert_equal(out, channel_affine_twin([values], scale, scale)[0], torch.float32)


def test_more_elements_than_32_bits_count() -> None:
    pixels = 2**32 + 8
    z = torch.ones((), dtype=torch.float64).expand(1, 1, 8, pixels // 8)
    for found in channel_sums([z], torch.zeros(1, 1, dtype=torch.float64)):
        assert found.item() == pixels


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that says that it is on a GPU; it has no memory."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda:0")


def test_a_cuda_tensor_in_a_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {**native.build_info(), "cuda_archs": [], "cuda_runtime": None}
    monkeypatch.setattr(native, "build_info", lambda: built)
    z, row = on_cuda(2, 3, 4, 4), on_cuda(1, 3)
    message = (
        "expected a tensor on a device that has kernels, got one on cuda:0: the native module is a "
        "CPU build: "
    )
    for name, call in (
        (r"z\[0\]", lambda: node_sum([z], row)),
        (r"z\[0\]", lambda: normalized_sum([z], on_cuda(1))),
        (r"z\[0\]", lambda: channel_sums([z], row)),
        (r"z\[0\]", lambda: channel_affine([z], row, row)),
        (r"z\[0\]", lambda: node_sum_dq(z, [z])),
        ("g", lambda: node_sum_dz(z, row)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            call()


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1",
    reason="this machine promises any amount of memory",
)
def test_an_output_that_memory_does_not_hold_is_torchs_error() -> None:
    z = torch.zeros(()).expand(2**20, 1, 2**10, 2**10)  # 4.4 TB
    one = torch.ones(1, 1)
    for call in (
        lambda: node_sum([z], one),
        lambda: normalized_sum([z], one[0], [False]),
        lambda: channel_affine([z], one, one),
        lambda: node_sum_dz(z, one),
    ):
        with pytest.raises(RuntimeError, match="allocate memory"):
            call()


Z = torch.zeros(2, 3, 4, 4)
HUGE = torch.zeros(()).expand(2**20, 2**20, 2, 1)
SCALE = torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: node_sum([], SCALE), ValueError, "z: expected 1 to 64 tensors, got 0"),
        (lambda: node_sum([Z] * 65, SCALE), ValueError, "z: expected 1 to 64 tensors, got 65"),
        (lambda: node_sum(Z, SCALE), TypeError, "z: expected a list of tensors, got Tensor"),
        (lambda: node_sum([Z[0]], SCALE), ValueError, r"z\[0\]: expected 4 dimensions"),
        (lambda: node_sum([Z.int()], SCALE), TypeError, r"z\[0\]: expected dtype float32"),
        (lambda: node_sum([Z, Z.double()], SCALE), TypeError, r"z\[1\]: expected dtype"),
        (lambda: node_sum([Z, Z[:, :2]], SCALE), ValueError, r"z\[1\]: expected shape"),
        (lambda: node_sum([Z, Z.to("meta")], SCALE), ValueError, r"z\[1\]: expected device cpu"),
        (lambda: node_sum([Z], SCALE[:, :2]), ValueError, r"scale: expected shape \[K, C\]"),
        (lambda: node_sum([Z, Z], SCALE), ValueError, r"scale: expected shape \[K, C\] = \(2, 3\)"),
        (lambda: node_sum([Z], SCALE.double()), TypeError, "scale: expected dtype"),
        (lambda: node_sum([Z], SCALE, factors=torch.ones(1, 3)), ValueError, "factors: expected"),
        (lambda: node_sum([Z.bfloat16()], SCALE), ValueError, "bfloat16"),
        (lambda: normalized_sum([Z], torch.ones(2)), ValueError, r"weights: expected shape \[K\]"),
        (lambda: normalized_sum([Z], torch.ones(1), [True, True]), ValueError, "normalised"),
        (lambda: normalized_sum([Z[:0]], torch.ones(1)), ValueError, "batch statistics need 2"),
        (lambda: normalized_sum([Z], torch.ones(1), training=False), ValueError, "running"),
        (lambda: channel_sums([Z], torch.ones(2, 3)), ValueError, "pivot: expected shape"),
        (lambda: channel_affine([Z], SCALE, SCALE[:, :2]), ValueError, r"v: expected shape \[K, C"),
        (lambda: node_sum_dq(Z[:, :2], [Z]), ValueError, "g: expected shape .* as z"),
        (lambda: node_sum_dz(Z, SCALE[:0]), ValueError, "scale: expected 1 to 64 rows, got 0"),
        (lambda: node_sum([Z], SCALE.to("meta")), ValueError, "scale: expected device cpu, got m"),
        (lambda: node_sum([Z.to_sparse()], SCALE), TypeError, r"z\[0\]: expected a dense"),
        (lambda: node_sum([HUGE], SCALE), ValueError, r"z\[0\]: expected sizes of product 2\*\*40"),
        (lambda: node_sum_dz(HUGE, SCALE), ValueError, r"g: expected sizes .*got shape \(1048576"),
        (lambda: channel_sums([torch.empty(0, 1 << 41, 1, 1)], SCALE), ValueError, "sizes"),
    ],
)
def test_bad_input_names_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_shape_stride_or_type_crashes_the_process(data) -> None:
    def tensor() -> Tensor:
        rank = data.draw(st.sampled_from([4, 4, 4, 3]))
        shape = [data.draw(st.integers(0, 5)) for _ in range(rank)]
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64]))
        order = data.draw(st.permutations(range(rank)))
        steps = [data.draw(st.integers(1, 3)) for _ in range(rank)]
        whole = torch.ones(
            [size * step for size, step in zip(shape, steps, strict=True)], dtype=dtype
        )
        return whole[tuple(slice(None, None, step) for step in steps)].permute(order)

    z = [tensor() for _ in range(data.draw(st.integers(0, 3)))]
    if z and data.draw(st.booleans()):
        z = [z[0]] * data.draw(st.integers(1, 66))
    c = z[0].shape[1] if z and z[0].dim() == 4 else 2
    coefficients = torch.ones(
        len(z), c, dtype=torch.float64 if z and z[0].dtype == torch.float64 else torch.float32
    )
    for call in (
        lambda: [node_sum(z, coefficients)],
        lambda: [normalized_sum(z, coefficients.new_ones(len(z)))],
        lambda: list(channel_sums(z, coefficients)),
        lambda: channel_affine(z, coefficients, coefficients),
        lambda: list(node_sum_dq(z[0], z)) if z else [],
        lambda: node_sum_dz(z[0], coefficients) if z else [],
    ):
        try:
            results = call()
        except (ValueError, TypeError) as error:
            assert "expected" in str(error) or "batch statistics" in str(error)
            continue
        # All inputs are ones, so every result is a whole number; each normalised term is 0 but for
        # 1 / sqrt(eps) times the rounding of its mean.
        for result in results:
            torch.testing.assert_close(result, result.round(), rtol=0, atol=4e-5 * len(z))
