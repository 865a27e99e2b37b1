"""The pools against torch's own in float64: values, sums, derivatives, on every backend."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdarts_fast.kernels import channel_sums, normalized_sum, pools
from rdarts_fast.kernels.pool import KINDS, pools_twin
from tests.conftest import device_of
from tests.test_kernels import LAYOUTS, SHAPES, Case, dtypes_of
from tests.tolerances import assert_equal

# More than one strip of channels, more than one block of threads, rows longer than a strip.
POOLED = [*SHAPES, (1, 33, 5, 40), (1, 3, 70, 3), (1, 3, 2, 300), (2, 8, 8, 16)]
CHOICES = [("max", "avg"), ("avg", "max"), ("max",), ("avg",)]


def exact_gradient(x: Tensor, stride: int, kinds, g: list[Tensor]) -> Tensor:
    x = x.double().requires_grad_()
    values = [pool.value for pool in pools_twin(x, stride, kinds)]
    return torch.autograd.grad(values, x, [cotangent.double() for cotangent in g])[0]


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_their_sums_and_gradients_are_torchs(backend: str, stride: int) -> None:
    device = device_of(backend)
    for shape, layout, dtype in itertools.product(POOLED, LAYOUTS, dtypes_of(backend)):
        case = Case(shape, 1, layout, dtype)
        whole = case.z[0].mul(2).round()  # many equal maxima
        for x, kinds in [(case.z[0], KINDS), *((whole, choice) for choice in CHOICES)]:
            on = x.to(device).requires_grad_()
            got, expected = pools(on, stride, kinds), pools_twin(x.double(), stride, kinds)
            for a, b in zip(got, expected, strict=True):
                assert a.value.dtype == dtype and a.sums.dtype == torch.float64
                assert_equal(a.value.detach().cpu(), b.value, dtype)
                if dtype != torch.bfloat16:  # its sums are those of the rounded values
                    assert_equal(a.sums.cpu(), b.sums, case.coefficients, times=5)
            # A cotangent in the other memory format, or with strides of its own.
            g = [torch.randn(a.value.shape, generator=case.generator).to(dtype) for a in got]
            g[0] = g[0].transpose(2, 3).contiguous().transpose(2, 3)
            (dx,) = torch.autograd.grad(
                [a.value for a in got], on, [cotangent.to(device) for cotangent in g]
            )
            assert_equal(dx.cpu(), exact_gradient(x.detach(), stride, kinds, g), dtype)


def test_the_sums_are_those_of_what_is_stored(backend: str) -> None:
    """Steps of bfloat16 above 1, where a mean's rounding is as large as its distance from 1."""
    for dtype, layout in itertools.product(dtypes_of(backend), LAYOUTS):
        x = 1 + Case((2, 16, 8, 8), 1, layout, dtype).z[0].round() / 128
        for value, sums in pools(x.to(device_of(backend))):
            total, square = channel_sums([value], sums[2:].to(total_type(dtype)))
            assert_equal(sums[:1].cpu(), total.cpu(), total_type(dtype), times=5)
            assert_equal(sums[1:2].cpu(), square.cpu(), total_type(dtype), times=5)


def total_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("stride", [1, 2])
def test_first_and_second_derivatives(backend: str, stride: int) -> None:
    for layout, kinds in itertools.product(("nchw", "nhwc"), CHOICES):
        x = Case((2, 4, 4, 8), 1, layout, torch.float64).z[0].to(device_of(backend))
        x.requires_grad_()

        def function(x: Tensor, kinds=kinds) -> tuple[Tensor, ...]:
            return tuple(pool.value for pool in pools(x, stride, kinds))

        assert torch.autograd.gradcheck(function, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)

        # The gradient as a function of its cotangent is linear; so is its own, and that one's.
        values = function(x)

        def gradient(*g: Tensor, x=x, values=values) -> Tensor:
            return torch.autograd.grad(values, x, g, create_graph=True)[0]

        g = [torch.randn_like(value).requires_grad_() for value in values]
        assert torch.autograd.gradgradcheck(gradient, g, fast_mode=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_second_derivatives_are_torchs(backend: str, stride: int) -> None:
    """The gradient's gradient in its cotangent, which is a pool of another image."""
    device = device_of(backend)
    for shape, layout, dtype in itertools.product(POOLED, LAYOUTS, dtypes_of(backend)):
        case = Case(shape, 2, layout, dtype)
        x, h = case.z[0].mul(2).round(), case.z[1]
        found = []
        for image, function, into in ((x.to(device), pools, dtype), (x.double(), pools_twin, None)):
            image.requires_grad_()
            values = [pool.value for pool in function(image, stride)]
            g = [torch.ones_like(value).requires_grad_() for value in values]
            (dx,) = torch.autograd.grad(values, image, g, create_graph=True)
            found.append(torch.autograd.grad(dx, g, h.to(image) if into is None else h.to(device)))
        for a, b in zip(*found, strict=True):
            assert_equal(a.cpu(), b, dtype)


def test_one_of_two_gradients_will_do(backend: str) -> None:
    x = Case((2, 3, 5, 4), 1, "nchw", torch.float64).z[0].to(device_of(backend)).requires_grad_()
    for k in range(2):
        value = pools(x)[k].value
        (dx,) = torch.autograd.grad(value, x, torch.ones_like(value))
        exact = exact_gradient(x.detach().cpu(), 1, KINDS[k : k + 1], [torch.ones(2, 3, 5, 4)])
        assert_equal(dx.cpu(), exact, torch.float64)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_infinities_and_ties_go_where_torch_has_them(
    backend: str, layout: str, stride: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.0, -0.0, 1.0, torch.nan, torch.inf, -torch.inf, -torch.inf])
    odds = torch.tensor([1.0, 1, 1, 0.3, 0.3, 3, 3])
    for shape in [(3, 4, 8, 8), (3, 5, 7, 5)]:
        n = torch.Size(shape).numel()
        x = values[torch.multinomial(odds, n, replacement=True, generator=generator)].view(shape)
        if layout == "nhwc":
            x = x.contiguous(memory_format=torch.channels_last)
        expected_x = x.clone().contiguous().requires_grad_()
        expected = F.max_pool2d(expected_x, 3, stride, 1)
        on = x.to(device_of(backend)).requires_grad_()
        got = pools(on, stride)
        assert torch.equal(got[0].value.detach().cpu().isnan(), expected.detach().isnan())
        torch.testing.assert_close(got[0].value.detach().cpu(), expected.detach(), equal_nan=True)
        g = torch.randint(1, 100, expected.shape, generator=generator).float()
        (dx,) = torch.autograd.grad(got[0].value, on, g.to(on.device))
        assert torch.equal(dx.cpu(), torch.autograd.grad(expected, expected_x, g)[0])
        mean = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
        torch.testing.assert_close(got[1].value.detach().cpu(), mean, equal_nan=True)


def test_hard_channels_have_right_statistics(backend: str) -> None:
    """A constant channel, a mean a thousand times the deviation, and a dead one."""
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1], x[:, 2] = 3.0, x[:, 1] + 1e3, 0.0
    found = pools(x.to(device_of(backend)))
    for (_, sums), exact in zip(found, pools_twin(x.double()), strict=True):
        mean, square = sums[0] / 144 + sums[2], sums[1] / 144 - (sums[0] / 144).square()
        expected = exact.value
        assert (mean.cpu() - expected.mean((0, 2, 3))).abs().max() < 1e-4
        var = expected.var((0, 2, 3), correction=0)
        assert (square.cpu() - var).abs().max() < 1e-3
        assert square[0].abs() < 1e-10 and square[2] == 0


@pytest.mark.parametrize("training", [True, False])
def test_normalized_sum_takes_the_sums(backend: str, training: bool) -> None:
    """The same node and running buffers as where it sums for itself, some with sums, some not."""
    case = Case((3, 16, 8, 8), 2, "nhwc", torch.float64)
    device = device_of(backend)
    source, other = (x.to(device) for x in case.z)
    pooled = pools(source)
    z = [other, *(value for value, _ in pooled), other]
    sums = [None, *(sums for _, sums in pooled), None]
    weights = torch.tensor([0.2, 0.5, -0.3, 0.1], dtype=torch.float64, device=device)
    found = []
    for given_sums in (None, sums):
        zeros = torch.zeros(16, dtype=torch.float64, device=device)
        running = [(zeros.clone(), zeros + 1) for _ in z]
        flags = [True, True, True, False]
        out = normalized_sum(z, weights, flags, running, sums=given_sums, training=training)
        found.append([out, *(buffer for pair in running for buffer in pair)])
    for a, b in zip(*found, strict=True):
        assert_equal(a.cpu(), b.cpu(), torch.float64)


def test_sums_of_any_row_stride_are_read(backend: str) -> None:
    """Rows that coincide say: all sums are 1, so is the pivot."""
    z = torch.randn(1, 3, 1, 2, dtype=torch.float64, device=device_of(backend))
    rows = torch.ones(1, 3, dtype=torch.float64, device=z.device).expand(3, 3)
    weights = torch.ones(1, dtype=torch.float64, device=z.device)
    got = normalized_sum([z], weights, sums=[rows], eps=0.0)
    assert_equal(got.cpu(), (z.cpu() - 1.5) / 0.5, torch.float64)  # var = 1 / 2 - (1 / 2)^2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_again_and_on_two_threads(layout: str, stride: int) -> None:
    case = Case((5, 33, 8, 40), 1, layout, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            x = case.z[0].detach().requires_grad_()
            found = pools(x, stride)
            values = [value for value, _ in found]
            (dx,) = torch.autograd.grad(values, x, [value.detach() for value in values])
            results.append([dx, *values, *(sums for _, sums in found)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_zero_strides_and_transposed_images(backend: str) -> None:
    device = device_of(backend)
    for x in (
        torch.randn(1, 3, 1, 1).expand(2, 3, 4, 5),
        torch.randn(2, 3, 5, 4).transpose(2, 3),
        torch.randn(5, 4, 3, 2).permute(3, 2, 0, 1),
        torch.randn(2, 3, 9, 8)[:, :, ::2, ::2],
        torch.randn(2, 16, 9, 8)[:, ::2],
    ):
        for a, b in zip(pools(x.to(device)), pools_twin(x), strict=True):
            assert_equal(a.value.cpu(), b.value, torch.float32)


def test_meta_tensors_give_shapes() -> None:
    x = torch.empty(2, 3, 7, 8, device="meta", requires_grad=True)
    found = pools(x, 2)
    assert [pool.value.shape for pool in found] == [(2, 3, 4, 4)] * 2
    assert [pool.sums.shape for pool in found] == [(3, 3)] * 2
    values = [pool.value for pool in found]
    g = [torch.empty_like(value, requires_grad=True) for value in values]
    (dx,) = torch.autograd.grad(values, x, g, create_graph=True)
    assert dx.shape == x.shape and dx.device.type == "meta"
    assert torch.autograd.grad(dx, g, torch.empty_like(dx))[1].shape == (2, 3, 4, 4)


X = torch.zeros(2, 3, 4, 4)
SUMS = pools(X)[0].sums


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pools([X]), TypeError, "x: expected a tensor, got list"),
        (lambda: pools(X[0]), ValueError, r"x: expected 4 dimensions .* got shape \(3, 4, 4\)"),
        (lambda: pools(X.int()), TypeError, "x: expected dtype float32"),
        (lambda: pools(X.to_sparse()), TypeError, "x: expected a dense"),
        (lambda: pools(X.bfloat16()), ValueError, "bfloat16"),
        (lambda: pools(X[:, :0]), ValueError, "x: expected a channel and a pixel"),
        (lambda: pools(X[:, :, :0]), ValueError, "x: expected a channel and a pixel"),
        (lambda: pools(X, 0), ValueError, "stride: expected 1 or 2, got 0"),
        (lambda: pools(X, 3), ValueError, "stride: expected 1 or 2, got 3"),
        (lambda: pools(X, (1, 1)), ValueError, "stride: expected 1 or 2"),
        (lambda: pools(X, True), ValueError, "stride: expected 1 or 2, got True"),
        (lambda: pools(X, 1.0), ValueError, "stride: expected 1 or 2, got 1.0"),
        (lambda: pools(X, 1, []), ValueError, "kinds: expected"),
        (lambda: pools(X, 1, "max"), ValueError, "kinds: expected"),
        (lambda: pools(X, 1, ["max", "max"]), ValueError, "kinds: expected"),
        (lambda: pools(X, 1, ["sum"]), ValueError, "kinds: expected"),
        (
            lambda: normalized_sum([X], torch.ones(1), sums=[SUMS, SUMS]),
            ValueError,
            "sums: expected K = 1 entries, got 2",
        ),
        (
            lambda: normalized_sum([X], torch.ones(1), sums=[SUMS.float()]),
            ValueError,
            r"sums\[0\]: expected a float64 tensor \[3, C\]",
        ),
        (
            lambda: normalized_sum([X], torch.ones(1), sums=[SUMS[:2]]),
            ValueError,
            r"sums\[0\]: expected a float64 tensor \[3, C\] = \(3, 3\)",
        ),
        (
            lambda: normalized_sum([X], torch.ones(1), sums=[SUMS.T.contiguous().T]),
            ValueError,
            r"sums\[0\]: expected packed rows",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_shape_stride_or_type_crashes_the_process(data) -> None:
    rank = data.draw(st.sampled_from([4, 4, 4, 3]))
    shape = [data.draw(st.integers(0, 6)) for _ in range(rank)]
    steps = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64]))
    order = data.draw(st.permutations(range(rank)))
    whole = torch.ones([size * step for size, step in zip(shape, steps, strict=True)], dtype=dtype)
    x = whole[tuple(slice(None, None, step) for step in steps)].permute(order)
    stride = data.draw(st.integers(-1, 3))
    kinds = data.draw(st.lists(st.sampled_from([*KINDS, "none"]), max_size=3))
    if x.is_floating_point():
        x.requires_grad_()
    try:
        found = pools(x, stride, kinds)
    except (ValueError, TypeError) as error:
        assert "expected" in str(error)
        return
    values = [value for value, _ in found]
    for value, sums in found:
        torch.testing.assert_close(value, torch.ones_like(value))
        assert sums[:2].abs().max() < 1e-5 and (x.shape[0] == 0 or (sums[2] == 1).all())
    (dx,) = torch.autograd.grad([value.sum() for value in values], x)
    count = sum(value.numel() for value in values)
    assert dx.shape == x.shape and abs(dx.sum().item() - count) < 1e-3
